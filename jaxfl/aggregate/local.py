"""Aggregators of models that nodes keep for themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxfl import tree
from jaxfl.core import Aggregator


def dynamic_average(delta: float) -> Aggregator:
    """Averages models only where they have diverged, and as few of them as will do.

    Every node has a model of its own, see `local_models`. Those that violate

        ||f_i - r||^2 <= delta            (f_i - r is the payload, up to its sign)

    are the set B. While their average violates it too, other nodes join B in random
    order, 2 |B| more each time, or all once B would pass half of the nodes that sent.
    Then the nodes of B are given the average over B, each counting alike; the others
    go on, and r moves with `local_models` if B is everyone. When all conditions hold
    nothing is sent: `delta = inf` is no communication. `delta = 0` is periodic
    averaging, to the last bit.

    Client sends: its model if it is in B, and nothing else. Server sees: those models.
    Bits: one message up and one average down for each node of B; that a coordinator
    asks a node to join is not counted. `info.delivered` says who was in B.

    The condition is checked at the end of a round; the paper's every b batches are
    `steps=b`. The paper's count of violations, which calls for everyone when it has
    reached the number of nodes, is left out.

    Args:
      delta: the divergence threshold, a squared distance, at least 0; may be traced.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if delta is negative.

    >>> from jaxfl.core import Context
    >>> node, sent = jnp.arange(4), jnp.ones(4, bool)
    >>> ctx = Context(
    ...     jax.random.key(0), jax.random.key(1), jnp.int32(0), jnp.int32(-1), node,
    ...     sent, jnp.int32(4))
    >>> def average(*distances):
    ...     payload, delivered, () = dynamic_average(1.0).apply(
    ...         ctx, jnp.array(distances), sent, ())
    ...     return payload.item(), delivered.tolist()
    >>> average(0.5, 0.5, 0.5, 0.5)  # no violation
    (0.0, [False, False, False, False])
    >>> average(1.5, 0.0, -1.1, 0.0)  # balance each other
    (0.2, [True, False, True, False])
    >>> average(1.5, 0.5, 0.0, 0.0)
    (0.5, [True, True, True, True])

    Reference: Kamp et al. 2018, arXiv:1807.03210, algorithms 1 and 2.
    """
    if isinstance(delta, int | float) and not delta >= 0:
        raise ValueError(f"delta must be at least 0, got {delta}.")

    def outside(payload):
        return tree.norm(payload, squared=True) > delta

    def apply(ctx, payload, sent, state):
        violates = sent & jax.vmap(outside)(payload)
        draw = jax.vmap(lambda node: jax.random.bits(jax.random.fold_in(ctx.key, node)))
        queue = jnp.lexsort((ctx.roster, draw(ctx.roster), ~violates, ~sent))
        place = jnp.argsort(queue)  # the violators first, then who sent in any order
        everyone = jnp.sum(sent)

        def violated(size):
            average = tree.mean_rows(place < size, payload)
            return (size < everyone) & outside(average)

        def grow(size):
            return jnp.where(6 * size > everyone, everyone, 3 * size)

        size = jax.lax.while_loop(violated, grow, jnp.sum(violates))
        delivered = place < size
        return tree.mean_rows(delivered, payload), delivered, state

    def traffic(ctx, bits, delivered, reply):
        return jnp.where(delivered, bits, 0.0), jnp.where(delivered, reply, 0.0)

    return Aggregator(tree.of_floats("dynamic_average"), apply, traffic=traffic)


def mix(weights: np.ndarray | jax.Array) -> Aggregator:
    """Every node averages with its neighbours: gossip, with no server between them.

    `payload_i' = sum_j W_ij payload_j`, so that with `local_models`

        f_i <- sum_j W_ij f_j

    which is decentralised SGD. A neighbour that sent nothing, or was not asked, has
    its weight given to the node itself; a node that sent nothing, or has no row in W,
    keeps its model. With a symmetric W the average of those present is then the same
    after as before.

    Client sends: its message to each of its neighbours who is there; no server is. What
    `local_models` calls the reference is then the average of all models when all sent,
    a record that no node sees. Bits up: the message's, for each neighbour; down: those
    of the neighbours' messages.

    Args:
      weights: W, `[N, N]`, no entry negative, each row of sum 1; `W_ij > 0` where node
        i hears node j. See `jaxfl.topology`.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if weights are not square, or (unless traced) negative or of rows
        that do not sum to 1; by `federate`, with a channel that has a server's state.

    >>> from jaxfl import topology
    >>> from types import SimpleNamespace as Context
    >>> models, node = jnp.array([[0.0], [3.0], [6.0], [9.0]]), jnp.arange(4)
    >>> sent = jnp.array([True, True, True, False])
    >>> aggregator = mix(topology.ring(4))
    >>> mixed, delivered, () = aggregator.apply(
    ...     Context(roster=node), models, sent, ())
    >>> mixed[sent].ravel().tolist()  # node 3, who is away, was a neighbour of 0 and 2
    [1.0, 3.0, 5.0]
    >>> bits = jnp.where(sent, 32.0, 0.0)
    >>> up, down = aggregator.traffic(Context(roster=node, alive=sent), bits, sent, 0)
    >>> up.tolist(), down.tolist()
    ([32.0, 64.0, 32.0, 0.0], [32.0, 64.0, 32.0, 0.0])

    Reference: Lian et al. 2017, arXiv:1705.09056, algorithm 1, with the local steps
    before the averaging; Boyd et al. 2006, Randomized Gossip Algorithms.
    """
    shape = jnp.shape(weights)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"weights must be a square matrix [N, N], got shape {shape}.")
    if not isinstance(weights, Tracer):
        rows = np.asarray(weights, np.float64)
        if not (rows >= 0).all():
            raise ValueError("weights must not be negative.")
        if not np.allclose(rows.sum(1), 1.0, atol=1e-5):
            raise ValueError("weights must have rows that sum to 1.")
    weights = jnp.asarray(weights, jnp.float32)
    n = shape[0]

    def between(roster, present):
        """The weights of the roster's rows and columns, who is not there left out."""
        rows = weights.at[roster].get(mode="fill", fill_value=0.0)
        there = jnp.zeros(n, bool).at[roster].set(present, mode="drop")
        mixing = rows.at[:, roster].get(mode="fill", fill_value=0.0)
        own = jnp.sum(jnp.where(there, 0.0, rows), 1)
        return jnp.where(present, mixing, 0.0) + jnp.diag(own)

    def apply(ctx, payload, sent, state):
        mixing = between(ctx.roster, sent)

        def leaf(x):
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mixed = jnp.tensordot(mixing, wide, 1, precision=jax.lax.Precision.HIGHEST)
            return mixed.astype(x.dtype)

        return jax.tree.map(leaf, payload), sent & (ctx.roster < n), state

    def traffic(ctx, bits, delivered, reply):
        linked = between(ctx.roster, ctx.alive) > 0
        linked &= ctx.alive[:, None] & ~jnp.eye(len(ctx.roster), dtype=bool)
        heard = jnp.where(linked, bits, 0.0)  # [i, j]: what i hears of j
        return bits * jnp.sum(linked, 0), jnp.sum(heard, 1)

    return Aggregator(tree.of_floats("mix"), apply, personal=True, traffic=traffic)
