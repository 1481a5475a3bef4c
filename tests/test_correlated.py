"""Noise that is correlated over rounds: its covariance, its sensitivity, its runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import toy
from jax_privacy.matrix_factorization import (
    banded,
    buffered_toeplitz,
    sensitivity,
    streaming_matrix,
    toeplitz,
)

import jaxfl
from jaxfl import Cyclic, Poisson, accounting, chain, clip, mean
from jaxfl.privacy import (
    correlated_gaussian,
    gaussian,
    participation_sensitivity,
    tree_aggregation,
)

ROUNDS = 12
BANDED = banded.ColumnNormalizedBanded.default(ROUNDS, 3)
BLT = buffered_toeplitz.BufferedToeplitz(
    buf_decay=jnp.array([0.95, 0.4]), output_scale=jnp.array([0.3, 0.2])
)
MATRICES = {
    "independent": streaming_matrix.identity(),
    "banded": BANDED.inverse_as_streaming_matrix(),
    "buffered": BLT.inverse_as_streaming_matrix(),
    "tree": tree_aggregation(ROUNDS),
    "tree, own noise only": tree_aggregation(ROUNDS, efficient=False),
    "trees": tree_aggregation(ROUNDS, restart=5),
}


# ------------------------------------------------------------------ the binary tree


def tree_reference(n, efficient):
    """`C^-1` in terms of the noise of every node, `[n, nodes]`, by its definition."""
    nodes = [(level, i) for level in range(n.bit_length()) for i in range(n >> level)]

    def estimate(level, i):
        """The node's best linear unbiased estimate, and its variance."""
        own = np.array([float(node == (level, i)) for node in nodes])
        if level == 0 or not efficient:
            return own, 1.0
        (a, v), (b, w) = (estimate(level - 1, 2 * i + j) for j in (0, 1))
        precision = 1 + 1 / (v + w)
        return (own + (a + b) / (v + w)) / precision, 1 / precision

    sums = np.zeros((n + 1, len(nodes)))
    for t in range(1, n + 1):
        start = 0
        for level in reversed(range(n.bit_length())):
            if t >> level & 1:
                sums[t] += estimate(level, start >> level)[0]
                start += 1 << level
    return np.diff(sums, axis=0)


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("n", [1, 6, 13, 16])
def test_the_tree_is_that_of_its_nodes(n, efficient):
    want = tree_reference(n, efficient)
    got = np.asarray(tree_aggregation(n, efficient=efficient).materialize(n))
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=2e-6)
    assert not np.triu(got, 1).any()


def test_trees_that_begin_again_are_blocks():
    got = tree_aggregation(12, restart=5).materialize(12)
    whole, last = (tree_aggregation(n).materialize(n) for n in (5, 2))
    want = jax.scipy.linalg.block_diag(whole, whole, last)
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_a_plain_tree_moves_by_the_root_of_its_height():
    """A client is in one node on each of log2(n) + 1 levels."""
    for n, height in ((1, 1), (4, 3), (16, 5)):
        once = participation_sensitivity(tree_aggregation(n, efficient=False), n, n)
        assert once == pytest.approx(np.sqrt(height), rel=1e-5)
        # An estimate from more noise tells no more.
        better = participation_sensitivity(tree_aggregation(n), n, n)
        assert better <= once * (1 + 1e-6)


