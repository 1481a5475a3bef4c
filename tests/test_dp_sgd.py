"""Local training that protects a client's single examples."""

import dataclasses
import functools
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from dp_accounting import pld
from scales import assert_of_scale
from scipy import stats

import jaxfl
from jaxfl import local, privacy
from jaxfl.core import lone_context

D = 1000


def loss(w, batch, key):
    return 0.5 * jnp.sum((w - batch["x"]) ** 2, -1)


def clients(sizes, seed=0):
    ids = np.repeat(np.arange(len(sizes)), sizes)
    x = np.random.default_rng(seed).normal(size=(len(ids), D)).astype(np.float32)
    return jaxfl.from_arrays(jnp.asarray(x), jnp.asarray(ids), ids, len(sizes))


def private(z, clip_norm, denominator=4, microbatch_size=None, of=loss):
    return privacy.dp_sgd(
        of,
        clip_norm=clip_norm,
        noise_multiplier=z,
        denominator=denominator,
        microbatch_size=microbatch_size,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained(gradient, work, key, data):
    start = jnp.zeros(D)
    ctx = lone_context(key)
    return local.train(ctx, gradient, optax.sgd(0.1), start, data, **dict(work))


def trained(of, data, seed=0, **work):
    work = tuple(work.items())
    return _trained(local.gradient(of), work, jax.random.key(seed), data)


@pytest.mark.parametrize("microbatch_size", [None, 1, 2, 3])
def test_without_clip_and_noise_it_is_sgd(microbatch_size):
    data = clients([8, 8])[1]
    how = {"batch_size": 4, "epochs": 2}
    want = trained(loss, data, **how)
    got = trained(private(0.0, np.inf, microbatch_size=microbatch_size), data, **how)
    np.testing.assert_allclose(got.params, want.params, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_one_step_is_the_reference(poisson, microbatch_size):
    """All of a ragged client in one batch, clipped and summed in float64."""
    data = clients([3, 9, 5])
    one = data[2]
    of = private(0.0, 2.0, denominator=5, microbatch_size=microbatch_size)
    got = trained(of, one, batch_size=9, steps=1, poisson=poisson).params
    g = -np.asarray(data.examples["x"], np.float64)[jaxfl.data.client_rows(data)[2]]
    g *= np.minimum(1, 2.0 / np.linalg.norm(g, axis=1, keepdims=True))
    np.testing.assert_allclose(got, -0.1 * g.sum(0) / 5, rtol=1e-5, atol=1e-6)


def test_padding_is_nothing_even_if_it_is_not_a_number():
    of = private(0.0, 1.0, microbatch_size=2)
    x = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    mask = jnp.array([True, False, True, True, False])
    step = jax.jit(of.gradient)
    want = step(jnp.zeros(D), {"x": x}, mask, jax.random.key(0))[1]
    x[1], x[4] = np.nan, 1e9
    got = step(jnp.zeros(D), {"x": x}, mask, jax.random.key(0))[1]
    np.testing.assert_array_equal(got, want)
    assert np.linalg.norm(got) > 0.1


@pytest.mark.parametrize("poisson", [False, True])
def test_the_noise_is_what_the_mechanism_says(poisson):
    """In a round of fedavg: what all clients send beside what they do without it."""
    data, z, c = clients([6, 2, 5, 3]), 1.5, 0.8
    cohort = jaxfl.Cohort(jnp.arange(4), data, jnp.ones(4), jnp.ones(4, bool))

    def sent(z):
        algorithm = jaxfl.fedavg(
            private(z, c, microbatch_size=2),
            optax.sgd(0.1),
            batch_size=4,
            steps=1,
            poisson=poisson,
        )
        channel = jaxfl.chain(jaxfl.tap("sent"), jaxfl.mean())
        federation = jaxfl.federate(algorithm, channel)
        state = federation.init(jnp.zeros(D), data)
        _, info = jax.jit(federation.round)(jax.random.key(0), state, cohort)
        return np.asarray(info.reports[0]["sent"], np.float64)

    noise = ((sent(z) - sent(0.0)) / 0.1).ravel()
    std = z * c / 4
    assert_of_scale(noise, std)


def test_each_step_has_noise_of_its_own():
    data = clients([4, 4])[0]
    flat = private(1.0, 1.0, of=lambda w, batch, key: 0 * batch["x"][:, 0])
    one = np.asarray(trained(flat, data, batch_size=4, steps=1).params)
    many = np.asarray(trained(flat, data, batch_size=4, steps=16).params)
    assert many.std() / one.std() == pytest.approx(4.0, rel=0.15)


def test_poisson_batches_take_each_example_by_itself():
    """How often each is taken, and how many at a time: as of independent draws."""
    data = clients([3, 20, 10])
    n, b, steps = 20, 5, 3000

    def seen(w, batch, mask, key):
        rows = jnp.where(mask, batch["x"][:, 0].astype(int), n)
        counts = jnp.zeros(n + 1).at[rows].add(1)[:n]
        together = counts[0] * counts[1]
        sizes = jnp.zeros(n + 1).at[mask.sum()].add(1)
        return jnp.float32(0), -jnp.concatenate([counts, sizes, together[None]])

    one = data[1]
    start = int(one.start)
    x = jnp.zeros((33, 1)).at[one.index[start : start + n], 0].set(jnp.arange(n))
    one = dataclasses.replace(one, examples={"x": x})
    ctx = lone_context(jax.random.key(0))
    total = local.train(
        *(ctx, seen, optax.sgd(1.0), jnp.zeros(2 * n + 2), one),
        **local.Work(batch_size=b, steps=steps, poisson=True),
    ).params
    counts, sizes, together = total[:n], total[n : 2 * n + 1], total[-1]
    std = (steps * 0.25 * 0.75) ** 0.5
    assert np.abs(counts - steps / 4).max() < 4 * std
    expected = steps * stats.binom.pmf(np.arange(n + 1), n, b / n)
    usual = expected > 20
    assert (
        stats.chisquare(
            np.append(sizes[usual], steps - sizes[usual].sum()),
            np.append(expected[usual], steps - expected[usual].sum()),
        ).pvalue
        > 1e-3
    )
    assert abs(together - steps / 16) < 4 * (steps / 16) ** 0.5


def test_a_small_client_is_taken_whole():
    data = clients([3, 8])[0]
    whole = trained(loss, data, batch_size=4, steps=2, poisson=True).params
    want = trained(loss, data, batch_size=None, steps=2).params
    np.testing.assert_allclose(whole, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": np.inf}, "clip_norm must be finite"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"denominator": 0}, "denominator must be positive"),
        ({"microbatch_size": 0}, "must be a positive integer"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, words):
    right = {"clip_norm": 1.0, "noise_multiplier": 1.0, "denominator": 4}
    with pytest.raises(ValueError, match=words):
        privacy.dp_sgd(loss, **right | wrong)


def test_a_mean_is_no_loss_and_no_order_is_shuffled():
    one = private(0.0, 1.0, of=lambda w, batch, key: jnp.mean(w - batch["x"]))
    with pytest.raises(TypeError, match="one loss for each example"):
        trained(one, clients([4, 4])[0], batch_size=4)
    with pytest.raises(ValueError, match="poisson"):
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), poisson=True, shuffle=False)


def test_example_epsilon_is_that_of_the_accountant():
    how = {"examples": 600, "rounds": 5, "delta": 1e-5}
    got = privacy.example_epsilon(1.1, **how, batch_size=64, epochs=2, poisson=True)
    event = dp_accounting.PoissonSampledDpEvent(
        64 / 600, dp_accounting.GaussianDpEvent(1.1)
    )
    accountant = pld.PLDAccountant()
    accountant.compose(event, 5 * 2 * 10)
    assert got == pytest.approx(accountant.get_epsilon(1e-5))
    # without amplification: one mechanism for each pass, 10 and, in steps, 5 x 2
    passes = privacy.example_epsilon(1.1, **how, batch_size=64, epochs=2)
    steps = privacy.example_epsilon(1.1, **how, batch_size=64, steps=11)
    mu = 10**0.5 / 1.1

    def delta(e):
        upper = stats.norm.cdf(-e / mu + mu / 2)
        return upper - np.exp(e) * stats.norm.cdf(-e / mu - mu / 2)

    assert passes == steps > 2 * got
    assert delta(passes) == pytest.approx(1e-5, rel=1e-2)  # Balle and Wang 2018


@pytest.mark.parametrize("name", ["examples", "rounds", "delta", "noise_multiplier"])
def test_example_epsilon_is_refused_where_there_is_none(name):
    right = {"noise_multiplier": 1, "examples": 9, "rounds": 1, "delta": 0.1}
    wrong: Any = right | {name: 0}
    with pytest.raises(ValueError, match=name):
        privacy.example_epsilon(**wrong)
