"""Integer noise that clients add together, randomised response, and their accounts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from scales import assert_of_scale
from scipy import stats
from scipy.special import ive

import jaxfl
from jaxfl import chain, clip, compress, core, mean, privacy, secure
from jaxfl.channel import mechanisms
from jaxfl.privacy import integers
from jaxfl.privacy.distributed import _rounded
from jaxfl.privacy.mechanism import rounded_norms

DISTRIBUTIONS = {
    "skellam": (
        integers.skellam,
        lambda v: lambda k: stats.skellam.pmf(k, v / 2, v / 2),
    ),
    "discrete_gaussian": (integers.discrete_gaussian, lambda v: normal(v)),
}


def normal(variance):
    every = np.exp(-(np.arange(-4000, 4001) ** 2.0) / (2 * variance)).sum()
    return lambda k: np.exp(-(k**2.0) / (2 * variance)) / every


def chi_square(draws, pmf) -> float:
    """The p-value of integers, in cells of at least 20 expected draws each."""
    k = np.arange(draws.min() - 1, draws.max() + 2)
    expected = len(draws) * pmf(k)
    enough = np.flatnonzero(expected >= 20)
    low, high = k[enough[0]], k[enough[-1]]
    inside = np.clip(draws, low, high)
    counts = np.bincount(inside - low, minlength=high - low + 1)
    cells = len(draws) * pmf(np.arange(low, high + 1))
    cells[0] += (len(draws) - cells.sum()) / 2
    cells[-1] += len(draws) - cells.sum()
    return float(stats.chisquare(counts, cells).pvalue)


@pytest.mark.parametrize("variance", [0.3, 4.0, 900.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_integers_are_of_their_distribution(name, variance):
    table, pmf = DISTRIBUTIONS[name]
    drawn = jax.jit(integers.draw, static_argnums=2)
    # a NamedTuple of arrays: what is compiled is the search, whatever the table
    draws = np.asarray(drawn(table(variance), jax.random.key(1), 200_000))
    assert chi_square(draws, pmf(variance)) > 1e-3
    for wrong in (0.8, 1.25):
        other = np.asarray(drawn(table(wrong * variance), jax.random.key(1), 200_000))
        assert chi_square(other, pmf(variance)) < 1e-6
    again = np.asarray(drawn(table(variance), jax.random.key(2), 200_000))
    assert (draws != again).mean() > 0.2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tables_are_those_of_the_distribution(name):
    """All 63 bits of `P[|Y| > k]`, as far as float64 goes, to the last that is any."""
    table, pmf = DISTRIBUTIONS[name]
    high, low = (x.astype(np.float64) for x in table(49.0))
    k = np.arange(1, 140)
    above = 2 * np.cumsum(pmf(49.0)(k)[::-1])[::-1]
    got = high * 2.0**-32 + low * 2.0**-63
    assert got.min() < 1e-17
    np.testing.assert_allclose(got, above[: len(got)], 1e-9, 2.0**-62)
    assert above[len(got)] < 2.0**-62


def test_large_tables_hold():
    """Of the largest noise that is allowed: half of all draws are within 0.6745."""
    for table in (integers.skellam, integers.discrete_gaussian):
        high = table(2.0**28).high.astype(np.float64) * 2.0**-32
        assert np.searchsorted(-high, -0.5) == pytest.approx(0.6745 * 2**14, rel=1e-4)


def test_without_noise_there_are_zeros():
    for table in (integers.skellam, integers.discrete_gaussian):
        assert not integers.draw(table(0.0), jax.random.key(0), 5).any()


# --- rounding -----------------------------------------------------------------


def test_rounding_is_unbiased_and_keeps_the_bound():
    rng = np.random.default_rng(0)
    x = rng.normal(size=64)
    x *= 3.0 / np.linalg.norm(x)
    limit, _ = rounded_norms(3.0, 64)
    keys = jax.random.split(jax.random.key(0), 4000)
    y = jax.vmap(lambda k: _rounded(k, jnp.float32(x), limit))(keys)
    y = np.asarray(y, np.float64)
    assert (np.abs(y - x) < 1).all()
    assert np.linalg.norm(y, axis=1).max() <= limit
    # a few in a thousand were rounded again, which biases by as little
    assert np.abs((y.mean(0) - x) / (y.std(0) / 4000**0.5 + 1e-9)).max() < 5
    free = np.floor(x + rng.uniform(size=(4000, 64)))
    assert (np.linalg.norm(free, axis=1) > limit).mean() < 1 - np.exp(-0.5)


def test_rounding_ends_where_no_rounding_fits():
    x = jnp.array([0.5, -0.5])
    assert _rounded(jax.random.key(0), x, 0.4).tolist() == [0, 0]
    assert np.abs(_rounded(jax.random.key(0), 10 * x, 6.0)).max() == 5


# --- the channels -------------------------------------------------------------

CHANNELS = {"skellam": privacy.skellam, "discrete_gaussian": privacy.discrete_gaussian}
N, D, C, Z = 8, 256, 0.5, 0.7


def updates(seed=0):
    x = np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True) * C  # on the bound


def summed(channel, x, seed=0):
    """What the server decodes of one round in which client i sends row i."""

    def client(ctx, broadcast, client_state, data):
        return data, (), ()

    def server(ctx, state, outcome):
        return outcome.payload

    algorithm = core.Algorithm(lambda p: (p, ()), client, server)
    federation = jaxfl.federate(algorithm, channel)
    state = federation.init(jnp.zeros(x.shape[1]), jnp.asarray(x))
    cohort = core.Cohort(jnp.arange(N), jnp.asarray(x), jnp.ones(N), jnp.ones(N, bool))
    new, info = jax.jit(federation.round)(jax.random.key(seed), state, cohort)
    return np.asarray(new.server.algorithm, np.float64), info


def around(noise, z=Z, bits=16, after=()):
    noise = noise(z, clients=N, dimension=D, bits=bits)
    return chain(clip(C), compress.rotation(), mean(denominator=N), noise, *after)


@pytest.mark.parametrize("noise", CHANNELS.values(), ids=CHANNELS)
def test_without_noise_the_sum_is_that_of_the_updates(noise):
    x = updates()
    for seed, bits in ((0, 20), (1, 16)):
        channel = around(noise, z=0.0, bits=bits)
        got, _ = summed(channel, x, seed)
        (found,) = mechanisms(channel)
        grid = C / found.noise.steps  # each of N errors is below a step
        assert np.abs(got - x.mean(0)).max() < 4 * grid * (1 / N) ** 0.5
        assert np.abs(got - x.mean(0)).max() > 1e-3 * grid


@pytest.mark.parametrize("noise", CHANNELS.values(), ids=CHANNELS)
def test_the_noise_is_what_the_mechanism_says(noise):
    """Of the mean over a round: z C / N, beside what rounding adds."""
    x = updates()
    channel = around(noise)
    (found,) = mechanisms(channel)
    assert found.noise.noise_multiplier == Z and found.clients == N
    errors = np.concatenate([summed(channel, x, s)[0] - x.mean(0) for s in range(8)])
    std = Z * C / N
    assert (found.noise.steps * Z) ** 2 > 1000 * N  # rounding is nothing beside it
    assert_of_scale(errors, std)


@pytest.mark.parametrize("noise", CHANNELS.values(), ids=CHANNELS)
def test_the_sum_is_the_same_in_secret(noise):
    """To the bit, and what the server sees of one client is another thing."""
    x = updates()
    plain, _ = summed(around(noise, after=[jaxfl.tap("wire")]), x)
    secret, info = summed(
        around(noise, after=[secure.secure_sum(), jaxfl.tap("wire")]), x
    )
    np.testing.assert_array_equal(plain, secret)
    wire = np.asarray(info.reports[-1]["wire"].values).ravel()
    assert wire.max() < 2**16
    cells = np.bincount(wire >> 12, minlength=16)
    assert stats.chisquare(cells).pvalue > 1e-3


def test_sums_wrap_round_and_messages_are_residues():
    """With bits too few for so large a sum it comes out wrong, but it comes out."""
    noise = privacy.skellam(0.0, clients=1, dimension=4, bits=8)
    ctx = toy_context()._replace(bound=core.Bound(1.0))
    layout, _ = noise.init(jnp.zeros(4))
    x = jnp.array([1.0, -1.0, 0.0, 0.0])
    message, _, report = noise.encode(
        ctx, jaxfl.Message(x / 2**0.5, jnp.float32(1), jnp.float32(128)), layout, ()
    )
    assert message.bits == 32 and message.payload.values.max() < 256
    signed = np.asarray(message.payload.values).astype(np.uint8).view(np.int8)
    assert signed[0] > 0 and signed[1] < 0
    three = jax.tree.map(lambda v: 3 * v, message.payload)
    count = jax.tree.map(lambda v: 3 * v, report)
    got, _ = noise.decode(ctx, three, layout, count)
    (found,) = mechanisms(chain(clip(1.0), noise))
    want = (3 * signed.astype(int) + 128) % 256 - 128
    np.testing.assert_allclose(got, want / found.noise.steps, 1e-6)


def toy_context():
    return core.server_context(
        *(jax.random.key(0), jnp.int32(0), jnp.arange(4), jnp.ones(4, bool)),
        *(jnp.int32(4), toy.params()),
    )


def test_a_sum_that_is_lost_is_no_number():
    noise = privacy.skellam(1.0, clients=4, dimension=3, bits=12)
    layout, _ = noise.init(jnp.zeros(3))
    report = {"norm": jnp.float32(2), "count": jnp.float32(2)}
    lost = secure.Residues(jnp.full(3, 2**11, jnp.uint32), 12)
    assert np.isnan(noise.decode(toy_context(), lost, layout, report)[0]).all()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"clients": 0}, "clients must be"),
        ({"dimension": 1.5}, "dimension must be"),
        ({"bits": 25}, "bits must be"),
        ({"bits": 2, "clients": 100}, "too few for 100 clients"),
        ({"deviations": 0.0}, "deviations must be"),
        ({"bits": 24, "noise_multiplier": 9.0}, "lower bits"),
    ],
)
@pytest.mark.parametrize("noise", CHANNELS.values(), ids=CHANNELS)
def test_what_makes_no_sense_is_refused(noise, wrong, words):
    right = {"noise_multiplier": 1.0, "clients": 4, "dimension": 8, "bits": 16}
    with pytest.raises(ValueError, match=words):
        noise(**right | wrong)


def test_what_does_not_fit_is_refused():
    noise = privacy.skellam(1.0, clients=4, dimension=8, bits=16)
    with pytest.raises(ValueError, match="dimension must be the size.*3, got 8"):
        noise.init(jnp.zeros(3))
    with pytest.raises(TypeError, match="floats"):
        noise.init(jnp.arange(8))
    with pytest.raises(ValueError, match="nothing bounds"):
        mechanisms(chain(mean(denominator=4), noise))
    with pytest.raises(ValueError, match="not linear"):
        jaxfl.federate(
            jaxfl.fedavg(toy.loss, toy_sgd()), chain(clip(1.0), noise), jaxfl.median()
        )


def toy_sgd():
    import optax

    return optax.sgd(0.1)


# --- accounts -----------------------------------------------------------------


def divergence(p, q, a):
    return np.log(np.exp(a * np.log(p) + (1 - a) * np.log(q)).sum()) / (a - 1)


def test_skellam_rdp_bounds_the_true_divergence():
    """Of one coordinate, by summing, where the bound leaves little room."""
    k = np.arange(-150, 151)
    for steps, z in ((5.0, 1.0), (2.0, 3.0)):
        l2, _ = rounded_norms(steps, 1)
        shift, variance = int(l2), (z * steps) ** 2
        p, q = ive(np.abs(k), variance), ive(np.abs(k - shift), variance)
        for a in (2, 4, 8):
            inside = (p > 1e-250) & (q > 1e-250)
            true = divergence(p[inside], q[inside], a)
            bound = privacy.skellam_rdp(privacy.Skellam(z, steps, 1), [a])[0]
            assert true <= bound <= 2 * true + a * (l2**2 - shift**2) / variance


def test_discrete_gaussian_rdp_bounds_the_true_divergence():
    """Of a sum of three in one coordinate; of rough noise too."""
    for steps, z in ((4.0, 1.0), (2.0, 0.5)):
        l2, _ = rounded_norms(steps, 1)
        one = normal((z * steps) ** 2 / 3)(np.arange(-50, 51))
        p = np.convolve(np.convolve(one, one), one)
        q = np.roll(p, int(l2))
        for a in (2, 4, 8):
            inside = (p > 1e-250) & (q > 1e-250)
            true = divergence(p[inside], q[inside], a)
            noise = privacy.DiscreteGaussian(z, steps, 1, 3)
            assert true <= privacy.discrete_gaussian_rdp(noise, [a])[0]


@pytest.mark.parametrize("dimension", [1, 1024, 2**20])
def test_both_are_near_the_normal_mechanism_on_a_fine_grid(dimension):
    orders = [2, 8, 32]
    fine = 1000.0 * dimension**0.5
    want = np.array(orders) / 2 / 1.3**2
    skellam = privacy.skellam_rdp(privacy.Skellam(1.3, fine, dimension), orders)
    noise = privacy.DiscreteGaussian(1.3, fine, dimension, 100)
    normal = privacy.discrete_gaussian_rdp(noise, orders)
    for got in (skellam, normal):
        assert (np.array(got) > want).all()
        np.testing.assert_allclose(got, want, rtol=2e-3)


def test_few_bits_cost_privacy_and_are_accounted_for():
    """The same noise over coarser grids, in the order of how coarse they are."""
    found = [
        mechanisms(around(privacy.skellam, bits=bits))[0].noise for bits in (6, 8, 16)
    ]
    epsilon = [privacy.skellam_rdp(noise, [8])[0] for noise in found]
    assert epsilon[0] > 1.5 * epsilon[1] and epsilon[1] > 1.05 * epsilon[2]
    assert epsilon[2] == pytest.approx(8 / 2 / Z**2, rel=1e-3)


def test_orders_are_those_of_the_theorems():
    with pytest.raises(ValueError, match="orders must be whole"):
        privacy.skellam_rdp(privacy.Skellam(1.0, 10.0, 4), [1.5])
    with pytest.raises(ValueError, match="orders must be above 1"):
        privacy.discrete_gaussian_rdp(privacy.DiscreteGaussian(1.0, 9.0, 4, 2), [1])


# --- randomised response ------------------------------------------------------


def responses(epsilon, x, n, **how):
    channel = privacy.randomised_response(epsilon, **how)
    ctx = toy_context()._replace(bound=core.Bound(1.0))
    message = jaxfl.Message(jnp.float32(x), jnp.float32(1), jnp.float32(32 * len(x)))

    def one(key):
        return channel.encode(ctx._replace(key=key), message, (), ())[0].payload

    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.parametrize("m, levels", [(None, 2), (None, 5), (1, 2), (3, 4)])
def test_responses_are_unbiased(m, levels):
    x = np.array([0.6, -0.5, 0.0, 0.1])
    y = responses(8.0, x, 10_000, coordinates=m, levels=levels)
    error = (y.mean(0) - x) / (y.std(0) / 10_000**0.5)
    assert np.abs(error).max() < 4.5
    biased = (y.mean(0) * 1.25 - x) / (y.std(0) / 10_000**0.5)
    assert np.abs(biased).max() > 6
    assert ((y != 0).sum(1) <= (m or 4)).all()
    if levels == 2:
        a = 8.0 / (m or 4)
        want = 4 / (m or 4) * ((math.exp(a) + 1) / (math.exp(a) - 1)) ** 2
        np.testing.assert_allclose((y**2).mean(0), want, 0.05)


@pytest.mark.parametrize("levels", [2, 4])
def test_no_response_is_likelier_than_epsilon_allows(levels):
    """From two opposite messages: at the ends e^epsilon, and nowhere more."""
    epsilon, n = 1.5, 20_000
    counts = []
    for x in (1.0, -1.0):
        y = responses(epsilon, np.array([x]), n, levels=levels)[:, 0]
        levels_of = np.unique(y.round(3), return_counts=True)
        assert len(levels_of[0]) == levels
        counts.append(levels_of[1])
    ratio = np.log(counts[0] / counts[1])
    assert np.abs(ratio).max() == pytest.approx(epsilon, abs=0.1)
    assert ratio[-1] > 0 > ratio[0]


def test_epsilon_is_shared_by_the_coordinates():
    """Each of two is given half, so that a pair is where the whole is spent."""
    y = responses(2.0, np.array([0.7, 0.7]), 20_000)
    kept = (y > 0).mean(0)
    p = math.e / (math.e + 1)
    np.testing.assert_allclose(kept, 0.85 * p + 0.15 * (1 - p), atol=0.015)


def test_responses_are_refused_where_they_make_no_sense():
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            privacy.randomised_response(epsilon)
    with pytest.raises(ValueError, match="levels must be"):
        privacy.randomised_response(1.0, levels=1)
    with pytest.raises(ValueError, match="coordinates must be a positive"):
        privacy.randomised_response(1.0, coordinates=0)
    with pytest.raises(ValueError, match="at most the payload's 3"):
        privacy.randomised_response(1.0, coordinates=4).init(jnp.zeros(3))
    with pytest.raises(ValueError, match="nothing bounds"):
        mechanisms(privacy.randomised_response(1.0))
    (found,) = mechanisms(chain(clip(1.0), privacy.randomised_response(3.0)))
    assert found == privacy.Local(privacy.RandomisedResponse(3.0))
