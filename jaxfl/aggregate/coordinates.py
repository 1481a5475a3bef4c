"""Robust aggregators that treat every coordinate alone."""

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Aggregator


def median() -> Aggregator:
    """The median of each coordinate over all who sent, delivered to them.

    `median_{i in S} payload_i[j]` for every j; of an even number of values the mean of
    the two in the middle, of none 0. All clients count alike, whatever their weights.
    Coordinatewise: over a mesh each device takes K values of its share of coordinates.

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
            rows = sent.reshape(-1, *[1] * (x.ndim - 1))
            x = jnp.sort(jnp.where(rows, x, jnp.inf), axis=0)  # who sent comes first
            middle = 0.5 * x[(n - 1) // 2] + 0.5 * x[n // 2]
            return jnp.where(n > 0, middle, jnp.zeros_like(middle))

        return jax.tree.map(leaf, payload), sent, state

    return Aggregator(tree.of_floats("median"), apply, coordinatewise=True)
