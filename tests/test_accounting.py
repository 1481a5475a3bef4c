"""Epsilons: published ones, closed forms, and none where there is no bound."""

import dataclasses
import functools
import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import toy
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

import jaxfl
from jaxfl import Poisson, accounting, chain, clip, communicate, mean, privacy
from jaxfl.accounting import ClassicRdp, calibrate, epsilon

WholeOrders = functools.partial(ClassicRdp, range(2, 65))


def noised(multiplier, *left):
    return chain(*left, clip(0.5), mean(denominator=9), privacy.gaussian(multiplier))


def spent(channel, cohort=None, population=100, rounds=10, delta=1e-5, **how):
    run = {"population": population, "cohort": cohort, "rounds": rounds}
    return epsilon(channel, **run, delta=delta, **how)


# Where it does not matter, by the accountant that is quick.
quick = functools.partial(spent, accountant=RdpAccountant)


def reference(multiplier, delta, moved=1.0):
    """The epsilon of one normal noise, by the two-sided tail of its privacy loss."""
    mu = moved / multiplier

    def exceeds(e):
        tail, own = scipy.stats.norm.cdf([mu / 2 - e / mu, -mu / 2 - e / mu])
        return tail - math.exp(e) * own - delta

    return scipy.optimize.brentq(exceeds, 0, 500)


# --- published ---------------------------------------------------------------

# TensorFlow Privacy's tutorial on MNIST: batches of 256 of 60,000, delta 1e-5.
TUTORIAL = [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]


@pytest.mark.parametrize("multiplier, epochs, published", TUTORIAL)
def test_the_tutorial_of_tensorflow_privacy(multiplier, epochs, published):
    """By the default orders of dp_accounting; by its conversion, and PLD, tighter."""
    rounds = epochs * 60_000 // 256
    event = dp.PoissonSampledDpEvent(256 / 60_000, dp.GaussianDpEvent(multiplier))
    found = []
    for accountant in (ClassicRdp, RdpAccountant, PLDAccountant):
        found.append(
            spent(
                noised(multiplier),
                Poisson(256, overflow=1e-30),
                population=60_000,
                rounds=rounds,
                accountant=accountant,
            )
        )
        own = accountant().compose(event, rounds).get_epsilon(1e-5)
        np.testing.assert_allclose(found[-1], own, rtol=1e-9)
    classic, newer, tightest = found
    assert round(classic, 2) == published
    assert tightest < newer < classic


def test_dp_fedavg():
    """McMahan et al. 2018 counted with moments of whole orders."""
    run = functools.partial(
        spent, noised(1.0), population=763_430, rounds=5000, delta=1e-9
    )
    cohort = Poisson(5000, overflow=1e-25)
    assert round(run(cohort, accountant=WholeOrders), 3) == 4.634
    assert run(cohort, accountant=ClassicRdp) < 4.634


# --- closed forms ------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 9])
def test_everyone_in_every_round(rounds):
    """Normal noise composes to that of z / sqrt(rounds)."""
    want = reference(2.0 / math.sqrt(rounds), 1e-5)
    for cohort in (None, 100):
        np.testing.assert_allclose(
            spent(noised(2.0), cohort, rounds=rounds), want, rtol=1e-3
        )


def test_laplace_noise():
    channel = chain(clip(2.0, ord=1), mean(denominator=9), privacy.laplace(4.0))
    found = spent(channel, rounds=3, delta=1e-9)
    np.testing.assert_allclose(found, 3 / 4, rtol=1e-3)
    assert spent(channel, Poisson(10), rounds=3) < 0.2


@pytest.mark.parametrize("cohort", [None, Poisson(2), 2])
def test_noises_of_one_round_are_one(cohort):
    """An adaptive clip and what `noise_left` leaves for the updates, and that alone."""
    updates = privacy.gaussian(privacy.noise_left(1.5, spent=4.0))
    adaptive = privacy.adaptive_clip(0.5, initial=1.0, clients=10, count_std=2.0)
    both = chain(adaptive, mean(denominator=10), updates)
    want = quick(noised(1.5), cohort)
    np.testing.assert_allclose(quick(both, cohort), want, rtol=1e-9)
    careless = chain(adaptive, mean(denominator=10), privacy.gaussian(1.5))
    assert quick(careless, cohort) > 1.02 * want


def test_normal_and_laplace_noise_compose():
    channel = chain(
        *(clip(1.0, ord=1), mean(denominator=5.0)),
        *(privacy.gaussian(2.0), privacy.laplace(3.0)),
    )
    events = [dp.GaussianDpEvent(2.0), dp.LaplaceDpEvent(3.0)]
    own = PLDAccountant().compose(dp.ComposedDpEvent(events), 10).get_epsilon(1e-5)
    np.testing.assert_allclose(spent(channel), own, rtol=1e-9)
    with pytest.raises(ValueError, match="accountant: PLD"):
        spent(channel, Poisson(10))


