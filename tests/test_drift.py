"""Angles between updates, their diversity, and hills between models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.drift import barrier, gradient_diversity, linear_path, pairwise_cosine


def updates(k=5):
    rng = np.random.default_rng(3)
    return {
        "w": rng.normal(size=(k, 2, 3)).astype(np.float32),
        "b": rng.normal(size=k).astype(np.float32),
    }


def flat(tree):
    k = len(tree["b"])
    rows = [x.reshape(k, -1) for x in tree.values()]
    return np.concatenate(rows, 1).astype(np.float64)


def test_cosine_against_float64():
    g = flat(updates())
    length = np.linalg.norm(g, axis=1)
    got = jax.jit(pairwise_cosine)(updates())
    np.testing.assert_allclose(got, g @ g.T / np.outer(length, length), atol=1e-6)


def test_cosine_of_no_update():
    """One that is zero, one that is not finite: NaN for them, the rest as it is."""
    tree = updates()
    for x in tree.values():
        x[1], x[3] = 0, np.nan
    got = np.asarray(pairwise_cosine(tree))
    fine = np.isin(np.arange(5), [0, 2, 4])
    np.testing.assert_array_equal(np.isfinite(got), np.outer(fine, fine))


def test_diversity_against_float64():
    g = flat(updates())
    want = (g**2).sum() / (g.sum(0) ** 2).sum()
    np.testing.assert_allclose(gradient_diversity(updates()), want, rtol=1e-5)
    sent = jnp.array([True, False, True, True, False])
    some = g[np.asarray(sent)]
    want = (some**2).sum() / (some.sum(0) ** 2).sum()
    np.testing.assert_allclose(gradient_diversity(updates(), sent), want, rtol=1e-5)


def test_diversity_of_opposites_and_of_nobody():
    assert np.isinf(gradient_diversity(jnp.array([[1.0], [-1.0]])))
    assert np.isnan(gradient_diversity(jnp.ones((2, 1)), jnp.zeros(2, bool)))


def test_of_every_round_of_a_run():
    """What a tap reports; a client that was not there does not count."""
    federation = jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1)), jaxfl.chain(jaxfl.tap(), jaxfl.mean())
    )
    mask = np.arange(toy.N) < 4
    federation = jaxfl.contribution.participating(federation, mask)
    data = toy.data()
    _, (info, _) = jaxfl.scan_rounds(
        federation,
        federation.init(toy.params(), data),
        data,
        rounds=2,
        key=jax.random.key(0),
    )
    report = info.reports[0]["tap"]
    diversity = jax.vmap(gradient_diversity)(report, info.sent)
    for t in range(2):
        g = flat({name: np.asarray(x[t, :4]) for name, x in report.items()})
        want = (g**2).sum() / (g.sum(0) ** 2).sum()
        np.testing.assert_allclose(diversity[t], want, rtol=1e-5)
    cosine = jax.vmap(pairwise_cosine)(report)
    np.testing.assert_array_equal(
        np.isfinite(cosine), np.tile(np.outer(mask, mask), (2, 1, 1))
    )


def test_path_of_a_quadratic():
    """Of a convex loss every barrier is 0; along the line it is a parabola."""
    _, y, _ = toy.examples()
    a = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.float32(0)}
    b = {"w": jnp.array([0.0, 1.0, 4.0]), "b": jnp.float32(2)}

    def value(params):
        mean = jnp.mean((params["b"] - y) ** 2)
        return {"loss": mean + jnp.sum(params["w"] ** 2), "b": params["b"]}

    along = linear_path(value, a, b, points=5)
    t = np.linspace(0, 1, 5)
    w = (1 - t)[:, None] * [1, -2, 0.5] + t[:, None] * [0, 1, 4]
    want = (w**2).sum(1) + ((2 * t[:, None] - y) ** 2).mean(1)
    np.testing.assert_allclose(along["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(along["b"], 2 * t, rtol=1e-6)
    top, ends = want.max(), (want[0] + want[-1]) / 2
    np.testing.assert_allclose(barrier(along["loss"]), top - ends, rtol=1e-5)


def test_path_ends_at_the_models_to_the_bit():
    a, b = (jax.random.normal(jax.random.key(i), (50,), jnp.bfloat16) for i in (0, 1))
    along = linear_path(lambda w: w, a, b, points=3)
    assert along.dtype == jnp.bfloat16
    assert (along[0] == a).all() and (along[-1] == b).all()


def test_errors():
    with pytest.raises(ValueError, match="points"):
        linear_path(jnp.sum, jnp.zeros(2), jnp.ones(2), points=1)
