"""Reference encoders: what the server decodes, to bits and back, in NumPy on the host.

The ledger says how long a message is; these say it by being as long. Each makes of the
payload that a codec gives, and of nothing else but the seeds that the client has drawn,
an array of bits from which the same payload comes back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from scipy.linalg import hadamard

from jaxfl.compress.rotations import _lloyd_max


class Reference(NamedTuple):
    """An encoder of one vector, `[d]`.

    Attributes:
      encode: `(x [d], key) -> bits`, uint8 of 0 and 1; key is the channel's `ctx.key`.
      decode: `(bits, d) -> (x [d], the bits behind it)`.
    """

    encode: Callable[[np.ndarray, Any], np.ndarray]
    decode: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def to_bits(numbers, width: int) -> np.ndarray:
    """Whole numbers from 0, each in `width` bits, the highest first."""
    numbers = np.atleast_1d(numbers).astype(np.uint64)[:, None]
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    return (numbers >> shifts & np.uint64(1)).astype(np.uint8).ravel()


def from_bits(bits: np.ndarray, width: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n whole numbers of `width` bits each, and the bits behind them."""
    here, rest = bits[: n * width], bits[n * width :]
    powers = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
    return here.reshape(n, width).astype(np.int64) @ powers, rest


def numbers(dtype: DTypeLike = np.float32) -> Reference:
    """Every number in a dtype that holds it exactly."""
    width = 8 * np.dtype(dtype).itemsize
    unsigned = np.dtype(f"uint{width}")

    def encode(x, key):
        assert (x.astype(dtype).astype(x.dtype) == x).all(), "not of this dtype"
        return to_bits(x.astype(dtype).view(unsigned), width)

    def decode(bits, d):
        whole, rest = from_bits(bits, width, d)
        return whole.astype(unsigned).view(dtype).astype(np.float32), rest

    return Reference(encode, decode)


def one(x) -> np.ndarray:
    """One float32."""
    return numbers().encode(np.atleast_1d(np.float32(x)), None)


def neighbours(x, reach=8):
    """float32 numbers round x, the nearest first."""
    x = np.float32(x)
    yield x
    up = down = x
    for _ in range(reach):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, -up)
        yield from (up, down)


def step_of(x: np.ndarray, levels: int) -> np.float32:
    """A step of which all of x are whole multiples, to the bit, `levels` at most."""
    largest = np.abs(x).max()
    if largest == 0:
        return np.float32(0)
    for top in range(1, levels + 1):
        for step in neighbours(largest / np.float32(top)):
            whole = np.rint(x / step).astype(np.float32)
            if (whole * step == x).all() and abs(whole).max() <= levels:
                return step
    raise AssertionError("these are no multiples of one step")


def qsgd(levels: int) -> Reference:
    width = math.ceil(math.log2(levels + 1))

    def encode(x, key):
        step = step_of(x, levels)
        level = np.rint(np.abs(x) / step) if step else np.zeros(len(x))
        parts = one(step), to_bits(x < 0, 1), to_bits(level, width)
        return np.concatenate(parts)

    def decode(bits, d):
        step, bits = numbers().decode(bits, 1)
        negative, bits = from_bits(bits, 1, d)
        level, bits = from_bits(bits, width, d)
        return np.where(negative, -1, 1).astype("f") * level.astype("f") * step, bits

    return Reference(encode, decode)


def uniform(width: int) -> Reference:
    top = 2**width - 1

    def encode(x, key):
        low = x.min()
        step = step_between(x, low, top)
        level = np.rint((x - low) / step) if step else np.zeros(len(x))
        return np.concatenate([one(low), one(step), to_bits(level, width)])

    def step_between(x, low, top):
        """Products and sums may be fused or not, so it is found to one rounding."""
        x = x.astype(np.float64) - low
        for highest in range(top, 0, -1):
            step = x.max() / highest
            if step == 0 or np.allclose(np.rint(x / step) * step, x, 1e-6, step * 1e-3):
                return np.float32(step)
        raise AssertionError("these are not at distances of one step")

    def decode(bits, d):
        (low, step), bits = numbers().decode(bits, 2)
        level, bits = from_bits(bits, width, d)
        return low + level.astype(np.float32) * step, bits

    return Reference(encode, decode)


