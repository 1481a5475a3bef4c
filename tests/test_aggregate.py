"""What aggregators make of messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfl
from jaxfl import core
from jaxfl.aggregate import distances


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


# --- references in float64, from the papers' pseudo-code ----------------------
#
# `x` are the messages of those who sent, [n, d], in the order of their population ids.


def krum_order(x, f):
    """From the lowest score to the highest; sorting is stable, so by id in a tie."""
    scores = []
    for i in range(len(x)):
        others = [np.sum((x[i] - x[j]) ** 2) for j in range(len(x)) if j != i]
        scores.append(sum(sorted(others)[: max(len(x) - f - 2, 1)]))
    return sorted(range(len(x)), key=lambda i: scores[i])


def reference_trimmed_mean(x, f):
    return np.sort(x, axis=0)[f : len(x) - f].mean(0)


def reference_krum(x, f):
    return x[krum_order(x, f)[0]]


def reference_multi_krum(x, f, m=None):
    most = len(x) - f - 2
    return x[krum_order(x, f)[: min(m or most, most)]].mean(0)


def reference_bulyan(x, f):
    n, received, selected = len(x), list(x), []
    for _ in range(n - 2 * f):
        selected.append(received.pop(krum_order(np.array(received), f)[0]))
    beta = n - 4 * f

    def nearest(values):
        near = sorted(values, key=lambda v: (abs(v - np.median(values)), v))
        return np.mean(near[:beta])

    return np.array([nearest(column) for column in np.transpose(selected)])


def reference_geometric_median(x, iterations=8, nu=1e-6):
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        beta = 1 / np.maximum(nu, np.sqrt(((v - x) ** 2).sum(1)))
        v = beta @ x / beta.sum()
    return v


def reference_centered_clip(x, radius, iterations, v):
    for _ in range(iterations):
        away = x - v
        far = np.sqrt((away**2).sum(1))
        factor = [min(1, radius / r) if r > 0 else 1 for r in far]
        v = v + np.mean(away * np.array(factor)[:, None], 0)
    return v


K, SHAPES = 11, {"b": (), "w": (2, 2)}
D = 5


def context(roster, sent, key=None):
    key = jax.random.key(0) if key is None else key
    nothing = jnp.int32(0)
    return core.server_context(key, nothing, roster, sent, nothing + 1000, ())


def unflatten(x):
    """Messages [..., D] as payloads."""
    return {"b": x[..., 0], "w": x[..., 1:].reshape(*x.shape[:-1], 2, 2)}


def flatten(payload):
    w = np.asarray(payload["w"])
    first = np.asarray(payload["b"])[..., None]
    return np.concatenate([first, w.reshape(*w.shape[:-2], -1)], -1)


def cases(least, ties):
    """100 cohorts of clients in any order of which some are absent; or with ties."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, K, D))
    if ties:  # few whole numbers, so that distances are exact and often the same
        x = rng.integers(-1, 2, (100, K, D))
    roster = rng.permuted(np.tile(3 * np.arange(K), (100, 1)), axis=1)
    n = rng.integers(least, K + 1, 100)
    sent = rng.permuted(np.arange(K) < n[:, None], axis=1)
    return np.where(sent[..., None], x, 0).astype(np.float32), roster, sent


def apply(aggregator, x, roster, sent, state=()):
    """Of 100 cohorts at once."""

    def one(x, roster, sent, state):
        ctx = context(roster, sent)
        return aggregator.apply(ctx, unflatten(x), sent, state)

    payload, delivered, state = jax.jit(jax.vmap(one))(x, roster, sent, state)
    return flatten(payload), np.asarray(delivered), state


def by_id(x, roster, sent):
    order = np.argsort(roster)
    return x[order][sent[order]].astype(np.float64)


