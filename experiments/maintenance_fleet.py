"""A fleet whose engines wear out: who is serviced when, and what it costs.

Nodes (airlines) have a few slots (aircraft), each with an engine whose whole life was
recorded. A tick is a cycle, one flight, and counts as an hour. An engine is flown until
it fails, or until somebody who watches it has it serviced; either way the slot stands
still for a while, and then has a new engine.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLYING, FORETOLD, SERVICED, FAILED = range(4)
"""What `Slots.condition` tells apart."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """What things cost, in dollars, and how long they take, in cycles.

    By default those of a company's prototype, Turbofan Tycoon of 2018.
    """

    profit: float = 250.0
    """Of each cycle that is flown."""
    maintenance: float = 10_000.0
    """Of servicing an engine that has not failed."""
    failure: float = 60_000.0
    """Of an engine that has."""
    maintenance_down: int = 20
    """Cycles that a slot stands still after it was serviced."""
    failure_down: int = 60
    """Cycles that it does after a failure."""
    interval: int = 193
    """Cycles after which preventive maintenance services an engine."""
    threshold: float = 10.0
    """Predictive maintenance does if fewer cycles than that are foretold."""


class Slots(NamedTuple):
    """All slots of a fleet, int32 and bool arrays of any one shape.

    Attributes:
      turn: which engine of its own sequence is in the slot.
      cycle: flights of that engine so far.
      down: cycles that the slot will still stand still.
      broken: whether it stands, or last stood, because of a failure.
      foretold: whether it flew, and its engine was foretold to fail soon.
      flown: cycles flown since the start.
      maintained: engines serviced since the start.
      failed: engines that failed since the start.
    """

    turn: jax.Array
    cycle: jax.Array
    down: jax.Array
    broken: jax.Array
    foretold: jax.Array
    flown: jax.Array
    maintained: jax.Array
    failed: jax.Array

    @property
    def condition(self) -> jax.Array:
        """`FLYING`, `FORETOLD`, `SERVICED` or `FAILED`, uint8."""
        standing = jnp.where(self.broken, FAILED, SERVICED)
        flying = jnp.where(self.foretold, FORETOLD, FLYING)
        return jnp.where(self.down > 0, standing, flying).astype(jnp.uint8)


Watch = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(engine, cycle) -> (due, soon)`: of engines that have flown so many cycles, which
are to be serviced now, and which are foretold to fail soon."""


def start(*shape: int) -> Slots:
    """Every slot with its first engine, which has not flown."""
    number, flag = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    return Slots(number, number, number, flag, flag, number, number, number)


def sequences(
    key: jax.Array, engines: jax.Array, shape: tuple[int, ...], length: int
) -> jax.Array:
    """Engines that a slot has one after another, `shape + (length,)`.

    Drawn with replacement, and before anything is flown: the j-th engine of a slot is
    the same whatever becomes of those before it, so that strategies which are given the
    same sequences differ in nothing but what they do.
    """
    return jax.random.choice(key, engines, (*shape, length))


def longest_sequence(prices: Prices, ticks: int) -> int:
    """Engines that a slot has in so many ticks, at most: each flies once."""
    return ticks // (1 + min(prices.maintenance_down, prices.failure_down)) + 1


def tick(
    prices: Prices, life: Any, sequence: jax.Array, watch: Watch, slots: Slots
) -> Slots:
    """One cycle of a fleet.

    A slot that does not stand still flies once more. If that was its engine's last
    flight the engine has failed; if not, and it is due, it is serviced. Then the slot
    has its next engine, and stands still for as many cycles as that takes.

    Args:
      prices: how long slots stand still.
      life: int32 `[E]`, flights of each engine until it fails, that one included.
      sequence: int32 `[..., J]`, see `sequences`.
      watch: asked of every slot, also where the answer does not matter.
      slots: `[..., ]`, as `sequence`, or with more axes before those.
    """
    place = jnp.indices(sequence.shape[:-1], sparse=True)
    engine = sequence[(*place, slots.turn)]
    flies = slots.down == 0
    cycle = slots.cycle + flies
    due, soon = watch(engine, cycle)
    fails = flies & (cycle >= jnp.asarray(life)[engine])
    served = flies & due & ~fails
    over = fails | served
    stands = jnp.where(fails, prices.failure_down, prices.maintenance_down)
    return Slots(
        turn=slots.turn + over,
        cycle=jnp.where(over, 0, cycle),
        down=jnp.where(over, stands, slots.down - ~flies),
        broken=jnp.where(over, fails, slots.broken),
        foretold=flies & soon & ~over,
        flown=slots.flown + flies,
        maintained=slots.maintained + served,
        failed=slots.failed + fails,
    )


def after_flights(number: Any) -> Watch:
    """Services an engine after so many flights, and foretells nothing."""

    def watch(engine, cycle):
        return cycle >= number, jnp.zeros(cycle.shape, bool)

    return watch


def when_foretold(life_left: Callable, threshold: Any) -> Watch:
    """Services an engine of which fewer cycles are foretold than a threshold.

    Soon is within three times the threshold.

    Args:
      life_left: `(engine, cycle) -> cycles`, what is foretold.
      threshold: in cycles.
    """

    def watch(engine, cycle):
        left = life_left(engine, cycle)
        return left < threshold, left < 3 * threshold

    return watch


def money(prices: Prices, counts: Any) -> Any:
    """Dollars, from counts alone: it is linear in them.

    Args:
      prices: of which only what costs or earns, not what takes time.
      counts: `[..., 3]`, cycles flown, engines serviced, engines that failed.
    """
    each = np.array([prices.profit, -prices.maintenance, -prices.failure])
    return np.asarray(counts, float) @ each


def once(ready: jax.Array, then: Watch, before: Watch) -> Watch:
    """As one watches once somebody is ready, and as another does before.

    Args:
      ready: bool, `[]` or of a shape that broadcasts with the slots'.
      then, before: watches.
    """

    def watch(engine, cycle):
        (due, soon), (due_before, soon_before) = (
            of(engine, cycle) for of in (then, before)
        )
        return (
            jnp.where(ready, due, due_before),
            jnp.where(ready, soon, soon_before),
        )

    return watch
