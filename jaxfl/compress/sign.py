"""Codecs that send signs."""

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.compress.vector import codec, if_sent
from jaxfl.core import Channel


def scaled_sign() -> Channel:
    """Sends the sign of every number and their mean magnitude.

    `C(x) = (||x||_1 / d) sign(x)`, where a 0 counts as positive, since one bit has no
    third value. It is biased: put `error_feedback` round it, and you have EF-signSGD.
    The paper has one scale for each layer: `leafwise(scaled_sign())`.

    Client sends: a bit for each number and the scale. Server sees: plus or minus it.
    Bits: `d + 32`.

    Raises:
      TypeError: when a payload has integers.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> x = jnp.array([1.0, -3.0, 0.0, 4.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = scaled_sign().encode(ctx, update, (), ())
    >>> message.payload.tolist(), message.bits.item()
    ([2.0, -2.0, 2.0, 2.0], 36.0)

    Reference: Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1.
    """

    def code(key, x):
        scale = jnp.mean(jnp.abs(x))
        return jnp.where(x >= 0, scale, -scale), x.size + 32

    return codec(code, "scaled_sign")


def sign_majority() -> Channel:
    """Sends signs, of which the server takes the vote of the majority.

    `sign(sum_i sign(x_i))`, coordinate by coordinate; 0 where the votes are even, and
    a client's own 0 counts as positive. With `mean()` to the right of it clients have
    as many votes as their weight.

    Client sends: a bit for each number. Server sees: the clients' signs. Bits: d.

    Raises:
      TypeError: when a payload has integers.
      ValueError: by `federate`, with an aggregator that makes no sum, which would hold
        a vote of its own.

    >>> from jaxfl.core import Message
    >>> x = jnp.array([1.0, -3.0, 0.0, 4.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = sign_majority().encode(None, update, (), ())
    >>> message.payload.tolist(), message.bits.item()
    ([1.0, -1.0, 1.0, 1.0], 4.0)
    >>> votes = jnp.array([3.0, -1.0, 0.0, 1.0])
    >>> sign_majority().decode(None, votes, (), ())[0].tolist()
    [1.0, -1.0, 0.0, 1.0]

    Reference: Bernstein et al. 2018, arXiv:1802.04434, algorithm 3; 2019,
    arXiv:1810.05291, algorithm 1.
    """

    def init(payload):
        tree.require_floats(payload, "sign_majority")
        return (), ()

    def encode(ctx, message, server_state, client_state):
        payload = message.payload
        signs = jax.tree.map(
            lambda x: jnp.where(x >= 0, 1, -1).astype(x.dtype), payload
        )
        bits = if_sent(message, optax.tree.size(payload))
        message = message._replace(payload=signs, bits=bits)
        return message, client_state, ()

    def decode(ctx, payload, server_state, report):
        return jax.tree.map(jnp.sign, payload), server_state

    return Channel(init, encode, decode, of_sums=True)
