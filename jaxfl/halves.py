"""The two halves of a round: what one client does, and what the server does.

`jaxfl.round` maps the one over a cohort and feeds the other, in one program. Where
clients are machines of their own each runs its half, see `jaxfl.interop.flower`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.channel import mechanisms
from jaxfl.core import (
    Aggregator,
    Algorithm,
    Bound,
    Channel,
    ClientState,
    Context,
    Data,
    Message,
    Metrics,
    Outcome,
    Payload,
    ServerState,
    State,
    server_context,
)
from jaxfl.privacy.mechanism import Distributed, Local

PyTree = Any
Parts = tuple[Algorithm, Channel, Aggregator]


class Letter(NamedTuple):
    """What one client's half of a round makes.

    Attributes:
      payload: what the channel made of the update; zeros where nothing is sent.
      sent: bool `[]`, whether it leaves the client.
      rejected: bool `[]`, whether it does not because something was not finite.
      bits: float32 `[]`, the length of all that is sent.
      report: what the channel reports of it.
      metrics: what the algorithm measured.
    """

    payload: Payload
    sent: jax.Array
    rejected: jax.Array
    bits: jax.Array
    report: PyTree
    metrics: Metrics


def client_half(
    parts: Parts,
    ctx: Context,
    broadcast: PyTree,
    channel_server: PyTree,
    own: ClientState,
    data: Data,
    weight: jax.Array,
    alive: jax.Array | bool = True,
) -> tuple[Letter, ClientState]:
    """One client's half of a round, from its data to its message.

    `federate` maps it over a cohort; where clients are machines, each calls it.

    Args:
      parts: `federation.parts`.
      ctx: the server's, with the `key` and the id of this client.
      broadcast: what came down, `algorithm.broadcast(server_state)`.
      channel_server: the channel's state at the server.
      own: this client's state.
      data: this client's.
      weight: float32 `[]`, of its message.
      alive: bool `[]`; of a client that is not, nothing is sent and no state moves.

    Returns:
      What it sends, and its state until then. `algorithm.receive` is for when the
      server has answered.
    """
    algorithm, channel, aggregator = parts
    train_key, send_key = jax.random.split(ctx.key)
    ctx = ctx._replace(broadcast=algorithm.version(ctx, broadcast))

    payload, own_algorithm, metrics = algorithm.client(
        ctx._replace(key=train_key), broadcast, own.algorithm, data
    )
    own_algorithm = same(own.algorithm, own_algorithm, "algorithm.client")
    finite = tree.is_finite(payload)
    weight = jnp.where(alive & finite, weight, 0.0)
    bits = jnp.where(weight > 0, jnp.float32(tree.num_bits(payload)), 0.0)
    message, own_channel, report = channel.encode(
        ctx._replace(key=send_key),
        Message(tree.mask(finite, payload), weight, bits, jnp.float32(0)),
        channel_server,
        own.channel,
    )
    own_channel = same(own.channel, own_channel, "channel.encode")
    finite &= tree.is_finite((message.payload, message.weight, report))
    done = alive & finite
    sent = done & (message.weight > 0)
    payload = tree.mask(sent, message.payload)
    length = jnp.where(sent, aggregator.bits(payload, message.bits), message.bits)
    letter = Letter(
        payload,
        sent,
        rejected=alive & ~finite,
        bits=jnp.where(alive, length + message.header, 0.0),
        report=report,
        metrics=metrics,
    )
    new = ClientState(own_algorithm, own_channel)
    return letter, optax.tree.where(done, new, own)


def server_half(
    parts: Parts,
    ctx: Context,
    server: ServerState,
    payload: Payload,
    sent: jax.Array,
    reports: PyTree,
    *,
    apply: Callable | None = None,
) -> tuple[ServerState, Outcome, Payload]:
    """The server's half of a round, from the messages to its next state.

    Args:
      parts: `federation.parts`.
      ctx: the server's.
      server: its state.
      payload: the sum of those that arrived if the aggregator is linear, else the
        stack `[K, ...]`, zero where none did.
      sent: bool `[K]`, whose arrived.
      reports: the sum of what the channel reported of those.
      apply: how the aggregator is applied; `aggregator.apply` if None.

    Returns:
      Its next state, the outcome, and what is given back: the outcome's payload, or
      each client's own, `[K, ...]`, if the aggregator is personal.
    """
    algorithm, channel, aggregator = parts
    apply = aggregator.apply if apply is None else apply
    # One client moves a sum by its own message; what it moves a median by, nobody says.
    summed = aggregator.makes_sum
    summed_bound = channel.bound(Bound()) if summed else Bound()
    private = any(
        not isinstance(mechanism, Local | Distributed)
        for mechanism in mechanisms(channel, summed)
    )
    aggregate_key, decode_key, step_key = jax.random.split(ctx.key, 3)
    payload, delivered, aggregator_state = apply(
        ctx._replace(key=aggregate_key), payload, sent, server.aggregator
    )
    decode_ctx = ctx._replace(key=decode_key, bound=summed_bound, sent=sent)

    def decode(payload):
        return channel.decode(decode_ctx, payload, server.channel, reports)

    if aggregator.personal:
        reply = jax.vmap(lambda x: decode(x)[0])(payload)
        payload, channel_server = tree.mean_rows(delivered, reply), server.channel
    else:
        payload, channel_server = decode(payload)
        reply = payload
    channel_server = same(server.channel, channel_server, "channel.decode")
    aggregator_state = same(server.aggregator, aggregator_state, "aggregator.apply")
    fine = tree.is_finite(payload)  # a sum can overflow
    delivered &= fine
    channel_server, aggregator_state = optax.tree.where(
        fine,
        (channel_server, aggregator_state),
        (server.channel, server.aggregator),
    )
    outcome = Outcome(payload, sent, delivered)
    stepped = algorithm.server(ctx._replace(key=step_key), server.algorithm, outcome)
    stepped = same(server.algorithm, stepped, "algorithm.server")
    # That nobody was there is private too: then the noise alone is what arrives.
    goes_on = fine if private else jnp.any(delivered)
    stepped = optax.tree.where(goes_on, stepped, server.algorithm)
    return ServerState(stepped, channel_server, aggregator_state), outcome, reply


def round_context(
    key: jax.Array,
    algorithm: Algorithm,
    state: State,
    roster: jax.Array,
    alive: jax.Array,
) -> tuple[Context, PyTree, jax.Array]:
    """How a round begins at the server.

    Args:
      key: the run's.
      algorithm: `federation.parts[0]`.
      state: before the round.
      roster: int32 `[K]`, population ids of the cohort.
      alive: bool `[K]`, who of it is there.

    Returns:
      The server's context, the broadcast, and the key of which a client's own is
      `fold_in(key, population id)`.
    """
    client_key, server_key = jax.random.split(jax.random.fold_in(key, state.round))
    broadcast = algorithm.broadcast(state.server.algorithm)
    ctx = server_context(
        server_key, state.round, roster, alive, state.population, broadcast
    )
    return (
        ctx._replace(broadcast=algorithm.version(ctx, broadcast)),
        broadcast,
        client_key,
    )


def blank_unless(flag: jax.Array, values: PyTree) -> PyTree:
    """Values to look at: NaN, or the integer 0, where there are none."""

    def blank(x):
        x = jnp.asarray(x)
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.where(flag, x, jnp.full_like(x, jnp.nan if inexact else 0))

    return jax.tree.map(blank, values)


def same(old: PyTree, new: PyTree, name: str) -> PyTree:
    """`new`, which must be like `old`: a state is carried from round to round."""
    before, after = jax.tree.structure(old), jax.tree.structure(new)
    if before != after:
        raise TypeError(
            f"{name} must return a state of the structure it got, {before}, "
            f"not {after}."
        )

    def leaf(path, a, b):
        b = jnp.asarray(b)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            where = jax.tree_util.keystr(path)
            raise TypeError(
                f"{name} must keep the shapes and dtypes of its state; {where} was "
                f"{a.dtype}{list(a.shape)} and became {b.dtype}{list(b.shape)}."
            )
        return b

    return jax.tree_util.tree_map_with_path(leaf, old, new)
