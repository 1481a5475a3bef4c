"""Memories that make up for what a codec loses."""

import jax
import optax

from jaxfl import tree
from jaxfl.core import Channel, Message


def error_feedback(channel: Channel) -> Channel:
    """Adds to each message what the codec lost of those before it.

    At each client, with e_0 = 0,

        p_t = x_t + e_t,    send C(p_t),    e_{t+1} = p_t - C(p_t)

    so that all that was sent is all that was to be sent, but for the last error:
    `sum_t C(p_t) = sum_t x_t - e_T`. In a round in which the codec withholds its
    message nothing arrives, and e_{t+1} = p_t; a message that was withheld left of here
    is neither added to nor remembered. What is to the right of here, such as a gate or
    a clip, is not made up for.

    The time is the codec's, and that of reading and writing a model's worth of memory
    for each client of the cohort.

    Client sends: what the codec sends. Server sees: what it decodes to, also of a codec
    that decodes at the server, since the client has to know. Bits: the codec's.

    Args:
      channel: C; its decoded messages are subtracted from the payload, so it must not
        lose more than it keeps, as `random_k` does by default, which is scaled up to be
        unbiased, and `qsgd` where its levels are fewer than the root of d: then the
        error grows without end.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if the channel makes sense of sums only; when it has a state at the
        server, which a client does not know.

    >>> import jax.numpy as jnp
    >>> from jaxfl.compress import top_k
    >>> half = error_feedback(top_k(0.5))
    >>> update = Message(jnp.array([3.0, 2.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> state = half.init(jnp.zeros(2))[1]
    >>> for _ in range(3):
    ...     message, state, _ = half.encode(None, update, ((), ()), state)
    ...     print(message.payload.tolist())
    [3.0, 0.0]
    [0.0, 4.0]
    [6.0, 0.0]

    Reference: Seide et al. 2014 (1-bit SGD); Stich et al. 2018, arXiv:1809.07599,
    algorithm 1; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2.
    """
    init = _beside_zeros(channel, "error_feedback")

    def encode(ctx, message, server_state, client_state):
        error, inner_state = client_state
        sent_before = message.weight > 0
        wanted = optax.tree.add(message.payload, error)
        arrived, message, inner_state, report = _arrived(
            channel, ctx, message, wanted, server_state, inner_state
        )
        left = optax.tree.sub(wanted, arrived)
        error = optax.tree.where(sent_before, left, error)
        return message._replace(payload=arrived), (error, inner_state), report

    return Channel(init, encode)


def differences(channel: Channel) -> Channel:
    """Sends how a payload differs from the client's last, as both ends know it.

    At each client, and in the server's memory of it, with g_0 = 0,

        send c_t = C(x_t - g_t),    g_{t+1} = g_t + c_t

    and the payload becomes g_{t+1}. This is EF21. In a round in which the codec
    withholds its message the server goes on with g_t: `differences(gate(...))` is lazy
    aggregation. A message that was withheld left of here stays so and changes no g.

    Of a cohort smaller than the population only the cohort's g are summed, where the
    paper's server, of all clients in each round, sums everyone's.

    Client sends: what the codec sends. Server sees: what it decodes to, and keeps one g
    for each client; here it is in the client's state. Bits: the codec's.

    Args:
      channel: C, a contraction such as `top_k`.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if the channel makes sense of sums only; when it has a state at the
        server.

    >>> import jax.numpy as jnp
    >>> from jaxfl.compress import top_k
    >>> half = differences(top_k(0.5))
    >>> update = Message(jnp.array([3.0, 2.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> state = half.init(jnp.zeros(2))[1]
    >>> for _ in range(2):
    ...     message, state, _ = half.encode(None, update, ((), ()), state)
    ...     print(message.payload.tolist(), message.bits.item())
    [3.0, 0.0] 33.0
    [3.0, 2.0] 33.0

    Reference: Richtarik et al. 2021, arXiv:2106.05203, algorithm 2.
    """
    init = _beside_zeros(channel, "differences")

    def encode(ctx, message, server_state, client_state):
        known, inner_state = client_state
        weight, wanted = message.weight, optax.tree.sub(message.payload, known)
        arrived, message, inner_state, report = _arrived(
            channel, ctx, message, wanted, server_state, inner_state
        )
        known = optax.tree.where(weight > 0, optax.tree.add(known, arrived), known)
        message = message._replace(payload=known, weight=weight)
        return message, (known, inner_state), report

    return Channel(init, encode)


def _beside_zeros(channel: Channel, name: str):
    """An init whose client state is zeros like the payload, and the channel's own."""
    if channel.of_sums:
        raise ValueError(f"{name}: channel must make sense of one message alone.")

    def init(payload):
        tree.require_floats(payload, name)
        server_state, client_state = channel.init(payload)
        if jax.tree.leaves(server_state):
            raise ValueError(
                f"{name}: channel must have no state at the server, got {server_state}."
            )
        return server_state, (optax.tree.zeros_like(payload), client_state)

    return init


def _arrived(channel, ctx, message: Message, wanted, server_state, client_state):
    """What the server gets of a payload, and the message, state and report."""
    ctx = ctx and ctx._replace(bound=None)  # that of the update, not of what is wanted
    message, client_state, report = channel.encode(
        ctx, message._replace(payload=wanted), server_state, client_state
    )
    arrived, _ = channel.decode(ctx, message.payload, server_state, report)
    arrived = tree.mask(message.weight > 0, arrived)
    return arrived, message, client_state, report
