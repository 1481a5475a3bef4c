"""Values of coalitions by whole runs, and their division, against brute force."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import contribution
from jaxfl.contribution import leave_one_out, sampled_shapley, shapley
from jaxfl.faults import Schedule

RATE = 0.05


def run(federation, data, cohort_size=None, rounds=3):
    state = federation.init(toy.params(), data)
    return jaxfl.scan_rounds(
        federation,
        state,
        data,
        rounds=rounds,
        key=jax.random.key(5),
        cohort_size=cohort_size,
    )


def plain():
    return jaxfl.federate(jaxfl.fedavg(toy.loss, optax.sgd(RATE)), jaxfl.mean())


def stateful():
    """Batches in a random order, states at both ends, noise: all to be disturbed."""
    return jaxfl.federate(
        jaxfl.scaffold(toy.loss, RATE, batch_size=2),
        jaxfl.chain(jaxfl.clip(5.0), jaxfl.privacy.local_gaussian(0.1), jaxfl.mean()),
    )


# --- who takes part -----------------------------------------------------------


def test_left_out_is_never_asked():
    """The run of a schedule that asks the others only, even if the data are NaN."""
    present = [0, 2, 5]
    mask = np.isin(np.arange(toy.N), present)
    x, y, ids = toy.examples()
    x[~mask[ids]] = np.nan
    data = jaxfl.from_arrays(jnp.asarray(x), jnp.asarray(y), ids, toy.N)
    federation = stateful()
    got, (info, _) = run(contribution.participating(federation, mask), data)
    asked = Schedule(client=np.tile(np.array(present, np.int32), (3, 1)))
    want, (others, _) = run(federation, data, asked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    assert info.alive.tolist() == [mask.tolist()] * 3
    np.testing.assert_array_equal(info.bits_down.sum(1), others.bits_down.sum(1))
    assert float(jnp.abs(got.params["w"] - toy.params()["w"]).max()) > 0.01


@pytest.mark.parametrize("size", [2, jaxfl.Poisson(3)])
def test_cohorts_are_drawn_as_they_were(size):
    """Of sampled cohorts, padded ones too, those in the coalition are alive."""
    mask, federation = np.arange(toy.N) % 2 == 0, plain()
    _, (whole, _) = run(federation, toy.data(), size)
    _, (info, _) = run(contribution.participating(federation, mask), toy.data(), size)
    np.testing.assert_array_equal(info.client, whole.client)
    want = whole.alive & mask[np.minimum(whole.client, toy.N - 1)]
    np.testing.assert_array_equal(info.alive, want)
    assert want.any() and (want != whole.alive).any()


def test_a_schedule_does_not_send_to_who_is_left_out():
    client = np.tile(np.arange(toy.N, dtype=np.int32), (3, 1))
    schedule = Schedule(client=client, asked=np.ones((3, toy.N), bool))
    mask = np.arange(toy.N) == 1
    only = contribution.participating(plain(), mask)
    _, (info, _) = run(only, toy.data(), schedule)
    np.testing.assert_array_equal(info.bits_down > 0, np.tile(mask, (3, 1)))


def test_simulate_takes_it():
    only = contribution.participating(plain(), np.arange(toy.N) == 5)
    state, history = jaxfl.simulate(
        only,
        toy.params(),
        toy.data(),
        rounds=1,
        key=jax.random.key(0),
        progress=False,
    )
    x, _, ids = toy.examples()
    start = np.asarray(toy.params()["w"])
    want = start + RATE * (x[ids == 5] - start).mean(0)
    np.testing.assert_allclose(state.params["w"], want, rtol=1e-5)
    assert history.clients.sent.sum() == 1
    with pytest.raises(ValueError, match="mask"):
        contribution.participating(plain(), np.ones(3, bool)).init(
            toy.params(), toy.data()
        )


# --- games of runs ------------------------------------------------------------

TARGET = np.array([1.5, 0.5, 2.0])


def closed_form(masks):
    """One round of one whole step is the mean of the coalition's examples."""
    x, _, ids = toy.examples()
    value = []
    for mask in masks:
        rows = x[mask[ids]].astype(np.float64)
        start = np.asarray(toy.params()["w"], np.float64)
        w = start + RATE * (rows - start).mean(0) if len(rows) else start
        value.append(-np.sum((w - TARGET) ** 2))
    return np.array(value)


def of_runs(chunk_size=8):
    def utility(state):
        return -jnp.sum((state.params["w"] - TARGET) ** 2)

    return contribution.game(
        plain(),
        toy.params(),
        toy.data(),
        utility=utility,
        rounds=1,
        key=jax.random.key(0),
        chunk_size=chunk_size,
    )


def every_coalition(n):
    return np.array(list(itertools.product([False, True], repeat=n)))


@pytest.mark.parametrize("chunk_size", [3, 256])
def test_a_game_of_runs_has_its_closed_form(chunk_size):
    """On coalitions that fill no whole number of chunks, nobody's among them."""
    masks = every_coalition(toy.N)[::5]
    assert len(masks) % 3
    value = of_runs(chunk_size)(masks)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, closed_form(masks), rtol=1e-5)


