"""Rounds to a target accuracy, against how alike clients are and how long they train.

Karimireddy et al. 2020, arXiv:1910.06378, section 7: 100 clients, of which 20 % take
part in a round; an epoch is five steps of a fifth of a client's examples; each has a
share of its examples drawn at random and the rest sorted by class. SGD (one step on all
the examples of the clients of a round), FedAvg, FedProx and SCAFFOLD, each with the
best of some learning rates. The paper's data are EMNIST; here it is MNIST.
"""

import dataclasses
import sys
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import from_arrays, mnist, similarity


@dataclasses.dataclass(frozen=True)
class Settings:
    """Logistic regression to a target accuracy."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    shares: tuple[float, ...]
    """Of each client's examples that are drawn at random."""
    epochs: tuple[int, ...]
    """Of local training in a round."""
    learning_rates: tuple[float, ...]
    """Of the clients; each algorithm has the one that is best for it."""
    most: int
    """Rounds after which a run is given up."""
    seeds: int
    """Of initial weights, cohorts and batches."""
    target: float = 0.85
    """The test accuracy to reach; the paper's on EMNIST is 0.5."""
    over: int = 1
    """Rounds, of whose mean accuracy that is asked: one may be lucky in its clients."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    clients: int = 100
    """N."""
    cohort: int = 20
    """K."""
    mu: float = 1.0
    """FedProx's, as in the paper."""
    segment: int = 25
    """Rounds from one look at whether the target is reached to the next."""


PRESETS = {
    "ci": Settings(
        *("ci", (0.0, 1.0), (5,), (0.03, 0.1)),
        *(25, 1),
        target=0.7,
        segment=5,
    ),
    "full": Settings(
        *("full", (0.0, 0.1, 1.0), (1, 5, 10, 20), (0.01, 0.03, 0.1, 0.3, 1.0)),
        *(200, 3),
        target=0.885,
        over=10,
    ),
}


def algorithms(config, loss, epochs, batch_size):
    """By name, from a learning rate."""
    work = {"batch_size": batch_size, "epochs": epochs}

    def sgd(rate):
        return jaxfl.fedavg(loss, optax.sgd(rate), batch_size=None, epochs=1)

    def fedavg(rate):
        return jaxfl.fedavg(loss, optax.sgd(rate), **work)

    def fedprox(rate):
        return jaxfl.fedprox(loss, optax.sgd(rate), config.mu, **work)

    def scaffold(rate):
        return jaxfl.scaffold(loss, rate, **work)

    return {"SGD": sgd, "SCAFFOLD": scaffold, "FedAvg": fedavg, "FedProx": fedprox}


def programs(config, algorithm_of, model):
    """`(rates, keys, data) -> states`, and a segment of all of these runs."""

    def federation_of(rate):
        return jaxfl.federate(algorithm_of(rate), jaxfl.mean())

    def begin(rate, key, data):
        return federation_of(rate).init(model.init(key), data)

    def segment(rate, key, state, data, evaluate):
        state, (_, seen) = jaxfl.scan_rounds(
            *(federation_of(rate), state, data),
            rounds=config.segment,
            key=key,
            cohort_size=config.cohort,
            evaluate=evaluate,
        )
        return state, seen["accuracy"]

    return (
        jax.jit(jax.vmap(begin, (0, 0, None))),
        jax.jit(jax.vmap(segment, (0, 0, 0, None, None))),
    )


def rounds_to_target(config, begin, segment, data, evaluate):
    """The first round at the end of so many at the target, `[rates, seeds]`, and all
    accuracies.

    All learning rates and seeds run as one program, until all seeds of one of the rates
    are there and no other rate can have a smaller mean any more; of who is not there,
    NaN.
    """
    rates, seeds = np.meshgrid(
        np.float32(config.learning_rates), np.arange(config.seeds), indexing="ij"
    )
    keys = jax.vmap(jax.random.key)(seeds.ravel())
    flat = jnp.asarray(rates.ravel())
    state, accuracy = begin(flat, keys, data), np.zeros((len(flat), 0))
    while True:
        state, seen = segment(flat, keys, state, data, evaluate)
        accuracy = np.concatenate([accuracy, seen], 1)
        sums = np.cumsum(np.pad(accuracy, ((0, 0), (1, 0))), 1)
        means = (sums[:, config.over :] - sums[:, : -config.over]) / config.over
        there = np.pad(means, ((0, 0), (config.over - 1, 0))) >= config.target
        first = np.where(there.any(1), 1.0 + there.argmax(1), np.nan)
        first = first.reshape(rates.shape)
        hoped = np.nan_to_num(first, nan=1.0 + accuracy.shape[1]).mean(1)  # at best
        done = np.isfinite(first[hoped.argmin()]).all()
        if done or accuracy.shape[1] >= config.most:
            break
    return first, accuracy.reshape(*rates.shape, -1)


