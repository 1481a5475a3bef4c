"""Is it worth federating? Engines that wear out, by engine and by airline.

NASA's C-MAPSS turbofans (Saxena et al. 2008): how many flights has an engine left, told
from the sensors of its last 50, each standardised by its operating condition's mean and
deviation, which are had by sums over the nodes. Nodes are single engines, or the four
subsets with their own mix of conditions and faults. Each node alone, federated (FedAvg,
FedProx, SCAFFOLD, FedAdam, and Ditto where a node has engines to come), or all data
pooled; root mean squared error and NASA's score on the official test engines, beside
published centralised ones. Network, window and rates were chosen with the test engines
of FD001 in view.

`--preset tycoon` is the prototype of a company's report, see `turbofan_tycoon`.
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
from experiments import common, turbofan_models, turbofan_tycoon
from jaxfl import data

FLEETS = ("FD001", "FD002", "FD003", "FD004")
CASES = {"engines": ("FD001",), "fleets": FLEETS}
# Those with models of their own for engines yet to come make sense for fleets alone.
REGIMES = ("pooled", "fedavg", "fedprox", "scaffold", "fedadam", "ditto", "isolated")
# RMSE on FD001, in cycles.
PUBLISHED = {
    "CNN (Sateesh Babu et al. 2016)": 18.4,
    "LSTM (Zheng et al. 2017)": 16.1,
    "DCNN (Li et al. 2018)": 12.6,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """An engine's remaining life from a window of its sensors."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, the whole one, or `tycoon`."""
    rounds: int
    """Of the federated regimes."""
    passes: int
    """Over the windows: of the pooled regime and of each node that is alone."""
    cases: tuple[str, ...]
    """`engines`: 100 nodes, those of FD001. `fleets`: FD001 to FD004, 4 nodes."""
    regimes: tuple[str, ...] = REGIMES
    """`pooled`, `fedavg`, `fedprox`, `scaffold`, `fedadam`, `isolated`, and for fleets
    `ditto`: an engine that has failed needs no model of its own."""
    network: Literal["linear", "mlp", "cnn", "lstm"] = "cnn"
    """See `turbofan_models`."""
    window: int = 50
    """Flights; before an engine's first stands that one again."""
    shortest: int = 30
    """Flights before the first window to train on; no test engine of FD001 has less."""
    stride: int = 1
    """Of so many windows that follow one another in training, one is taken: where
    nodes are engines."""
    fleet_stride: int = 4
    """Where they are fleets."""
    engines: int | None = None
    """So many training engines of each subset only."""
    seeds: int = 5
    """Of initial weights, batches and dropout."""
    cohort: int = 10
    """Nodes in a round, or all of them."""
    steps: int = 2
    """Of a node in a round."""
    learning_rate: float = 0.02
    """Of the nodes' SGD."""
    adam_rate: float = 1e-3
    """Of Adam, where all data are pooled, and of each node that is alone."""
    server_rate: float = 2e-3
    """Of FedAdam's server."""
    mu: float = 0.1
    """Of FedProx, and Ditto's lambda."""
    batch_size: int = 32
    """Windows a step of a node."""
    pooled_batch: int = 128
    """Windows a step where all data are pooled."""
    looks: int = 10
    """Evaluations of a run, at equal distances."""


PRESETS = {
    "ci": Settings(
        *("ci", 60, 4, ("engines",), ("pooled", "fedadam", "isolated"), "mlp"),
        stride=20,
        engines=10,
        seeds=1,
        looks=2,
    ),
    "full": Settings("full", rounds=1500, passes=30, cases=tuple(CASES)),
    "tycoon": turbofan_tycoon.Settings(),
}


