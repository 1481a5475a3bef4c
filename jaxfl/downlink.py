"""The way down: a broadcast sent as encoded differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.core import Algorithm, Channel, Message, Params, PyTree, keep, newest


class DownlinkState(NamedTuple):
    """The server's state.

    Attributes:
      algorithm: that of the algorithm inside.
      known: `w^`, the broadcast as the clients have it.
      channel: both ends of the channel; the server is its only sender.
      bits: float32 `[]`, the length of the last difference.
    """

    algorithm: PyTree
    known: PyTree
    channel: tuple[PyTree, PyTree]
    bits: jax.Array

    @property
    def params(self) -> Params:
        """The server's own model, of which clients know `known`."""
        return self.algorithm.params


class DownlinkClient(NamedTuple):
    """A client's state: the algorithm's, and the round it last took part in, or -1."""

    algorithm: PyTree
    heard: jax.Array


def downlink(algorithm: Algorithm, channel: Channel) -> Algorithm:
    """Sends the broadcast down as differences that a channel has encoded.

    Server and clients hold the same `w^`, from which the clients train. When the server
    has stepped from w_t to w_{t+1} it sends

        C(w_{t+1} - w^_t),   w^_{t+1} = w^_t + C(w_{t+1} - w^_t)

    so what the encoding C lost is in the next difference, and nothing of it is lost for
    good. A payload is still what the server had, w^, minus what the client has.

    Server sends: the encoded difference. Bits down: a client that took part in round s
    for the last time is sent the t - s differences that it missed, each counted as long
    as the last one, or the whole `w^` where that is shorter, as the first time.

    Args:
      algorithm: any; its broadcast must be of floats if the channel's payload must.
      channel: C, a codec, with an error feedback of its own or without.

    Returns:
      An algorithm whose states are `DownlinkState` and `DownlinkClient`.

    Raises:
      TypeError: if algorithm or channel is not of its type.
      ValueError: if the channel has a `mean`: there is one sender; if the algorithm
        keeps several versions: `asynchronous(downlink(...), ...)` does.

    >>> from jaxfl import at_client, fedavg, federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> halves = at_client(optax.stateless(
    ...     lambda x, params: jax.tree.map(lambda x: jnp.round(2 * x) / 2, x)))
    >>> y = jnp.array([1.0, 3.3])
    >>> state, _ = simulate(
    ...     federate(downlink(fedavg(loss, optax.sgd(1.0)), halves), mean()),
    ...     jnp.float32(0.0), from_arrays(y, y, client_ids=[0, 1]),
    ...     rounds=1, key=jax.random.key(0), progress=False)
    >>> state.params.item(), state.server.algorithm.known.item()
    (2.15, 2.0)

    Reference: Tang et al. 2019, arXiv:1905.05957 (DoubleSqueeze), for the error that is
    sent later; Sattler et al. 2019, arXiv:1903.02891, for clients that missed rounds.
    """
    for name, part, kind in (
        ("algorithm", algorithm, Algorithm),
        ("channel", channel, Channel),
    ):
        if not isinstance(part, kind):
            raise TypeError(f"{name} must be a jaxfl.{kind.__name__}, got {part!r}.")
    if channel.of_sums:
        raise ValueError("channel: mean() divides a sum, and one server sends.")
    if algorithm.version is not newest:
        raise ValueError("algorithm: it broadcasts several versions; put this inside.")

    def init(params):
        server, client = algorithm.init(params)
        known = algorithm.broadcast(server)
        states = channel.init(jax.tree.map(jnp.zeros_like, known))
        state = DownlinkState(server, known, states, jnp.float32(0))
        return state, DownlinkClient(client, jnp.int32(-1))

    def client(ctx, broadcast, state, data):
        payload, own, metrics = algorithm.client(ctx, broadcast, state.algorithm, data)
        return payload, DownlinkClient(own, ctx.round), metrics

    def server(ctx, state, outcome):
        step_key, send_key, decode_key = jax.random.split(ctx.key, 3)
        stepped = algorithm.server(ctx._replace(key=step_key), state.algorithm, outcome)
        news = optax.tree.sub(algorithm.broadcast(stepped), state.known)
        at_server, at_sender = state.channel
        whole = Message(news, jnp.float32(1), jnp.float32(tree.num_bits(news)))
        message, at_sender, report = channel.encode(
            ctx._replace(key=send_key), whole, at_server, at_sender
        )
        payload, report = tree.mask(message.weight > 0, (message.payload, report))
        news, at_server = channel.decode(
            ctx._replace(key=decode_key), payload, at_server, report
        )
        return DownlinkState(
            stepped,
            optax.tree.add(state.known, news),
            (at_server, at_sender),
            message.bits + message.header,
        )

    def receive(broadcast, payload, state, delivered):
        own = algorithm.receive(broadcast, payload, state.algorithm, delivered)
        return state._replace(algorithm=own)

    def bits_down(ctx, server_state, state):
        whole = algorithm.bits_down(ctx, server_state.algorithm, state.algorithm)
        missed = (ctx.round - state.heard) * server_state.bits
        return jnp.where(state.heard < 0, whole, jnp.minimum(missed, whole))

    return Algorithm(
        init,
        client,
        server,
        keep if algorithm.receive is keep else receive,
        lambda state: state.known,
        bits_down,
    )