def terngrad() -> Reference:
    def encode(x, key):
        sign = np.where(x == 0, 0, np.where(x > 0, 1, 2))
        return np.concatenate([one(np.abs(x).max()), to_bits(sign, 2)])

    def decode(bits, d):
        scale, bits = numbers().decode(bits, 1)
        sign, bits = from_bits(bits, 2, d)
        return np.array([0, 1, -1], np.float32)[sign] * scale, bits

    return Reference(encode, decode)


def scaled_sign() -> Reference:
    def encode(x, key):
        return np.concatenate([one(np.abs(x).max()), to_bits(x < 0, 1)])

    def decode(bits, d):
        scale, bits = numbers().decode(bits, 1)
        negative, bits = from_bits(bits, 1, d)
        return np.where(negative, -scale, scale), bits

    return Reference(encode, decode)


def sign_majority() -> Reference:
    def decode(bits, d):
        negative, bits = from_bits(bits, 1, d)
        return np.where(negative, -1, 1).astype(np.float32), bits

    return Reference(lambda x, key: to_bits(x < 0, 1), decode)


def count(fraction: float, d: int) -> int:
    return max(1, round(fraction * d))


def top_k(fraction: float, values: Reference | None = None) -> Reference:
    """k indices, among them those of all that is not 0, or a bitmap, and k values."""
    values = values or numbers()

    def listed(k, d):
        return k * (d - 1).bit_length() <= d

    def encode(x, key):
        k, width = count(fraction, len(x)), (len(x) - 1).bit_length()
        assert np.count_nonzero(x) <= k
        at = np.sort(np.argsort(x == 0, kind="stable")[:k])
        bitmap = np.isin(np.arange(len(x)), at).astype(np.uint8)
        where = to_bits(at, width) if listed(k, len(x)) else bitmap
        return np.concatenate([where, values.encode(x[at], key)])

    def decode(bits, d):
        k, x = count(fraction, d), np.zeros(d, np.float32)
        if listed(k, d):
            at, bits = from_bits(bits, (d - 1).bit_length(), k)
        else:
            at, bits = np.flatnonzero(bits[:d]), bits[d:]
        x[at], bits = values.decode(bits, k)
        return x, bits

    return Reference(encode, decode)


def random_k(
    fraction: float, values: Reference | None = None, *, unbiased: bool = True
) -> Reference:
    """The seed, from which both ends draw the indices, and k values."""
    values = values or numbers()

    def indices(seed, d):
        draws = np.asarray(jax.random.bits(jax.random.key(seed), (d,)))
        highest = np.argsort(-draws.astype(np.int64), kind="stable")
        return np.sort(highest[: count(fraction, d)])

    def factor(d):
        return np.float32(d / count(fraction, d) if unbiased else 1)

    def unscaled(x, scale):
        return next(v for v in neighbours(x / scale) if v * scale == x)

    def encode(x, key):
        seed_key, values_key = jax.random.split(key)
        seed = np.asarray(jax.random.bits(seed_key))
        at = indices(seed, len(x))
        sent = np.array([unscaled(v, factor(len(x))) for v in x[at]], np.float32)
        return np.concatenate([to_bits(seed, 32), values.encode(sent, values_key)])

    def decode(bits, d):
        (seed,), bits = from_bits(bits, 32, 1)
        x = np.zeros(d, np.float32)
        sent, bits = values.decode(bits, count(fraction, d))
        x[indices(np.uint32(seed), d)] = sent * factor(d)
        return x, bits

    return Reference(encode, decode)