def test_a_fixed_size_moves_twice_as_far():
    """Replacing one of K: the noise halved. Of everyone but one no worse than that."""
    event = dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.5))
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    own = accountant.compose(event, 10).get_epsilon(1e-5)
    assert spent(noised(3.0), 10) == own
    assert own < 0.5 * quick(noised(1.5))
    assert spent(noised(3.0), 99) == quick(noised(1.5))


@pytest.mark.parametrize("cohort", [None, Poisson(10), 10])
def test_local_noise_is_not_amplified(cohort):
    """Other data move a message of norm 1 by 2, each time that a client sends."""
    normal = chain(clip(0.3), privacy.local_gaussian(4.0), mean())
    want = reference(4.0, 1e-5, moved=2.0)
    np.testing.assert_allclose(spent(normal, cohort, rounds=1), want, rtol=1e-3)
    laplace = chain(clip(0.3, ord=1), privacy.local_laplace(4.0), mean())
    found = spent(laplace, cohort, rounds=3, delta=1e-9)
    np.testing.assert_allclose(found, 3 * 2 / 4, rtol=1e-3)


def test_more_noise_fewer_rounds_or_clients_spend_less():
    def run(multiplier=1.0, cohort=10, rounds=10, delta=1e-5):
        return quick(noised(multiplier), Poisson(cohort), rounds=rounds, delta=delta)

    assert max(run(multiplier=1.1), run(cohort=9), run(rounds=9), run(delta=1e-4)) < (
        run()
    )


@pytest.mark.parametrize("accountant", [PLDAccountant, RdpAccountant, ClassicRdp])
def test_delta_pays_for_clients_without_a_row(accountant):
    """`delta + (1 + e^epsilon) rounds overflow` is delta again."""

    def run(overflow, delta=1e-5):
        cohort = Poisson(2, overflow)
        return spent(noised(1.0), cohort, accountant=accountant, delta=delta)

    overflow = 1e-9
    found = run(overflow)
    assert run(1e-30) < found < 1.05 * run(1e-30)
    lost = (1 + math.exp(found)) * 10 * overflow
    assert run(1e-30, 1e-5 - lost) <= found
    assert run(1e-4) == math.inf


def test_it_is_the_federations_own_noise():
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    federation = jaxfl.federate(algorithm, noised(1.0), chunk_size=2)
    assert quick(federation) == quick(noised(1.0)) > quick(noised(jnp.float32(1.1)))


# --- no bound ----------------------------------------------------------------


COUNTED = privacy.adaptive_clip(0.5, initial=1.0, clients=10)
NO_BOUND = {
    "no noise": (chain(clip(1.0), mean(denominator=9)), "no noise"),
    "nothing": (jaxfl.identity(), "no noise"),
    "a count alone": (chain(COUNTED, mean(denominator=9)), "no noise"),
    "a part": (
        chain(clip(1.0), mean(denominator=9), jaxfl.on("w", privacy.gaussian(1.0))),
        "no noise",
    ),
    "multiplier 0": (noised(0.0), "positive"),
    "count without noise": (
        noised(1.0, privacy.adaptive_clip(0.5, initial=1, clients=10, count_std=0.0)),
        "positive",
    ),
    "no clip": (chain(mean(denominator=9), privacy.gaussian(1.0)), "nothing bounds"),
    "local and central": (
        chain(clip(1.0), privacy.local_gaussian(1.0), noised(1.0)),
        "either alone",
    ),
    "weights left of noise": (
        chain(mean(), clip(1.0), privacy.gaussian(1.0)),
        "layer 0.*weights",
    ),
    "who sent": (
        noised(1.0, communicate.target_rate(0.5, initial=1.0, step=1.0, keep=False)),
        "layer 0",
    ),
    "several multipliers": (noised(jnp.ones(2)), "must be a number"),
}


@pytest.mark.parametrize("name", NO_BOUND)
def test_no_epsilon_without_a_bound(name):
    channel, words = NO_BOUND[name]
    with pytest.raises(ValueError, match=words):
        spent(channel)


def test_what_follows_the_noise_costs_nothing():
    alone = quick(noised(1.0))
    momentum = jaxfl.at_server(optax.trace(0.9))
    for left in (momentum, jaxfl.tap(), clip(3.0), mean(denominator=2)):
        assert quick(noised(1.0, left)) == alone


def test_no_epsilon_of_a_median():
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    channel = chain(clip(1.0), privacy.local_gaussian(1.0))
    local = jaxfl.federate(algorithm, channel, jaxfl.median())
    assert quick(local) == quick(channel)
    with pytest.raises(ValueError, match="nothing bounds"):
        central = chain(clip(1.0), privacy.gaussian(1.0))
        spent(jaxfl.federate(algorithm, central, jaxfl.median()))


def test_no_epsilon_of_a_traced_multiplier():
    with pytest.raises(ValueError, match="traced"):
        jax.vmap(lambda z: spent(noised(z)))(jnp.ones(2))


