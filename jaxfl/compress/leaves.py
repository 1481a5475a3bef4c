"""A channel for every array of a payload."""

import jax
import jax.numpy as jnp

from jaxfl.channel import at_layer, encode_part
from jaxfl.core import Channel


def leafwise(channel: Channel) -> Channel:
    """Applies a channel to every array of the payload, each on its own.

    A codec then has a scale, a threshold or a norm for each layer of a model. Every
    array has states and random keys of its own. If one is withheld, zeros go in its
    place, as in `on`.

    Client sends: a message for each array. Server sees: what they decode to. Bits:
    their sum.

    Args:
      channel: it sees a message of one array, which what it sends must be as well.

    >>> from jaxfl.compress import scaled_sign
    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(*[jax.random.key(0)] * 2, *[jnp.int32(0)] * 5)
    >>> payload = {"b": jnp.array([-4.0]), "w": jnp.array([1.0, 3.0])}
    >>> update = Message(payload, jnp.float32(1.0), jnp.float32(96.0))
    >>> signs = leafwise(scaled_sign())
    >>> message, _, _ = signs.encode(ctx, update, *signs.init(payload))
    >>> jax.tree.map(lambda x: x.tolist(), message.payload), message.bits.item()
    ({'b': [-4.0], 'w': [2.0, 2.0]}, 67.0)
    """

    def init(payload):
        states = [channel.init(x) for x in jax.tree.leaves(payload)]
        return tuple(s for s, _ in states), tuple(c for _, c in states)

    def sends(payload):
        return jax.tree.map(channel.sends, payload)

    def encode(ctx, message, server_state, client_state):
        leaves, structure = jax.tree.flatten(message.payload)
        bits = header = jnp.float32(0)
        states, reports = [], []
        for i, leaf in enumerate(leaves):
            one, state, report = encode_part(
                *(channel, at_layer(ctx, i, ctx.bound), leaf, message.weight),
                *(server_state[i], client_state[i]),
            )
            leaves[i], bits, header = one.payload, bits + one.bits, header + one.header
            states.append(state)
            reports.append(report)
        message = message._replace(
            payload=structure.unflatten(leaves),
            bits=bits,
            header=message.header + header,
        )
        return message, tuple(states), tuple(reports)

    def decode(ctx, payload, server_state, report):
        leaves, structure = jax.tree.flatten(payload)
        states = list(server_state)
        for i, leaf in enumerate(leaves):
            leaves[i], states[i] = channel.decode(
                at_layer(ctx, i, ctx.bound), leaf, states[i], report[i]
            )
        return structure.unflatten(leaves), tuple(states)

    return Channel(init, encode, decode, of_sums=channel.of_sums, sends=sends)