def goal(config):
    """What is to be reached, in words."""
    mean = f" in the mean of {config.over} rounds'" if config.over > 1 else ""
    return f"{100 * config.target:g} %{mean}"


def cell(config, table, share, epochs, name):
    """Rounds, and how many times fewer than SGD's; at least, if SGD was given up."""
    rounds, sgd = table[share, epochs, name], table[share, 1, "SGD"]
    if np.isnan(rounds):
        return f"> {config.most}"
    if np.isnan(sgd):
        return f"{rounds:.0f} (> {config.most / rounds:.1f}x)"
    return f"{rounds:.0f} ({sgd / rounds:.1f}x)"


def draw(config, table):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(1, len(config.shares)),
        figsize=(3.4 * len(config.shares), 3.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    styles = {
        "SGD": (common.BLACK, "--", ""),
        "SCAFFOLD": (common.BLUE, "-", "o"),
        "FedAvg": (common.RED, ":", "x"),  # where it is as SCAFFOLD, both are seen
        "FedProx": (common.ORANGE, "-", "^"),
    }
    for axes, share in zip(panels[0], config.shares, strict=True):
        for name, (colour, line, marker) in styles.items():
            rounds = [
                table[share, epochs, name] if name != "SGD" else table[share, 1, name]
                for epochs in config.epochs
            ]
            axes.plot(
                config.epochs, rounds, line, color=colour, marker=marker, label=name
            )
        axes.set_title(f"{100 * share:g} % drawn at random", fontsize=10)
        axes.set(xlabel="local epochs in a round", xscale="log", yscale="log")
    panels[0, 0].set_ylabel(f"rounds to {goal(config)} test accuracy")
    panels[0, 0].set_ylim(1, config.most)
    panels[0, -1].legend(frameon=False, fontsize=8)
    common.tidy(*panels[0])
    for axes in panels[0]:
        axes.set_xticks(config.epochs, list(map(str, config.epochs)))
        axes.minorticks_off()
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    if config.most % config.segment:
        sys.exit("--segment must divide --most")
    train, test = mnist(config.data)
    model = models.from_linen(models.logistic_regression(), train["x"][:1])
    batch_size = len(train["y"]) // config.clients // 5
    evaluate = jaxfl.on_server(model.metrics, test)
    populations = {}
    for share in config.shares:
        ids = similarity(train["y"], num_clients=config.clients, share=share, seed=0)
        data = from_arrays(train["x"], train["y"], ids, config.clients)
        populations[share] = jax.tree.map(jnp.asarray, data)
    table, best, points = {}, {}, []
    cells = [("SGD", 1)]
    cells += [
        (name, epochs)
        for epochs in config.epochs
        for name in ("SCAFFOLD", "FedAvg", "FedProx")
    ]
    for name, epochs in rich.progress.track(cells, "algorithms"):
        of_rate = algorithms(config, model.loss, epochs, batch_size)[name]
        compiled = programs(config, of_rate, model)
        for share, data in populations.items():
            first, accuracy = rounds_to_target(config, *compiled, data, evaluate)
            mean = first.mean(1)  # NaN unless all seeds are there
            at = int(np.nanargmin(mean)) if np.isfinite(mean).any() else -1
            found = at >= 0
            table[share, epochs, name] = float(mean[at]) if found else np.nan
            best[share, epochs, name] = config.learning_rates[at] if found else None
            points += [
                (share, epochs, name, rate, seed, r + 1, value)
                for rate, runs in zip(config.learning_rates, accuracy, strict=True)
                for seed, values in enumerate(runs)
                for r, value in enumerate(values)
            ]

    folder = common.results_folder("scaffold2020")
    summary = {
        "rounds": {
            f"{name}, {epochs} epochs, {share:g}": None if np.isnan(r) else r
            for (share, epochs, name), r in table.items()
        },
        "learning rates": {
            f"{name}, {epochs} epochs, {share:g}": rate
            for (share, epochs, name), rate in best.items()
        },
        "settings": dataclasses.asdict(config),
    }
    common.save_summary(folder, summary)
    columns = ("share", "epochs", "algorithm", "rate", "seed", "round", "accuracy")
    common.save_history(folder, columns, points)
    common.save_figure(folder, draw(config, table), "scaffold2020")

    trained = [("SGD", 1)]
    trained += [
        (name, epochs)
        for name in ("SCAFFOLD", "FedAvg", "FedProx")
        for epochs in config.epochs
    ]
    rows = [
        (name, str(epochs))
        + tuple(cell(config, table, share, epochs, name) for share in config.shares)
        for name, epochs in trained
    ]
    common.print_table(
        folder,
        f"Rounds to {goal(config)} test accuracy on MNIST ({config.data}), and how "
        f"many times fewer than SGD; mean of {config.seeds} seeds, by the best of "
        f"{len(config.learning_rates)} rates",
        ("algorithm", "epochs", *(f"{100 * s:g} % alike" for s in config.shares)),
        rows,
    )


if __name__ == "__main__":
    main()