RULES = {
    "trimmed_mean": (jaxfl.trimmed_mean(2), 5, (reference_trimmed_mean, 2)),
    "krum": (jaxfl.krum(2), 7, (reference_krum, 2)),
    "multi_krum": (jaxfl.multi_krum(2), 7, (reference_multi_krum, 2)),
    "multi_krum of 3": (jaxfl.multi_krum(2, 3), 7, (reference_multi_krum, 2, 3)),
    "bulyan": (jaxfl.bulyan(1), 7, (reference_bulyan, 1)),
    "bulyan, two": (jaxfl.bulyan(2), 11, (reference_bulyan, 2)),
    "geometric_median": (
        jaxfl.geometric_median(),
        1,
        (reference_geometric_median,),
    ),
}


@pytest.mark.parametrize("ties", [False, True], ids=["any", "ties"])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_the_papers(name, ties):
    aggregator, least, (reference, *args) = RULES[name]
    x, roster, sent = cases(least, ties)
    got, delivered, _ = apply(aggregator, x, roster, sent)
    want = [
        reference(by_id(*case), *args) for case in zip(x, roster, sent, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(delivered, sent)


@pytest.mark.parametrize("iterations", [1, 3])
def test_centered_clip_is_the_papers_over_rounds(iterations):
    aggregator = jaxfl.centered_clip(0.7, iterations=iterations)
    x, roster, sent = cases(1, False)
    state = unflatten(jnp.zeros((100, D)))
    want = np.zeros((100, D))
    for shift in range(3):
        got, delivered, state = apply(
            aggregator, x + shift * sent[..., None], roster, sent, state
        )
        want = np.array(
            [
                reference_centered_clip(
                    row[s].astype(float) + shift, 0.7, iterations, v
                )
                for row, s, v in zip(x, sent, want, strict=True)
            ]
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(delivered, sent)


def test_centered_clip_of_nobody_delivers_nothing_and_remembers():
    aggregator, nobody = jaxfl.centered_clip(1.0), jnp.zeros(2, bool)
    payload, delivered, state = aggregator.apply(
        None, jnp.zeros((2, 3)), nobody, jnp.ones(3)
    )
    assert not payload.any() and not delivered.any()
    np.testing.assert_array_equal(state, np.ones(3))


def test_geometric_median_is_the_point_of_least_summed_distance():
    x, roster, sent = cases(4, False)
    got, *_ = apply(jaxfl.geometric_median(iterations=200), x, roster, sent)
    rng = np.random.default_rng(1)
    for v, rows, s in zip(got, x, sent, strict=True):

        def summed(v, rows=rows[s]):
            return np.linalg.norm(rows - v, axis=1).sum()

        around = v + 0.02 * rng.normal(size=(20, D))
        assert summed(v) < min(map(summed, around)) + 1e-6


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_distances_are_exact_however_close(spread):
    """Over more than one block of coordinates, and one that is not full."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=2500) + spread * rng.normal(size=(6, 2500))).astype(np.float32)
    payload = {"w": x[:, :2400].reshape(6, 60, 40), "b": x[:, 2400:]}
    got = jax.jit(distances.squared_distances)(payload)
    exact = x.astype(np.float64)
    want = np.sum((exact[:, None] - exact) ** 2, -1)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(got, got.T)


# --- who is withstood, and who is not -----------------------------------------


def bucketed_median(s):
    return jaxfl.bucketing(s, jaxfl.median())


# aggregator: n, liars that it stands, liars that it does not, rounds
BREAKDOWN = {
    "median": (jaxfl.median(), 7, 3, 4, 1),
    "trimmed_mean": (jaxfl.trimmed_mean(2), 7, 2, 3, 1),
    "krum": (jaxfl.krum(2), 7, 2, 4, 1),
    "multi_krum": (jaxfl.multi_krum(2), 7, 2, 4, 1),
    "bulyan": (jaxfl.bulyan(1), 7, 1, 4, 1),
    "geometric_median": (jaxfl.geometric_median(iterations=200), 7, 3, 4, 1),
    "centered_clip": (jaxfl.centered_clip(1.0), 7, 3, 4, 3000),
    "bucketing": (bucketed_median(2), 12, 2, 6, 1),
}
LIES = {
    "together": lambda rng, f: np.full((f, D), 1.0),
    "apart": lambda rng, f: rng.normal(size=(f, D)),
    "huge": lambda rng, f: 1e9 * np.arange(1, f + 1)[:, None] * np.ones(D),
}


def error(name, liars, lie):
    """How far it comes from the mean of the honest, in their largest distance."""
    aggregator, n, *_, rounds = BREAKDOWN[name]
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(n - liars, D)) + 2
    lies = 1e6 * LIES[lie](rng, liars)
    x = rng.permutation(np.concatenate([honest, lies])).astype(np.float32)
    sent = jnp.ones(n, bool)

    def one(_, carry):
        _, state = carry
        payload, _, state = aggregator.apply(
            context(jnp.arange(n), sent), unflatten(jnp.asarray(x)), sent, state
        )
        return payload, state

    zero = unflatten(jnp.zeros(D))
    payload, _ = jax.lax.fori_loop(0, rounds, one, (zero, aggregator.init(zero)))
    spread = max(np.linalg.norm(a - b) for a in honest for b in honest)
    return np.linalg.norm(flatten(payload) - honest.mean(0)) / spread


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", BREAKDOWN)
def test_just_below_its_breakdown_point_a_rule_holds(name, lie):
    assert error(name, BREAKDOWN[name][2], lie) < 1


@pytest.mark.parametrize("name", BREAKDOWN)
def test_above_its_breakdown_point_a_rule_fails(name):
    assert error(name, BREAKDOWN[name][3], "together") > 50


def test_a_mean_fails_with_one_liar():
    x = jnp.array([1.0, 1.1, 0.9, 1e6])
    summed, *_ = jaxfl.total().apply(None, jnp.sum(x), jnp.ones(4, bool), ())
    assert summed / 4 > 1e5


def test_krums_choice_is_as_near_to_the_honest_as_it_says():
    """A liar that is chosen, among honest messages that are far from each other."""
    n, f = 9, 3
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, n, D)).astype(np.float32)
    x[:, :f] = x[:, f:].mean(1, keepdims=True) + 0.3
    roster, sent = np.tile(np.arange(n), (100, 1)), np.ones((100, n), bool)
    got, *_ = apply(jaxfl.krum(f), x, roster, sent)
    lied = (got[:, None] == x[:, :f]).all(-1).any(-1)
    honest = x[:, f:]
    away = np.linalg.norm(honest - got[:, None], axis=-1).min(1)
    widest = np.linalg.norm(honest[:, :, None] - honest[:, None], axis=-1).max((1, 2))
    assert lied.sum() > 50
    assert (away <= np.sqrt((n - f - 2) / (n - 2 * f - 1)) * widest).all()


FEW = {
    "trimmed_mean": (jaxfl.trimmed_mean, 5, reference_trimmed_mean),
    "krum": (jaxfl.krum, 7, reference_krum),
    "multi_krum": (jaxfl.multi_krum, 7, reference_multi_krum),
    "bulyan": (jaxfl.bulyan, 11, reference_bulyan),
}


@pytest.mark.parametrize("name", FEW)
def test_of_too_few_nothing_is_delivered(name):
    rule, least, _ = FEW[name]
    sent = np.arange(K) < np.arange(K + 1)[:, None]  # nobody to everyone
    x = np.where(sent[..., None], np.ones(D, np.float32), 0)
    roster = np.tile(np.arange(K), (K + 1, 1))
    got, delivered, _ = apply(rule(2), x, roster, sent)
    enough = np.arange(K + 1) >= least
    np.testing.assert_array_equal(delivered, sent & enough[:, None])
    np.testing.assert_array_equal(got, np.where(enough[:, None], np.ones(D), 0))

    with pytest.raises(ValueError, match=f"f=2 needs at least {least} clients"):
        few = jnp.ones(least - 1, bool)
        rule(2).apply(context(jnp.arange(least - 1), few), jnp.ones(least - 1), few, ())
    for f in (-1, 0.5):
        with pytest.raises(ValueError, match="f must be a whole number"):
            rule(f)


@pytest.mark.parametrize("name", FEW)
def test_many_f_at_once(name):
    rule, _, reference = FEW[name]
    x, roster, sent = (a[0] for a in cases(K, False))

    @jax.jit
    @jax.vmap
    def together(f):
        payload, delivered, () = rule(f).apply(
            context(roster, sent), unflatten(jnp.asarray(x)), sent, ()
        )
        return payload, delivered

    payload, delivered = together(jnp.arange(4))
    want = [reference(by_id(x, roster, sent), f) for f in range(3)]
    np.testing.assert_allclose(flatten(payload)[:3], want, rtol=1e-5, atol=1e-6)
    assert delivered[:3].all() and delivered[3].all() == (name != "bulyan")


# --- bucketing ----------------------------------------------------------------


def spy():
    """Gives back the stack that it is given."""

    def apply(ctx, payload, sent, state):
        return payload, sent, state

    return jaxfl.Aggregator(lambda payload: (), apply)


@functools.partial(jax.jit, static_argnums=0)
def buckets(s, key, roster, sent):
    """How much of whose message, `[K]` by id, is in each bucket."""
    ctx, x = context(roster, sent, key), jnp.eye(len(sent))[roster]
    shares, delivered, () = jaxfl.bucketing(s, spy()).apply(
        ctx, jnp.where(sent[:, None], x, 0), sent, ()
    )
    return shares, delivered


@pytest.mark.parametrize("s", [1, 2, 3, 20])
def test_buckets_are_means_of_s_messages_each(s):
    sent, n = jnp.arange(K) < 8, 8
    shares, delivered = buckets(s, jax.random.key(0), jnp.arange(K), sent)
    np.testing.assert_array_equal(delivered, sent)
    sizes = [s] * (n // s) + [n % s] * (n % s > 0)
    sizes += [0] * (len(shares) - len(sizes))
    assert len(shares) == -(-K // s)
    np.testing.assert_array_equal((shares > 0).sum(1), sizes)
    np.testing.assert_array_equal((shares > 0).sum(0), sent)
    np.testing.assert_allclose(shares.sum(1), np.array(sizes) > 0, rtol=1e-6)


def test_buckets_are_drawn_by_who_is_in_them():
    """Not by slot, and not by who else is there."""
    everyone = jnp.ones(K, bool)
    key, roster = jax.random.key(0), jnp.arange(K)
    plain, _ = buckets(2, key, roster, everyone)
    np.testing.assert_array_equal(plain, buckets(2, key, roster[::-1], everyone)[0])
    other, _ = buckets(2, jax.random.key(1), roster, everyone)
    assert (plain != other).any()


def test_any_two_are_in_one_bucket_as_often():
    n, s, rounds = 6, 3, 4000
    keys = jax.random.split(jax.random.key(0), rounds)
    sent = jnp.ones(n, bool)
    shares, _ = jax.vmap(lambda key: buckets(s, key, jnp.arange(n), sent))(keys)
    both = np.einsum("rbi,rbj->ij", *[np.sign(shares)] * 2) / rounds
    p = (s - 1) / (n - 1)
    off = both[~np.eye(n, dtype=bool)]
    assert abs(off - p).max() < 4.5 * (p * (1 - p) / rounds) ** 0.5


def test_bucketing_refuses_what_makes_no_sense():
    for s in (0, 1.5):
        with pytest.raises(ValueError, match="s must be a whole number"):
            jaxfl.bucketing(s, jaxfl.median())  # pyright: ignore
    with pytest.raises(TypeError, match="inner must be a jaxfl.Aggregator"):
        jaxfl.bucketing(2, jaxfl.identity())  # pyright: ignore
    for inner in (jaxfl.total(), jaxfl.mix(np.eye(2))):
        with pytest.raises(ValueError, match="inner must make one aggregate"):
            jaxfl.bucketing(2, inner)


def test_centres_refuse_what_makes_no_sense():
    for rule, name, wrong in (
        (lambda: jaxfl.centered_clip(0.0), "radius", "0.0"),
        (lambda: jaxfl.centered_clip(1.0, iterations=0), "iterations", "0"),
        (lambda: jaxfl.geometric_median(iterations=0), "iterations", "0"),
        (lambda: jaxfl.geometric_median(nu=0.0), "nu", "0.0"),
        (lambda: jaxfl.multi_krum(1, 0), "m", "0"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {wrong}"):
            rule()
