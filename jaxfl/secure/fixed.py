"""Payloads as whole numbers, whose sum is exact and can be masked."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import tree
from jaxfl.compress.vector import Layout, dither, if_sent
from jaxfl.core import Bound, Channel, PyTree, unbounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residues:
    """A payload of whole numbers modulo `2^bits`.

    Attributes:
      values: pytree of uint32 arrays, each number below `2^bits`. A sum of residues
        may be above it and wrap at 2^32, which is a multiple of it.
      bits: from 2 to 32, a part of the structure and not an array.
    """

    values: PyTree
    bits: int = dataclasses.field(metadata={"static": True})


def fixed_point(
    limit: float, scale: float, *, bits: int = 32, stochastic: bool = False
) -> Channel:
    """Rounds a payload to whole numbers modulo 2^bits, of which sums are exact.

    `q = trunc(scale clamp(x, -limit, limit)) mod 2^bits` at the client; at the server
    the sum of all q, as a number from `-2^(bits - 1)` on, over scale. No sum can wrap
    round: a cohort of K for which

        K ceil(limit scale) <= 2^(bits - 1) - 1

    does not hold is refused. So `-2^(bits - 1)` is never a sum, and stands for one
    that could not be had (`secure_sum`): it decodes to NaN, which no one is given.

    A sum above 2^24 steps loses its lowest bits when it becomes a float32 at the end. A
    power of two as scale adds no rounding of its own. It belongs to the right of what
    changes a client's own update, `mean` included.

    Client sends: the whole numbers. Server sees: them; behind `secure_sum` only their
    sum. Reports: `clamped`, how many coordinates were beyond the limit. Bits: `bits` a
    coordinate.

    Args:
      limit: of the absolute value of each coordinate, as it comes here; what is
        beyond it is clamped.
      scale: steps in one unit.
      bits: from 2 to 32.
      stochastic: whether to round up with the fraction's probability, which is unbiased
        (to 2^-17), or always toward 0, which lengthens no message: a clip left of here
        then bounds what one client contributes, as a channel with noise asks for.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if limit or scale is not positive, bits not from 2 to 32; when a
        round is traced, if the sum over its cohort might not fit.

    >>> from jaxfl.core import Context, Message
    >>> roster = jnp.arange(3)
    >>> ctx = Context(*[jax.random.key(0)] * 2, *[jnp.int32(0)] * 2, roster, roster, 3)
    >>> update = Message(jnp.array([0.5, -0.3, 9.0]), jnp.float32(1), jnp.float32(96))
    >>> channel = fixed_point(limit=1.0, scale=8, bits=6)
    >>> layout, _ = channel.init(update.payload)
    >>> message, _, report = channel.encode(ctx, update, layout, ())
    >>> message.payload.values.tolist(), message.bits.item(), report["clamped"].item()
    ([4, 62, 8], 18.0, 1.0)
    >>> channel.decode(ctx, message.payload, layout, report)[0].tolist()
    [0.5, -0.25, 1.0]

    Reference: Bonawitz et al. 2017, arXiv:1611.04482, section 2; stochastic rounding as
    in Bonawitz et al. 2019, arXiv:1912.00131.
    """
    for name, value in (("limit", limit), ("scale", scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    if bits not in range(2, 33):
        raise ValueError(f"bits must be a whole number from 2 to 32, got {bits}.")
    highest = math.ceil(limit * scale)
    top = np.float32(highest)
    if int(top) > highest:  # float32 has 24 bits of it
        top = np.nextafter(top, np.float32(0))

    def init(payload):
        tree.require_floats(payload, "fixed_point")
        return Layout.of(payload), ()

    def sends(payload):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.uint32), payload)
        return Residues(zeros, bits)

    def encode(ctx, message, layout, client_state):
        k = ctx.roster.shape[0]
        if k * highest > 2 ** (bits - 1) - 1:
            raise ValueError(
                f"fixed_point: a sum over a cohort of {k}, each up to limit * scale = "
                f"{highest} in size, may not fit in {bits} bits; lower limit={limit} "
                f"or scale={scale}, raise bits={bits} (to at most 32), or ask at most "
                f"{(2 ** (bits - 1) - 1) // highest} clients."
            )
        leaves, structure = jax.tree.flatten(message.payload)
        sizes = sum(x.size for x in leaves)
        # A number that is not finite would pass for a whole one: the report says so,
        # and the round drops the message.
        clamped = sum(
            jnp.sum(jnp.where(jnp.isfinite(x), jnp.abs(x) > limit, jnp.nan))
            for x in leaves
        )
        levels = []
        for i, x in enumerate(leaves):
            x = jnp.clip(x.astype(jnp.float32), -limit, limit) * jnp.float32(scale)
            if stochastic:
                up = dither(jax.random.fold_in(ctx.key, i), x.size).reshape(x.shape)
                low = jnp.floor(x)
                level = low + (up < x - low)
            else:
                level = jnp.trunc(x)
            level = jnp.clip(level, -top, top).astype(jnp.int32)
            levels.append(modulo(level, bits))
        message = message._replace(
            payload=Residues(structure.unflatten(levels), bits),
            bits=if_sent(message, bits * sizes),
        )
        return message, client_state, {"clamped": jnp.float32(clamped)}

    def decode(ctx, payload, layout, report):
        def leaf(x, like):
            x = signed(x, bits)
            value = x.astype(jnp.float32) / jnp.float32(scale)
            value = jnp.where(x == signed(no_sum(bits), bits), jnp.nan, value)
            return value.astype(like.dtype)

        leaves = jax.tree.leaves(payload.values)
        decoded = [leaf(x, y) for x, y in zip(leaves, layout.leaves, strict=True)]
        return layout.structure.unflatten(decoded), layout

    def times(factor):
        return lambda bound: Bound(factor * bound.l2, factor * bound.l1)

    return Channel(
        *(init, encode, decode),
        of_sums=True,
        sends=sends,
        bound=unbounded if stochastic else times(scale),
        sensitivity=times(1 / scale),
    )


def modulo(level: jax.Array, bits: int) -> jax.Array:
    """Whole numbers modulo 2^bits, uint32."""
    return level.astype(jnp.uint32) & np.uint32(2**bits - 1)


def signed(residue: jax.Array | np.uint32, bits: int) -> jax.Array:
    """The number from `-2^(bits - 1)` on that a residue stands for, int32."""
    return jnp.left_shift(residue, 32 - bits).astype(jnp.int32) >> (32 - bits)


def no_sum(bits: int) -> np.uint32:
    """The residue that no sum of `fixed_point` has: it says that there is none."""
    return np.uint32(2 ** (bits - 1))
