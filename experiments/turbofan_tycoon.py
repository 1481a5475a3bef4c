"""The prototype Turbofan Tycoon: what a small network gains by being federated.

Cloudera Fast Forward Labs 2018, Federated Learning (report FF09): engines of C-MAPSS'
FD001 and FD003, training and test files put together, four at each of 80 airlines, and
80 more to test on. A network of 48 hidden units (865 weights) tells from one flight's
sensors how long an engine has left: trained at each airline alone, by federated
averaging, or on all rows pooled. As the report does, the life of an engine is counted
to its last row, also where NASA cut it off; or, if asked for, to its failure.

A split of 400 engines says little, so all engines are tested: in each repetition they
are dealt into five groups, each of which is the test engines of one split.
"""

import dataclasses
import functools
import sys
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common, turbofan_models
from jaxfl import data, models

PUBLISHED = {"naive": 94.2, "local": 79.0, "federated": 64.3, "pooled": 62.4}
REGIMES = {"local": "each airline alone", "federated": "federated", "pooled": "pooled"}
ENGINES, FOLDS, PER_AIRLINE = 400, 5, 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """An engine's remaining life from one flight, by a small network."""

    preset: Literal["tycoon"] = "tycoon"
    """See `turbofan`."""
    rounds: int = 20
    """In each an airline passes once over its rows."""
    repetitions: int = 2
    """Of five splits each, that between them test on all engines."""
    engines: int = 400
    """How many to take; all of them by default."""
    lives: tuple[Literal["recorded", "true"], ...] = ("recorded", "true")
    """To the last row in the files, as in the report, or to the failure."""
    learning_rate: float = 0.01
    """Of plain SGD."""
    batch_size: int = 32
    """Rows a step."""


