"""Membership inference: what scores are worth, and that they are the best there are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jaxfl
from jaxfl import attack
from jaxfl.data import from_arrays, subset


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def null_error(members, others):
    """The standard error of the AUC where nothing is to be told."""
    return np.sqrt((members + others + 1) / (12 * members * others))


# ------------------------------------------------------------- how good scores are


def test_auc_counts_pairs_and_half_of_ties(rng):
    for _ in range(20):
        size = rng.integers(2, 40)
        score = rng.integers(0, 5, size).astype(np.float32)  # many ties
        member = np.arange(size) < rng.integers(1, size)
        inner, outer = score[member][:, None], score[~member][None]
        pairs = np.mean((inner > outer) + (inner == outer) / 2)
        np.testing.assert_allclose(attack.auc(score, member), pairs, rtol=1e-12)
        u = stats.mannwhitneyu(score[member], score[~member]).statistic
        np.testing.assert_allclose(pairs, u / inner.size / outer.size, rtol=1e-6)


def test_true_positives_are_those_of_the_best_threshold(rng):
    rates = np.array([0.0, 0.1, 0.29, 0.5, 1.0])
    for _ in range(20):
        size = rng.integers(2, 40)
        score = rng.integers(0, 8, size).astype(np.float32)
        member = np.arange(size) < rng.integers(1, size)
        found = np.zeros(len(rates))
        for threshold in [*np.unique(score), np.inf]:
            accused = score >= threshold
            allowed = accused[~member].mean() <= rates + 1e-12
            found = np.where(allowed, np.maximum(found, accused[member].mean()), found)
        np.testing.assert_allclose(attack.tpr_at_fpr(score, member, rates), found)


def test_rows_are_attacks_of_their_own(rng):
    score = rng.normal(size=(2, 3, 30))
    member = rng.random((2, 1, 30)) < 0.5
    rates = [0.1, 0.5]
    found, area = attack.tpr_at_fpr(score, member, rates), attack.auc(score, member)
    assert found.shape == (2, 3, 2) and area.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(area[i, j], attack.auc(score[i, j], member[i, 0]))
        np.testing.assert_array_equal(
            found[i, j], attack.tpr_at_fpr(score[i, j], member[i, 0], rates)
        )
    assert attack.tpr_at_fpr(score, member, 0.1).shape == (2, 3)


def test_private_tpr_bounds_the_normal_mechanism_and_touches_it():
    """Of all epsilons with their deltas the tightest bound is the optimal test."""
    mu, fpr = 1.2, 0.03
    best = stats.norm.cdf(stats.norm.ppf(fpr) + mu)
    bounds = []
    for epsilon in np.linspace(0, 8, 400):
        delta = stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(
            epsilon
        ) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        bounds.append(attack.private_tpr(fpr, epsilon, delta))
    assert best <= min(bounds) < best + 1e-4
    np.testing.assert_allclose(attack.private_tpr([0.0, 0.5, 1.0], 0.0), [0, 0.5, 1])
    np.testing.assert_allclose(attack.private_tpr([0.2, 1.0], 1e4), 1.0)


@pytest.mark.parametrize(
    ("score", "member", "match"),
    [
        ([1.0, np.nan], [True, False], "NaN"),
        ([1.0, 2.0], [True, True], "member must be true of some"),
        ([1.0, 2.0], [False, False], "member must be true of some"),
    ],
)
def test_refuses_scores_that_say_nothing(score, member, match):
    with pytest.raises(ValueError, match=match):
        attack.auc(score, member)
    with pytest.raises(ValueError, match=match):
        attack.tpr_at_fpr(score, member, 0.1)
    with pytest.raises(ValueError, match="fpr must be between"):
        attack.tpr_at_fpr([1.0, 2.0], [True, False], 1.5)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        attack.private_tpr(0.1, -1.0)


# -------------------------------------------------------------------------- scores


def test_confidence_is_the_log_odds_of_the_right_class(rng):
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = p[np.arange(50), labels]
    got = attack.confidence(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(got, np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
    # It orders as the loss does, also where the probability rounds to 1.
    loss = -np.log(p)
    np.testing.assert_array_equal(np.argsort(got), np.argsort(-loss))
    sure = attack.confidence(jnp.array([[90.0, 0.0], [80.0, 0.0]]), jnp.array([0, 0]))
    assert sure.tolist() == [90.0, 80.0]
    score = attack.loss_threshold(jnp.asarray(loss), 0.5)
    np.testing.assert_array_equal(np.asarray(score) >= 0, loss <= 0.5)


E, S = 4000, 400


def normal(rng, mu_in, mu_out, std_in, std_out):
    """What a model and S shadows give of candidates, each with its own numbers."""
    inside = np.asarray(attack.random_halves(jax.random.key(0), S + 2, E))

    def draw(inside):
        z = rng.normal(size=inside.shape)
        return np.where(inside, mu_in + std_in * z, mu_out + std_out * z)

    shadows = draw(inside).astype(np.float32)
    return (shadows[0], shadows[2:], inside[2:]), inside[0]


def test_lira_is_the_optimal_test_of_shifted_normals(rng):
    """With a shift of d deviations it is Phi(d / sqrt(2)), whatever the scales are."""
    d = 1.5
    std, mu = np.exp(rng.normal(size=E)), 5 * rng.normal(size=E)
    seen, member = normal(rng, mu + d * std, mu, std, std)
    area = stats.norm.cdf(d / np.sqrt(2))
    error = 0.5 / np.sqrt(E)  # at most, of an AUC of E / 2 pairs of its own
    for online in (True, False):
        score = attack.lira(*seen, online=online)
        assert abs(attack.auc(score, member) - area) < 3 * error
        found = attack.tpr_at_fpr(score, member, 0.05)
        best = stats.norm.cdf(stats.norm.ppf(0.05) + d)
        slope = np.exp(-d * stats.norm.ppf(0.05) - d**2 / 2)  # of the curve
        variance = best * (1 - best) + slope**2 * 0.05 * 0.95
        assert abs(found - best) < 4 * np.sqrt(variance / (E / 2))
    # What heeds no scale, or no mean, of the single candidate is told from it.
    wrong = attack.lira(*seen, shared_variance=True)
    assert attack.auc(wrong, member) < area - 5 * error
    assert attack.auc(seen[0], member) < area - 5 * error


def test_lira_tells_variances_apart(rng):
    """Where members only vary less, the AUC is 2/pi arctan(s_out / s_in)."""
    std = np.exp(rng.normal(size=E))
    seen, member = normal(rng, 3.0, 3.0, 0.5 * std, std)
    error = 0.5 / np.sqrt(E)
    area = 2 / np.pi * np.arctan(2.0)
    assert abs(attack.auc(attack.lira(*seen), member) - area) < 3 * error
    assert attack.auc(attack.lira(*seen, online=False), member) < 0.5 + 3 * error


def test_lira_is_two_log_densities_in_float64(rng):
    seen, _ = normal(rng, 1.0, 0.0, 2.0, 1.0)
    phi, shadows, inside = (x[..., :50] for x in seen)
    for shared in (False, True):
        parts = []
        for chosen in (inside, ~inside):
            rows = [shadows[chosen[:, e], e].astype(np.float64) for e in range(50)]
            mean, var = (np.array([f(r) for r in rows]) for f in (np.mean, np.var))
            size = np.array([len(r) for r in rows])
            var = var * size / (size - 1)
            if shared:
                var = np.sum(var * (size - 1)) / np.sum(size - 1)
            parts.append(stats.norm.logpdf(phi, mean, np.sqrt(var)))
        got = attack.lira(phi, shadows, inside, shared_variance=shared)
        np.testing.assert_allclose(got, parts[0] - parts[1], rtol=1e-3, atol=1e-4)


def test_each_model_is_attacked_with_all_others():
    masks = attack.random_halves(jax.random.key(1), 8, 30)
    phi = jax.random.normal(jax.random.key(2), (8, 2, 30)) + masks[:, None]
    got = attack.lira_each(phi, masks)
    for s in (0, 5):
        others = np.arange(8) != s
        want = attack.lira(phi[s], phi[others], masks[others])
        np.testing.assert_allclose(got[s], want, rtol=1e-4, atol=1e-4)


def test_lira_refuses_too_few_shadow_models():
    masks = jnp.array([[True], [True], [False], [False]])
    phi = jnp.zeros((4, 1))
    with pytest.raises(ValueError, match="every candidate must be in two"):
        attack.lira(phi[0], phi[1:], masks[1:])
    attack.lira(phi[0], phi[1:], masks[1:], online=False)
    with pytest.raises(ValueError, match="every candidate must be in three"):
        attack.lira_each(phi, masks)
    with pytest.raises(ValueError, match=r"shadows must have shape \[S, 1\]"):
        attack.lira(phi[0], phi[:, 0], masks)
    with pytest.raises(ValueError, match="inside must have shape"):
        attack.lira(phi[0], phi, masks[1:])
    with pytest.raises(ValueError, match="models must be even"):
        attack.random_halves(jax.random.key(0), 3, 10)


def squares(w, batch, key):
    return 0.5 * jnp.sum((w - batch["x"]) ** 2, -1)


def test_alignment_is_the_optimal_test_of_one_step_in_noise(rng):
    """Of steps with z and without, in noise sigma: AUC = Phi(|g| / (sigma sqrt(2)))."""
    d, worlds, sigma = 20, 2000, 1.5
    z, others = rng.normal(size=d) / np.sqrt(d), rng.normal(size=d)
    z *= 2.0
    member = np.arange(worlds) % 2 == 0
    updates = others + member[:, None] * -z + sigma * rng.normal(size=(worlds, d))

    @jax.vmap
    def score(update):
        candidates = {"x": jnp.asarray(z, jnp.float32)[None]}
        return attack.alignment(
            *(squares, jnp.zeros(d), candidates, update, jax.random.key(0)),
            normalise=False,
        )[0]

    area = attack.auc(score(jnp.asarray(updates, jnp.float32)), member)
    best = stats.norm.cdf(np.linalg.norm(z) / sigma / np.sqrt(2))
    assert abs(area - best) < 3 * 0.5 / np.sqrt(worlds)


# ------------------------------------------------------------------- shadow models


D, CLIENTS, CANDIDATES = 30, 3, 24
X = np.random.default_rng(1).normal(size=(CANDIDATES, D)).astype(np.float32)
Y = np.random.default_rng(2).integers(0, 2, CANDIDATES)


def logistic(w, batch, key):
    logits = batch["x"] @ w
    return optax.sigmoid_binary_cross_entropy(logits, batch["y"].astype(jnp.float32))


def federation_of(rounds):
    ids = np.arange(CANDIDATES) % CLIENTS
    data = jax.tree.map(jnp.asarray, from_arrays(X, Y, ids, CLIENTS))
    algorithm = jaxfl.fedavg(logistic, optax.sgd(0.5), batch_size=4)
    federation = jaxfl.federate(algorithm, jaxfl.mean())

    def train(key, mask):
        own = subset(data, mask)
        state = federation.init(jnp.zeros(D), own)
        state, _ = jaxfl.scan_rounds(federation, state, own, rounds=rounds, key=key)
        return state.params

    return train


def margins(x, y):
    return lambda w: jnp.where(y > 0, 1.0, -1.0) * (x @ w)


def test_shadow_models_of_a_federation_vmapped_are_those_one_by_one():
    train, key = federation_of(rounds=3), jax.random.key(0)
    masks = attack.random_halves(jax.random.key(1), 6, CANDIDATES)
    observe = margins(X, Y)
    run = jax.jit(
        lambda size: attack.shadow_scores(train, observe, key, masks, at_once=size),
        static_argnums=0,
    )
    whole = run(None)
    for size in (1, 4):
        np.testing.assert_allclose(run(size), whole, rtol=1e-4, atol=1e-5)
    for s in (0, 5):
        one = observe(train(jax.random.fold_in(key, s), masks[s]))
        np.testing.assert_allclose(whole[s], one, rtol=1e-4, atol=1e-5)


def test_a_model_that_memorised_is_read_and_one_that_never_saw_is_not():
    models = 64
    masks = attack.random_halves(jax.random.key(1), models, CANDIDATES)
    x = np.random.default_rng(7).normal(size=X.shape).astype(np.float32)

    def observe(w):
        return {"seen": margins(X, Y)(w), "never": margins(x, Y)(w)}

    phi = jax.jit(
        lambda key: attack.shadow_scores(federation_of(10), observe, key, masks)
    )(jax.random.key(0))
    # Who is called a member of what was never seen is another draw: the outputs do
    # depend on `masks`, by which they were trained. Coins, and not halves of models, of
    # which the others would tell how the one that is left out was called.
    called = np.random.default_rng(8).random((models, CANDIDATES)) < 0.5
    half = models * CANDIDATES // 2
    for online in (True, False):
        read = attack.lira_each(phi["seen"], masks, online=online)
        assert attack.auc(read, masks).mean() > 0.85
        blind = attack.lira_each(phi["never"], called, online=online)
        area = attack.auc(blind.ravel(), called.ravel())
        assert abs(area - 0.5) < 3 * null_error(half, half)
    area = attack.auc(phi["never"].ravel(), called.ravel())
    assert abs(area - 0.5) < 3 * null_error(half, half)


def test_subset_is_the_federation_of_what_it_keeps(rng):
    ids = np.array([2, 0, 0, 2, 3, 2, 0])  # client 1 has nothing
    data = from_arrays(np.arange(7), np.arange(7), ids, 4)
    masks = rng.random((20, 7)) < 0.5
    kept = jax.jit(jax.vmap(lambda mask: subset(data, mask).size))(masks)
    for mask, size in zip(masks, kept, strict=True):
        own = subset(data, mask)
        np.testing.assert_array_equal(own.size, size)
        for client in range(4):
            rows = own[client].take(jnp.arange(4))["x"][: int(size[client])]
            np.testing.assert_array_equal(rows, np.flatnonzero(mask & (ids == client)))
    with pytest.raises(ValueError, match="mask had the shape"):
        subset(data, np.ones(6, bool))
    with pytest.raises(ValueError, match="data was not of several clients"):
        subset(data[0], np.ones(7, bool))
