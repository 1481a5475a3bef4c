"""What codecs have in common: the payload as one vector, and cheap random numbers."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.core import Channel, Message, Payload, no_state, pass_on


def codec(
    code: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | float]],
    name: str = "codec",
) -> Channel:
    """A codec of your own, written for the whole payload as one vector of float32.

    Client sends: an encoding. Server sees: what it decodes to, in the payload's dtypes.
    Bits: as the code says.

    Args:
      code: `(key, x [d]) -> (what the server makes of x [d], bits)`.
      name: for error messages.

    Returns:
      A channel that remembers nothing.

    Raises:
      TypeError: when a payload has integers.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> halves = codec(lambda key, x: (jnp.round(2 * x) / 2, 8 * x.size))
    >>> update = Message(jnp.array([0.9, 3.2]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, _ = halves.encode(ctx, update, (), ())
    >>> message.payload.tolist(), message.bits.item()
    ([1.0, 3.0], 16.0)
    """

    def encode(ctx, message, server_state, client_state):
        x, unravel = ravel_pytree(message.payload)
        decoded, bits = code(ctx.key, x.astype(jnp.float32))
        message = message._replace(
            payload=unravel(decoded.astype(x.dtype)), bits=if_sent(message, bits)
        )
        return message, client_state, ()

    return Channel(tree.of_floats(name, no_state), encode)


def if_sent(message: Message, bits: jax.Array | float) -> jax.Array:
    """A length in bits, float32 `[]`, and 0 if nothing is sent."""
    return jnp.where(message.weight > 0, jnp.float32(bits), 0.0)


def decodes_alone(channel: Channel) -> bool:
    """Whether a channel has nothing to do at the server."""
    layers = (channel,) if channel.layers is None else channel.layers
    return all(layer.decode is pass_on for layer in layers)


def dither(key: jax.Array, n: int) -> jax.Array:
    """Uniform numbers between 0 and 1, float32 `[n]`, for stochastic rounding.

    They have 16 bits, two from each draw of 32, which takes half the time: what is
    rounded up with them is so with a probability that is off by at most 2^-17.
    """
    words = jax.random.bits(key, (1024 * -(-n // 2048),))  # odd lengths are slow
    halves = jnp.concatenate([words >> 16, words & 0xFFFF])[:n]
    return (halves.astype(jnp.float32) + 0.5) * 2.0**-16


def inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 for 0."""
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the numbers of a payload are in one vector: a state that has no arrays.

    Attributes:
      structure: the payload's `PyTreeDef`.
      leaves: the shape and dtype of each of its arrays.
    """

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, payload: Payload) -> "Layout":
        leaves, structure = jax.tree.flatten(payload)
        shapes = (jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in leaves)
        return cls(structure, tuple(shapes))

    @property
    def size(self) -> int:
        return sum(x.size for x in self.leaves)

    def unravel(self, vector: jax.Array) -> Payload:
        """The payload of these numbers, `[size]`, each in the dtype it had."""
        ends = itertools.accumulate(x.size for x in self.leaves)
        parts = jnp.split(vector, list(ends)[:-1])
        return self.structure.unflatten(
            part.reshape(x.shape).astype(x.dtype)
            for part, x in zip(parts, self.leaves, strict=True)
        )
