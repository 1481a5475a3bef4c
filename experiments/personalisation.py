"""How good is it for whom: one model for all, one each, and what lies between.

MNIST by the 539 people who wrote it, and dealt out so that one class dominates at each
client: every client is evaluated on held-out examples of its own. Ditto (Li et al.
2021, arXiv:2012.04221), APFL (Deng et al. 2020, arXiv:2003.13461), FedRep (Collins et
al. 2021, arXiv:2102.07078) and pFedMe (Dinh et al. 2020, arXiv:2006.08848) against the
federated model, that model fine-tuned, and training alone, all with as many rounds. A
model of a client's own is trained in the rounds in which the client takes part. What is
chosen is chosen by the first seed's mean accuracy, not on what is held out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import jaxfl
from experiments import common
from jaxfl import evaluate, local, models, tree
from jaxfl.data import dominant_class, group, mnist, mnist_writers, natural


@dataclasses.dataclass(frozen=True)
class Settings:
    """A network of one hidden layer; SGD, one epoch a round, plain averaging."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    partitions: tuple[Literal["writers", "dominant"], ...]
    """Of the digits; `writers` needs the original files in $JAXFL_DATA_DIR."""
    rounds: int
    """In each a share of the clients takes part."""
    learning_rates: tuple[float, ...]
    """Of which the federated model, training alone and FedRep choose one each."""
    methods: tuple[str, ...] = (
        *("global", "local", "fine-tuned", "Ditto", "APFL", "FedRep", "pFedMe"),
    )
    """Which to run; `global` is always run."""
    data: Literal["embedded", "files"] = "embedded"
    """The subset in the package, or the original files in $JAXFL_DATA_DIR."""
    clients: int = 100
    """N of the partition `dominant`."""
    bias: float = 0.9
    """The share of a class that lies on the clients that it dominates."""
    share: float = 0.1
    """Of the clients, that takes part in a round."""
    hidden: int = 64
    """Units of the hidden layer."""
    batch_size: int = 10
    """Examples a step."""
    seeds: int = 3
    """Of held-out examples, initial weights, cohorts and batches."""


PRESETS = {
    "ci": Settings(
        "ci",
        partitions=("dominant",),
        rounds=20,
        learning_rates=(0.1,),
        methods=("global", "local", "fine-tuned"),
        clients=20,
        share=0.5,
        hidden=16,
        seeds=1,
    ),
    "full": Settings(
        "full",
        partitions=("writers", "dominant"),
        rounds=150,
        learning_rates=(0.03, 0.1, 0.3),
        data="files",
    ),
}


class Method(NamedTuple):
    """One way to give a client a model.

    Attributes:
      algorithm: from the learning rate and the parameter that is chosen.
      personal: likewise, what each client is evaluated with, see `on_clients`.
      values: of the parameter; None if it is the learning rate itself.
      parameter: its name.
      channel: its messages'.
    """

    algorithm: Callable[[Any, Any], jaxfl.Algorithm]
    personal: Callable[[Any, Any], Callable]
    values: tuple[float, ...] | None = None
    parameter: str = "learning rate"
    channel: jaxfl.Channel = jaxfl.mean()


def is_head(path: str) -> bool:
    return path.startswith("Dense_1")


def methods(config: Settings, loss) -> dict[str, Method]:
    work = local.Work(batch_size=config.batch_size)
    longer = local.Work(batch_size=config.batch_size, epochs=5)

    def fedavg(rate, value):
        return jaxfl.fedavg(loss, optax.sgd(rate), **work)

    def near(rate, lam):
        """What pFedMe's client makes of the federated model."""
        optimizer = optax.chain(local.proximal(lam), optax.sgd(rate))
        return evaluate.fine_tuned(loss, optimizer, **longer)

    def with_new_head(rate, value):
        """FedRep's own head is fitted to the last body before it is used."""
        optimizer = local.only(optax.sgd(rate), is_head)
        tuned = evaluate.fine_tuned(loss, optimizer, **work)

        def model(params, own, data, key):
            return tuned(tree.with_named(params, own), own, data, key)

        return model

    return {
        "global": Method(fedavg, lambda rate, value: evaluate.the_federated),
        "local": Method(
            lambda rate, value: jaxfl.isolated(loss, optax.sgd(rate), **work),
            lambda rate, value: lambda params, own, data, key: own,
            channel=jaxfl.identity(),
        ),
        "fine-tuned": Method(
            fedavg,  # is that of "global", and not run again
            lambda rate, share: evaluate.fine_tuned(
                loss, optax.sgd(share * rate), **longer
            ),
            *((0.1, 0.3, 1.0), "share of the learning rate"),
        ),
        "Ditto": Method(
            lambda rate, lam: jaxfl.ditto(loss, optax.sgd(rate), lam, **work),
            lambda rate, lam: lambda params, own, data, key: own,
            *((0.03, 0.3, 3.0), "lambda"),
        ),
        "APFL": Method(
            lambda rate, alpha: jaxfl.apfl(loss, optax.sgd(rate), alpha, **work),
            lambda rate, alpha: lambda params, own, data, key: own.model(params),
            *((0.25, 0.5, 0.75), "alpha"),
        ),
        "FedRep": Method(
            lambda rate, value: jaxfl.fedper(
                loss, optax.sgd(rate), is_head, head_steps=10, **work
            ),
            with_new_head,
        ),
        "pFedMe": Method(
            lambda rate, lam: jaxfl.pfedme(
                loss, 0.5 / lam, lam, optax.sgd(rate), personal_steps=3, **work
            ),
            near,
            *((0.1, 1.0), "lambda"),
        ),
    }