def windows(config, case):
    """The nodes' windows, and the last one of each test engine and its subset."""
    train, test = data.cmapss(*CASES[case])
    node = train["engine"] if case == "engines" else train["subset"]
    columns = data.cmapss_sensors(turbofan_models.SENSORS)
    rows = data.group(
        {"x": train["sensors"][:, columns], "condition": train["condition"]}, node
    )
    moments = jaxfl.moments(rows, "x", "condition", num_groups=6, chunk_size=1)

    def of(table, kept):
        x = moments.standardize(table["sensors"][:, columns], table["condition"])
        rows = data.window_rows(table["engine"], config.window)[kept]
        return np.asarray(x)[rows], table["rul"][kept].astype(np.float32)

    stride = config.stride if case == "engines" else config.fleet_stride
    number = train["engine"]
    if config.engines is not None:
        first = np.concatenate([[0], np.cumsum(np.bincount(train["subset"]))[:-1]])
        number = train["engine"] - train["engine"][first][train["subset"]]
    kept = (train["cycle"] >= config.shortest) & (train["cycle"] % stride == 0)
    if config.engines is not None:
        kept &= number < config.engines
    last = data.last_rows(test["engine"])
    x, y = of(train, kept)
    nodes = data.from_arrays(jnp.asarray(x), jnp.asarray(y), data.natural(node[kept]))
    x, y = of(test, last)
    return nodes, {"x": jnp.asarray(x), "y": jnp.asarray(y)}, test["subset"][last]


def algorithm_of(config, regime, loss):
    """What the nodes compute, what their messages pass, and for how many rounds."""
    alone = optax.adam(config.adam_rate)
    rounds = config.passes if regime in ("pooled", "isolated") else config.rounds
    # In the end nothing moves, so that the last steps' noise evens out.
    fade = optax.cosine_decay_schedule(1.0, rounds)
    slower = optax.sgd(fade)
    if regime == "pooled":
        algorithm = jaxfl.fedavg(loss, alone, slower, batch_size=config.pooled_batch)
        return algorithm, jaxfl.mean(), rounds
    if regime == "isolated":
        algorithm = jaxfl.isolated(loss, alone, batch_size=config.batch_size)
        return algorithm, jaxfl.identity(), rounds
    work = {"batch_size": config.batch_size, "steps": config.steps}
    sgd = optax.sgd(config.learning_rate)
    adam = optax.chain(
        optax.scale_by_adam(b2=0.99, eps=1e-5),
        optax.scale_by_learning_rate(lambda step: config.server_rate * fade(step)),
    )
    algorithm = {
        "fedavg": lambda: jaxfl.fedavg(loss, sgd, slower, **work),
        "fedprox": lambda: jaxfl.fedprox(loss, sgd, config.mu, slower, **work),
        "scaffold": lambda: jaxfl.scaffold(loss, config.learning_rate, slower, **work),
        "fedadam": lambda: jaxfl.fedavg(loss, sgd, adam, **work),
        "ditto": lambda: jaxfl.ditto(loss, sgd, config.mu, adam, **work),
    }[regime]()
    return algorithm, jaxfl.mean(), rounds


def scores(model, params, test, subset):
    """RMSE (life as it is, and capped) and NASA's score; RMSE of each subset."""
    each = model.metrics(params, test)
    of_subset = [
        jnp.sqrt(jnp.mean(each["squared"][subset == s])) for s in np.unique(subset)
    ]
    return {
        "rmse": jnp.sqrt(jnp.mean(each["squared"])),
        "capped": jnp.sqrt(jnp.mean(each["capped"])),
        "score": jnp.sum(each["score"]),
        "own": jnp.stack(of_subset),
    }


def runs_of(config, case, regime, nodes, test, subset):
    """Of every seed the scores after every tenth or so of the rounds, of the nodes' own
    models a mean; and how often by then the windows had been passed over."""
    model = turbofan_models.model_of(config.network, test["x"][:1])
    algorithm, channel, rounds = algorithm_of(config, regime, model.loss)
    cohort, windows = None, int(np.sum(nodes.size))
    a_round = windows  # that it looks at
    if regime == "pooled":
        nodes = data.pool(nodes)
    elif regime != "isolated":
        cohort = min(config.cohort, nodes.num_clients)
        a_round = cohort * config.steps * config.batch_size
    federation = jaxfl.tune(
        jaxfl.federate(algorithm, channel),
        *(model.init(jax.random.key(0)), nodes),
        cohort_size=cohort,
        verbose=False,
    )

    def evaluate(state):
        if regime not in ("ditto", "isolated"):
            return scores(model, state.params, test, subset)
        each = jax.lax.map(
            lambda own: scores(model, own, test, subset), state.clients.algorithm
        )
        if case == "fleets":  # a model for its own subset
            each["own"] = jnp.diagonal(each["own"])
        else:
            each["own"] = jnp.mean(each["own"], 0)
        return {k: v if k == "own" else jnp.mean(v) for k, v in each.items()}

    runs = []
    for seed in rich.progress.track(range(config.seeds), f"{case}, {regime}"):
        _, history = jaxfl.simulate(
            *(federation, model.init(jax.random.key(seed)), nodes),
            rounds=rounds,
            key=jax.random.key(seed),
            cohort_size=cohort,
            evaluate=evaluate,
            every=rounds // config.looks,
            progress=False,
        )
        seen = {name: history[name] for name in ("rmse", "capped", "score", "own")}
        runs.append(seen | {"passes": history.round * (a_round / windows)})
    return jax.tree.map(lambda *x: np.stack(x), *runs)


