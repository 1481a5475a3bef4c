"""What differential privacy costs: accuracy against epsilon, by kind of clipping.

McMahan et al. 2018, arXiv:1710.06963, and Andrew et al. 2021, arXiv:1905.03871:
federated averaging on MNIST whose clients are drawn at random each round (Poisson),
whose updates are clipped, to norms chosen beforehand or to one that follows their
median, and whose sum gets normal noise. All noise multipliers, clip norms and seeds run
as one program. Epsilon is the accountant's for the very channel that added the noise.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import accounting, models, privacy
from jaxfl.data import from_arrays, iid, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging of logistic regression, with client-level privacy."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    clients: int
    """N; the digits are dealt out evenly."""
    cohort: int
    """Each client takes part in a round with probability cohort / clients."""
    rounds: int
    """In each a client passes once over its digits."""
    noise_multipliers: tuple[float, ...]
    """z, of all noise in a round together."""
    clip_norms: tuple[float, ...]
    """C, the fixed ones."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    quantile: float = 0.5
    """Of the updates' norms, that the adaptive clip norm follows."""
    initial_norm: float = 0.1
    """The adaptive clip norm in the first round."""
    seeds: int = 3
    """Of initial weights, cohorts, batches and noise."""
    learning_rate: float = 0.1
    """Of the clients."""
    batch_size: int = 10
    """Examples a step."""
    delta: float = 1e-5
    """The probability with which epsilon need not hold."""


PRESETS = {
    "ci": Settings(
        "ci",
        clients=600,
        cohort=60,
        rounds=10,
        noise_multipliers=(0.5, 2.0),
        clip_norms=(0.1, 1.0),
        seeds=2,
    ),
    "full": Settings(
        "full",
        clients=6000,
        cohort=300,
        rounds=100,
        noise_multipliers=(0.7, 1.0, 1.5, 2.5, 4.0, 6.0),
        clip_norms=(0.03, 0.1, 0.3, 1.0),
        data="files",
    ),
}


def fixed(config, noise_multiplier, norm) -> jaxfl.Channel:
    """DP-FedAvg."""
    return jaxfl.chain(
        jaxfl.clip(norm),
        jaxfl.mean(denominator=config.cohort),
        privacy.gaussian(noise_multiplier),
    )


def adaptive(config, noise_multiplier) -> jaxfl.Channel:
    """DP-FedAvg with adaptive clipping; the count takes its share of the noise."""
    count_std = config.cohort / 20
    return jaxfl.chain(
        privacy.adaptive_clip(
            config.quantile,
            config.initial_norm,
            clients=config.cohort,
            count_std=count_std,
        ),
        jaxfl.mean(denominator=config.cohort),
        privacy.gaussian(privacy.noise_left(noise_multiplier, 2 * count_std)),
    )


def grid(config, *axes):
    """Every combination of some values and seeds, `[V]` each."""
    values = np.meshgrid(*axes, np.arange(config.seeds), indexing="ij")
    return [jnp.asarray(v.ravel()) for v in values]


def runs_of(config, channel_of, values, model, data, test, every):
    """Runs of all values at once; accuracies and clip norms, `[..., seeds, E]`.

    Args:
      channel_of: from all values but the last, the seed.
      values: `[V]` arrays.
    """
    evaluate = jaxfl.on_server(model.metrics, test)

    def look(state):
        norm = jax.tree.leaves(state.server.channel)  # adaptive_clip's, if any
        return evaluate(state) | {"norm": norm[0] if norm else jnp.float32(0)}

    @jax.jit
    @jax.vmap
    def one_run(*value):
        algorithm = jaxfl.fedavg(
            *(model.loss, optax.sgd(config.learning_rate)),
            batch_size=config.batch_size,
        )
        federation = jaxfl.federate(algorithm, channel_of(*value[:-1]), chunk_size=30)
        key = jax.random.fold_in(jax.random.key(0), value[-1])
        return jaxfl.scan_rounds(
            *(federation, federation.init(model.init(key), data), data),
            rounds=config.rounds,
            key=key,
            cohort_size=jaxfl.Poisson(config.cohort),
            evaluate=look,
            every=every,
        )[1][1]

    seen = jax.device_get(one_run(*values))
    shape = [len(np.unique(v)) for v in values]
    return {name: seen[name].reshape(*shape, -1) for name in ("accuracy", "norm")}


