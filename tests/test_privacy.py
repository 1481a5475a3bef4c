"""Channels that bound what one client contributes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfl
from jaxfl.core import Message


@jax.jit
def encode(payload, norm):
    full = Message(payload, jnp.float32(2.0), jnp.float32(64.0))
    message, _, report = jaxfl.clip(norm).encode(None, full, (), ())
    return message, report


def clipped(payload, norm):
    message, report = encode(payload, norm)
    assert (message.weight, message.bits) == (2.0, 64.0)
    return message.payload, bool(report["clipped"])


def length(payload):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(payload)]
    return np.linalg.norm(np.concatenate(leaves))


SHAPES = [(), (3,), (2, 4)], [(5,), (1, 1, 3), ()], [(7, 2), (1,), (4,)]


def random_payload(rng, dtype):
    shapes = SHAPES[rng.integers(3)]
    size = 10.0 ** rng.uniform(-3, 3)
    leaves = [jnp.asarray(size * rng.normal(size=s), dtype) for s in shapes]
    return {"a": leaves[0], "b": leaves[1:]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_no_norm_exceeds_the_bound(dtype):
    """To the rounding of the payload's own dtype, for 60 random trees and norms."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        payload, norm = random_payload(rng, dtype), float(10.0 ** rng.uniform(-2, 2))
        result, was_clipped = clipped(payload, norm)
        eps = float(jnp.finfo(dtype).eps)
        assert length(result) <= norm * (1 + eps + 1e-6)
        assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(
            lambda x: x.dtype, payload
        )
        if was_clipped:  # to the bound itself, along the same direction
            assert length(payload) > norm * (1 - 1e-6)
            np.testing.assert_allclose(length(result), norm, rtol=2 * eps + 1e-6)
            factor = norm / length(payload)
            jax.tree.map(
                lambda a, b, f=factor, eps=eps: np.testing.assert_allclose(
                    np.asarray(a, np.float64),
                    f * np.asarray(b, np.float64),
                    rtol=2 * eps,
                    atol=1e-6,
                ),
                result,
                payload,
            )
        else:
            assert length(payload) <= norm * (1 + 1e-6)
            jax.tree.map(np.testing.assert_array_equal, result, payload)
        seen.add(was_clipped)
    assert seen == {True, False}


def test_a_payload_at_the_bound_or_zero_is_untouched():
    for payload in (jnp.array([3.0, 4.0]), jnp.zeros(2)):
        result, was_clipped = clipped(payload, 5.0)
        assert not was_clipped
        np.testing.assert_array_equal(result, payload)


def test_sensitivity_of_a_fixed_mean():
    """One client more or less moves the aggregate by at most C / d."""
    channel = jaxfl.chain(jaxfl.clip(2.0), jaxfl.mean(denominator=4.0))
    server, own = channel.init(jnp.zeros(3))
    rng = np.random.default_rng(1)

    def aggregate(payloads):
        total = sum(
            channel.encode(
                _context(), Message(p, jnp.float32(1), jnp.float32(96)), server, own
            )[0].payload
            for p in payloads
        )
        return channel.decode(_context(), total, server, ((), ()))[0]

    payloads = [jnp.asarray(5 * rng.normal(size=3), jnp.float32) for _ in range(5)]
    for i in range(5):
        without = payloads[:i] + payloads[i + 1 :]
        moved = np.linalg.norm(aggregate(payloads) - aggregate(without))
        assert 0.1 < moved <= 2.0 / 4.0 * (1 + 1e-5)


def _context():
    client = jnp.int32(0)
    return jaxfl.Context(
        jax.random.key(0), jax.random.key(1), client, client, client, client, client
    )


def test_the_norm_may_be_traced():
    lengths = jax.vmap(lambda c: jnp.linalg.norm(clipped_traced(c)))(
        jnp.array([1.0, 9.0])
    )
    np.testing.assert_allclose(lengths, [1.0, 5.0], rtol=1e-6)


def clipped_traced(norm):
    full = Message(jnp.array([3.0, 4.0]), jnp.float32(1), jnp.float32(64))
    return jaxfl.clip(norm).encode(None, full, (), ())[0].payload


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_the_norm_is_positive(wrong):
    with pytest.raises(ValueError, match="norm must be positive"):
        jaxfl.clip(wrong)
