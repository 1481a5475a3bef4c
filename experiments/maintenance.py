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
    "preventive": "every so many cycles",
    "isolated": "foretold by each airline's own model",
    "federated": "foretold by the federated model",
    "top_k": "federated, largest updates only",
    "dp": "federated, private",
    "pooled": "foretold by a model of all data",
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
    strategies: tuple[str, ...] = (
        *("corrective", "preventive", "isolated", "federated", "pooled"),
    )
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


def one_game(config, strategy, model, channel, engines, airlines, key):
    """One strategy and one seed; frames, and the megabytes that were sent."""
    init_key, run_key, sequence_key = jax.random.split(key, 3)
    number = len(engines.life) // (maintenance_models.PER_AIRLINE + 1)
    nodes = number * (maintenance_models.PER_AIRLINE) // SLOTS
    length = maintenance_fleet.longest_sequence(config.prices, config.cycles)
    sequence = maintenance_fleet.sequences(
        sequence_key, airlines.played, (nodes, SLOTS), length
    )
    knob = jnp.asarray(knobs(config, strategy))[:, None, None]
    learns = strategy not in ("corrective", "preventive")
    own = strategy == "isolated"

    if learns:
        teller = maintenance_models.foreteller_of(
            config, model, engines, airlines.rows
        )
        federation = maintenance_models.federation_of(
            config, strategy, channel, teller.loss
        )
        state = federation.init(model.init(init_key), airlines.rows)
    else:
        teller = federation = state = None

    def learn(state, cycle):
        if not learns:
            return state, jnp.float32(0)
        state, (info, _) = jaxfl.scan_rounds(
            federation, state, airlines.at(cycle), rounds=1, key=run_key
        )
        return state, jnp.sum(info.bits_up)

    def watch_of(state, cycle):
        if not learns:
            return maintenance_fleet.after_flights(knob)
        params = state.clients.algorithm if own else state.params

        def left(engine, flown):
            row = engines.first[engine] + jnp.maximum(flown - 1, 0)
            window = engines.window[row]
            if own:
                of_nodes = jax.vmap(teller.left, (0, 1), 1)
                return of_nodes(params, window)
            return teller.left(params, window)

        known = airlines.at(cycle - config.warm_up * config.period).size > 0
        ready = known[:, None] if own else jnp.any(known)
        return maintenance_fleet.once(
            ready,
            maintenance_fleet.when_foretold(left, knob),
            maintenance_fleet.after_flights(config.prices.interval),
        )

    def period(carry, cycle):
        state, slots = carry
        state, bits = learn(state, cycle)
        watch = watch_of(state, cycle)

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

    slots = maintenance_fleet.start(len(knob), nodes, SLOTS)
    starts = jnp.arange(0, config.cycles, config.period)
    _, (frames, bits) = jax.lax.scan(period, (state, slots), starts)
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
    keys = jax.random.split(jax.random.key(0), config.seeds)
    found = {}
    for strategy in config.strategies:
        each = [
            maintenance_models.airlines_of(
                *(config, engines, examples, seed), strategy == "pooled"
            )
            for seed in range(config.seeds)
        ]
        rows = data.stack([airlines.rows for airlines in each])
        airlines = maintenance_models.Airlines(
            rows,
            jnp.stack([airlines.known for airlines in each]),
            jnp.stack([airlines.played for airlines in each]),
        )
        axes = maintenance_models.Airlines(data.stack_axes(rows), 0, 0)
        for channel in config.channels if strategy == "federated" else ("none",):
            passes = maintenance_models.channel_of(config, channel, len(each[0].rows))
            run = functools.partial(one_game, config, strategy, model, passes)
            name = strategy if channel == "none" else channel
            found[name] = jax.device_get(
                jax.jit(jax.vmap(run, in_axes=(None, axes, 0)))(engines, airlines, keys)
            )
    return found
