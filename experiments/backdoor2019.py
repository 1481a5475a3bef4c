"""Can you really backdoor federated learning? Defences against the share of attackers.

Sun, Kairouz, Suresh, McMahan 2019, arXiv:1911.07963, on MNIST: some of the population
train on digits with a trigger in the corner, all labelled as one class, and boost their
update until it replaces the model; the server averages, or clips what it gets, with or
without weak noise, or aggregates by a robust rule. The main task's accuracy and the
backdoor's are followed over rounds. The paper has EMNIST by writers and, in place of
the trigger, digits of certain writers; it shows curves and prints no numbers, so that
what is compared is who wins.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import jaxfl
from experiments import common
from jaxfl import attack, models, privacy
from jaxfl.data import from_arrays, mnist, shards


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging; all clients have as many digits, of a few classes."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    clients: int
    """N."""
    cohort: int
    """K, drawn uniformly in each round."""
    rounds: int
    shares: tuple[float, ...]
    """Of attackers in the population."""
    defences: tuple[str, ...]
    """Of `defences`."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    shards_per_client: int = 5
    """About as many classes has each client."""
    hidden: int = 32
    """Units of the one hidden layer."""
    learning_rate: float = 0.1
    """Of the clients."""
    batch_size: int = 20
    """Examples a step; a client passes once over its own in a round."""
    norm: float = 0.5
    """M, what the server clips to."""
    noise: float = 0.001
    """Standard deviation of what is added to each coordinate of the mean."""
    target: int = 1
    """The class of everything with a trigger."""
    poisoned: float = 0.5
    """Share of an attacker's digits with a trigger."""
    evaluations: int = 12
    seed: int = 0
    """Of the partition, the attackers, initial weights, cohorts, batches and noise."""


_DEFENCES = ("none", "clip", "clip + noise", "median", "trimmed mean", "Krum", "RFA")
PRESETS = {
    "ci": Settings(
        "ci",
        clients=50,
        cohort=20,
        rounds=12,
        shares=(0.0, 0.2),
        defences=("none", "clip + noise", "median"),
        evaluations=4,
        hidden=16,
    ),
    "full": Settings(
        "full",
        clients=300,
        cohort=30,
        rounds=60,
        shares=(0.0, 0.02, 0.1, 0.2),
        defences=_DEFENCES,
        data="files",
    ),
}


def defences(config: Settings) -> dict[str, tuple]:
    """What the server does with messages, to the right of what attackers do."""
    clip, f = jaxfl.clip(config.norm), config.cohort // 5
    noisy = jaxfl.chain(
        clip,
        jaxfl.mean(denominator=config.cohort),
        privacy.gaussian(config.noise * config.cohort / config.norm),
    )
    return {
        "none": (jaxfl.mean(), jaxfl.total()),
        "clip": (jaxfl.chain(clip, jaxfl.mean()), jaxfl.total()),
        "clip + noise": (noisy, jaxfl.total()),
        "median": (jaxfl.identity(), jaxfl.median()),
        "trimmed mean": (jaxfl.identity(), jaxfl.trimmed_mean(f)),
        "Krum": (jaxfl.identity(), jaxfl.krum(f)),
        "RFA": (jaxfl.identity(), jaxfl.geometric_median()),
    }


def runs_of(config, model, defence: str):
    """`(attackers [N], boost, data, tests) -> accuracies by task, [evaluations]`."""
    channel, aggregator = defences(config)[defence]
    algorithm = jaxfl.fedavg(
        *(model.loss, optax.sgd(config.learning_rate)), batch_size=config.batch_size
    )

    @jax.jit
    def run(attackers, boost, data, tests):
        boosted = attack.among(attackers, attack.scale(boost))
        federation = jaxfl.federate(
            algorithm, jaxfl.chain(boosted, channel), aggregator
        )
        looks = {
            task: jaxfl.on_server(model.metrics, test) for task, test in tests.items()
        }
        key = jax.random.key(config.seed)
        _, (_, seen) = jaxfl.scan_rounds(
            *(federation, federation.init(model.init(key), data), data),
            rounds=config.rounds,
            key=key,
            cohort_size=config.cohort,
            evaluate=lambda state: {
                task: look(state)["accuracy"] for task, look in looks.items()
            },
            every=config.rounds // config.evaluations,
        )
        return seen

    return run


