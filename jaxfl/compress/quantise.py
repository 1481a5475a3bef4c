"""Codecs that send every number in few bits."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxfl import tree
from jaxfl.compress.vector import codec, dither, if_sent, inverse
from jaxfl.core import Channel


def cast(dtype: DTypeLike) -> Channel:
    """Sends every number in another floating-point format, rounded to the nearest.

    Client sends: the numbers in that format. Server sees: their values, in the
    payload's dtypes. Bits: d times those of the format. What is too large for a format
    becomes infinite in it, and such a message is dropped; bfloat16 has the range of
    float32.

    Args:
      dtype: for instance `jnp.bfloat16` or `jnp.float8_e5m2`.

    Raises:
      TypeError: when a payload has integers; if dtype is not of floats.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([1.001, 3.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, _ = cast(jnp.bfloat16).encode(None, update, (), ())
    >>> message.payload.tolist(), message.bits.item()
    ([1.0, 3.0], 32.0)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point format, got {dtype}.")
    width = jnp.finfo(dtype).bits

    def init(payload):
        tree.require_floats(payload, "cast")
        return (), ()

    def encode(ctx, message, server_state, client_state):
        payload = message.payload
        message = message._replace(
            payload=jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), payload),
            bits=if_sent(message, width * optax.tree.size(payload)),
        )
        return message, client_state, ()

    return Channel(init, encode)


def uniform(bits: int) -> Channel:
    """Rounds every number at random to one of k = 2^bits levels between the extremes.

    `B(r) = x_min + r s / (k - 1)` with `s = x_max - x_min`; a number between `B(r)` and
    `B(r + 1)` becomes the upper with probability
    `(x_i - B(r)) / (B(r + 1) - B(r))`, else the lower. Then `E C(x) = x` and
    `E ||C(x) - x||^2 <= d s^2 / (4 (k - 1)^2)`. Put `rotation()` left of it to make s
    small.

    Client sends: a level for each number, and two numbers that say where the levels
    are. Server sees: the levels' values. Bits: `bits d + 64`.

    Args:
      bits: b, from 1 to 16; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if bits is not a whole number from 1 to 16.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> x = jnp.array([-1.0, 0.0, 0.5, 2.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = uniform(2).encode(ctx, update, (), ())  # -1, 0, 1, 2
    >>> message.payload[jnp.array([0, 1, 3])].tolist(), message.bits.item()
    ([-1.0, 0.0, 2.0], 72.0)

    Reference: Suresh et al. 2017, arXiv:1611.00429, section 2.2.
    """
    if isinstance(bits, int | float) and bits not in range(1, 17):
        raise ValueError(f"bits must be a whole number from 1 to 16, got {bits}.")
    steps = 2**bits - 1

    def code(key, x):
        low, span = jnp.min(x), jnp.max(x) - jnp.min(x)
        level = jnp.floor((x - low) * (steps * inverse(span)) + dither(key, x.size))
        level = jnp.minimum(level, steps)
        return low + level * (span / steps), bits * x.size + 64

    return codec(code, "uniform")


def qsgd(levels: int) -> Channel:
    """Rounds every number at random to one of s levels of the vector's norm.

    `Q_s(x_i) = ||x||_2 sgn(x_i) xi_i`, where `xi_i` is `(l + 1) / s` with probability
    `s |x_i| / ||x||_2 - l`, else `l / s`, and `l = floor(s |x_i| / ||x||_2)`. Then
    `E Q_s(x) = x` and `E ||Q_s(x) - x||^2 <= min(d / s^2, sqrt(d) / s) ||x||_2^2`.

    Client sends: the norm; and a sign and a level for each number, in as many bits for
    each, where the paper has a code of variable length: see `entropy`. Server sees: the
    levels' values. Bits: `d (1 + ceil(log2(s + 1))) + 32`.

    Args:
      levels: s, 1 or more, best 2^n - 1; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if levels is not a whole number from 1 to 65535.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> x = jnp.array([3.0, 0.0, -4.0, 0.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = qsgd(5).encode(ctx, update, (), ())  # 1/5, ..., 5/5 of 5
    >>> message.payload.tolist(), message.bits.item()
    ([3.0, 0.0, -4.0, 0.0], 48.0)

    Reference: Alistarh et al. 2017, arXiv:1610.02132, section 3.1.
    """
    if isinstance(levels, int | float) and levels not in range(1, 2**16):
        raise ValueError(
            f"levels must be a whole number from 1 to 65535, got {levels}."
        )

    def code(key, x):
        norm = jnp.sqrt(jnp.sum(x * x))
        level = jnp.floor(jnp.abs(x) * (levels * inverse(norm)) + dither(key, x.size))
        level = jnp.minimum(level, levels)
        width = 33 - jax.lax.clz(jnp.int32(levels))  # a sign, and 0, ..., s
        return jnp.sign(x) * level * (norm / levels), x.size * width + 32

    return codec(code, "qsgd")


def terngrad(clip: float | None = 2.5) -> Channel:
    """Rounds every number at random to 0 or to the largest magnitude, with its sign.

    `C(x)_i = s sgn(x_i) b_i` with `s = max_j |x_j|` and `b_i` 1 with probability
    `|x_i| / s`, else 0, after each number has been clipped to `clip` times the standard
    deviation of all. Without clipping `E C(x) = x`. The paper has one s for each layer:
    `leafwise(terngrad())`.

    Client sends: s and two bits for each number. Server sees: -s, 0 and s.
    Bits: `2 d + 32`.

    Args:
      clip: c, in standard deviations, positive; None not to clip. It may be a traced
        array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if clip is not positive.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> x = jnp.array([3.0, 0.0, -3.0, 0.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = terngrad().encode(ctx, update, (), ())
    >>> message.payload.tolist(), message.bits.item()
    ([3.0, 0.0, -3.0, 0.0], 40.0)

    Reference: Wen et al. 2017, arXiv:1705.07878, equations 1 to 3; clipping, section 5.
    """
    if isinstance(clip, int | float) and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}.")

    def code(key, x):
        if clip is not None:
            bound = clip * jnp.std(x)
            x = jnp.clip(x, -bound, bound)
        largest = jnp.max(jnp.abs(x))
        chosen = jnp.floor(jnp.abs(x) * inverse(largest) + dither(key, x.size))
        return jnp.sign(x) * jnp.minimum(chosen, 1.0) * largest, 2 * x.size + 32

    return codec(code, "terngrad")
