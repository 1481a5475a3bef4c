"""Who is drawn, and how often."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import toy

import jaxfl
from jaxfl.mesh import NOBODY
from jaxfl.sampling import Poisson, _draw_few, draw_clients, sample_cohort

# --- K of N ------------------------------------------------------------------


def chi_square(draw, n=5, draws=4000):
    """The p-value of `[draws, 2]` cohorts against ordered pairs, all as likely."""
    pairs = np.asarray(
        jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), draws))
    )
    counts = np.zeros((n, n))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    assert not np.diag(counts).any(), "a client was drawn twice"
    return scipy.stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue


def test_cohorts_are_uniform_without_replacement():
    ones = jnp.ones(5)
    assert chi_square(lambda key: sample_cohort(key, ones, 2).client) > 0.01


def test_few_of_many_are_uniform_without_replacement():
    assert chi_square(lambda key: _draw_few(key, 5, 2)) > 0.01
    assert chi_square(lambda key: _draw_few(key, 5, 4)[2:]) > 0.01
    client = sample_cohort(jax.random.key(0), jnp.ones(100_000), 5_000).client
    assert client.dtype == jnp.int32 and len(set(client.tolist())) == 5_000
    assert client.min() < 100 and client.max() >= 99_900


def test_the_uniformity_test_sees_a_bias():
    def biased(key):
        p = jnp.array([0.23, 0.21, 0.19, 0.19, 0.18])
        return jax.random.choice(key, 5, (2,), replace=False, p=p)

    assert chi_square(biased) < 1e-4
    with pytest.raises(AssertionError, match="twice"):
        chi_square(lambda key: jax.random.choice(key, 5, (2,)))


def test_a_cohort_is_of_its_clients():
    data = toy.data()
    cohort = sample_cohort(jax.random.key(3), data, 4)
    sizes = np.array(toy.SIZES)[cohort.client]
    assert cohort.weight.tolist() == cohort.data.size.tolist() == sizes.tolist()
    assert cohort.alive.all() and len(set(cohort.client.tolist())) == 4
    everyone = sample_cohort(jax.random.key(3), data)
    assert everyone.client.tolist() == list(range(toy.N))


# --- each for itself ---------------------------------------------------------


def drawn(sampling, n, draws=4000, seed=1):
    """Who takes part in each of many rounds, `[draws, n]`."""
    keys = jax.random.split(jax.random.key(seed), draws)
    clients = jax.jit(jax.vmap(lambda key: draw_clients(key, n, sampling)))(keys)
    part = np.zeros((draws, n + 1), bool)
    np.put_along_axis(part, np.minimum(clients, n), True, 1)
    assert clients.shape[1] == sampling.rows(n)
    return part[:, :n]


def p_values(part, rate):
    """Against q: of the number of clients in a round, of each client's rounds, and of
    the four things that each of some pairs can do in a round."""
    draws, n = part.shape
    few, many = scipy.stats.binom.ppf([0.01, 0.99], n, rate).astype(int)
    sizes = np.clip(part.sum(1), few, many)
    expected = scipy.stats.binom.pmf(np.arange(few, many + 1), n, rate)
    expected[0] = scipy.stats.binom.cdf(few, n, rate)
    expected[-1] = scipy.stats.binom.sf(many - 1, n, rate)
    counts = np.bincount(sizes, minlength=many + 1)[few:]
    size = scipy.stats.chisquare(counts, draws * expected).pvalue
    squares = (part.sum(0) - draws * rate) ** 2 / (draws * rate * (1 - rate))
    client = scipy.stats.chi2.sf(squares.sum(), n)
    pairs = []
    for i, j in [(0, 1), (1, n - 1), (n // 2, n // 2 + 1)]:
        seen = [
            np.sum((part[:, i] == a) & (part[:, j] == b))
            for a, b in itertools.product([True, False], repeat=2)
        ]
        both = [rate**2, *[rate * (1 - rate)] * 2, (1 - rate) ** 2]
        pairs.append(scipy.stats.chisquare(seen, draws * np.array(both)).pvalue)
    return size, client, min(pairs)


@pytest.mark.parametrize("n, expected", [(7, 3.0), (60, 12.5)])
def test_each_client_takes_part_for_itself(n, expected):
    assert min(p_values(drawn(Poisson(expected), n), expected / n)) > 0.01


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_test_sees_another_rate(factor):
    assert max(p_values(drawn(Poisson(12.5 * factor), 60), 12.5 / 60)) < 1e-4


def test_the_test_sees_fixed_sizes_and_clients_that_go_together():
    everyone = jnp.arange(60)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: jax.random.choice(key, everyone, (12,), replace=False))
    fixed = np.zeros((4000, 60), bool)
    np.put_along_axis(fixed, np.asarray(draw(keys)), True, 1)
    assert p_values(fixed, 12 / 60)[0] < 1e-4
    twins = drawn(Poisson(12), 60)
    twins[:, 1] = twins[:, 0]
    assert p_values(twins, 12 / 60)[2] < 1e-4


@pytest.mark.parametrize(
    "expected, n, overflow",
    [(3, 7, 0.1), (100, 10_000, 1e-15), (5000, 763_430, 1e-20), (0.01, 5, 0.9)],
)
def test_the_rows_are_the_fewest_that_are_enough(expected, n, overflow):
    """By another implementation of the binomial distribution."""
    rows = Poisson(expected, overflow).rows(n)
    more = scipy.stats.binom.sf([rows - 1, rows], n, expected / n)
    assert more[1] <= overflow and (more[0] > overflow or rows == 1)


def test_too_many_are_left_out():
    """A row short, once in so many rounds; all that there is room for come."""
    whole, cut = Poisson(3), Poisson(3, overflow=0.1)
    room = cut.rows(7)
    all_drawn, some = drawn(whole, 7), drawn(cut, 7)
    np.testing.assert_array_equal(some.sum(1), np.minimum(all_drawn.sum(1), room))
    assert not (some & ~all_drawn).any()
    lost = np.mean(all_drawn.sum(1) > room)
    assert 0.5 * 0.041 < lost < 1.5 * 0.041  # P(Binomial(7, 3 / 7) > 5) = 0.0410


def test_rows_that_nobody_fills_are_nobody():
    data = toy.data()
    cohort = sample_cohort(jax.random.key(2), data, Poisson(3))
    taking_part = cohort.client[cohort.alive]
    assert 0 < len(taking_part) < toy.N == len(cohort.client)
    assert (cohort.client[~cohort.alive] == NOBODY).all()
    assert cohort.client.dtype == jnp.int32
    sizes = np.array(toy.SIZES)[taking_part]
    assert cohort.data.size[cohort.alive].tolist() == sizes.tolist()
    np.testing.assert_array_equal(cohort.weight[cohort.alive], sizes)
    assert not cohort.weight[~cohort.alive].any()


def test_a_round_is_that_of_who_takes_part():
    """Padding, the first client among it, changes nothing; not even its own state."""
    federation = jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2),
        jaxfl.chain(jaxfl.at_client(optax.trace(0.9)), jaxfl.mean()),
    )
    data = toy.data()
    state = federation.init(toy.params(), data)
    padded = sample_cohort(jax.random.key(2), data, Poisson(3))
    alone = toy.cohort(data, padded.client[padded.alive].tolist())
    assert 0 not in alone.client
    (got, _), (want, info) = (
        jax.jit(federation.round)(jax.random.key(0), state, cohort)
        for cohort in (padded, alone)
    )
    assert info.sent.sum() > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@pytest.mark.parametrize("noise", [False, True])
def test_rounds_without_anybody(noise):
    """They leave the model as it was; but where there is noise, nobody must know."""
    channel = jaxfl.chain(jaxfl.clip(1.0), jaxfl.mean(denominator=0.2))
    if noise:
        channel = jaxfl.chain(channel, jaxfl.privacy.gaussian(1.0))
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    _, history = jaxfl.simulate(
        jaxfl.federate(algorithm, channel),
        toy.params(),
        toy.data(),
        rounds=20,
        key=jax.random.key(0),
        cohort_size=Poisson(0.2),
        evaluate=lambda state: {"b": state.params["b"]},
        progress=False,
    )
    moved = np.diff(history["b"], prepend=toy.params()["b"]) != 0
    asked = history.clients.alive.any(1)
    assert 10 < np.sum(~asked) < 20
    assert moved[~asked].all() if noise else not moved[~asked].any()
    table = history.client_table()
    assert len(table["client"]) == history.clients.alive.sum()
    assert set(table["client"].tolist()) <= set(range(toy.N))


def test_the_plan_has_room_for_all_and_expects_the_mean():
    params, data = toy.params(), toy.data()
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    cost = jaxfl.dry_run(federation, params, data, cohort_size=Poisson(2.5))
    assert cost.bits_up == cost.bits_down == 2.5 * 4 * 32
    jaxfl.tune(federation, params, data, cohort_size=Poisson(2.5), verbose=False)
