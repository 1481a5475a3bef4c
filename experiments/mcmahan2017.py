"""Rounds to a target test accuracy, as in tables 1 and 2 of McMahan et al. 2017.

MNIST among 100 clients, IID or two shards of sorted digits each; the 2NN to 97 %, the
CNN to 99 %. The paper chose the learning rate of every cell by a grid and reports the
best; `--learning-rates` is that grid. Its counts come from curves of its own grid and
seeds, so they are bounds for a rerun more than exact values.

Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, arXiv:1602.05629.
"""

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import from_arrays, iid, mnist, shards

CLIENTS = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every combination of the tuples is a cell of the table."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    max_rounds: int
    """Where a run ends that has not reached the target."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    model: Literal["2nn", "cnn"] = "2nn"
    """The 2NN (table 1) or the CNN (tables 1 and 2)."""
    partitions: tuple[Literal["iid", "shards"], ...] = ("iid", "shards")
    """IID, or two shards of the sorted digits for each client."""
    C: tuple[float, ...] = (0.0, 0.1)
    """Share of the clients in a round; 0 is one client."""
    E: tuple[int, ...] = (1,)
    """Local epochs."""
    B: tuple[int, ...] = (10,)
    """Local batch size; 0 is infinity, all of a client's examples."""
    learning_rates: tuple[float, ...] = (0.1,)
    """The best of them counts, cell by cell."""
    target: float | None = None
    """Test accuracy; 0.97 for the 2NN and 0.99 for the CNN if not given."""
    seed: int = 0
    """Of the partition, the initial weights, the cohorts and the batches."""


PRESETS = {
    "ci": Settings("ci", max_rounds=60, C=(0.1,), partitions=("iid",), target=0.93),
    "full": Settings("full", max_rounds=4500, data="files"),
}

# (model, E, B): {C: (IID, non-IID)}; B = 0 is infinity, None what was not reached.
PUBLISHED = {
    ("2nn", 1, 0): {
        0.0: (1455, 4278),
        0.1: (1474, 1796),
        0.2: (1658, 1528),
    },
    ("2nn", 1, 10): {
        0.0: (316, 3275),
        0.1: (87, 664),
        0.2: (77, 619),
        0.5: (75, 443),
        1.0: (70, 380),
    },
    ("cnn", 5, 0): {
        0.0: (387, 1181),
        0.1: (339, 1100),
        0.2: (337, 978),
        0.5: (164, 1067),
        1.0: (246, None),
    },
    ("cnn", 5, 10): {
        0.0: (50, 956),
        0.1: (18, 206),
        0.2: (18, 200),
        0.5: (18, 261),
        1.0: (16, 97),
    },
    ("cnn", 1, 0): {0.1: (626, 483)},
    ("cnn", 1, 10): {0.1: (34, 350)},
    ("cnn", 1, 50): {0.1: (65, 600)},
    ("cnn", 5, 50): {0.1: (29, 334)},
    ("cnn", 20, 0): {0.1: (234, 672)},
    ("cnn", 20, 10): {0.1: (18, 173)},
    ("cnn", 20, 50): {0.1: (32, 426)},
}


def rounds_to(target: float, accuracy: np.ndarray) -> float | None:
    """Where the best accuracy so far, interpolated between rounds, crosses the target.

    >>> rounds_to(0.5, np.array([0.2, 0.4, 0.3, 0.6]))
    3.5
    """
    best = np.maximum.accumulate(accuracy)
    if best[-1] < target:
        return None
    i = int(np.argmax(best >= target))
    if i == 0:
        return 1.0
    return float(i + (target - best[i - 1]) / (best[i] - best[i - 1]))


