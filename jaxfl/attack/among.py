"""Who lies, and when: any channel, at certain clients only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Channel, Context, unchanged

Clients = Any  # ids, or flags [N]
Rounds = Any  # None, a range, flags [R], or a predicate of the round


def among(clients: Clients, channel: Channel, rounds: Rounds = None) -> Channel:
    """Applies a channel at certain clients only; all others send as if it were not.

    `x_i' = channel(x_i)` for i in the set, `x_i` for all others: so that some are
    liars, or some have a faulty machine, or only some have momentum. It is placed where
    they act: left of what an honest implementation does to their message, such as a
    `clip` that the server enforces, and right of what they keep to. Its decode is not
    run: the server knows nothing of it.

    Client sends: in the set what the channel makes of its message; else its message.
    Server sees: it, and not who is in the set. Bits: of the channel in the set.
    What may come out is not bounded.

    Args:
      clients: ids, int `[M]`, or flags, bool `[N]`; they may be traced, so that a vmap
        goes over sets of liars.
      channel: what to do with their messages; it keeps the payload's shape.
      rounds: when: a `range`, flags bool `[R]`, or a predicate of the round's number
        (from 0); always if None. At other times the channel's state stays as it is.

    Raises:
      TypeError: if clients or rounds are not of these types; when a payload would
        change its shape.
      ValueError: if the channel is, or has, a `mean`, which is of all clients.

    >>> import optax
    >>> from types import SimpleNamespace as Context
    >>> from jaxfl import at_client
    >>> from jaxfl.core import Message
    >>> liars = among([1, 4], at_client(optax.scale(-1.0)), rounds=range(10, 20))
    >>> update = Message(jnp.array([2.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> def sent(client, round):
    ...     ctx = Context(client=client, round=round)
    ...     return liars.encode(ctx, update, *liars.init(update.payload))[0].payload
    >>> sent(0, 15).tolist(), sent(1, 15).tolist(), sent(1, 20).tolist()
    ([2.0], [-2.0], [2.0])
    """
    lies, now = membership(clients), schedule(rounds)
    if channel.of_sums:
        raise ValueError("channel: mean() is of all clients; put it right of among().")

    def init(payload):
        sends = jax.eval_shape(channel.sends, payload)
        if jax.tree.map(jnp.shape, sends) != jax.tree.map(jnp.shape, payload):
            raise TypeError("among: channel must keep the shape of a payload.")
        return channel.init(payload)

    def encode(ctx: Context, message, server_state, client_state):
        lie, state, report = channel.encode(ctx, message, server_state, client_state)
        here = lies(ctx.client) & now(ctx.round)
        message, state = jax.tree.map(
            lambda new, old: jnp.where(here, new, old),
            (lie, state),
            (message, client_state),
        )
        return message, state, tree.mask(here, report)

    return Channel(init, encode, sensitivity=unchanged)


def membership(clients: Clients) -> Callable[[jax.Array], jax.Array]:
    """Whether a client, or each of several, is in a set, from its id.

    Raises:
      TypeError: if clients are neither ids nor flags.

    >>> membership([1, 4])(jnp.arange(5)).tolist()
    [False, True, False, False, True]
    >>> membership(jnp.array([False, True]))(jnp.arange(3)).tolist()
    [False, True, False]
    """
    if not hasattr(clients, "dtype") and not len(clients):
        return lambda client: jnp.zeros(jnp.shape(client), bool)
    chosen = jnp.asarray(clients)
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise TypeError(
            "clients must be ids, int [M], or flags, bool [N], "
            f"got {chosen.dtype}{list(chosen.shape)}."
        )
    if chosen.dtype == bool:
        return lambda client: chosen.at[client].get(mode="fill", fill_value=False)
    return lambda client: jnp.any(jnp.asarray(client)[..., None] == chosen, -1)


def schedule(rounds: Rounds) -> Callable[[jax.Array], jax.Array]:
    """Whether it is time, from the round's number.

    Raises:
      TypeError: if rounds are neither None, a range, flags, nor a predicate.

    >>> [bool(schedule(range(2, 6, 3))(r)) for r in range(7)]
    [False, False, True, False, False, True, False]
    """
    if rounds is None:
        return lambda round: jnp.array(True)
    if callable(rounds):
        predicate: Callable = rounds
        return predicate
    if isinstance(rounds, range):
        if not len(rounds):
            return lambda round: jnp.array(False)
        first, last = min(rounds), max(rounds)
        return lambda round: (
            (round >= first) & (round <= last) & ((round - first) % rounds.step == 0)
        )
    flags = jnp.asarray(rounds)
    if flags.ndim != 1 or flags.dtype != bool:
        raise TypeError(
            "rounds must be None, a range, a predicate or flags, bool [R], "
            f"got {rounds!r}."
        )
    return lambda round: flags.at[round].get(mode="fill", fill_value=False)