def rows_of(config, life):
    """Inputs and remaining life, `[E, 17]`; each row's engine, and its cycle, `[E]`."""
    rows, engine, cycle = [], [], []
    columns = data.cmapss_sensors(turbofan_models.SENSORS)
    for i, table in enumerate(data.cmapss("FD001", "FD003")):
        left = table["rul"]
        if life == "recorded":
            left = left - left[data.last_rows(table["engine"])][table["engine"]]
        inputs = table["settings"][:, :2], table["sensors"][:, columns]
        rows.append(np.column_stack([*inputs, left]).astype(np.float32))
        engine.append(ENGINES // 2 * i + table["engine"])
        cycle.append(table["cycle"])
    rows, engine, cycle = map(np.concatenate, (rows, engine, cycle))
    every = ENGINES // config.engines
    kept = engine % every == 0
    return rows[kept], engine[kept] // every, cycle[kept]


def airlines(engines: int, repetition: int, fold: int) -> np.ndarray:
    """Whose each engine is, `[engines]`: the last id is that of the test engines."""
    if engines % (FOLDS * PER_AIRLINE) or ENGINES % engines:
        raise ValueError(
            f"engines must divide {ENGINES} and be a multiple of "
            f"{FOLDS * PER_AIRLINE}, got {engines}."
        )
    order = np.random.default_rng(repetition).permutation(engines)
    in_test = order % FOLDS == fold
    ids = np.full(engines, (engines - in_test.sum()) // PER_AIRLINE)
    ids[~in_test] = np.argsort(np.argsort(order[~in_test])) // PER_AIRLINE
    return ids


def rmse(model, moments, test, params):
    """In cycles, over all rows of the test engines."""
    place = jnp.arange(test.longest)
    rows = moments.standardize(test.take(place)["x"])
    error = (model.apply(params, rows[:, :-1])[:, 0] - rows[:, -1]) * moments.std[0, -1]
    return jnp.sqrt(jnp.sum(jnp.where(place < test.size, error**2, 0)) / test.size)


def part(whole: jaxfl.ClientData, clients: slice) -> jaxfl.ClientData:
    """Some of the clients, whose loops are as long as the longest of them."""
    start, size = np.asarray(whole.start)[clients], np.asarray(whole.size)[clients]
    bounds = {"shortest": int(size.min()), "longest": int(size.max())}
    return dataclasses.replace(whole, start=start, size=size, **bounds)


def one_run(config, model, regime, key, train, test):
    """RMSE after every second round, `[R / 2]`, on one split."""
    moments = jaxfl.moments(train, chunk_size=1)
    score = functools.partial(rmse, model, moments, test[0])

    def loss(params, batch, key):
        rows = moments.standardize(batch["x"])
        return (model.apply(params, rows[:, :-1], key)[:, 0] - rows[:, -1]) ** 2

    optimizer = optax.sgd(config.learning_rate)
    if regime == "local":
        algorithm = jaxfl.isolated(loss, optimizer, batch_size=config.batch_size)
        channel = jaxfl.identity()
    else:
        algorithm = jaxfl.fedavg(loss, optimizer, batch_size=config.batch_size)
        channel = jaxfl.mean()

    def evaluate(state):
        own = state.clients.algorithm
        if regime == "local":
            return {"rmse": jnp.mean(jax.lax.map(score, own))}
        return {"rmse": score(state.params)}

    federation = jaxfl.federate(algorithm, channel, chunk_size=1)
    return jaxfl.scan_rounds(
        *(federation, federation.init(model.init(key), train), train),
        rounds=config.rounds,
        key=key,
        evaluate=evaluate,
        every=2,
    )[1][1]["rmse"]


def runs_of(config, life):
    """RMSE in cycles by regime, `[splits, R / 2]`, and of the guess, `[splits]`."""
    rows, engine, cycle = rows_of(config, life)
    model = models.from_linen(
        models.mlp((48,), 1, init=models.torch_uniform), rows[:1, :-1]
    )
    ids = [
        airlines(config.engines, repetition, fold)[engine]
        for repetition in range(config.repetitions)
        for fold in range(FOLDS)
    ]
    naive = [
        np.sqrt(np.mean((181 - cycle - rows[:, -1])[i == i.max()] ** 2)) for i in ids
    ]
    examples = {"x": jnp.asarray(rows)}
    keys = jax.random.split(jax.random.key(0), len(ids))
    found = {}
    for regime in REGIMES:
        whose = [(i == i.max()).astype(int) for i in ids] if regime == "pooled" else ids
        splits = [data.group(examples, i) for i in whose]
        train = data.stack([part(split, slice(-1)) for split in splits])
        test = data.stack([part(split, slice(-1, None)) for split in splits])
        run = jax.vmap(
            functools.partial(one_run, config, model, regime),
            in_axes=(0, data.stack_axes(train), data.stack_axes(test)),
        )
        found[regime] = np.asarray(jax.jit(run)(keys, train, test))
    return {"naive": np.array(naive)} | found


def draw(config, runs):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(1, len(runs)), figsize=(5.5 * len(runs), 4), layout="constrained"
    )
    colours = {
        "local": common.ORANGE,
        "federated": common.GREEN,
        "pooled": common.BLUE,
    }
    rounds = np.arange(2, config.rounds + 1, 2)
    for axes, (life, found) in zip(np.atleast_1d(panels), runs.items(), strict=True):
        level = found["naive"].mean()
        axes.axhline(level, color=common.BLACK, ls="--", label="guess: 181 - t")
        for regime, colour in colours.items():
            curve, spread = found[regime].mean(0), found[regime].std(0)
            axes.plot(rounds, curve, color=colour, label=REGIMES[regime])
            axes.fill_between(
                *(rounds, curve - spread, curve + spread),
                color=colour,
                alpha=0.15,
                lw=0,
            )
        axes.set(
            xlabel="round (one pass over an airline's rows)",
            ylabel="RMSE on test engines (cycles)",
            title=f"life counted to the {'last row' if life == 'recorded' else 'end'}",
            ylim=(0, None),
            xticks=rounds[1::2],
        )
    common.tidy(*np.atleast_1d(panels))
    np.atleast_1d(panels)[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def run(config: Settings) -> None:
    if config.rounds % 2:
        sys.exit("--rounds must be even: every second is looked at.")
    runs = {life: runs_of(config, life) for life in config.lives}
    last = {
        life: {name: (r if r.ndim == 1 else r[:, -1]) for name, r in found.items()}
        for life, found in runs.items()
    }
    folder = common.results_folder("turbofan")
    summary = {
        life: {
            "rmse": {name: r.mean() for name, r in found.items()},
            "std": {name: r.std() for name, r in found.items()},
            "federated / pooled": found["federated"].mean() / found["pooled"].mean(),
            "local / federated": found["local"].mean() / found["federated"].mean(),
        }
        for life, found in last.items()
    }
    settings = {"settings": dataclasses.asdict(config), "published": PUBLISHED}
    common.save_summary(folder, summary | settings)
    common.save_history(
        folder,
        ("life", "split", "regime", "round", "rmse"),
        [
            (life, split, regime, 2 * (i + 1), value)
            for life, found in runs.items()
            for regime in REGIMES
            for split, curve in enumerate(found[regime])
            for i, value in enumerate(curve)
        ],
    )
    common.save_figure(folder, draw(config, runs), "turbofan")
    common.print_table(
        folder,
        f"RMSE in cycles, mean (std) over {FOLDS * config.repetitions} splits",
        ("", "published", *(f"life to the {life} end" for life in runs)),
        [
            (name, PUBLISHED[name])
            + tuple(
                f"{r[name].mean():.1f} ({r[name].std():.1f})" for r in last.values()
            )
            for name in PUBLISHED
        ],
    )
