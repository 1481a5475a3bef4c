"""Noise that is correlated over rounds, or amplified by sampling: accuracy by epsilon.

Kairouz et al. 2021, arXiv:2103.00039: DP-FTRL adds to sums of updates the noise of a
binary tree, and needs no sampling for its privacy, only that a client takes part
seldom; Choquette-Choo et al. 2023, arXiv:2306.08153, and Dvijotham et al. 2024,
arXiv:2404.16706, take better matrices than the tree's. Against them DP-FedAvg, whose
noise is independent, with the amplification of Poisson sampling and without. Every
mechanism has the epsilon of the column it is in, and its best learning rate of a few,
which costs privacy that is not counted here.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from jax_privacy.matrix_factorization import banded, buffered_toeplitz

import jaxfl
from experiments import common
from jaxfl import accounting, models, privacy
from jaxfl.data import from_arrays, iid, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every client takes one step on all of its examples when it takes part."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    data: Literal["embedded", "files", "tfds"]
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    clients: int
    """N, which share the examples at random."""
    cohort: int
    """K, of every round; on average, where it is sampled."""
    passes: int
    """How often every client takes part, in turn; N / K rounds each."""
    epsilons: tuple[float, ...]
    """Of the whole run, for one client added or removed."""
    learning_rates: tuple[float, ...]
    """Of the server."""
    delta: float = 1e-5
    """Less than one in the number of clients."""
    clip: float = 1.0
    """Of the Euclidean norm of an update."""
    seed: int = 0
    """Of partition, initial weights, cohorts and noise."""


PRESETS = {
    "ci": Settings("ci", "embedded", 500, 50, 3, (2.0, 8.0), (0.5,)),
    "full": Settings(
        *("full", "files", 6000, 300, 10),
        *((1.0, 2.0, 4.0, 8.0, 16.0), (0.5, 1.0, 2.0)),
    ),
}


def mechanisms(config: Settings) -> dict:
    """How noise is added, from its multiplier; how cohorts are drawn; a colour."""
    apart = config.clients // config.cohort
    rounds = config.passes * apart
    bands = banded.ColumnNormalizedBanded.default(rounds, apart)
    # What `buffered_toeplitz.optimize` finds for 200 rounds, 20 apart; it leaves all
    # other buffers empty. Bands that `toeplitz` optimises have 3 % less error.
    buffered = buffered_toeplitz.BufferedToeplitz.build(
        buf_decay=[0.9098], output_scale=[0.5117], dtype=jnp.float32
    )
    in_turn = jaxfl.Cyclic(config.cohort)
    correlated = {
        "tree": (privacy.tree_aggregation(rounds, restart=apart), common.ORANGE),
        "buffered Toeplitz": (buffered.inverse_as_streaming_matrix(), common.GREEN),
        "banded": (bands.inverse_as_streaming_matrix(), common.BLUE),
    }

    def add(matrix):
        return functools.partial(
            privacy.correlated_gaussian,
            noising_matrix=matrix,
            rounds=rounds,
            min_separation=apart,
            max_participations=config.passes,
        )

    return {
        "independent": (privacy.gaussian, in_turn, common.SKY),
        "independent, amplified": (
            *(privacy.gaussian, jaxfl.Poisson(config.cohort), common.BLACK),
        ),
    } | {
        name: (add(matrix), in_turn, colour)
        for name, (matrix, colour) in correlated.items()
    }


def draw(config, rows, colours):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, colour in colours.items():
        best = [
            max(r["accuracy"] for r in rows if (r["noise"], r["epsilon"]) == (name, e))
            for e in config.epsilons
        ]
        axes.plot(config.epsilons, 100 * np.array(best), "o-", color=colour, label=name)
    axes.set(
        xlabel=f"epsilon (delta = {config.delta:g})",
        ylabel="test accuracy (%)",
        xscale="log",
        title=f"MNIST, {config.clients:,} clients, {config.cohort} a round, "
        f"{config.passes} passes",
    )
    axes.legend(frameon=False, loc="lower right", title="noise")
    common.tidy(axes)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = mnist(config.data)
    ids = iid(train["y"], num_clients=config.clients, seed=config.seed)
    data = from_arrays(train["x"], train["y"], ids, config.clients)
    data = jax.tree.map(jnp.asarray, data)
    model = models.from_linen(models.logistic_regression(), train["x"][:1])
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 1))
    evaluate = jaxfl.on_server(model.metrics, jax.tree.map(jnp.asarray, test))
    rounds = config.passes * (config.clients // config.cohort)
    known = mechanisms(config)

    def channel(noise, multiplier):
        return jaxfl.chain(
            jaxfl.clip(config.clip),
            jaxfl.mean(denominator=config.cohort),
            noise(multiplier),
        )

    rows, calibrated = [], {}
    for name, (noise, cohort, _) in rich.progress.track(known.items(), "noise"):
        kind = noise is privacy.gaussian, cohort  # whatever the matrix
        if kind not in calibrated:
            calibrated[kind] = [
                accounting.calibrate(
                    functools.partial(channel, noise),
                    epsilon,
                    population=config.clients,
                    cohort=cohort,
                    rounds=rounds,
                    delta=config.delta,
                    tolerance=0.01,
                )
                for epsilon in config.epsilons
            ]
        multipliers = calibrated[kind]

        @functools.partial(jax.vmap, in_axes=(0, 0, None))
        def run(multiplier, rate, data, noise=noise, cohort=cohort):
            algorithm = jaxfl.fedavg(
                model.loss, optax.sgd(1.0), optax.sgd(rate), batch_size=None
            )
            federation = jaxfl.federate(
                algorithm, channel(noise, multiplier), chunk_size=50
            )
            return jaxfl.scan_rounds(
                *(federation, federation.init(params, data), data),
                rounds=rounds,
                key=key,
                cohort_size=cohort,
                evaluate=evaluate,
                every=rounds,
            )[1][1]["accuracy"][-1]

        z, rates = map(
            jnp.ravel,
            jnp.meshgrid(
                jnp.array(multipliers), jnp.array(config.learning_rates), indexing="ij"
            ),
        )
        accuracy = np.reshape(jax.jit(run)(z, rates, data), (len(multipliers), -1))
        for (e, r), value in np.ndenumerate(accuracy):
            rows.append(
                {
                    "noise": name,
                    "epsilon": config.epsilons[e],
                    "multiplier": multipliers[e],
                    "learning_rate": config.learning_rates[r],
                    "accuracy": float(value),
                }
            )

    folder = common.results_folder("dp_ftrl2021")
    common.save_history(folder, tuple(rows[0]), (tuple(r.values()) for r in rows))
    best = {
        name: {
            f"{e:g}": max(
                r["accuracy"] for r in rows if (r["noise"], r["epsilon"]) == (name, e)
            )
            for e in config.epsilons
        }
        for name in known
    }
    common.save_summary(
        folder, {"accuracy": best, "settings": dataclasses.asdict(config)}
    )
    colours = {name: colour for name, (*_, colour) in known.items()}
    common.save_figure(folder, draw(config, rows, colours), "dp_ftrl2021")
    common.print_table(
        folder,
        f"MNIST ({config.data}), {config.clients} clients, {rounds} rounds of "
        f"{config.cohort}, delta {config.delta:g}: test accuracy %",
        ("noise", *(f"epsilon {e:g}" for e in config.epsilons)),
        [
            (name, *(f"{100 * a:.1f}" for a in row.values()))
            for name, row in best.items()
        ],
    )


if __name__ == "__main__":
    main()
