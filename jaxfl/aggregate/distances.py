"""Robust aggregators that choose messages by how near they are to others."""

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.aggregate.coordinates import (
    BLOCK,
    ascending,
    by_blocks,
    check_cohort,
    check_liars,
    middle,
)
from jaxfl.core import Aggregator, Payload


def krum(f: int) -> Aggregator:
    """The one message that has the nearest neighbours.

    Of the n who sent, client i has the score

        s(i) = sum_{i -> j} ||x_i - x_j||^2

    over the n - f - 2 messages j that are nearest to its own, and the message of the
    lowest score is the aggregate. Of equal scores the lowest population id has it. All
    clients count alike, whatever their weights.

    Breakdown point: f of n, if n >= 2f + 3. Up to then what is chosen, which may well
    be a liar's, is no further from some honest message than
    `sqrt((n - f - 2) / (n - 2f - 1))` times the largest distance of two honest ones. Of
    fewer who sent nothing is delivered. Over a mesh every device is given the stack of
    whole messages.

    Args:
      f: how many may lie; may be traced.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if f is not a whole number of at least 0, or (unless traced) a cohort
        has fewer than 2f + 3 clients.

    >>> from types import SimpleNamespace as Context
    >>> ctx, sent = Context(roster=jnp.arange(5)), jnp.ones(5, bool)
    >>> payload = jnp.array([1.0, 1.2, 1.3, 0.5, 900.0])
    >>> krum(1).apply(ctx, payload, sent, ())[0].round(3).item()
    1.2

    Reference: Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent, section 4.
    """
    return _krum("krum", f, 1)


def multi_krum(f: int, m: int | None = None) -> Aggregator:
    """The mean of the m messages that have the nearest neighbours.

    Those of the m lowest scores of `krum`; of equal scores, those of the lowest
    population ids. All clients count alike, whatever their weights.

    Breakdown point: f of n, if n >= 2f + 3, as of `krum`. Of fewer who sent nothing is
    delivered. Over a mesh every device is given the stack of whole messages.

    Args:
      f: how many may lie; may be traced.
      m: how many are averaged, but never more than `n - f - 2`, which is None.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if f is not a whole number of at least 0, m is not positive, or
        (unless f is traced) a cohort has fewer than 2f + 3 clients.

    >>> from types import SimpleNamespace as Context
    >>> ctx, sent = Context(roster=jnp.arange(5)), jnp.ones(5, bool)
    >>> payload = jnp.array([1.0, 1.2, 1.3, 0.5, 900.0])
    >>> multi_krum(1).apply(ctx, payload, sent, ())[0].round(3).item()
    1.25

    Reference: Blanchard et al. 2017, section 5; the bound of m that of El Mhamdi et
    al. 2018, arXiv:1802.07927.
    """
    if m is not None and m < 1:
        raise ValueError(f"multi_krum: m must be at least 1 or None, got {m}.")
    return _krum("multi_krum", f, m)


def _krum(name: str, f: int, m: int | None) -> Aggregator:
    check_liars(name, f)

    def apply(ctx, payload, sent, state):
        check_cohort(name, f, 2 * f + 3, sent)
        most = jnp.sum(sent) - f - 2
        chosen = most if m is None else jnp.minimum(m, most)
        scores = _scores(squared_distances(payload), sent, f)
        place = jnp.argsort(jnp.lexsort((ctx.roster, scores, ~sent)))
        enough = most > f
        near = (place < chosen) & enough

        def block(x):
            wide = jnp.where(near[:, None], x, 0).astype(jnp.float32)
            return jnp.sum(wide, 0) / jnp.maximum(jnp.sum(near), 1)

        return by_blocks(block, payload), sent & enough, state

    return Aggregator(tree.of_floats(name), apply)


