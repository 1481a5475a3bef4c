"""What foretelling failures earns: a fleet that is flown while its models learn.

The game of Turbofan Tycoon (Cloudera Fast Forward Labs 2018, report FF09) as a
simulation: airlines of four aircraft fly engines of NASA's C-MAPSS until they fail, for
a fixed number of cycles, or until a model foretells fewer than ten cycles more. The
model is each airline's own, that of all by federated averaging, or one trained on all
rows in one place. Engines fail while they fly, which is when rows to train on become
known, and every so many cycles there is a round. A cycle counts as an hour.

All strategies of a seed are given the same engines. Beside the interval and threshold
that are priced, others are flown; prices can be changed afterwards, since money is
linear in the cycles flown, the engines serviced and those that failed.

`--preset tycoon` has the prototype's engines (the life of each is counted to its last
row, also where NASA cut it off) and network.
"""

import base64
import dataclasses
import functools
import json
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxfl
from experiments import common, maintenance_fleet, maintenance_models
from experiments.maintenance_fleet import Prices
from jaxfl import data

LABELS = {
    "corrective": "run to failure",
    "preventive": "fixed interval",
    "isolated": "each airline's own model",
    "federated": "federated model",
    "top_k": "federated, compressed",
    "dp": "federated, private",
    "pooled": "model of all data",
}
COLOURS = {
    "corrective": common.BLACK,
    "preventive": common.PINK,
    "isolated": common.ORANGE,
    "federated": common.GREEN,
    "top_k": common.SKY,
    "dp": common.RED,
    "pooled": common.BLUE,
}
SLOTS = 4
STRATEGIES = ("corrective", "preventive", "isolated", "federated", "pooled")
CHANNELS = ("none", "top_k", "dp")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A fleet under several strategies of maintenance."""

    preset: Literal["ci", "full", "tycoon"]
    """Where the other settings start from: a small run, the whole one, or the one of
    the prototype."""
    engines: int
    """A fifth is played with; four of the others are each airline's to train on."""
    cycles: int
    """How long the fleet is flown."""
    strategies: tuple[str, ...] = STRATEGIES
    """`corrective`, `preventive`, `isolated`, `federated`, `pooled`."""
    channels: tuple[str, ...] = ("none",)
    """What federated updates pass, each a run: `none`; `top_k`, the largest of each,
    with error feedback; `dp`, clipped and noised."""
    prices: Prices = Prices()
    """And times."""
    intervals: tuple[int, ...] = (100, 125, 150, 175, 225, 250)
    """Of preventive maintenance; beside the one that is priced."""
    thresholds: tuple[float, ...] = (5.0, 15.0, 20.0, 30.0, 40.0)
    """Of predictive maintenance; likewise."""
    life: Literal["true", "recorded"] = "true"
    """To the failure, or the last row of engines that were cut off as well."""
    network: Literal["linear", "mlp", "cnn", "lstm", "tycoon"] = "mlp"
    """See `turbofan_models`; or the prototype's 48 hidden units."""
    window: int = 30
    """Flights that it looks at."""
    period: int = 20
    """Cycles between rounds."""
    every: int = 10
    """Cycles between those that are looked at; divides `period`."""
    warm_up: int = 5
    """Rounds after its first row before a model is asked; until then as preventive."""
    epochs: int = 2
    """Passes over its rows that a node makes in a round."""
    stride: int = 2
    """Of so many rows that follow one another one is trained on."""
    seeds: int = 5
    """Of engines, initial weights and batches; each five have all engines played."""
    learning_rate: float = 0.02
    """Of the airlines' SGD, which has a momentum of 0.9 but in the prototype."""
    alone_rate: float = 1e-3
    """Of Adam, where an airline is alone or data are pooled; not in the prototype."""
    batch_size: int = 32
    """Rows a step."""
    pooled_batch: int = 128
    """Rows a step, where data are pooled; not in the prototype."""
    fraction: float = 0.05
    """Of an update that `top_k` sends."""
    epsilon: float = 8.0
    """Of all that an airline sends, of `dp`."""
    delta: float = 1e-3
    """The probability with which epsilon need not hold."""
    clip_norm: float = 0.5
    """Of an update, of `dp`."""


PRESETS = {
    "ci": Settings(
        *("ci", 20, 600, ("corrective", "preventive", "isolated", "federated")),
        thresholds=(30.0,),
        intervals=(150,),
        network="linear",
        window=5,
        period=50,
        seeds=2,
        stride=4,
    ),
    "full": Settings("full", engines=200, cycles=3000),
    "tycoon": Settings(
        "tycoon",
        engines=400,
        cycles=3000,
        life="recorded",
        network="tycoon",
        window=1,
        learning_rate=0.01,
    ),
}


