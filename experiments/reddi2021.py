"""Adaptive server optimisers: FedAvg, FedAvgM, FedAdagrad, FedAdam and FedYogi.

Reddi et al. 2021, arXiv:2003.00295, section 5: next characters of Shakespeare, a client
a speaking role, by the character LSTM; and CIFAR-10, dealt out in Dirichlet
proportions, by a residual network with group normalisation. Every server optimiser is
given a grid of client and server learning rates, all of which run as one program, and
has the best of them, by the mean accuracy over the last rounds, as in the paper.

The data are subsets: a fifth of CIFAR-10, and 40,000 lines of Shakespeare. The presets
have fewer rounds than the paper besides, and a small network for images, `full` a
smaller LSTM too, so that two cores do it in minutes; `gpu` has the paper's LSTM. What
can be compared with the paper is who is ahead of whom.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import cifar10, dirichlet, from_arrays, natural, shakespeare


@dataclasses.dataclass(frozen=True)
class Settings:
    """Server optimisers on two tasks."""

    preset: Literal["ci", "full", "gpu"]
    """Where the other settings start from: a small run, or the whole one."""
    tasks: tuple[str, ...] = ("shakespeare", "cifar10")
    """Of these two."""
    servers: tuple[str, ...] = ("FedAdagrad", "FedAdam", "FedYogi", "FedAvgM", "FedAvg")
    """Of these five."""
    factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Times the usual learning rates: those that are tried, of clients and servers."""
    rounds: int = 40
    """Of every run."""
    last: int = 10
    """Rounds at the end over which accuracy is averaged."""
    cohort: int = 10
    """Clients a round, as in the paper."""
    steps: int = 4
    """Of a client in a round. The paper has an epoch."""
    batch_size: int = 10
    """Examples a step."""
    clients: int = 100
    """That CIFAR-10 is dealt out to; the paper has 500, of 100 images too."""
    alpha: float = 0.1
    """Of the Dirichlet proportions of a class over the clients."""
    image_model: Literal["small", "resnet18"] = "small"
    """Two convolutions with strides, or the paper's network."""
    characters: int = 80
    """Of a window, as in the paper."""
    hidden: int = 32
    """Units of a layer of the LSTM; the paper has 256."""
    test_examples: int = 400
    """Windows or images, from the test set, after every round."""
    chunk_size: int | None = 1
    """Clients at a time, each in all runs of the grid at once; None for all."""
    source: Literal["files", "tfds"] = "files"
    """The original files in $JAXFL_DATA_DIR, of CIFAR-10 a part; or TFDS, the whole."""


PRESETS = {
    "ci": Settings(
        "ci",
        servers=("FedAdam",),
        factors=(0.1, 1.0),
        rounds=3,
        last=2,
        cohort=2,
        steps=1,
        hidden=4,
        characters=20,
        test_examples=20,
    ),
    "full": Settings("full"),
    "gpu": Settings(
        "gpu",
        rounds=200,
        last=20,
        steps=10,
        hidden=256,
        chunk_size=None,
    ),
}

# By the paper's table 1, in %.
PAPER = {
    "shakespeare": dict(
        FedAdagrad=57.5, FedAdam=57.0, FedYogi=57.2, FedAvgM=57.3, FedAvg=56.9
    ),
    "cifar10": dict(
        FedAdagrad=72.1, FedAdam=77.4, FedYogi=78.0, FedAvgM=77.4, FedAvg=72.8
    ),
}

# Server optimisers and their usual learning rates, near the best of the paper's.
SERVERS = {
    "FedAdagrad": (jaxfl.fedadagrad, 0.1),
    "FedAdam": (jaxfl.fedadam, 0.01),
    "FedYogi": (jaxfl.fedyogi, 0.01),
    "FedAvgM": (lambda rate: optax.sgd(rate, momentum=0.9), 0.3),
    "FedAvg": (optax.sgd, 1.0),
}


class Small(nn.Module):
    """Two 3x3 convolutions with strides, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        for features in 16, 32:
            x = nn.Conv(*(features, (3, 3), 2), conv_general_dilated=jaxfl.matmul_conv)(
                x
            )
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def shakespeare_task(config):
    """Model, population, test examples and the clients' usual learning rate."""
    train, test = shakespeare(config.source, sequence_length=config.characters)
    data = from_arrays(train["x"], train["y"], natural(train["role"]))
    model = models.from_linen(
        models.char_lstm(hidden=config.hidden),
        train["x"][:1],
        loss=models.token_cross_entropy(),
        metrics=models.token_accuracy(),
    )
    return model, data, {k: test[k] for k in ("x", "y")}, 1.0


