"""Robust aggregators that treat every coordinate alone."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import tree
from jaxfl.core import Aggregator


def median() -> Aggregator:
    """The median of each coordinate over all who sent, delivered to them.

    `median_{i in S} payload_i[j]` for every j; of an even number of values the mean of
    the two in the middle, of none 0. All clients count alike, whatever their weights.
    Coordinatewise: over a mesh each device takes K values of its share of coordinates.

    Breakdown point: fewer than half of n, the number who sent. Up to then no coordinate
    leaves the range of the honest ones.

    Returns:
      An `Aggregator`; it raises TypeError when initialised with integers.

    >>> payload = jnp.array([[1.0, 5.0], [2.0, 9.0], [9.0, 7.0], [0.0, 0.0]])
    >>> sent = jnp.array([True, True, True, False])
    >>> median().apply(None, payload, sent, ())[0].tolist()
    [2.0, 7.0]

    Reference: Yin et al. 2018, arXiv:1803.01498, option I of algorithm 1.
    """

    def apply(ctx, payload, sent, state):
        n = jnp.sum(sent)

        def leaf(x):
            return middle(ascending(x, sent), n)

        return jax.tree.map(leaf, payload), sent, state

    return Aggregator(tree.of_floats("median"), apply, coordinatewise=True)


def trimmed_mean(f: int) -> Aggregator:
    """The mean of each coordinate without its f lowest and f highest values.

    With `x_(1) <= ... <= x_(n)` the values of a coordinate of the n who sent,

        1 / (n - 2f) sum_{i = f + 1}^{n - f} x_(i)

    All clients count alike, whatever their weights. Coordinatewise: over a mesh each
    device takes K values of its share of coordinates.

    Breakdown point: f of n, if n > 2f. Up to then no coordinate leaves the range of the
    honest ones. Of fewer who sent nothing is delivered.

    Args:
      f: how many are left out at each end, `beta n` in the paper; may be traced.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if f is not a whole number of at least 0, or (unless traced) a cohort
        has not more than 2f clients.

    >>> payload = jnp.array([[1.0, 5.0], [2.0, 9.0], [9.0, 7.0], [0.0, 0.0]])
    >>> sent = jnp.array([True, True, True, False])
    >>> trimmed_mean(1).apply(None, payload, sent, ())[0].tolist()
    [2.0, 7.0]

    Reference: Yin et al. 2018, arXiv:1803.01498, option II of algorithm 1.
    """
    check_liars("trimmed_mean", f)

    def apply(ctx, payload, sent, state):
        check_cohort("trimmed_mean", f, 2 * f + 1, sent)
        n = jnp.sum(sent)

        def leaf(x):
            rank = jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
            kept = (rank >= f) & (rank < n - f)
            wide = jnp.where(kept, ascending(x, sent), 0).astype(jnp.float32)
            return (jnp.sum(wide, 0) / jnp.maximum(n - 2 * f, 1)).astype(x.dtype)

        return jax.tree.map(leaf, payload), sent & (n > 2 * f), state

    return Aggregator(tree.of_floats("trimmed_mean"), apply, coordinatewise=True)


def ascending(x: jax.Array, flags: jax.Array) -> jax.Array:
    """The rows `[K, ...]` whose flag holds, each coordinate sorted; then infinity."""
    rows = flags.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sort(jnp.where(rows, x, jnp.inf), axis=0)


def middle(x: jax.Array, n: jax.Array) -> jax.Array:
    """The median of the first n rows of what is sorted; of none, 0."""
    middle = 0.5 * x[(n - 1) // 2] + 0.5 * x[n // 2]
    return jnp.where(n > 0, middle, jnp.zeros_like(middle))


def check_liars(name: str, f: int | jax.Array) -> None:
    """Raises ValueError unless f, if it is not traced, is a number of clients."""
    if isinstance(f, jax.Array):
        return
    if not isinstance(f, int | np.integer) or f < 0:
        raise ValueError(f"{name}: f must be a whole number of at least 0, got {f!r}.")


def check_cohort(name: str, f: int | jax.Array, least: int, sent: jax.Array) -> None:
    """Raises ValueError for cohorts in which no round could be withstood."""
    if not isinstance(f, jax.Array) and len(sent) < least:
        raise ValueError(
            f"{name}: f={f} needs at least {least} clients, the cohort has {len(sent)}."
        )