# ---------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("separation, most", [(3, None), (4, 2), (1, 1), (12, None)])
def test_sensitivity_of_banded_matrices(separation, most):
    got = participation_sensitivity(MATRICES["banded"], ROUNDS, separation, most)
    if separation >= BANDED.bands or most == 1:
        often = most or -(-ROUNDS // separation)
        assert got == pytest.approx(np.sqrt(often), rel=1e-5)
    want = sensitivity.get_min_sep_sensitivity_upper_bound(
        BANDED.materialize(), separation, most
    )
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("separation, most", [(3, None), (4, 2), (1, None)])
def test_sensitivity_of_buffered_matrices(separation, most):
    got = participation_sensitivity(MATRICES["buffered"], ROUNDS, separation, most)
    want = toeplitz.minsep_sensitivity_squared(
        BLT.toeplitz_coefs(ROUNDS), separation, most
    )
    assert got**2 == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_no_client_moves_the_run_further(name):
    """By trying every set of rounds, and every sign where it is small."""
    n, separation = 8, 3
    inverse = np.asarray(MATRICES[name].materialize(n), np.float64)
    gram = np.linalg.inv(inverse @ inverse.T)
    worst = 0.0
    for bits in range(1, 1 << n):
        rounds = [t for t in range(n) if bits >> t & 1]
        if min(np.diff(rounds), default=n) >= separation:
            for signs in np.ndindex(*[2] * len(rounds)):
                x = np.zeros(n)
                x[rounds] = 2 * np.array(signs) - 1
                worst = max(worst, x @ gram @ x)
    got = participation_sensitivity(MATRICES[name], n, separation)
    assert np.sqrt(worst) <= got * (1 + 1e-6) <= 1.02 * np.sqrt(worst)


# ----------------------------------------------------------------------- covariance


COORDINATES = 4000


@functools.cache
def released(name):
    """What the server gets of zeros in every round of a run, `[rounds, d]`."""
    noise = correlated_gaussian(0.7, MATRICES[name], rounds=ROUNDS, min_separation=3)
    channel = chain(clip(2.0), mean(denominator=4.0), noise)
    zeros = {"w": jnp.zeros((COORDINATES // 2, 2)), "b": jnp.zeros(())}

    def client(ctx, broadcast, client_state, data):
        return zeros, (), {}

    def server(ctx, state, outcome):
        return outcome.payload["w"]

    algorithm = jaxfl.Algorithm(lambda params: (zeros["w"], ()), client, server)
    federation = jaxfl.federate(algorithm, channel)
    data = toy.data()
    state = federation.init(zeros, data)
    seen = []
    step = jax.jit(federation.round)
    for _ in range(ROUNDS):
        state, _ = step(jax.random.key(1), state, toy.cohort(data))
        seen.append(np.ravel(state.server.algorithm))
    return np.array(seen, np.float64)


def deviance(name, seen, scale=1.0):
    """How unlikely it is, as a p-value, that noise has the covariance of a matrix.

    Whitened it is `rounds x d` independent standard normals: their squares add up to
    a chi-square, and the products of two rounds to a sum of zero mean.
    """
    inverse = np.asarray(MATRICES[name].materialize(ROUNDS), np.float64)
    sens = participation_sensitivity(MATRICES[name], ROUNDS, 3)
    sigma = scale * 0.7 * sens * 2.0 / 4.0  # of the mean: C / denominator
    white = np.linalg.solve(inverse, seen) / sigma
    gram, d = white @ white.T, seen.shape[1]
    z = (gram - d * np.eye(ROUNDS)) / np.sqrt(d * (1 + np.eye(ROUNDS)))
    z = z[np.tril_indices(ROUNDS)]
    return scipy.stats.chi2.sf(np.sum(z**2), len(z))


@pytest.mark.parametrize("name", MATRICES)
def test_noise_has_the_covariance_of_its_matrix(name):
    seen = released(name)
    assert deviance(name, seen) > 1e-3
    assert deviance(name, seen, scale=1.05) < 1e-9
    for other in MATRICES:
        if other != name:
            assert deviance(other, seen) < 1e-9


# ----------------------------------------------------------------------------- runs


def federation(name="banded", rounds=ROUNDS, **plan):
    noise = correlated_gaussian(0.5, MATRICES[name], rounds=rounds, min_separation=2)
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    channel = chain(clip(1.0), mean(denominator=3.0), noise)
    return jaxfl.federate(algorithm, channel, **plan)


def run(name="banded", rounds=6, federation_rounds=ROUNDS, plan=None, **options):
    return jaxfl.simulate(
        federation(name, federation_rounds, **(plan or {})),
        *(toy.params(), toy.data()),
        rounds=rounds,
        key=jax.random.key(0),
        cohort_size=Cyclic(3),
        progress=False,
        **options,
    )[0]


def numbers(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.server)]


@pytest.mark.parametrize("name", ["banded", "buffered", "trees"])
def test_a_run_goes_on_to_the_bit(tmp_path, name):
    run(name, 2, checkpoint=tmp_path)
    got = run(name, checkpoint=tmp_path)
    for a, b in zip(numbers(got), numbers(run(name)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_is_the_same_for_every_plan():
    want = numbers(run("trees"))
    mesh = jaxfl.client_mesh(jax.devices()[:3])
    for plan in ({"chunk_size": 1}, {"chunk_size": 2, "mesh": mesh}):
        for a, b in zip(numbers(run("trees", plan=plan)), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_nothing_is_released_after_the_last_round():
    last = run(rounds=4, federation_rounds=4)
    after = run(rounds=6, federation_rounds=4)
    assert int(after.round) == 6
    jax.tree.map(np.testing.assert_array_equal, after.params, last.params)


def test_noise_goes_by_the_bound_of_the_chain():
    noise = correlated_gaussian(1.0, MATRICES["tree"], rounds=2, min_separation=2)
    with pytest.raises(ValueError, match="correlated_gaussian: nothing bounds"):
        algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1))
        jaxfl.federate(algorithm, chain(clip(1.0), mean(), noise))


@pytest.mark.parametrize(
    "error, word, change",
    [
        (ValueError, "noise_multiplier", {"noise_multiplier": -1.0}),
        (TypeError, "noising_matrix", {"noising_matrix": np.eye(3)}),
        (ValueError, "rounds", {"rounds": 0}),
        (ValueError, "min_separation", {"min_separation": 0}),
        (ValueError, "max_participations", {"max_participations": -1}),
    ],
)
def test_arguments(error, word, change):
    arguments = {
        "noise_multiplier": 1.0,
        "noising_matrix": MATRICES["banded"],
        "rounds": 4,
        "min_separation": 2,
    }
    with pytest.raises(error, match=word):
        correlated_gaussian(**(arguments | change))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": 4, "restart": 0}])
def test_a_tree_has_rounds(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        tree_aggregation(**wrong)


# ----------------------------------------------------------------------- accounting


def epsilon(name="banded", multiplier=2.0, most=None, **change):
    noise = correlated_gaussian(
        *(multiplier, MATRICES[name]),
        rounds=ROUNDS,
        min_separation=3,
        max_participations=most,
    )
    how = {"population": 11, "cohort": Cyclic(3), "rounds": ROUNDS, "delta": 1e-5}
    return accounting.epsilon(
        chain(clip(0.3), mean(denominator=3.0), noise), **(how | change)
    )


@pytest.mark.parametrize("name", MATRICES)
def test_a_run_is_one_gaussian_mechanism(name):
    """By the delta of the Gaussian mechanism, Balle and Wang 2018, theorem 8."""
    spent, phi, z = epsilon(name, 2.0), scipy.stats.norm.cdf, 2.0
    delta = phi(0.5 / z - z * spent) - np.exp(spent) * phi(-0.5 / z - z * spent)
    assert delta == pytest.approx(1e-5, rel=1e-2)


def test_independent_noise_is_as_private_as_it_is_without_correlations():
    """A client has 4 turns, 3 rounds apart: what `gaussian` adds is sens(C) as much."""
    independent = chain(clip(0.3), mean(denominator=3.0), gaussian(2.0 * np.sqrt(4)))
    want = accounting.epsilon(
        independent, population=11, cohort=Cyclic(3), rounds=ROUNDS, delta=1e-5
    )
    assert epsilon("independent", 2.0) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    "word, change",
    [
        ("rounds", {"rounds": 13}),
        ("3 rounds apart; .* for 3 times", {"most": 3}),
        ("2 rounds apart", {"cohort": Cyclic(4)}),
        ("1 rounds apart", {"cohort": 3}),
        ("1 rounds apart", {"cohort": Poisson(3)}),
        ("2 rounds apart", {"population": 8}),
    ],
)
def test_another_pattern_is_not_accounted_for(word, change):
    with pytest.raises(ValueError, match=word):
        epsilon(**change)
