"""Codecs that send some of the numbers, and where they are."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.channel import identity
from jaxfl.compress.vector import decodes_alone, if_sent
from jaxfl.core import Channel, unbounded, unchanged


def top_k(fraction: float, values: Channel | None = None) -> Channel:
    """Sends the k numbers of largest magnitude, and where they are.

    `C(x)_i = x_i if |x_i| is among the k largest of |x_1|, ..., |x_d|, else 0`, with
    `k = max(1, round(fraction d))`; of equal magnitudes the first. It is biased: put
    `error_feedback` round it.

    Client sends: k values and k indices, or a bitmap where that is shorter. Server
    sees: a payload with d - k zeros. Bits: those of the values, and
    `min(k ceil(log2 d), d)`.

    The selection is exact. On a CPU it takes some ten passes over the payload, and with
    values, which have to be put together, some thirty.

    Args:
      fraction: k / d, in (0, 1]; it may be a traced array, without values.
      values: a channel for the values, `[k]`, in the order of their indices; None for
        the values as they are.

    Raises:
      TypeError: when a payload has integers; if fraction is traced, with values.
      ValueError: if fraction is not in (0, 1], or values has something to do at the
        server, where it would meet a sum of values of different indices.

    >>> from jaxfl.core import Message
    >>> x = jnp.array([1.0, -5.0, 0.5, 3.0])
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(128.0))
    >>> message, _, _ = top_k(0.5).encode(None, update, (), ())
    >>> message.payload.tolist(), message.bits.item()  # 2 (32 + log2 4)
    ([0.0, -5.0, 0.0, 3.0], 68.0)

    Reference: Aji and Heafield 2017, arXiv:1704.05021; Stich et al. 2018,
    arXiv:1809.07599, definition 2.2.
    """

    def choose(ctx, x, k):
        return ctx, largest(jnp.abs(x), k)

    def index_bits(k, d):
        return jnp.minimum(k * (d - 1).bit_length(), d)

    return _some("top_k", fraction, values, choose, index_bits, unbiased=False)


def random_k(
    fraction: float, values: Channel | None = None, *, unbiased: bool = True
) -> Channel:
    """Sends k numbers at random places, which a seed of 32 bits tells the server.

    `C(x)_i = (d / k) x_i if i in w, else 0`, with w a random set of k indices, every
    set alike, and `k = max(1, round(fraction d))`. Then `E C(x) = x` and
    `E ||C(x) - x||^2 = (d / k - 1) ||x||^2`.

    Client sends: k values and the seed. Server sees: a payload with d - k zeros.
    Bits: those of the values, and 32.

    The time is that of `top_k`, and of d random numbers.

    Args:
      fraction: k / d, in (0, 1]; it may be a traced array, without values.
      values: a channel for the values, `[k]`, in the order of their indices; None for
        the values as they are.
      unbiased: False for `x_i` in place of `(d / k) x_i`, as `error_feedback` needs it.

    Raises:
      TypeError: when a payload has integers; if fraction is traced, with values.
      ValueError: if fraction is not in (0, 1], or values has something to do at the
        server.

    >>> from jaxfl.core import Context, Message
    >>> ctx = Context(jax.random.key(0), *[jnp.int32(0)] * 6)
    >>> update = Message(jnp.ones(1000), jnp.float32(1.0), jnp.float32(32_000.0))
    >>> message, _, _ = random_k(0.01).encode(ctx, update, (), ())
    >>> message.payload.sum().item(), message.bits.item()  # 10 times 100; 32 (10 + 1)
    (1000.0, 352.0)

    Reference: Stich et al. 2018, arXiv:1809.07599, definition 2.2; a seed in place of
    indices, Konecny et al. 2016, arXiv:1610.05492, section 2.
    """

    def choose(ctx, x, k):
        seed_key, values_key = jax.random.split(ctx.key)
        seed = jax.random.bits(seed_key)
        draws = jax.random.bits(jax.random.key(seed), x.shape)
        return ctx._replace(key=values_key), _largest(draws, k)

    def index_bits(k, d):
        return 32

    return _some("random_k", fraction, values, choose, index_bits, unbiased)


def _some(name, fraction, values, choose, index_bits, unbiased) -> Channel:
    """Sends the values of chosen indices: `choose: (ctx, x, k) -> (ctx, bool [d])`."""
    values = identity() if values is None else values
    as_they_are = values.layers == ()
    number = isinstance(fraction, int | float)
    check_fraction(fraction)
    if not decodes_alone(values):
        raise ValueError(f"{name}: values must have nothing to do at the server.")
    if not number and not as_they_are:
        raise TypeError(f"fraction must be a number with values, got {fraction}.")

    def init(payload):
        tree.require_floats(payload, name)
        x, _ = ravel_pytree(payload)
        return ((), ()) if as_they_are else values.init(x[: count(fraction, x.size)])

    def encode(ctx, message, server_state, client_state):
        x, unravel = ravel_pytree(message.payload)
        k = count(fraction, x.size)
        ctx, chosen = choose(ctx, x, k)
        plain = if_sent(message, k * jnp.finfo(x.dtype).bits)
        report = ()
        if as_they_are:  # then there is no need to put them together
            message = message._replace(bits=plain)
            sent = jnp.where(chosen, x, 0)
        else:
            places = jnp.nonzero(chosen, size=k)[0]
            message, client_state, report = values.encode(
                ctx,
                message._replace(payload=x[places], bits=plain),
                server_state,
                client_state,
            )
            sent = jnp.zeros_like(x).at[places].set(message.payload)
        if unbiased:
            sent = (sent * (x.size / k)).astype(x.dtype)
        indices = if_sent(message, index_bits(k, x.size))
        message = message._replace(payload=unravel(sent), bits=message.bits + indices)
        return message, client_state, report

    # The largest as they are: any norm is that of the whole at most.
    bound = unchanged if as_they_are and not unbiased else unbounded
    return Channel(init, encode, bound=bound, sensitivity=unchanged)


def check_fraction(fraction: float) -> None:
    if isinstance(fraction, int | float) and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}.")


def count(fraction: float, d: int):
    """k, at least 1: a number, or an array if the fraction is traced."""
    if isinstance(fraction, int | float):
        return max(1, round(fraction * d))
    return jnp.maximum(1, jnp.round(fraction * d)).astype(jnp.int32)


def largest(x: jax.Array, k) -> jax.Array:
    """Marks the k largest of numbers that are not negative; of equal ones, the first.

    By counting, which is many times faster than to sort: how many have each value of
    the highest bits, then of those in which the k-th largest is each value of the next.

    Args:
      x: `[d]`, compared as float32, which are in the order of their bits.
      k: how many, which may be traced.

    Returns:
      bool `[d]`, with k of them True.

    >>> largest(jnp.array([3.0, 1.0, 3.0, 2.0, 3.0]), 2).tolist()
    [True, False, True, False, False]
    """
    return _largest(jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), k)


def _largest(x: jax.Array, k) -> jax.Array:
    """`largest` of uint32."""

    bound, left, equal = jnp.uint32(0), jnp.int32(k), jnp.ones(x.shape, bool)
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digit = (x >> shift) & (2**width - 1)
        here = jnp.zeros(2**width, jnp.int32).at[digit].add(equal.astype(jnp.int32))
        from_here = jnp.cumsum(here[::-1])[::-1]  # these and all above them
        best = jnp.sum(from_here >= left) - 1
        left -= from_here[best] - here[best]
        equal &= digit == best.astype(jnp.uint32)
        bound |= best.astype(jnp.uint32) << shift

    excess = jnp.sum(equal, dtype=jnp.int32) - left
    place, bits = jnp.arange(x.size, dtype=jnp.int32), x.size.bit_length()

    def raise_end(i, end):  # the last `excess` of the equal ones are not before it
        later = end | (1 << (bits - 1 - i))
        behind = jnp.sum(equal & (place >= later), dtype=jnp.int32)
        return jnp.where(behind >= excess, later, end)

    trips = jnp.where(excess > 0, bits, 0)  # without ties there is nothing to look for
    end = jax.lax.fori_loop(0, trips, raise_end, jnp.int32(0))
    return (x > bound) | (equal & ((place < end) | (excess == 0)))
