"""An aggregator round another, which makes messages more alike."""

import jax
import jax.numpy as jnp

from jaxfl.core import Aggregator


def bucketing(s: int, inner: Aggregator) -> Aggregator:
    """Gives a robust aggregator the means of s messages each, put together at random.

    A random order pi of the n who sent, drawn anew in each round, makes
    `ceil(n / s)` buckets, of which the last may be smaller:

        y_i = 1 / |B_i| sum_{k in B_i} x_k,    B_i = {pi((i - 1) s + 1), ..., pi(i s)}

    Honest messages of clients with unlike data differ less, by a factor s in the
    variance, when they are means; without that a robust rule takes the unusual for a
    lie. All clients of a bucket count alike.

    Breakdown point: f liars spoil at most f of the `ceil(n / s)` buckets, so that many
    `inner` must stand, which is the f to give it.

    Args:
      s: messages in a bucket; 1 changes nothing but the order.
      inner: an aggregator that takes the stack, not a sum.

    Raises:
      TypeError: if inner is no aggregator.
      ValueError: if s is not a whole number of at least 1, or inner is linear or gives
        each client an aggregate of its own.

    >>> from jaxfl.aggregate import median
    >>> from jaxfl.core import server_context
    >>> payload, sent = jnp.array([0.0, 1.0, 5.0, 6.0]), jnp.ones(4) > 0
    >>> key, zero, clients = jax.random.key(0), jnp.int32(0), jnp.arange(4)
    >>> ctx = server_context(key, zero, clients, sent, zero + 4, ())
    >>> bucketing(2, median()).apply(ctx, payload, sent, ())[0].item()
    3.0

    Reference: Karimireddy, He, Jaggi 2022, arXiv:2006.09365, algorithm 1.
    """
    if not isinstance(s, int) or s < 1:
        raise ValueError(f"s must be a whole number of at least 1, got {s!r}.")
    if not isinstance(inner, Aggregator):
        raise TypeError(f"inner must be a jaxfl.Aggregator, got {inner!r}.")
    if inner.linear or inner.personal:
        raise ValueError("inner must make one aggregate from the stack of messages.")

    def apply(ctx, payload, sent, state):
        order_key, inner_key = jax.random.split(ctx.key)
        draw = jax.vmap(
            lambda client: jax.random.bits(jax.random.fold_in(order_key, client))
        )
        order = jnp.lexsort((ctx.roster, draw(ctx.roster), ~sent))
        buckets = -(-len(order) // s)
        order = jnp.pad(order, (0, buckets * s - len(order)), constant_values=-1)
        there = (sent[order] & (order >= 0)).reshape(buckets, s)
        size = jnp.sum(there, 1)

        def leaf(x):
            rows = x[order].reshape(buckets, s, *x.shape[1:])
            each = [1] * (x.ndim - 1)
            wide = rows / jnp.maximum(size, 1).reshape(-1, 1, *each)
            wide = jnp.where(there.reshape(buckets, s, *each), wide, 0.0)
            return jnp.sum(wide, 1).astype(x.dtype)

        ctx = ctx._replace(key=inner_key, roster=jnp.arange(buckets), alive=size > 0)
        payload, delivered, state = inner.apply(
            ctx, jax.tree.map(leaf, payload), size > 0, state
        )
        return payload, sent & jnp.any(delivered), state

    return Aggregator(inner.init, apply, coordinatewise=inner.coordinatewise)
