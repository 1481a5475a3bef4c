"""What aggregators make of messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfl


def median(payload, sent):
    payload, delivered, () = jaxfl.median().apply(None, payload, jnp.asarray(sent), ())
    np.testing.assert_array_equal(delivered, sent)
    return payload


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_median_is_numpys_of_those_who_sent(k):
    rng = np.random.default_rng(k)
    sent = rng.permutation([True] * k + [False] * 3)
    payload = {
        "w": rng.normal(size=(k + 3, 4, 2)).astype(np.float32),
        "b": rng.normal(size=k + 3).astype(np.float32),
    }
    jax.tree.map(
        lambda got, x: np.testing.assert_array_equal(got, np.median(x[sent], axis=0)),
        median(payload, sent),
        payload,
    )


def test_median_ignores_how_far_a_minority_lies():
    payload = jnp.array([1.0, 2.0, 3.0, 3e38, -3e38])
    assert median(payload, [True] * 5) == 2
    assert median(payload, [True, True, True, True, False]) == 2.5
    assert median(jnp.array([3e38, 3.2e38]), [True] * 2) < np.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_median_of_nobody_is_zero_and_keeps_the_dtype(dtype):
    got = median(jnp.ones((3, 2), dtype), [False] * 3)
    np.testing.assert_array_equal(got, np.zeros(2))
    assert got.dtype == dtype


def test_median_is_of_floats():
    with pytest.raises(TypeError, match="median: payload must be of floats, got int32"):
        jaxfl.median().init({"n": jnp.zeros(2, jnp.int32)})