def knobs(config, strategy: str) -> tuple:
    """The intervals or thresholds that a strategy is flown with; first the stated."""
    if strategy == "corrective":
        return (maintenance_models.NEVER,)
    if strategy == "preventive":
        return (config.prices.interval, *config.intervals)
    return (config.prices.threshold, *config.thresholds)


def frame(slots: maintenance_fleet.Slots) -> dict[str, jax.Array]:
    """What is kept of one moment: counts of each knob, all slots of the first."""
    counts = jnp.stack([slots.flown, slots.maintained, slots.failed], -1)
    age = jnp.minimum(slots.cycle[0] // 2, 255).astype(jnp.uint8)
    return {
        "counts": jnp.sum(counts, (1, 2)),
        "state": slots.condition[0].ravel(),
        "age": age.ravel(),
    }


def one_game(
    config, strategy, model, channel, engines, airlines, moments, sequence, key
):
    """One strategy and one seed; frames, and the megabytes that were sent."""
    knob = jnp.asarray(knobs(config, strategy))[:, None, None]
    if strategy in ("corrective", "preventive"):
        watcher = maintenance_models.steady(knob)
    else:
        foreteller = maintenance_models.foreteller_of(config, model, engines, moments)
        federation = maintenance_models.federation_of(
            config, strategy, channel, foreteller.loss
        )
        watcher = maintenance_models.learner(
            config, federation, foreteller, engines, airlines, knob, key
        )

    def period(carry, cycle):
        state, slots = carry
        state, bits = watcher.learn(state, cycle)
        watch = watcher.watch(state, cycle)

        def cycles(slots, _):
            step = functools.partial(
                *(maintenance_fleet.tick, config.prices, engines.life, sequence, watch)
            )
            slots = jax.lax.fori_loop(0, config.every, lambda _, s: step(s), slots)
            return slots, frame(slots)

        slots, frames = jax.lax.scan(
            cycles, slots, length=config.period // config.every
        )
        return (state, slots), (frames, bits)

    slots = maintenance_fleet.start(len(knob), *sequence.shape[:-1])
    starts = jnp.arange(0, config.cycles, config.period)
    _, (frames, bits) = jax.lax.scan(period, (watcher.state, slots), starts)
    frames = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), frames)
    return frames | {"megabytes": jnp.sum(bits) / 8e6}


def games_of(config) -> dict[str, dict[str, np.ndarray]]:
    """Of every strategy all seeds' frames.

    Returns:
      By strategy: `counts [seeds, T, knobs, 3]`, cycles flown, engines serviced, and
      failed; `state` and `age`, `[seeds, T, nodes * slots]`; `megabytes [seeds]`.
    """
    engines = maintenance_models.engines_of(config)
    model = maintenance_models.network_of(config, engines)
    examples = {
        "row": engines.row,
        "window": engines.window,
        "left": engines.row[:, -1],
    }

    def airlines_of(together):
        each = [
            maintenance_models.airlines_of(config, engines, examples, seed, together)
            for seed in range(config.seeds)
        ]
        rows, known, played = zip(*each, strict=True)
        return maintenance_models.Airlines(
            data.stack(rows), jnp.stack(known), jnp.stack(played)
        )

    def axes(airlines):
        return maintenance_models.Airlines(data.stack_axes(airlines.rows), 0, 0)

    nodes = config.engines // 5  # four engines each to train on, a fifth played
    keys = jax.random.split(jax.random.key(0), (2, config.seeds))
    apart, pooled = airlines_of(False), airlines_of(True)
    moments = jax.jit(
        jax.vmap(
            functools.partial(jaxfl.moments, x="row", chunk_size=1),
            in_axes=(data.stack_axes(apart.rows),),
        )
    )(apart.rows)
    sequences = jax.vmap(
        functools.partial(
            maintenance_fleet.sequences,
            shape=(nodes, SLOTS),
            length=maintenance_fleet.longest_sequence(config.prices, config.cycles),
        )
    )(keys[0], apart.played)
    found = {}
    for strategy in config.strategies:
        airlines = pooled if strategy == "pooled" else apart
        for channel in config.channels if strategy == "federated" else ("none",):
            passes = maintenance_models.channel_of(config, channel, nodes)
            run = functools.partial(one_game, config, strategy, model, passes)
            run = jax.jit(jax.vmap(run, in_axes=(None, axes(airlines), 0, 0, 0)))
            name = strategy if channel == "none" else channel
            frames = run(engines, airlines, moments, sequences, keys[1])
            found[name] = jax.device_get(frames)
    return found