def test_shapley_of_runs():
    """Efficiency; nothing for the client without examples; the closed form's values."""
    got = shapley(of_runs(32), toy.N)
    np.testing.assert_allclose(got, shapley(closed_form, toy.N), atol=1e-5)
    nobody, everyone = closed_form(every_coalition(toy.N)[[0, -1]])
    np.testing.assert_allclose(got.sum(), everyone - nobody, atol=1e-5)
    assert toy.SIZES[4] == 0 and abs(got[4]) < 1e-6
    assert np.abs(got[:4]).min() > 1e-3


def test_errors_of_games():
    with pytest.raises(ValueError, match="chunk_size"):
        of_runs(0)
    with pytest.raises(ValueError, match="masks"):
        of_runs()(np.ones((2, 3), bool))
    value = contribution.game(
        plain(),
        toy.params(),
        toy.data(),
        utility=lambda state: state.params["w"],
        rounds=1,
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match="utility"):
        value(np.ones((1, toy.N), bool))


# --- any game -----------------------------------------------------------------


def random_game(n, seed=0):
    """A value of its own for every coalition."""
    table = np.random.default_rng(seed).normal(size=2**n)
    return lambda masks: table[masks @ (1 << np.arange(n))]


def brute_force(game, n):
    """The mean over all orders, straight from the definition."""
    total = np.zeros(n)
    for order in itertools.permutations(range(n)):
        mask = np.zeros(n, bool)
        for i in order:
            before = game(mask[None])[0]
            mask[i] = True
            total[i] += game(mask[None])[0] - before
    return total / math.factorial(n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shapley_is_the_mean_over_all_orders(n):
    game = random_game(n)
    np.testing.assert_allclose(shapley(game, n), brute_force(game, n), rtol=1e-10)


def test_axioms():
    """Client 3 adds nothing to anyone, 0 and 2 are alike, all is divided."""

    def game(masks):
        pull = masks @ np.array([1.0, 2.0, 1.0, 0.0])
        return 3.0 + pull**2 + 5.0 * (masks[:, 0] & masks[:, 2])

    value = shapley(game, 4)
    np.testing.assert_allclose(value, brute_force(game, 4), rtol=1e-12)
    np.testing.assert_allclose(value.sum(), 16 + 5, rtol=1e-12)
    np.testing.assert_allclose(value[0], value[2], rtol=1e-12)
    assert abs(value[3]) < 1e-12 < value.min() + 1e-11


def test_leave_one_out():
    game = random_game(4)
    everyone = np.ones(4, bool)
    want = [
        game(everyone[None])[0] - game((np.arange(4) != i)[None])[0] for i in range(4)
    ]
    np.testing.assert_allclose(leave_one_out(game, 4), want, rtol=1e-12)


def test_sampled_shapley_is_unbiased_and_knows_its_error():
    """z-scores over 200 estimates of 7 values: neither too wide nor too narrow."""
    n, game = 7, random_game(7)
    exact = shapley(game, n)
    found = [sampled_shapley(game, n, permutations=40, seed=s) for s in range(200)]
    z = np.array([(e.value - exact) / e.error for e in found])
    assert np.abs(z.mean(0)).max() < 4 / math.sqrt(len(found))
    assert 0.9 < z.std() < 1.15  # of Student's t with 39 degrees of freedom: 1.03
    total = game(np.ones((1, n), bool)) - game(np.zeros((1, n), bool))
    np.testing.assert_allclose([e.value.sum() for e in found], total[0], rtol=1e-9)
    assert all(e.coalitions <= 2**n for e in found)


def test_no_coalition_is_played_twice():
    played = []

    def game(masks):
        played.extend(map(tuple, masks.tolist()))
        return random_game(4)(masks)

    found = sampled_shapley(game, 4, permutations=50, seed=1)
    assert found.coalitions == len(played) == len(set(played)) == 16


def test_truncation_saves_and_is_within_its_tolerance():
    """Clients saturate: the first few bring all but a little."""
    n, tolerance, played = 12, 0.05, []

    def game(masks):
        played.append(len(masks))
        return 1 - 0.4 ** masks.sum(1)

    whole = sampled_shapley(game, n, permutations=20, seed=0)
    cost, _ = sum(played), played.clear()
    cut = sampled_shapley(game, n, permutations=20, seed=0, tolerance=tolerance)
    # 0.4^k < 0.05 + 0.4^12 from k = 4 on, so that four of twelve are played.
    assert sum(played) <= 2 + 20 * 4 < cost
    gap = whole.value.sum() - cut.value.sum()
    assert 0 < gap < tolerance
    np.testing.assert_allclose(cut.value.sum(), 1 - 0.4**4, rtol=1e-12)


def test_errors_of_division():
    game = random_game(3)
    with pytest.raises(ValueError, match="num_clients"):
        shapley(game, 21)
    with pytest.raises(ValueError, match="num_clients"):
        leave_one_out(game, 0)
    with pytest.raises(ValueError, match="permutations"):
        sampled_shapley(game, 3, permutations=1, seed=0)
    with pytest.raises(ValueError, match="tolerance"):
        sampled_shapley(game, 3, permutations=2, seed=0, tolerance=-0.1)
    with pytest.raises(ValueError, match="game"):
        shapley(lambda masks: np.zeros(2), 3)
