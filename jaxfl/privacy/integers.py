"""Exact draws of integers from symmetric distributions, inside a compiled round."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Table(NamedTuple):
    """A distribution over the integers, alike on both sides of 0.

    `P[|Y| > k]` for k = 0, 1, ... in 63 bits each; what is rarer than 2^-63 is left
    out, and all else is as exact as float64.

    Attributes:
      high: uint32 `[n]`, the first 32 of these bits, never rising.
      low: uint32 `[n]`, the other 31.
    """

    high: np.ndarray
    low: np.ndarray


def draw(table: Table, key: jax.Array, n: int) -> jax.Array:
    """Independent draws, int32 `[n]`.

    The magnitude is how many entries of the table exceed a uniform number of 63 bits,
    by bisection; one more bit is the sign.
    """
    size = len(table.high)
    if not size:
        return jnp.zeros(n, jnp.int32)
    high, word = jax.random.bits(key, (2, n))
    low, negative = word >> 1, (word & 1) == 1
    highs, lows = jnp.asarray(table.high), jnp.asarray(table.low)
    steps = size.bit_length()

    def halve(i, k):
        """If the first k entries exceed the number: as many, or a power of 2 more."""
        more = k + (1 << (steps - 1 - i))
        at = jnp.minimum(more, size) - 1
        exceeds = (highs[at] > high) | ((highs[at] == high) & (lows[at] > low))
        return jnp.where((more <= size) & exceeds, more, k)

    k = jax.lax.fori_loop(0, steps, halve, jnp.zeros(n, jnp.int32))
    return jnp.where(negative, -k, k)


@functools.cache
def skellam(variance: float) -> Table:
    """`P[Y = k] = e^-v I_k(v)`, the difference of two Poisson variables of mean v/2."""
    from scipy.special import ive

    return _table(ive(np.arange(_reach(variance)), variance))


@functools.cache
def discrete_gaussian(variance: float) -> Table:
    """`P[Y = k]` in proportion to `exp(-k^2 / (2 v))`."""
    k = np.arange(_reach(variance), dtype=np.float64)
    return _table(np.exp(-(k**2) / (2 * variance)) if variance else k == 0)


def _table(mass: np.ndarray) -> Table:
    """From the probabilities of 0, 1, 2, ..., up to a factor."""
    both = np.where(np.arange(len(mass)) > 0, 2.0, 1.0) * mass
    least = np.cumsum(both[::-1])[::-1]  # P[|Y| >= k]; the smallest are added first
    words = np.ldexp(least[1:] / least[0], 63).astype(np.uint64)
    words = words[words > 0]
    high, low = words >> np.uint64(31), words & np.uint64(2**31 - 1)
    return Table(high.astype(np.uint32), low.astype(np.uint32))


def _reach(variance: float) -> int:
    """Beyond it both are rarer than 2^-63, 9.1 deviations of a normal variable."""
    return math.ceil(10 * math.sqrt(variance)) + 60