def per_hour(config, counts: np.ndarray, prices: Prices | None = None) -> np.ndarray:
    """Dollars per engine-hour since the start, `[seeds, T, knobs]`, of such counts."""
    hours = config.every * np.arange(1, counts.shape[1] + 1)
    slots = SLOTS * (config.engines // 5)
    earned = maintenance_fleet.money(prices or config.prices, counts)
    return earned / (slots * hours)[:, None]


def game_of(config, games: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """One seed's game as plain numbers and text, for a page that plays it.

    Args:
      config: settings.
      games: see `games_of`.
      seed: whose fleet; bands are of all seeds.
    """

    def text(x):
        return base64.b64encode(np.asarray(x, np.uint8).tobytes()).decode("ascii")

    def strategy(name, game):
        counts, earned = game["counts"], per_hour(config, game["counts"])[..., 0]
        mean, std = earned.mean(0), earned.std(0)
        names = ("flown", "maintained", "failed")
        return {
            "name": name,
            "label": LABELS[name],
            **dict(zip(names, counts[seed, :, 0].T.tolist(), strict=True)),
            "band": {"low": (mean - std).tolist(), "high": (mean + std).tolist()},
            "state": text(game["state"][seed]),
            "age": text(game["age"][seed]),
        }

    return {
        "title": f"{config.engines // 5} airlines of {SLOTS} aircraft",
        "prices": dataclasses.asdict(config.prices),
        "times": list(range(config.every, config.cycles + 1, config.every)),
        "strategies": [strategy(name, game) for name, game in games.items()],
        "nodes": config.engines // 5,
        "slots": SLOTS,
    }


def by_prices(config, games, failure: Any, maintenance: Any) -> dict[str, np.ndarray]:
    """Dollars per engine-hour at the end under other prices, from the counts alone.

    Args:
      config: settings; what takes how long is as it was flown.
      games: see `games_of`.
      failure, maintenance: `[F]` and `[M]`, in dollars.

    Returns:
      `[seeds, F, M]` of every strategy, with the one of its intervals or thresholds
      that is best at each price.
    """
    hours, found = SLOTS * (config.engines // 5) * config.cycles, {}
    for name, game in games.items():
        last = np.asarray(game["counts"][:, -1, ..., None, None], float)
        flown, maintained, failed = np.moveaxis(last, 2, 0)
        earned = (
            config.prices.profit * flown
            - np.asarray(maintenance) * maintained
            - np.asarray(failure)[:, None] * failed
        ) / hours
        best = earned.mean(0).argmax(0)
        found[name] = np.take_along_axis(earned, best[None, None], 1)[:, 0]
    return found


def rivals(games) -> list[str]:
    """Strategies without a federated model, and that nobody has to be trusted for."""
    return [n for n in games if n in ("corrective", "preventive", "isolated")]


def draw(config, games):
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.4), layout="constrained"
    )
    times = config.every * np.arange(1, 1 + config.cycles // config.every)
    low = []
    for name, game in games.items():
        earned, colour = per_hour(config, game["counts"]), COLOURS[name]
        mean, std = earned[..., 0].mean(0), earned[..., 0].std(0)
        left.plot(times, mean, color=colour, label=LABELS[name])
        left.fill_between(
            *(times, mean - std, mean + std), color=colour, alpha=0.2, lw=0
        )
        low.append((mean - std)[len(times) // 5 :].min())
        last, stated = earned[:, -1].mean(0), np.array(knobs(config, name))
        order = np.argsort(stated)
        if name in ("corrective", "preventive"):
            best = last.argmax()
            label = name if name == "corrective" else f"every {stated[best]} cycles"
            middle.axhline(last[best], color=colour, ls="--", label=label)
        else:
            middle.plot(
                stated[order], last[order], color=colour, marker="o", label=name
            )
    left.set(
        xlabel="time (cycles)",
        ylabel="earned since the start\n(dollars per engine-hour)",
        ylim=(min(0, *low) - 10, config.prices.profit),
        title=f"mean and deviation of {config.seeds} seeds",
    )
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    middle.set(
        xlabel="serviced when fewer cycles than that are foretold",
        ylabel="earned by the end\n(dollars per engine-hour)",
        title="other thresholds; the best interval",
    )
    middle.legend(frameon=False, fontsize=8)

    failure, maintenance = np.geomspace(5e3, 5e5, 81), np.geomspace(1e3, 1e5, 81)
    earned = {
        name: each.mean(0)
        for name, each in by_prices(config, games, failure, maintenance).items()
    }
    names = [*rivals(games), *(n for n in ("federated",) if n in games)]
    winner = np.argmax([earned[name] for name in names], 0)
    colours = ListedColormap([COLOURS[name] for name in names])
    right.pcolormesh(
        *(failure, maintenance, winner.T),
        cmap=colours,
        vmin=-0.5,
        vmax=len(names) - 0.5,
        alpha=0.35,
        linewidth=0,
        rasterized=True,
    )
    if "federated" in games and rivals(games):
        gain = earned["federated"] - np.max([earned[n] for n in rivals(games)], 0)
        lines = right.contour(
            *(failure, maintenance, gain.T), colors="black", linewidths=0.8
        )
        right.clabel(lines, fmt="%g", fontsize=7)
    right.plot(
        *(config.prices.failure, config.prices.maintenance),
        marker="*",
        ms=11,
        color="black",
        ls="",
    )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="price of a failure (dollars)",
        ylabel="price of servicing (dollars)",
        title="who earns most, each at its best (lines: dollars by\n"
        "which the federated leads; star: the stated prices)",
    )
    seen = [Patch(color=COLOURS[n], alpha=0.35, label=n) for n in names]
    right.legend(handles=seen, fontsize=8, loc="lower left")
    common.tidy(left, middle)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.strategies, STRATEGIES), (config.channels, CHANNELS))
    if config.period % config.every or config.cycles % config.period:
        sys.exit("--every must divide --period, and that --cycles")
    games = games_of(config)
    earned = {name: per_hour(config, game["counts"]) for name, game in games.items()}
    hours = SLOTS * (config.engines // 5) * config.cycles

    folder = common.results_folder("maintenance")
    summary = {
        name: {
            "dollars": earned[name][:, -1, 0].mean(),
            "std": earned[name][:, -1, 0].std(),
            "each": earned[name][:, -1, 0],
            "per 1000 hours": dict(
                zip(
                    ("flown", "maintained", "failed"),
                    1000 * game["counts"][:, -1, 0].mean(0) / hours,
                    strict=True,
                )
            ),
            "by interval or threshold": dict(
                zip(
                    map(str, knobs(config, name)),
                    earned[name][:, -1].mean(0),
                    strict=True,
                )
            ),
            "megabytes": game["megabytes"].mean(),
        }
        for name, game in games.items()
    }
    common.save_summary(folder, summary | {"settings": dataclasses.asdict(config)})
    common.save_history(
        folder,
        ("strategy", "at", "seed", "cycle", "flown", "maintained", "failed", "dollars"),
        [
            (name, knob, seed, config.every * (t + 1), *game["counts"][seed, t, k])
            + (earned[name][seed, t, k],)
            for name, game in games.items()
            for k, knob in enumerate(knobs(config, name))
            for seed in range(config.seeds)
            # The stated one at all times, others at the end.
            for t in range(earned[name].shape[1])[
                slice(None) if k == 0 else slice(-1, None)
            ]
        ],
    )
    with open(folder / "game.json", "w", encoding="utf-8") as file:
        json.dump(game_of(config, games), file)
    common.save_figure(folder, draw(config, games), "maintenance")

    def row(name):
        of, at = earned[name][:, -1], knobs(config, name)
        best = of.mean(0).argmax()
        flown, maintained, failed = summary[name]["per 1000 hours"].values()
        return (
            LABELS[name],
            f"{of[:, 0].mean():.1f} ({of[:, 0].std():.1f})",
            f"{flown / 10:.1f} %",
            f"{maintained:.2f}",
            f"{failed:.2f}",
            "" if name == "corrective" else f"{of[:, best].mean():.1f} at {at[best]:g}",
            f"{summary[name]['megabytes']:.3g}",
        )

    common.print_table(
        f"{config.engines // 5} airlines of {SLOTS} aircraft, {config.cycles} cycles, "
        f"{config.seeds} seeds; {config.network}, life to the {config.life} end; "
        "dollars per engine-hour (deviation); events per 1000 engine-hours",
        ("strategy", "dollars", "in the air", "serviced", "failed", "best", "MB sent"),
        [row(name) for name in games],
    )


if __name__ == "__main__":
    main()