def test_no_amplification_of_laplace_by_a_fixed_size():
    channel = chain(clip(1.0, ord=1), mean(denominator=9), privacy.laplace(1.0))
    with pytest.raises(ValueError, match="accountant: Rdp.*WithoutReplacement"):
        spent(channel, 10)
    with pytest.raises(ValueError, match="accountant: PLD"):
        spent(noised(1.0), 10, accountant=PLDAccountant)


def test_no_epsilon_of_an_unknown_mechanism():
    other = noised(1.0)._replace(layers=None, mechanism=lambda bound, moved: "noise")
    with pytest.raises(ValueError, match="no accountant knows the mechanism 'noise'"):
        spent(other)


@pytest.mark.parametrize(
    "word, options",
    [
        ("population", {"population": 0}),
        ("rounds", {"rounds": 0}),
        ("rounds", {"rounds": 1.5}),
        ("delta", {"delta": 1.0}),
        ("delta", {"delta": 0.0}),
        ("cohort_size", {"cohort": 101}),
        ("expected", {"cohort": Poisson(100)}),
    ],
)
def test_arguments(word, options):
    with pytest.raises(ValueError, match=word):
        spent(noised(1.0), **options)


def test_it_is_of_a_federation_or_a_channel():
    with pytest.raises(TypeError, match="private must be"):
        spent(1.0)


# --- the noise for an epsilon -------------------------------------------------


@pytest.mark.parametrize("target, cohort", [(0.5, Poisson(2)), (8.0, None)])
def test_calibrated_noise_is_the_least(target, cohort):
    run = {"population": 100, "cohort": cohort, "rounds": 10, "delta": 1e-5}
    least = calibrate(noised, target, **run, accountant=RdpAccountant)
    assert quick(noised(least), cohort) <= target < quick(noised(0.998 * least), cohort)


def test_calibration_to_the_closed_form():
    run = {"population": 100, "cohort": None, "rounds": 1, "delta": 1e-5}
    multiplier = calibrate(noised, 1.0, **run, start=40.0)
    np.testing.assert_allclose(reference(multiplier, 1e-5), 1.0, rtol=2e-3)


@pytest.mark.parametrize(
    "word, target, options",
    [
        ("target must", 0.0, {}),
        ("tolerance must", 1.0, {"tolerance": 0.0}),
        ("start must", 1.0, {"start": -1.0}),
        ("target: no noise", 1e-9, {"cohort": Poisson(9, overflow=0.1)}),
    ],
)
def test_calibration_that_cannot_be(word, target, options):
    run = {"population": 100, "cohort": None, "rounds": 1, "delta": 1e-5} | options
    with pytest.raises(ValueError, match=word):
        calibrate(noised, target, **run, accountant=RdpAccountant)


# --- the ledger ---------------------------------------------------------------


def test_the_ledger_has_what_was_spent_at_each_evaluation():
    cohort = Poisson(3)
    federation = jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2), noised(1.0)
    )
    _, history = jaxfl.simulate(
        federation,
        toy.params(),
        toy.data(),
        rounds=5,
        every=2,
        cohort_size=cohort,
        key=jax.random.key(0),
        evaluate=lambda state: {"b": state.params["b"]},
        progress=False,
    )
    options = {"cohort": cohort, "delta": 1e-5, "accountant": RdpAccountant}
    kept = accounting.ledger(history, federation, population=toy.N, **options)
    want = [quick(federation, cohort, toy.N, rounds) for rounds in (2, 4, 5)]
    assert kept["epsilon"].tolist() == want == sorted(want)
    assert list(kept.evaluation_table()) == ["round", "b", "epsilon"]
    assert kept.clients is history.clients and "epsilon" not in history.evaluations
    assert dataclasses.replace(kept, evaluations=history.evaluations) == history


@pytest.mark.parametrize("rounds", [1, 4])
def test_randomised_response_is_pure(rounds):
    """Its epsilons add up where delta is next to nothing."""
    channel = chain(clip(1.0), privacy.randomised_response(0.5), mean())
    run: dict = {"population": 100, "cohort": 10, "rounds": rounds}
    got = epsilon(channel, **run, delta=1e-12)
    np.testing.assert_allclose(got, 0.5 * rounds, rtol=2e-2)
    if rounds > 1:  # a larger delta buys something
        run["rounds"] = 200
        assert epsilon(channel, **run, delta=1e-3) < 0.5 * 100


@pytest.mark.parametrize("noise", [privacy.skellam, privacy.discrete_gaussian])
def test_distributed_noise_on_a_fine_grid_counts_as_normal(noise):
    shared = {"clients": 20, "dimension": 64, "bits": 20}
    of_clients = chain(clip(1.0), mean(denominator=20.0), noise(1.5, **shared))
    at_server = chain(clip(1.0), mean(denominator=20.0), privacy.gaussian(1.5))
    run: dict = {"population": 20, "cohort": None, "rounds": 10, "delta": 1e-5}
    want = epsilon(at_server, **run, accountant=RdpAccountant)
    got = epsilon(of_clients, **run)
    assert want <= got * (1 + 1e-3) and got <= 1.01 * want