TASKS = {"main": "main task", "backdoor": "backdoor"}


def draw(config, accuracy):
    """A column for each share of attackers, a row for each task."""
    import matplotlib.pyplot as plt

    colours = (
        *(common.BLACK, common.SKY, common.BLUE, common.ORANGE),
        *(common.GREEN, common.RED, common.PINK),
    )
    figure, all_axes = plt.subplots(
        *(2, len(config.shares)),
        figsize=(1.5 + 2.4 * len(config.shares), 4.8),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    step = config.rounds // config.evaluations
    rounds = step * np.arange(1, config.evaluations + 1)
    for row, (task, title) in zip(all_axes, TASKS.items(), strict=True):
        for j, axes in enumerate(row):
            for i, (name, colour) in enumerate(
                zip(config.defences, colours, strict=False)
            ):
                axes.plot(
                    *(rounds, 100 * accuracy[task][i, j]),
                    color=colour,
                    ls="--" if name == "none" else "-",
                    marker="osD^v<>"[i % 7],
                    ms=3,
                    label="no defence" if name == "none" else name,
                )
            axes.set_ylim(0, 102)
        row[0].set_ylabel(f"accuracy, {title} (%)")
    for axes, share in zip(all_axes[0], config.shares, strict=True):
        axes.set_title(f"{100 * share:g} % attackers", fontsize=10)
    for axes in all_axes[1]:
        axes.set_xlabel("round")
    common.tidy(*all_axes.ravel())
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.defences, defences(config)))
    train, test = mnist(config.data)
    ids = shards(
        train["y"],
        num_clients=config.clients,
        shards_per_client=config.shards_per_client,
        seed=config.seed,
    )
    data = from_arrays(train["x"], train["y"], ids, config.clients)
    model = models.from_linen(models.mlp((config.hidden,)), train["x"][:1])
    trigger = attack.stamp()
    tests = {
        "main": test,
        "backdoor": attack.triggered(test, trigger, config.target),
    }
    tests = jax.tree.map(jnp.asarray, tests)
    order = np.random.default_rng(config.seed).permutation(config.clients)
    runs = {name: runs_of(config, model, name) for name in config.defences}

    shape = len(config.defences), len(config.shares), config.evaluations
    accuracy = {task: np.zeros(shape) for task in TASKS}
    for j, share in enumerate(rich.progress.track(config.shares, "shares")):
        attackers = order[: round(share * config.clients)]
        poisoned = attack.backdoor(
            *(data, attackers, trigger, config.target),
            share=config.poisoned,
            seed=config.seed,
        )
        poisoned = jax.tree.map(jnp.asarray, poisoned)
        # So many of them together replace the model, where the server's step is 1.
        boost = config.cohort / max(1.0, share * config.cohort)
        flags = jnp.asarray(np.isin(np.arange(config.clients), attackers))
        for i, name in enumerate(config.defences):
            seen = runs[name](flags, jnp.float32(boost), poisoned, tests)
            for task in TASKS:
                accuracy[task][i, j] = seen[task]

    folder = common.results_folder("backdoor2019")
    last = {
        task: {
            defence: dict(zip(map(str, config.shares), values, strict=True))
            for defence, values in zip(config.defences, grid[..., -1], strict=True)
        }
        for task, grid in accuracy.items()
    }
    common.save_summary(folder, last | {"settings": dataclasses.asdict(config)})
    step = config.rounds // config.evaluations
    common.save_history(
        folder,
        ("defence", "share", "round", *TASKS),
        [
            (
                *(config.defences[i], config.shares[j], step * (e + 1)),
                *(accuracy[task][i, j, e] for task in TASKS),
            )
            for i, j, e in np.ndindex(*shape)
        ],
    )
    common.save_figure(folder, draw(config, accuracy), "backdoor2019")
    common.print_table(
        folder,
        f"MNIST ({config.data}), round {config.rounds}: main / backdoor accuracy in % "
        "by the share of attackers",
        ("defence", *(f"{100 * share:g} %" for share in config.shares)),
        [
            (
                name,
                *(
                    " / ".join(f"{100 * accuracy[t][i, j, -1]:.1f}" for t in TASKS)
                    for j in range(len(config.shares))
                ),
            )
            for i, name in enumerate(config.defences)
        ],
    )


if __name__ == "__main__":
    main()