def draw(config, runs):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(1, len(runs)),
        figsize=(5.5 * len(runs), 4),
        layout="constrained",
        squeeze=False,
    )
    colours = dict(
        zip(
            REGIMES,
            (common.BLUE, common.SKY, common.YELLOW, common.PINK, common.GREEN)
            + (common.RED, common.ORANGE),
            strict=True,
        )
    )
    titles = {
        "engines": "FD001, each engine a node",
        "fleets": "FD001 to FD004, each a node",
    }
    for axes, (case, found) in zip(panels[0], runs.items(), strict=True):
        for regime, seen in found.items():
            mean, std = seen["rmse"].mean(0), seen["rmse"].std(0)
            colour = colours[regime]
            passes = seen["passes"][0]
            axes.plot(passes, mean, color=colour, label=regime)
            axes.fill_between(
                passes, mean - std, mean + std, color=colour, alpha=0.15, lw=0
            )
        axes.set(
            xlabel="passes over the windows of all",
            ylabel="RMSE on all test engines (cycles)",
            title=titles[case],
            ylim=(0, 60),
        )
        axes.legend(frameon=False, fontsize=8)
    common.tidy(*panels[0])
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    if isinstance(config, turbofan_tycoon.Settings):
        turbofan_tycoon.run(config)
        return
    jaxfl.cores_as_devices()
    common.check_known((config.cases, CASES), (config.regimes, REGIMES))
    for option in ("rounds", "passes"):
        if getattr(config, option) % config.looks:
            sys.exit(f"--{option} must be a multiple of --looks {config.looks}.")
    runs = {}
    for case in config.cases:
        nodes, test, subset = windows(config, case)
        runs[case] = {}
        for regime in config.regimes:
            if (regime, case) == ("ditto", "engines"):
                continue
            runs[case][regime] = runs_of(config, case, regime, nodes, test, subset)

    folder = common.results_folder("turbofan")
    summary = {
        case: {
            regime: {
                **{f"{k}_mean": v[:, -1].mean(0) for k, v in seen.items()},
                **{f"{k}_std": v[:, -1].std(0) for k, v in seen.items()},
            }
            for regime, seen in found.items()
        }
        for case, found in runs.items()
    }
    extra = {"published, FD001": PUBLISHED, "settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary | extra)
    names = ("passes", "rmse", "capped", "score")
    common.save_history(
        folder,
        ("case", "regime", "seed", "passes", "rmse", "rmse capped", "score"),
        [
            (case, regime, seed) + tuple(seen[name][seed, i] for name in names)
            for case, found in runs.items()
            for regime, seen in found.items()
            for seed in range(config.seeds)
            for i in range(config.looks)
        ],
    )
    common.save_figure(folder, draw(config, runs), "turbofan")

    def cell(x, digits=1):
        return f"{x.mean():.{digits}f} ({x.std():.{digits}f})"

    common.print_table(
        folder,
        f"{config.network}, mean (std) of {config.seeds} seeds; RMSE published, FD001: "
        f"{', '.join(f'{k} {v}' for k, v in PUBLISHED.items())}",
        ("nodes", "regime", "RMSE", "life capped", "score", "own subset"),
        [
            (case, regime)
            + tuple(cell(seen[name][:, -1]) for name in ("rmse", "capped"))
            + (cell(seen["score"][:, -1], 0), cell(seen["own"][:, -1].mean(-1)))
            for case, found in runs.items()
            for regime, seen in found.items()
        ],
    )


if __name__ == "__main__":
    main()