def bulyan(f: int) -> Aggregator:
    """Krum's choices one after another, and of each coordinate the mean of the nearest.

    `theta = n - 2f` times the choice of `krum` among the messages that are left is
    moved to the set S. Then, for each coordinate, the mean of the `beta = theta - 2f`
    values of S that are nearest to the median of S. Of equal scores the lowest
    population id is chosen, of values equally near the lower one. Among the r messages
    that are left a score is of the r - f - 2 nearest, or of the nearest one when so few
    are left. All clients count alike, whatever their weights.

    Breakdown point: f of n, if n >= 4f + 3. Up to then no coordinate leaves the range
    of the honest ones. Of fewer who sent nothing is delivered. Over a mesh every device
    is given the stack of whole messages.

    Args:
      f: how many may lie; may be traced.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if f is not a whole number of at least 0, or (unless traced) a cohort
        has fewer than 4f + 3 clients.

    >>> from types import SimpleNamespace as Context
    >>> ctx, sent = Context(roster=jnp.arange(7)), jnp.ones(7, bool)
    >>> payload = jnp.array([1.0, 1.2, 1.3, 0.5, 900.0, 1.1, 1.5])
    >>> bulyan(1).apply(ctx, payload, sent, ())[0].round(3).item()
    1.2

    Reference: El Mhamdi, Guerraoui, Rouault 2018, arXiv:1802.07927, section 4.
    """
    check_liars("bulyan", f)

    def apply(ctx, payload, sent, state):
        check_cohort("bulyan", f, 4 * f + 3, sent)
        n = jnp.sum(sent)
        theta = n - 2 * f
        beta = theta - 2 * f
        distances = squared_distances(payload)

        def choose(i, left):
            scores = _scores(distances, left, f)
            best = jnp.lexsort((ctx.roster, scores, ~left))[0]
            return left.at[best].set(left[best] & (i >= theta))

        chosen = sent & ~jax.lax.fori_loop(0, len(sent), choose, sent)

        def block(x):
            x = ascending(x, chosen)
            centre, rank = middle(x, theta), jnp.arange(len(x))
            # The nearest are a run of these: it begins where the lowest of a run is no
            # further away than what comes after the run.
            after = x.at[rank + beta].get(mode="fill", fill_value=jnp.inf)
            first = jnp.sum(centre - x > after - centre, 0)
            rank = rank[:, None]
            near = jnp.where((rank >= first) & (rank < first + beta), x, 0)
            return jnp.sum(near.astype(jnp.float32), 0) / jnp.maximum(beta, 1)

        enough = beta >= 3
        payload = tree.mask(enough, by_blocks(block, payload))
        return payload, sent & enough, state

    return Aggregator(tree.of_floats("bulyan"), apply)


def squared_distances(payload: Payload) -> jax.Array:
    """`||x_i - x_j||^2` of all pairs of rows of a stack, float32 `[K, K]`.

    By their differences: from a matrix of products, which is no faster, what is left of
    `||x_i||^2 + ||x_j||^2 - 2 <x_i, x_j>` is noise once messages are as close as a
    thousandth of their length. It takes a few coordinates at a time of all clients, and
    no memory but for those and the result.

    >>> squared_distances({"w": jnp.array([[0.0, 3.0], [4.0, 0.0]])}).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """

    def between(x):
        wide = x.astype(jnp.float32)
        return jnp.sum(jnp.square(wide[:, None] - wide), -1)

    def leaf(x):
        x = x.reshape(len(x), -1)
        width = min(BLOCK, x.shape[1])
        blocks = x.shape[1] // width

        def add(i, summed):
            block = jax.lax.dynamic_slice_in_dim(x, i * width, width, 1)
            return summed + between(block)

        return jax.lax.fori_loop(0, blocks, add, between(x[:, blocks * width :]))

    return sum(map(leaf, jax.tree.leaves(payload)))  # pyright: ignore


def _scores(distances: jax.Array, left: jax.Array, f: int | jax.Array) -> jax.Array:
    """Krum's, `[K]`, among those that are left."""
    pairs = left[:, None] & left & ~jnp.eye(len(left), dtype=bool)
    nearest = jnp.sort(jnp.where(pairs, distances, jnp.inf), axis=1)
    count = jnp.maximum(jnp.sum(left) - f - 2, 1)
    return jnp.sum(jnp.where(jnp.arange(len(left)) < count, nearest, 0), 1)