def populations(config: Settings, partition: str, seed: int):
    """Every client's examples to train on, and others: to choose by, and held out.

    Of five examples three, one and one; which of the two others is in `"heldout"`.
    """
    train, _ = mnist(config.data)
    if partition == "writers":
        ids = natural(mnist_writers()[0])
    else:
        ids = dominant_class(
            train["y"], num_clients=config.clients, bias=config.bias, seed=seed
        )
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    shuffled = shuffled[np.argsort(ids[shuffled], kind="stable")]
    size = np.bincount(ids)
    first = np.repeat(np.cumsum(size) - size, size)
    fifth = 5 * (np.arange(len(ids)) - first) // np.repeat(size, size)
    heldout = np.zeros(len(ids), np.float32)
    heldout[shuffled] = fifth == 4
    return [
        jax.tree.map(
            jnp.asarray,
            group(
                {k: v[part] for k, v in (train | {"heldout": heldout}).items()},
                *(ids[part], len(size)),
            ),
        )
        for part in (shuffled[fifth < 3], shuffled[fifth >= 3])
    ]


def programs(config: Settings, method: Method, model):
    """Compiled once: `(rate, value, seed, populations) -> state`, a run; and with that
    state too, accuracies `[2, N]` of the examples to choose by, and those held out."""

    @jax.jit
    def train(rate, value, seed, parts):
        federation = jaxfl.federate(
            method.algorithm(rate, value),
            method.channel,
            chunk_size=1,
            mesh=jaxfl.client_mesh(),
        )
        key, data = jax.random.key(seed), parts[0]
        return jaxfl.scan_rounds(
            *(federation, federation.init(model.init(key), data), data),
            rounds=config.rounds,
            key=key,
            cohort_size=max(1, round(config.share * data.num_clients)),
        )[0]

    def accuracy(params, batch):
        right, heldout = model.metrics(params, batch)["accuracy"], batch["heldout"]
        return {
            **{"chosen by": right * (1 - heldout), "heldout": right * heldout},
            "share": heldout,
        }

    @jax.jit
    def look(rate, value, seed, parts, state):
        means = evaluate.on_clients(
            *(accuracy, parts[1], parts[0]),
            model=method.personal(rate, value),
            key=jax.random.fold_in(jax.random.key(seed), 1),
            chunk_size=1,
        )(state)
        share = means["share"]
        return jnp.stack([means["chosen by"] / (1 - share), means["heldout"] / share])

    return train, look


def of_partition(config: Settings, partition: str, model):
    """The chosen parameters, and accuracies of the held-out examples `[seeds, N]`."""
    data = [populations(config, partition, seed) for seed in range(config.seeds)]
    every = methods(config, model.loss)
    names = ["global", *(m for m in config.methods if m != "global")]
    chosen, accuracies, rate, federated = {}, {}, 0.0, []
    for name in rich.progress.track(names, f"{partition:10}"):
        method = every[name]
        trained = federated if name == "fine-tuned" else None
        programs_of = programs(config, method, model)

        def run(option, seed, programs=programs_of, trained=trained):
            (train, look), arguments = programs, (*option, seed, data[seed])
            state = train(*arguments) if trained is None else trained[seed]
            return state, np.asarray(look(*arguments, state))

        options = [(rate, value) for value in method.values or ()] or [
            (rate, 0.0) for rate in config.learning_rates
        ]
        runs = [run(option, 0) for option in options]
        best = int(np.argmax([np.nanmean(by) for _, (by, _) in runs]))
        chosen[name] = options[best][0 if method.values is None else 1]
        final = [runs[best], *(run(options[best], s) for s in range(1, config.seeds))]
        accuracies[name] = np.stack([heldout for _, (_, heldout) in final])
        if name == "global":
            rate, federated = options[best][0], [state for state, _ in final]
    return chosen, accuracies


