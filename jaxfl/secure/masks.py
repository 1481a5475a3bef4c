"""Masks that hide each message and cancel in their sum, inside a compiled round."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl.compress.vector import if_sent
from jaxfl.core import Channel, Context, unchanged
from jaxfl.secure.cost import traffic
from jaxfl.secure.fixed import Residues, modulo, no_sum
from jaxfl.secure.graph import Graph, complete, offsets


def secure_sum(graph: Callable[[int], Graph] = complete) -> Channel:
    """Hides each message behind masks, of which the sum can be rid and no part of it.

    With a mask `r_uv = r_vu` for every pair of neighbours and one of its own for each
    client, b_u, uniform modulo 2^bits, client u sends

        y_u = x_u + b_u + sum_{v > u} r_uv - sum_{v < u} r_uv   mod 2^bits

    In the sum over those who sent the server removes their b_u, and those r_uv of which
    one end dropped out; all others have cancelled. For every client of the roster t of
    it and its neighbours must have sent, or nothing is decoded: then the aggregate is
    no number, nothing is delivered and no state moves, and `info.delivered` is all
    False. Who is not alive, withheld its message or is a row of padding counts as one
    that dropped out after it had shared its keys.

    Here masks are drawn from the key of the round, which both ends have, so a run is
    repeatable; what keys and shares do about that is in `jaxfl.secure.protocol`, and
    gives the same sum to the bit. A client draws k + 1 masks, one after another, so
    that memory does not grow with k; the server one for each that sent, and up to k for
    each that did not.

    Client sends: y_u. Server sees: y_u, uniform by itself and with those of others, and
    the sum. Bits: as before, and in the header the keys and shares that the protocol
    sends up, see `traffic`: `2 a_K + k (2 a_S + a_T) + (k + 1) a_S`, with no more
    neighbours than clients that are alive. What they are sent in turn is not counted.
    Guarantee: against an honest-but-curious server with fewer than t colluding
    neighbours of each client, computational; none when a single client sends.

    Args:
      graph: `n -> Graph`, for a cohort of n: `complete`, or `sparse(...)`, whose ring
        is ordered anew in each round.

    Raises:
      TypeError: when the payload is not that of `fixed_point`.
      ValueError: by `federate`, with an aggregator that is not linear; when a round is
        traced, if there is no such graph.

    >>> from jaxfl.core import Context, Message
    >>> from jaxfl.secure import Residues
    >>> everyone = jnp.arange(3)
    >>> ctx = Context(*[jax.random.key(0)] * 2, jnp.int32(0), everyone, everyone,
    ...               everyone >= 0, jnp.int32(3), sent=everyone >= 0)
    >>> x = Residues(jnp.array([[1, 2], [10, 20], [100, 200]], jnp.uint32), 16)
    >>> def send(client, x):
    ...     message = Message(x, jnp.float32(1), jnp.float32(32))
    ...     ctx_u = ctx._replace(client=client, sent=None)
    ...     return secure_sum().encode(ctx_u, message, (), ())[0].payload
    >>> y = jax.vmap(send)(everyone, x)
    >>> bool((y.values == x.values).any())
    False
    >>> summed = jax.tree.map(lambda y: jnp.sum(y, 0, dtype=jnp.uint32), y)
    >>> secure_sum().decode(ctx, summed, (), ())[0].values.tolist()
    [111, 222]

    Reference: Bonawitz et al. 2017, arXiv:1611.04482, figure 4; Bell et al. 2020,
    ePrint 2020/704, algorithm 2.
    """

    def init(payload):
        if not isinstance(payload, Residues):
            raise TypeError(
                "secure_sum: payload must be of residues; put fixed_point to its left."
            )
        return (), ()

    def encode(ctx, message, server_state, client_state):
        n = ctx.roster.shape[0]
        chosen = graph(n)
        steps = jnp.array(offsets(chosen, n), jnp.int32)
        keys = _keys(ctx)
        ring = ctx.roster[_ring(keys, ctx)]
        place = jnp.argmax(ring == ctx.client)
        x, unravel = ravel_pytree(message.payload)

        def add(i, x):
            other = ring[(place + steps[i]) % n]
            return x + _pairwise(keys, ctx.client, other, x.size)

        x = x + _own(keys, ctx.client, x.size)
        x = jax.lax.fori_loop(0, len(steps), add, x)
        x = modulo(x, message.payload.bits)

        k = jnp.minimum(chosen.neighbours, jnp.sum(ctx.alive) - 1)
        header = traffic(chosen._replace(neighbours=k), 0, 0).up
        message = message._replace(
            payload=unravel(x), header=message.header + if_sent(message, header)
        )
        return message, client_state, ()

    def decode(ctx, payload, server_state, report):
        n = ctx.roster.shape[0]
        chosen = graph(n)
        steps = jnp.array(offsets(chosen, n), jnp.int32)
        keys = _keys(ctx)
        order = _ring(keys, ctx)
        ring, sent = ctx.roster[order], ctx.sent[order]
        x, unravel = ravel_pytree(payload)

        def without(u, x):
            """The sum without the masks of the client at u."""

            def remove(i, x):
                """A neighbour's end of a mask of which the other end is missing."""
                v = (u + steps[i]) % n
                return jax.lax.cond(
                    sent[v],
                    lambda x: x - _pairwise(keys, ring[v], ring[u], x.size),
                    lambda x: x,
                    x,
                )

            return jax.lax.cond(
                sent[u],
                lambda x: x - _own(keys, ring[u], x.size),
                lambda x: jax.lax.fori_loop(0, len(steps), remove, x),
                x,
            )

        def count(i, holders):
            return holders + jnp.roll(sent, -steps[i])

        x = jax.lax.fori_loop(0, n, without, x)
        holders = jax.lax.fori_loop(0, len(steps), count, sent.astype(jnp.int32))
        x = modulo(x, payload.bits)
        x = jnp.where(jnp.all(holders >= chosen.threshold), x, no_sum(payload.bits))
        return unravel(x), server_state

    return Channel(
        *(init, encode, decode), of_sums=True, bound=unchanged, sensitivity=unchanged
    )


def _keys(ctx: Context) -> jax.Array:
    """The keys of the ring, of masks of pairs and of clients' own, `[3]`.

    They are of a generator whose draws are the same inside and outside of vmap, which
    not all are, or masks would not cancel.
    """
    seed = jax.random.key_data(ctx.shared_key)[:2]
    return jax.random.split(jax.random.wrap_key_data(seed, impl="threefry2x32"), 3)


def _ring(keys: jax.Array, ctx: Context) -> jax.Array:
    """Rows of the roster in a random order that is that of the ids alone, `[K]`."""
    draw = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(keys[0], i)))
    return jnp.argsort(draw(ctx.roster))


def _pairwise(keys: jax.Array, one, other, size: int) -> jax.Array:
    """What a mask of two clients adds to the message of the first, uint32 `[size]`."""
    key = jax.random.fold_in(keys[1], jnp.minimum(one, other))
    mask = jax.random.bits(jax.random.fold_in(key, jnp.maximum(one, other)), (size,))
    return jnp.where(one < other, mask, -mask)


def _own(keys: jax.Array, client, size: int) -> jax.Array:
    """A client's own mask, uint32 `[size]`."""
    return jax.random.bits(jax.random.fold_in(keys[2], client), (size,))