def curve(config, model, train, test, partition, C, E, B, rate) -> np.ndarray:
    """Test accuracy after each round, until the target is reached."""
    if partition == "iid":
        ids = iid(train["y"], num_clients=CLIENTS, seed=config.seed)
    else:
        ids = shards(train["y"], num_clients=CLIENTS, seed=config.seed)
    algorithm = jaxfl.fedavg(
        model.loss, optax.sgd(rate), batch_size=B or None, epochs=E
    )
    cohort = max(1, round(C * CLIENTS))
    data = from_arrays(train["x"], train["y"], ids, CLIENTS)
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 1))
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    federation = jaxfl.tune(federation, params, data, cohort_size=cohort)
    _, history = jaxfl.simulate(
        federation,
        params,
        data,
        rounds=config.max_rounds,
        cohort_size=cohort,
        key=key,
        evaluate=jaxfl.on_server(model.metrics, test, mesh=federation.mesh),
        until=lambda metrics: metrics["accuracy"] >= config.target,
    )
    return history["accuracy"]


def draw(config, curves):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    styles = {"iid": "-", "shards": "--"}
    colours = (common.BLUE, common.ORANGE, common.GREEN, common.PINK, common.SKY)
    cells = sorted({cell[1:] for cell in curves})
    for (partition, *cell), accuracy in curves.items():
        C, E, B = cell
        axes.plot(
            *(np.arange(1, len(accuracy) + 1), 100 * np.maximum.accumulate(accuracy)),
            styles[partition],
            color=colours[cells.index(tuple(cell)) % len(colours)],
            label=f"{partition}, C={C:g} E={E} B={B or '∞'}",
        )
    axes.axhline(100 * config.target, color="0.4", lw=0.8, ls=":", label="target")
    axes.set(
        xlabel="round",
        xscale="log",
        ylabel="best test accuracy so far (%)",
        title=f"MNIST {config.model.upper()}, {CLIENTS} clients",
    )
    common.tidy(axes)
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    standard = {"2nn": 0.97, "cnn": 0.99}[config.model]
    target = config.target or standard
    comparable = target == standard and config.data != "embedded"
    config = dataclasses.replace(config, target=target)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    test = jax.tree.map(jnp.asarray, test)
    network = models.two_nn() if config.model == "2nn" else models.cnn()
    model = models.from_linen(network, train["x"][:1])
    parameters = sum(x.size for x in jax.tree.leaves(model.init(jax.random.key(0))))

    curves, rows, results = {}, [], []
    for cell in itertools.product(config.partitions, config.C, config.E, config.B):
        partition, C, E, B = cell
        best = (None, None, None)
        for rate in config.learning_rates:
            accuracy = curve(config, model, train, test, *cell, rate)
            reached = rounds_to(target, accuracy)
            if best[2] is None or (reached or np.inf) < (best[0] or np.inf):
                best = (reached, rate, accuracy)
        reached, rate, curves[cell] = best
        published = PUBLISHED.get((config.model, E, B), {}).get(C, (None, None))
        paper = published[0 if partition == "iid" else 1] if comparable else None
        results.append(
            {
                **dict(zip(("partition", "C", "E", "B"), cell, strict=True)),
                "rounds": reached,
                "learning_rate": rate,
                "paper": paper,
                "final_accuracy": float(curves[cell][-1]),
            }
        )
        rows.append(
            (
                f"{partition}, C={C:g}, E={E}, B={B or '∞'}",
                f"{rate:g}",
                f"> {len(curves[cell])}" if reached is None else f"{reached:.0f}",
                "" if paper is None else paper,
            )
        )

    folder = common.results_folder("mcmahan2017")
    common.save_summary(
        folder,
        {
            "parameters": parameters,
            "cells": results,
            "settings": dataclasses.asdict(config),
        },
    )
    columns = ("partition", "C", "E", "B", "round", "accuracy")
    points = (
        (*cell, r, value)
        for cell, accuracy in curves.items()
        for r, value in enumerate(accuracy, 1)
    )
    common.save_history(folder, columns, points)
    common.save_figure(folder, draw(config, curves), f"mcmahan2017_{config.model}")
    common.print_table(
        folder,
        f"{config.model.upper()}, {parameters:,} parameters, MNIST ({config.data}): "
        f"rounds to {100 * target:g} %",
        ("cell", "learning rate", "rounds", "paper"),
        rows,
    )


if __name__ == "__main__":
    main()