def summarise(accuracy: np.ndarray) -> dict[str, float]:
    """Means over the seeds, each over the clients, of `[seeds, N]`."""
    worst = np.sort(accuracy, -1)[:, : max(1, accuracy.shape[-1] // 10)]  # NaN is last
    summary = evaluate.quantiles(accuracy) | {"worst decile": worst.mean(-1)}
    return {name: float(values.mean()) for name, values in summary.items()}


COLOURS = dict(
    zip(
        ("global", "local", "fine-tuned", "Ditto", "APFL", "FedRep", "pFedMe"),
        (
            *(common.BLACK, common.RED, common.ORANGE, common.BLUE),
            *(common.SKY, common.GREEN, common.PINK),
        ),
        strict=True,
    )
)
TITLES = {"writers": "by writer", "dominant": "one class dominates"}


def draw(config, table):
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, panels = plt.subplots(
        *(1, len(table)), figsize=(5 * len(table), 3.6), squeeze=False, sharey=True
    )
    figure.set_layout_engine("constrained")
    for axes, (partition, rows) in zip(panels[0], table.items(), strict=True):
        for i, (name, row) in enumerate(rows.items()):
            colour, x = COLOURS[name], {k: 100 * v for k, v in row.items()}
            axes.plot([x["p10"], x["p90"]], [i, i], color=colour, lw=3, alpha=0.5)
            axes.plot(x["p50"], i, "o", color=colour, ms=8)
            axes.plot(x["mean"], i, "|", color=colour, ms=14, mew=2)
            axes.plot(x["worst decile"], i, "<", color=colour, ms=6)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(
            xlabel="accuracy on a client's own held-out digits (%)",
            title=TITLES[partition],
        )
        common.tidy(axes)
    panels[0, 0].invert_yaxis()
    marks = {
        "median client": {"marker": "o", "ms": 8, "ls": ""},
        "10th to 90th percentile": {"lw": 3, "alpha": 0.5},
        "mean": {"marker": "|", "ms": 14, "mew": 2, "ls": ""},
        "mean of the worst tenth": {"marker": "<", "ms": 6, "ls": ""},
    }
    handles = [
        Line2D([], [], color=common.BLACK, label=label, **style)
        for label, style in marks.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 * len(table),
        frameon=False,
        fontsize=8,
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.methods, COLOURS))
    jaxfl.cores_as_devices()
    example = np.zeros((1, 28, 28, 1), np.uint8)
    model = models.from_linen(models.mlp((config.hidden,)), example)
    chosen, accuracies = {}, {}
    for partition in config.partitions:
        chosen[partition], accuracies[partition] = of_partition(
            config, partition, model
        )
    table = {
        partition: {name: summarise(a) for name, a in of_methods.items()}
        for partition, of_methods in accuracies.items()
    }
    folder = common.results_folder("personalisation")
    summary = {**table, "chosen": chosen, "settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary)
    rows = [
        (partition, name, seed, client, value)
        for partition, of_methods in accuracies.items()
        for name, a in of_methods.items()
        for (seed, client), value in np.ndenumerate(a)
    ]
    columns = ("partition", "method", "seed", "client", "accuracy")
    common.save_history(folder, columns, rows)
    common.save_figure(folder, draw(config, table), "personalisation")
    every = methods(config, model.loss)
    for partition, of_methods in table.items():
        measures = ("mean", "worst decile", "p10", "p50", "p90", "std")
        common.print_table(
            folder,
            f"MNIST ({config.data}), {TITLES[partition]}: accuracy in % on each "
            f"client's own held-out digits, mean of {config.seeds} seeds",
            ("method", *measures, "chosen"),
            [
                (
                    name,
                    *(f"{100 * row[m]:.1f}" for m in measures),
                    f"{every[name].parameter} {chosen[partition][name]:g}",
                )
                for name, row in of_methods.items()
            ],
        )


if __name__ == "__main__":
    main()