def draw(config, every, epsilons, without, fixed_runs, adaptive_runs):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    def band(axes, x, runs, **style):
        axes.plot(x, runs.mean(-1), **style)
        low, high = runs.min(-1), runs.max(-1)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)

    colours = (common.ORANGE, common.SKY, common.GREEN, common.PINK, common.RED)
    for i, (norm, colour) in enumerate(zip(config.clip_norms, colours, strict=False)):
        runs = 100 * fixed_runs["accuracy"][:, i, :, -1]
        band(left, epsilons, runs, color=colour, marker="o", label=f"fixed, {norm:g}")
    runs = 100 * adaptive_runs["accuracy"][..., -1]
    band(left, epsilons, runs, color=common.BLUE, marker="s", label="adaptive, median")
    best = 100 * without["accuracy"][..., -1].mean()
    left.axhline(best, color=common.BLACK, ls="--", label="neither clipped nor noised")
    left.set(
        xlabel=f"epsilon, at delta = {config.delta:g}",
        ylabel="test accuracy (%)",
        xscale="log",
        ylim=(None, best + 2),
    )
    figure.legend(
        *left.get_legend_handles_labels(),
        **{"frameon": False, "fontsize": 8, "loc": "outside lower left", "ncols": 4},
    )
    rounds = every * np.arange(1, adaptive_runs["norm"].shape[-1] + 1)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(epsilons)))
    for z, runs, colour in zip(
        config.noise_multipliers, adaptive_runs["norm"], shades, strict=True
    ):
        right.plot(rounds, runs.mean(0), color=colour, label=f"z = {z:g}")
    right.set(xlabel="round", ylabel="adaptive clip norm", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    common.tidy(left, right)
    figure.suptitle(
        f"MNIST, logistic regression, {config.clients} clients, "
        f"{config.cohort} a round, {config.rounds} rounds"
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = mnist(config.data)
    ids = iid(train["y"], num_clients=config.clients, seed=0)
    data = from_arrays(train["x"], train["y"], ids, config.clients)
    data = jax.tree.map(jnp.asarray, data)
    model = models.from_linen(models.logistic_regression(), train["x"][:1])
    every = max(config.rounds // 20, 1)

    def run(channel_of, *axes):
        values = grid(config, *axes)
        return runs_of(config, channel_of, values, model, data, test, every)

    z, norms = config.noise_multipliers, config.clip_norms
    without = run(lambda: jaxfl.mean(denominator=config.cohort))
    fixed_runs = run(lambda z, norm: fixed(config, z, norm), z, norms)
    adaptive_runs = run(lambda z: adaptive(config, z), z)

    budget = {
        "population": config.clients,
        "cohort": jaxfl.Poisson(config.cohort),
        "rounds": config.rounds,
        "delta": config.delta,
    }
    epsilons = [accounting.epsilon(fixed(config, m, norms[0]), **budget) for m in z]
    for m, epsilon in zip(z, epsilons, strict=True):  # of both together as of one
        same = accounting.epsilon(adaptive(config, m), **budget)
        np.testing.assert_allclose(same, epsilon, rtol=1e-3)

    rows = [
        (m, epsilon, f"fixed, {norm:g}", *row)
        for m, epsilon, of_norm in zip(
            z, epsilons, fixed_runs["accuracy"][..., -1], strict=True
        )
        for norm, row in zip(norms, of_norm, strict=True)
    ]
    rows += [
        (m, epsilon, "adaptive", *row)
        for m, epsilon, row in zip(
            z, epsilons, adaptive_runs["accuracy"][..., -1], strict=True
        )
    ]
    folder = common.results_folder("dp_fedavg")
    summary = {
        "epsilon": dict(zip(map(str, z), epsilons, strict=True)),
        "not private": without["accuracy"][..., -1].mean(),
        "fixed": fixed_runs["accuracy"][..., -1].mean(-1),
        "adaptive": adaptive_runs["accuracy"][..., -1].mean(-1),
        "last adaptive norm": adaptive_runs["norm"][..., -1].mean(-1),
        "settings": dataclasses.asdict(config),
    }
    common.save_summary(folder, summary)
    seeds = [f"accuracy, seed {s}" for s in range(config.seeds)]
    common.save_history(folder, ("z", "epsilon", "clipping", *seeds), rows)
    figure = draw(config, every, epsilons, without, fixed_runs, adaptive_runs)
    common.save_figure(folder, figure, "dp_fedavg")

    def percent(runs):
        return f"{100 * np.mean(runs):.1f}"

    common.print_table(
        folder,
        f"MNIST ({config.data}), test accuracy in %; "
        f"{100 * summary['not private']:.1f} neither clipped nor noised",
        ("z", "epsilon", *(f"clip {n:g}" for n in norms), "adaptive"),
        [
            (f"{m:g}", f"{epsilon:.2f}", *map(percent, of_norm), percent(own))
            for m, epsilon, of_norm, own in zip(
                *(z, epsilons, fixed_runs["accuracy"][..., -1]),
                adaptive_runs["accuracy"][..., -1],
                strict=True,
            )
        ],
    )


if __name__ == "__main__":
    main()
