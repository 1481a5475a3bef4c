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
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich

import jaxfl
from experiments import (
    common,
    maintenance_fleet,
    maintenance_models,
    maintenance_money,
    maintenance_page,
    turbofan_tycoon,
)
from experiments.maintenance_fleet import Prices
from experiments.maintenance_money import LABELS, SLOTS, per_hour
from jaxfl import data

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

    @property
    def nodes(self) -> int:
        """Airlines: four of five engines are trained on, by four at each."""
        return self.engines // turbofan_tycoon.FOLDS

    def knobs(self, strategy: str) -> tuple:
        """The intervals or thresholds that are flown, first the one that is priced."""
        if strategy == "corrective":
            return (maintenance_models.NEVER,)
        if strategy == "preventive":
            return (self.prices.interval, *self.intervals)
        return (self.prices.threshold, *self.thresholds)


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
    knob = jnp.asarray(config.knobs(strategy))[:, None, None]
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
    bits = jnp.sum(bits)
    if strategy == "pooled":  # no models are sent; every row is, when it is known
        known = jnp.sum(airlines.known < config.cycles)
        bits = 32.0 * engines.row.shape[1] * known
    return frames | {"megabytes": bits / 8e6}


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
            shape=(config.nodes, SLOTS),
            length=maintenance_fleet.longest_sequence(config.prices, config.cycles),
        )
    )(keys[0], apart.played)
    found = {}
    for strategy in config.strategies:
        airlines = pooled if strategy == "pooled" else apart
        for channel in config.channels if strategy == "federated" else ("none",):
            passes = maintenance_models.channel_of(config, channel)
            run = functools.partial(one_game, config, strategy, model, passes)
            run = jax.jit(jax.vmap(run, in_axes=(None, axes(airlines), 0, 0, 0)))
            name = strategy if channel == "none" else channel
            frames = run(engines, airlines, moments, sequences, keys[1])
            found[name] = jax.device_get(frames)
    return found


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
        counts, earned = (
            game["counts"],
            per_hour(config, game["counts"])[..., 0],
        )
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
        "title": f"{config.nodes} airlines of {SLOTS} aircraft",
        "prices": dataclasses.asdict(config.prices),
        "times": list(range(config.every, config.cycles + 1, config.every)),
        "strategies": [strategy(name, game) for name, game in games.items()],
        "nodes": config.nodes,
        "slots": SLOTS,
    }


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.strategies, STRATEGIES), (config.channels, CHANNELS))
    if config.period % config.every or config.cycles % config.period:
        sys.exit("--every must divide --period, and that --cycles")
    games = games_of(config)
    earned = {name: per_hour(config, game["counts"]) for name, game in games.items()}
    hours = SLOTS * config.nodes * config.cycles

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
                    map(str, config.knobs(name)),
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
            for k, knob in enumerate(config.knobs(name))
            for seed in range(config.seeds)
            # The stated one at all times, others at the end.
            for t in range(earned[name].shape[1])[
                slice(None) if k == 0 else slice(-1, None)
            ]
        ],
    )
    page = folder / "maintenance.html"
    maintenance_page.write(page, game_of(config, games))
    rich.print(f"the game of one seed, to look at in a browser: {page}")
    common.save_figure(folder, maintenance_money.draw(config, games), "maintenance")

    def row(name):
        of, at = earned[name][:, -1], config.knobs(name)
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
        folder,
        f"{config.nodes} airlines of {SLOTS} aircraft, {config.cycles} cycles, "
        f"{config.seeds} seeds; {config.network}, life to the {config.life} end; "
        "dollars per engine-hour (deviation); events per 1000 engine-hours",
        ("strategy", "dollars", "in the air", "serviced", "failed", "best", "MB sent"),
        [row(name) for name in games],
    )


if __name__ == "__main__":
    main()
