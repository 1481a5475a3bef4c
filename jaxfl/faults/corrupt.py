"""Updates that come to harm: not finite, bits flipped, garbage."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfl.core import Channel, Payload

Harm = Callable[[jax.Array, Payload], Payload]


def corrupt(harm: Harm, rate: float | jax.Array = 1.0) -> Channel:
    """Harms messages, each client's with a probability in every round.

    Client sends: what is left of its payload, as long as it was. Server sees: the same.
    Bits: no more. It reports whom it harmed (`"corrupted"`), and what is not finite
    then is dropped (`info.rejected`): place it where the harm is done, and left of
    codecs and masks only if those are what it is to be tried on.

    Args:
      harm: `(key, payload) -> payload`: `becomes(jnp.nan)`, `flip_bits(...)`,
        `garbage(...)`, or your own.
      rate: a probability, or `[N]`, one for each client: 1 for those who always do,
        0 for the others. `attack.among` is for clients and rounds of your choice.

    >>> from jaxfl.core import Message, lone_context
    >>> broken = corrupt(becomes(jnp.nan), rate=jnp.array([0.0, 1.0]))
    >>> update = Message(jnp.array([2.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> for client in (0, 1):
    ...     ctx = lone_context(jax.random.key(0), client)
    ...     print(broken.encode(ctx, update, (), ())[0].payload)
    [2.]
    [nan]
    """

    def encode(ctx, message, server_state, client_state):
        draw_key, harm_key = jax.random.split(ctx.key)
        its = jnp.asarray(rate)[ctx.client] if jnp.ndim(rate) else rate
        hit = jax.random.uniform(draw_key) < its
        harmed = harm(harm_key, message.payload)
        payload = jax.tree.map(
            lambda new, old: jnp.where(hit, new, old), harmed, message.payload
        )
        report = {"corrupted": hit.astype(jnp.float32)}
        return message._replace(payload=payload), client_state, report

    return Channel(encode=encode)


def becomes(value: float) -> Harm:
    """Every number becomes the same, such as NaN or infinity.

    >>> becomes(jnp.inf)(jax.random.key(0), jnp.zeros(2)).tolist()
    [inf, inf]
    """
    return lambda key, payload: jax.tree.map(lambda x: jnp.full_like(x, value), payload)


def garbage(scale: float | jax.Array) -> Harm:
    """Normal noise of a standard deviation in place of the payload.

    >>> garbage(0.0)(jax.random.key(0), jnp.ones(2)).tolist()
    [0.0, 0.0]
    """

    def harm(key, payload):
        return _each(
            lambda key, x: (scale * jax.random.normal(key, x.shape)).astype(x.dtype),
            *(key, payload),
        )

    return harm


def flip_bits(rate: float | jax.Array) -> Harm:
    """Flips one bit, whichever, of each number with a probability.

    >>> flipped = flip_bits(1.0)(jax.random.key(0), jnp.ones(1000))
    >>> was, now = (x.view(jnp.uint32) for x in (jnp.ones(1000), flipped))
    >>> set(jax.lax.population_count(was ^ now).tolist())
    {1}
    """

    def leaf(key, x):
        hit_key, place_key = jax.random.split(key)
        word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        place = jax.random.randint(place_key, x.shape, 0, 8 * x.dtype.itemsize)
        hit = jax.random.uniform(hit_key, x.shape) < rate
        mask = jnp.where(hit, jnp.ones((), word) << place.astype(word), 0)
        bits = jax.lax.bitcast_convert_type(x, word) ^ mask.astype(word)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    return lambda key, payload: _each(leaf, key, payload)


def _each(leaf, key, payload: Payload) -> Payload:
    """A function of a key and an array, of every array with a key of its own."""
    leaves, structure = jax.tree.flatten(payload)
    keys = jax.random.split(key, max(1, len(leaves)))
    return structure.unflatten(leaf(k, x) for k, x in zip(keys, leaves, strict=False))