def cifar10_task(config):
    """The same of CIFAR-10."""
    source = "subset" if config.source == "files" else "tfds"
    train, test = cifar10(source)
    ids = dirichlet(
        train["y"],
        num_clients=config.clients,
        alpha=config.alpha,
        seed=0,
    )
    model = models.from_linen(
        models.resnet18() if config.image_model == "resnet18" else Small(),
        train["x"][:1],
        preprocess=models.standardize(
            jnp.array([0.4914, 0.4822, 0.4465]), jnp.array([0.2470, 0.2435, 0.2616])
        ),
    )
    return model, from_arrays(train["x"], train["y"], ids, config.clients), test, 0.03


TASKS = {"shakespeare": shakespeare_task, "cifar10": cifar10_task}


def grid(config, usual_client, usual_server):
    """Client and server learning rates, `[V]` each, by row the client's."""
    factors = np.float32(config.factors)
    rates = np.meshgrid(usual_client * factors, usual_server * factors, indexing="ij")
    return dict(zip(("client", "server"), map(np.ravel, rates), strict=True))


def accuracies(config, task, server):
    """Of every run of the grid, its rates, and `[V, R]` test accuracies."""
    model, data, test, usual_client = TASKS[task](config)
    optimizer, usual_server = SERVERS[server]
    values = jax.tree.map(jnp.asarray, grid(config, usual_client, usual_server))
    data = jax.tree.map(jnp.asarray, data)
    rng = np.random.default_rng(0)  # the same clients and tests for all servers
    cohorts = [
        rng.choice(data.num_clients, config.cohort, replace=False)
        for _ in range(config.rounds)
    ]
    some = rng.permutation(len(test["y"]))[: config.test_examples]

    def federation_of(rates):
        algorithm = jaxfl.fedavg(
            *(model.loss, optax.sgd(rates["client"]), optimizer(rates["server"])),
            steps=config.steps,
            batch_size=config.batch_size,
        )
        return jaxfl.federate(algorithm, jaxfl.mean(), chunk_size=config.chunk_size)

    _, _, seen = common.sweep(
        *(f"{task}, {server}", federation_of, values),
        model.init(jax.random.key(0)),
        lambda r: data[cohorts[r]],
        rounds=config.rounds,
        key=jax.random.key(1),
        look=lambda info: (),
        evaluate=jaxfl.on_server(
            model.metrics, {k: jnp.asarray(v[some]) for k, v in test.items()}
        ),
    )
    return jax.device_get(values), seen["accuracy"]


def draw(config, curves):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(1, len(config.tasks)),
        figsize=(4.6 * len(config.tasks), 3.6),
        layout="constrained",
        squeeze=False,
    )
    styles = {
        "FedAdagrad": (common.GREEN, "--"),
        "FedAdam": (common.BLUE, "-"),
        "FedYogi": (common.SKY, "-."),
        "FedAvgM": (common.ORANGE, "--"),
        "FedAvg": (common.BLACK, "-"),
    }
    for axes, task in zip(panels[0], config.tasks, strict=True):
        for server in config.servers:
            colour, line = styles[server]
            curve = 100 * curves[task, server]
            rounds = np.arange(1, len(curve) + 1)
            axes.plot(rounds, curve, line, color=colour, label=server)
        axes.set_title(task, fontsize=10)
        axes.set(xlabel="round", ylabel="test accuracy (%)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    common.tidy(*panels[0])
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.tasks, TASKS), (config.servers, SERVERS))
    table, best, curves, points = {}, {}, {}, []
    for task in config.tasks:
        for server in config.servers:
            rates, accuracy = accuracies(config, task, server)
            at_end = accuracy[:, -config.last :].mean(1)
            at = int(at_end.argmax())
            table[task, server], curves[task, server] = at_end[at], accuracy[at]
            best[task, server] = {name: float(rates[name][at]) for name in rates}
            points += [
                (task, server, client, other, r + 1, value)
                for client, other, run in zip(
                    rates["client"], rates["server"], accuracy, strict=True
                )
                for r, value in enumerate(run)
            ]

    folder = common.results_folder("reddi2021")
    summary = {
        task: {
            server: {
                "accuracy": table[task, server],
                "paper": PAPER[task][server] / 100,
                "learning rates": best[task, server],
            }
            for server in config.servers
        }
        for task in config.tasks
    }
    settings = dataclasses.asdict(config)
    common.save_summary(folder, summary | {"settings": settings})
    columns = ("task", "server", "client_rate", "server_rate", "round", "accuracy")
    common.save_history(folder, columns, points)
    common.save_figure(folder, draw(config, curves), "reddi2021")
    common.print_table(
        folder,
        f"Test accuracy in %, mean of the last {config.last} of {config.rounds} "
        "rounds, by the best rates. The paper has more data and rounds, larger models",
        ("task", "server", "here", "paper", "client rate", "server rate"),
        [
            (
                *(task, server, f"{100 * table[task, server]:.1f}"),
                f"{PAPER[task][server]:.1f}",
                *(f"{rate:.2g}" for rate in best[task, server].values()),
            )
            for task in config.tasks
            for server in config.servers
        ],
    )


if __name__ == "__main__":
    main()