def rotation(seed, d: int) -> np.ndarray:
    """`H D / sqrt(d')` as a matrix, `[d', d]`, with the signs D of a seed."""
    n = 1 << (d - 1).bit_length()
    words = np.asarray(jax.random.bits(jax.random.key(seed), (-(-d // 32), 1)))
    signs = (words >> np.arange(32, dtype=np.uint32) & 1).ravel()[:d]
    return hadamard(n)[:, :d] * (2.0 * signs - 1) / n**0.5


def eden(width: int) -> Reference:
    """The seed, the scale, and a level for each rotated number.

    What the server decodes has all of them only if d is a power of two; else the
    encoder begins with the message itself.
    """
    levels = _lloyd_max(width)

    def encode(x, key):
        seed = np.asarray(jax.random.bits(key))
        rotated = rotation(seed, len(x)) @ x.astype(np.float64)
        for top in levels[levels > 0][::-1]:
            scale = np.abs(rotated).max() / top
            rank = np.abs(rotated[:, None] / (scale or 1) - levels).argmin(1)
            if np.allclose(levels[rank] * scale, rotated, 0, 1e-4 * scale):
                return np.concatenate(
                    [to_bits(seed, 32), one(scale), to_bits(rank, width)]
                )
        raise AssertionError("these are not at levels of one scale")

    def decode(bits, d):
        (seed,), bits = from_bits(bits, 32, 1)
        scale, bits = numbers().decode(bits, 1)
        back = rotation(np.uint32(seed), d).T
        rank, bits = from_bits(bits, width, back.shape[1])
        return (back @ levels[rank] * scale).astype(np.float32), bits

    return Reference(encode, decode)


def residues(width: int, neighbours: int | None = None) -> Reference:
    """Whole numbers below 2^width; behind what secure aggregation sends before them.

    That is two keys of 32 bytes, to each neighbour two shares of 32 with a tag of 16,
    and in the end a share of the secret of each and of the own one.
    """
    k = neighbours
    before = 0 if k is None else 8 * (2 * 32 + k * (2 * 32 + 16) + (k + 1) * 32)

    def encode(x, key):
        return np.concatenate([np.zeros(before, np.uint8), to_bits(x, width)])

    return Reference(encode, lambda bits, d: from_bits(bits[before:], width, d))


def randomised_response(epsilon, d: int, m: int, levels: int, clip=1.0) -> Reference:
    """The places, if not all are sent, and which of the levels each number is at."""
    a = epsilon / m
    top = clip * d / m * (math.exp(a) + levels - 1) / (math.exp(a) - 1)
    grid = (2 * np.arange(levels) / (levels - 1) - 1) * top
    width, place = (levels - 1).bit_length(), (d - 1).bit_length() * (m < d)

    def encode(x, key):
        at = np.flatnonzero(x)
        level = np.abs(x[at, None] - grid).argmin(1)
        return np.concatenate([to_bits(at, place), to_bits(level, width)])

    def decode(bits, d):
        at, bits = from_bits(bits, place, m) if place else (np.arange(d), bits)
        level, bits = from_bits(bits, width, m)
        x = np.zeros(d, np.float32)
        x[at] = grid[level]
        return x, bits

    return Reference(encode, decode)


def significant() -> Reference:
    """A flag; the places of what is not 0, by a bitmap or as a list; those numbers."""

    def encode(x, key):
        at, width = np.flatnonzero(x), (len(x) - 1).bit_length()
        bitmap = len(x) <= 32 + len(at) * width
        listed = np.concatenate([to_bits(len(at), 32), to_bits(at, width)])
        where = (x != 0).astype(np.uint8) if bitmap else listed
        return np.concatenate([[bitmap], where, numbers().encode(x[at], key)])

    def decode(bits, d):
        (bitmap,), bits = bits[:1], bits[1:]
        if bitmap:
            at, bits = np.flatnonzero(bits[:d]), bits[d:]
        else:
            (n,), bits = from_bits(bits, 32, 1)
            at, bits = from_bits(bits, (d - 1).bit_length(), n)
        x = np.zeros(d, np.float32)
        x[at], bits = numbers().decode(bits, len(at))
        return x, bits

    return Reference(encode, decode)


class Whole(NamedTuple):
    """An encoder of a payload: `encode(payload, key)`, `decode(bits, like)`."""

    encode: Callable
    decode: Callable


def whole(reference: Reference) -> Whole:
    """Of all numbers of the payload as one vector."""

    def encode(payload, key):
        leaves = [np.ravel(x) for x in jax.tree.leaves(payload)]
        return reference.encode(np.concatenate(leaves), key)

    def decode(bits, like):
        leaves, structure = jax.tree.flatten(like)
        x, rest = reference.decode(bits, sum(x.size for x in leaves))
        assert not len(rest)
        parts = np.split(x, np.cumsum([x.size for x in leaves])[:-1])
        return structure.unflatten(
            part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)
        )

    return Whole(encode, decode)


def leafwise(reference: Reference | dict[str, Reference]) -> Whole:
    """Of every array, one after another, with the key of its place.

    All have the same encoder, or those of a dictionary have the one of their entry.
    """

    def each(leaves):
        if isinstance(reference, Reference):
            return [reference] * len(leaves)
        return [reference[name] for name in sorted(reference)]

    def encode(payload, key):
        leaves = jax.tree.leaves(payload)
        return np.concatenate(
            [
                one.encode(np.ravel(x), jax.random.fold_in(key, i))
                for i, (one, x) in enumerate(zip(each(leaves), leaves, strict=True))
            ]
        )

    def decode(bits, like):
        leaves, structure = jax.tree.flatten(like)
        for i, one in enumerate(each(leaves)):
            x, bits = one.decode(bits, leaves[i].size)
            leaves[i] = x.reshape(leaves[i].shape)
        assert not len(bits)
        return structure.unflatten(leaves)

    return Whole(encode, decode)


def layer_key(key, round: int, client: int, place: int = 0) -> jax.Array:
    """`ctx.key` of a client's channel, at this place of a chain, in a run."""
    client_key, _ = jax.random.split(jax.random.fold_in(key, round))
    _, send_key = jax.random.split(jax.random.fold_in(client_key, client))
    return jax.random.fold_in(send_key, place)


# The encoders of the codecs in PARTS of test_laws, in their first round.
ENCODERS: dict[str, Whole] = {
    "top_k": whole(top_k(0.5)),
    "top_k of qsgd": whole(top_k(0.5, qsgd(7))),
    "random_k": whole(random_k(0.5)),
    "random_k of bfloat16": whole(random_k(0.5, numbers(jnp.bfloat16))),
    "cast": whole(numbers(jnp.bfloat16)),
    "uniform": whole(uniform(3)),
    "qsgd": whole(qsgd(4)),
    "terngrad": whole(terngrad()),
    "scaled_sign": whole(scaled_sign()),
    "sign_majority": whole(sign_majority()),
    "rotation": whole(numbers()),
    "rotation, uniform": whole(uniform(3)),
    "eden": whole(eden(3)),
    "drive": whole(eden(1)),
    "fetchsgd": whole(numbers()),
    "error_feedback": whole(top_k(0.5, terngrad())),
    "error_feedback, leafwise": leafwise(scaled_sign()),
    "differences": whole(top_k(0.5)),
    "leafwise": leafwise(qsgd(7)),
    "on, arrays": leafwise({"b": numbers(), "w": qsgd(7)}),
    "entropy": whole(qsgd(4)),
    "fixed_point": whole(residues(27)),
    "secure_sum": whole(residues(32, 4)),
    "skellam": whole(residues(20)),
    "discrete_gaussian": whole(residues(20)),
    "skellam in secret": whole(residues(20, 6)),
    "randomised_response": whole(randomised_response(6.0, 4, 4, 2)),
    "randomised_response of some": whole(randomised_response(6.0, 4, 3, 4)),
    "gaia": whole(significant()),
}


def arithmetic(counts, symbols) -> int:
    """An arithmetic code, by exact whole numbers: its bits behind a leading 1.

    Every symbol narrows the interval `[low, low + width) / total^n` to its own share;
    the code is the shortest binary fraction that is in the last of them.
    """
    counts = [int(c) for c in counts]
    below, total = np.cumsum([0, *counts]).tolist(), sum(counts)
    low, width = 0, 1
    for s in symbols:
        low, width = low * total + width * below[s], width * counts[s]
    scale, length = total ** len(symbols), 0
    while scale > width << length:
        length += 1
    return (1 << length) | -(-(low << length) // scale)


def arithmetic_decode(counts, n: int, code: int) -> list[int]:
    counts = [int(c) for c in counts]
    below, total = np.cumsum([0, *counts]).tolist(), sum(counts)
    length = code.bit_length() - 1
    place = (code - (1 << length)) * total**n >> length
    symbols, width = [], 1
    for i in range(n):
        share = width * total ** (n - 1 - i)
        s = int(np.searchsorted(below, place // share, side="right")) - 1
        symbols.append(s)
        place, width = place - below[s] * share, width * counts[s]
    return symbols
