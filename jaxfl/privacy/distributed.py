"""Channels in which every client adds its share of integer noise, for secure sums."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.compress.vector import Layout, dither, if_sent
from jaxfl.core import Channel
from jaxfl.privacy import integers, mechanism
from jaxfl.privacy.noise import NORMAL
from jaxfl.secure.fixed import Residues, modulo, no_sum, signed

LARGEST_STD = 2.0**14  # of one client's noise; scipy's Bessel functions end at 2^14.5
TRIES = 64  # of which all fail with a probability of e^-32


def skellam(
    noise_multiplier: float,
    *,
    clients: int,
    dimension: int,
    bits: int,
    deviations: float = 4.0,
) -> Channel:
    """Integers with Skellam noise of every client's own, modulo 2^b, for a secure sum.

    With C the bound on the norm of the message that comes in, s steps of a grid in C,
    n clients and d coordinates, a client sends

      y = R(s x / C) + Sk(0, (z s)^2 / n)   mod 2^b

    with R rounding at random, repeated until the norm is as in
    `privacy.mechanism.rounded_norms`, and Sk the difference of two Poisson variables;
    the server makes of the sum a number from `-2^(b-1)` on, times C / s. A sum of n
    shares of the noise is Skellam too, of standard deviation z C. The grid is as fine
    as keeps k deviations of what may come, if it is flat, from wrapping round:

      s^2 = (4^b - k^2 n) / (4 k^2 (n^2 / d + z^2))

    which `compress.rotation()` to the left sees to:

      chain(clip(C), compress.rotation(), mean(denominator=n),
            skellam(z, clients=n, dimension=..., bits=16), secure.secure_sum())

    Client sends: y. Server sees: y, with a share of the noise that hides little; behind
    `secure_sum`, only the sum. Bits: b d. Reports: C and a count of 1, by which the
    server scales. Guarantee: that of `skellam_rdp`, against whoever sees the sum, if n
    send; of fewer, noise is missing, so n is the smallest number that still counts,
    such as a threshold of the secure sum. Who sends is not hidden. Sensitivity: C,
    rounded up.

    Args:
      noise_multiplier: z, at least 0; not traced, as tables are made of it.
      clients: n.
      dimension: d, of the payload as it comes here; after a rotation a power of two.
      bits: b, from 2 to 24.
      deviations: k.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if noise_multiplier is negative, a number is not positive, bits is not
        from 2 to 24 or too few for so many clients; if one client's noise has a
        deviation above 2^14 steps; when a payload has another size; by `federate`, if
        no channel to its left bounds the norm of a message.

    >>> from jaxfl import chain, clip, mean
    >>> from jaxfl.channel import mechanisms
    >>> private = skellam(1.0, clients=100, dimension=1024, bits=16)
    >>> mechanisms(chain(clip(0.5), mean(denominator=100), private))
    [Distributed(noise=Skellam(noise_multiplier=1.0, steps=2496.72, dimension=1024),
    clients=100)]

    Reference: Agarwal, Kairouz, Liu 2021, arXiv:2110.04995, algorithm 1; the grid is
    that of Kairouz, Liu, Steinke 2021, arXiv:2102.06387, section 4.
    """
    return _distributed(
        *("skellam", integers.skellam, mechanism.Skellam),
        *(noise_multiplier, clients, dimension, bits, deviations),
    )


def discrete_gaussian(
    noise_multiplier: float,
    *,
    clients: int,
    dimension: int,
    bits: int,
    deviations: float = 4.0,
) -> Channel:
    """Integers with discrete normal noise of every client's own, for a secure sum.

    `P[Y = k]` is in proportion to `exp(-k^2 / (2 sigma^2))`, `sigma = z s / sqrt(n)`,
    for every client. See `skellam`, which it is like in all else; the sum of n shares
    is not quite discrete normal, which `discrete_gaussian_rdp` accounts for, and with
    sigma above 1 hardly matters.

    Args:
      noise_multiplier: z, at least 0; not traced, as tables are made of it.
      clients: n.
      dimension: d, of the payload as it comes here; after a rotation a power of two.
      bits: b, from 2 to 24.
      deviations: k.

    Raises:
      TypeError: as `skellam`.
      ValueError: as `skellam`.

    Reference: Kairouz, Liu, Steinke 2021, arXiv:2102.06387, algorithms 1 and 2.
    """

    def described(z, steps, dimension):
        return mechanism.DiscreteGaussian(z, steps, dimension, clients)

    return _distributed(
        *("discrete_gaussian", integers.discrete_gaussian, described),
        *(noise_multiplier, clients, dimension, bits, deviations),
    )


def _distributed(
    name: str,
    table: Callable[[float], integers.Table],
    described: Callable,
    z: float,
    clients: int,
    dimension: int,
    bits: int,
    deviations: float,
) -> Channel:
    if not z >= 0:
        raise ValueError(f"noise_multiplier must be at least 0, got {z}.")
    for what, value in (("clients", clients), ("dimension", dimension)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be a positive integer, got {value!r}.")
    if not deviations > 0:
        raise ValueError(f"deviations must be positive, got {deviations}.")
    if bits not in range(2, 25):
        raise ValueError(f"bits must be a whole number from 2 to 24, got {bits}.")
    room = 4**bits - deviations**2 * clients
    if room <= 0:
        raise ValueError(
            f"bits={bits} are too few for {clients} clients with {deviations=}."
        )
    spread = math.hypot(clients / math.sqrt(dimension), z)
    steps = math.sqrt(room) / (2 * deviations * spread)
    std = z * steps / math.sqrt(clients)
    if std > LARGEST_STD:
        raise ValueError(
            f"{name}: one client's noise would have a standard deviation of {std:.0f} "
            f"steps, above 2^14; lower bits={bits}."
        )
    noise = table(std**2)
    limit, _ = mechanism.rounded_norms(steps, dimension)

    def init(payload):
        tree.require_floats(payload, name)
        layout = Layout.of(payload)
        if layout.size != dimension:
            raise ValueError(
                f"dimension must be the size of the payload as it comes to {name}, "
                f"{layout.size}, got {dimension}."
            )
        return layout, ()

    def sends(payload):
        return Residues(jnp.zeros(dimension, jnp.uint32), bits)

    def encode(ctx, message, layout, client_state):
        norm = NORMAL.limit(name, ctx.bound)
        x, _ = ravel_pytree(message.payload)
        x = x.astype(jnp.float32) * (jnp.float32(steps) / norm)
        round_key, noise_key = jax.random.split(ctx.key)
        y = _rounded(round_key, x, limit) + integers.draw(noise, noise_key, dimension)
        message = message._replace(
            payload=Residues(modulo(y, bits), bits),
            bits=if_sent(message, bits * dimension),
        )
        return (
            message,
            client_state,
            {"norm": jnp.float32(norm), "count": jnp.float32(1)},
        )

    def decode(ctx, payload, layout, report):
        norm = report["norm"] / jnp.maximum(report["count"], 1.0)
        x = signed(payload.values, bits)
        lost = jnp.all(x == signed(no_sum(bits), bits))  # as a secure sum says it
        value = x.astype(jnp.float32) * (norm / jnp.float32(steps))
        return layout.unravel(jnp.where(lost, jnp.nan, value)), layout

    def of_sum(bound, sensitivity):
        NORMAL.limit(name, bound)
        return mechanism.Distributed(described(z, steps, dimension), clients)

    return Channel(*(init, encode, decode), of_sums=True, sends=sends, mechanism=of_sum)


def _rounded(key: jax.Array, x: jax.Array, limit: float) -> jax.Array:
    """Each up or down at random, unbiased, again until the norm is within the limit.

    If it never is, then towards 0, where no norm grows.
    """
    low = jnp.floor(x)

    def again(carry):
        tries, _, fits = carry
        return ~fits & (tries < TRIES)

    def attempt(carry):
        tries, _, _ = carry
        up = dither(jax.random.fold_in(key, tries), x.size) < x - low
        y = low + up
        return tries + 1, y, jnp.sum(y * y) <= limit**2

    start = jnp.int32(0), jnp.zeros_like(x), jnp.array(False)
    _, y, fits = jax.lax.while_loop(again, attempt, start)
    return jnp.where(fits, y, jnp.trunc(x)).astype(jnp.int32)
