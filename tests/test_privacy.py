"""Channels that bound what one client contributes, and that hide it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scales import assert_of_scale

import jaxfl
from jaxfl import chain, clip, core, mean, privacy
from jaxfl.channel import mechanisms
from jaxfl.core import Message


@jax.jit
def encode(payload, norm):
    full = Message(payload, jnp.float32(2.0), jnp.float32(64.0))
    message, _, report = jaxfl.clip(norm).encode(None, full, (), ())
    return message, report


def clipped(payload, norm):
    message, report = encode(payload, norm)
    assert (message.weight, message.bits) == (2.0, 64.0)
    return message.payload, bool(report["clipped"])


def length(payload):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(payload)]
    return np.linalg.norm(np.concatenate(leaves))


SHAPES = [(), (3,), (2, 4)], [(5,), (1, 1, 3), ()], [(7, 2), (1,), (4,)]


def random_payload(rng, dtype):
    shapes = SHAPES[rng.integers(3)]
    size = 10.0 ** rng.uniform(-3, 3)
    leaves = [jnp.asarray(size * rng.normal(size=s), dtype) for s in shapes]
    return {"a": leaves[0], "b": leaves[1:]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_no_norm_exceeds_the_bound(dtype):
    """To the rounding of the payload's own dtype, for 60 random trees and norms."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        payload, norm = random_payload(rng, dtype), float(10.0 ** rng.uniform(-2, 2))
        result, was_clipped = clipped(payload, norm)
        eps = float(jnp.finfo(dtype).eps)
        assert length(result) <= norm * (1 + eps + 1e-6)
        assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(
            lambda x: x.dtype, payload
        )
        if was_clipped:  # to the bound itself, along the same direction
            assert length(payload) > norm * (1 - 1e-6)
            np.testing.assert_allclose(length(result), norm, rtol=2 * eps + 1e-6)
            factor = norm / length(payload)
            jax.tree.map(
                lambda a, b, f=factor, eps=eps: np.testing.assert_allclose(
                    np.asarray(a, np.float64),
                    f * np.asarray(b, np.float64),
                    rtol=2 * eps,
                    atol=1e-6,
                ),
                result,
                payload,
            )
        else:
            assert length(payload) <= norm * (1 + 1e-6)
            jax.tree.map(np.testing.assert_array_equal, result, payload)
        seen.add(was_clipped)
    assert seen == {True, False}


def test_a_payload_at_the_bound_or_zero_is_untouched():
    for payload in (jnp.array([3.0, 4.0]), jnp.zeros(2)):
        result, was_clipped = clipped(payload, 5.0)
        assert not was_clipped
        np.testing.assert_array_equal(result, payload)


def test_sensitivity_of_a_fixed_mean():
    """One client more or less moves the aggregate by at most C / d."""
    channel = jaxfl.chain(jaxfl.clip(2.0), jaxfl.mean(denominator=4.0))
    server, own = channel.init(jnp.zeros(3))
    rng = np.random.default_rng(1)

    def aggregate(payloads):
        total = sum(
            channel.encode(
                _context(), Message(p, jnp.float32(1), jnp.float32(96)), server, own
            )[0].payload
            for p in payloads
        )
        return channel.decode(_context(), total, server, ((), ()))[0]

    payloads = [jnp.asarray(5 * rng.normal(size=3), jnp.float32) for _ in range(5)]
    for i in range(5):
        without = payloads[:i] + payloads[i + 1 :]
        moved = np.linalg.norm(aggregate(payloads) - aggregate(without))
        assert 0.1 < moved <= 2.0 / 4.0 * (1 + 1e-5)


def _context():
    client = jnp.int32(0)
    return jaxfl.Context(
        jax.random.key(0), jax.random.key(1), client, client, client, client, client
    )


def test_the_norm_may_be_traced():
    lengths = jax.vmap(lambda c: jnp.linalg.norm(clipped_traced(c)))(
        jnp.array([1.0, 9.0])
    )
    np.testing.assert_allclose(lengths, [1.0, 5.0], rtol=1e-6)


def clipped_traced(norm):
    full = Message(jnp.array([3.0, 4.0]), jnp.float32(1), jnp.float32(64))
    return jaxfl.clip(norm).encode(None, full, (), ())[0].payload


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_the_norm_is_positive(wrong):
    with pytest.raises(ValueError, match="norm must be positive"):
        jaxfl.clip(wrong)


# --- other norms --------------------------------------------------------------


def test_clip_by_absolute_values_is_numpy():
    rng = np.random.default_rng(0)
    channel = clip(2.0, ord=1)
    for size in (0.1, 10.0):
        x = {"a": size * rng.normal(size=(2, 3)), "b": size * rng.normal(size=4)}
        l1 = sum(np.abs(v).sum() for v in x.values())
        full = Message(jax.tree.map(jnp.float32, x), jnp.float32(1), jnp.float32(0))
        message, _, report = channel.encode(None, full, (), ())
        for name, v in x.items():
            want = v * min(1, 2.0 / l1)
            np.testing.assert_allclose(message.payload[name], want, rtol=1e-5)
        assert report["clipped"] == (l1 > 2)
    assert channel.bound(core.Bound()) == core.Bound(2.0, 2.0)
    with pytest.raises(ValueError, match="ord must be"):
        clip(1.0, ord=3)


def test_clip_layers_is_numpy():
    x = {"a": np.full((2, 2), 3.0), "b": np.array([0.1]), "c": np.arange(3.0)}
    full = Message(jax.tree.map(jnp.float32, x), jnp.float32(1), jnp.float32(0))
    message, _, report = privacy.clip_layers(1.5).encode(None, full, (), ())
    for name, v in x.items():
        want = v * min(1, 1.5 / 3**0.5 / np.linalg.norm(v))
        np.testing.assert_allclose(message.payload[name], want, rtol=1e-6)
    assert report["clipped"].item() == pytest.approx(2 / 3)


# --- a clip norm that follows a quantile --------------------------------------

K = 20


def cohort_of(payloads):
    """A federation whose client i sends row i, and what it is run on."""

    def client(ctx, broadcast, client_state, data):
        return data, (), ()

    algorithm = core.Algorithm(
        lambda p: (p, ()), client, lambda ctx, state, outcome: outcome.payload
    )
    everyone = core.Cohort(
        jnp.arange(len(payloads)),
        jnp.asarray(payloads),
        jnp.ones(len(payloads)),
        jnp.ones(len(payloads), bool),
    )
    return algorithm, everyone


def run(channel, payloads, rounds=1):
    """What is decoded and the server's state of the channel, after each round."""
    algorithm, everyone = cohort_of(payloads)
    federation = jaxfl.federate(algorithm, channel)
    state = federation.init(jnp.zeros(payloads.shape[1]), everyone.data)

    def step(state, _):
        state, _ = federation.round(jax.random.key(0), state, everyone)
        return state, (state.server.algorithm, state.server.channel)

    return jax.jit(lambda s: jax.lax.scan(step, s, None, rounds)[1])(state)


def lengths_of(k=K, d=3):
    x = np.random.default_rng(1).normal(size=(k, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return (x * np.geomspace(0.1, 20.0, k)[:, None]).astype(np.float32)


def test_adaptive_clip_is_algorithm_1():
    """Without noise, against float64: norms and what is decoded, of 40 rounds."""
    x = lengths_of().astype(np.float64)
    sizes, c, want = np.linalg.norm(x, axis=1), 3.0, []
    for _ in range(40):
        clipped = x * np.minimum(1, c / sizes)[:, None]
        below = (sizes <= c).mean()
        c = c * np.exp(-0.3 * (below - 0.7))
        want.append((clipped.mean(0), c))
    adaptive = privacy.adaptive_clip(
        0.7, initial=3.0, clients=K, count_std=0.0, learning_rate=0.3
    )
    decoded, state = run(chain(adaptive, mean(denominator=K)), np.float32(x), 40)
    np.testing.assert_allclose(state[0], [c for _, c in want], rtol=1e-4)
    np.testing.assert_allclose(decoded, [p for p, _ in want], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_adaptive_clip_finds_the_quantile(quantile):
    """From far away and with the paper's noise, to between its neighbours."""
    x = lengths_of(k=100)
    adaptive = privacy.adaptive_clip(quantile, initial=0.01, clients=100)
    _, state = run(chain(adaptive, mean(denominator=100)), x, 300)
    found = np.exp(np.log(np.asarray(state[0])[100:]).mean())
    near = [quantile - 0.04, quantile + 0.04]
    low, high = np.quantile(np.linalg.norm(x, axis=1), near)
    assert low < found < high


def test_the_noise_of_the_count_is_what_the_mechanism_says():
    x = lengths_of()
    adaptive = privacy.adaptive_clip(0.5, initial=3.0, clients=K, count_std=2.0)
    (found,) = mechanisms(adaptive)
    assert found == privacy.Reported(privacy.Gaussian(4.0))  # b - 1/2 is at most 1/2
    _, state = run(chain(adaptive, mean(denominator=K)), x, 4000)
    c = np.r_[3.0, np.asarray(state[0], np.float64)]
    below = (np.linalg.norm(x, axis=1) <= c[:-1, None]).sum(1)
    share = 0.5 - np.diff(np.log(c)) / 0.2
    noise = K * share - below
    assert_of_scale(noise, 2.0, "norm")


# --- noise --------------------------------------------------------------------


C, D, M = 0.5, 4000, 5.0
NOISES = {
    # channel, which norm is clipped, the distribution
    "gaussian": (privacy.gaussian, 2, "norm", privacy.Gaussian),
    "laplace": (privacy.laplace, 1, "laplace", privacy.Laplace),
    "local_gaussian": (privacy.local_gaussian, 2, "norm", privacy.Gaussian),
    "local_laplace": (privacy.local_laplace, 1, "laplace", privacy.Laplace),
}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", NOISES)
def test_the_noise_is_what_the_mechanism_says(name, inside):
    """In a whole round, wherever it stands: beside what the round gives without."""
    make, ord, distribution, described = NOISES[name]
    local = name.startswith("local")

    def between(z):
        layers = [mean(denominator=M), make(z)]
        return chain(clip(C, ord=ord), *(layers if inside else layers[::-1]))

    found = mechanisms(between(1.3))
    assert found == [privacy.Local(described(1.3)) if local else described(1.3)]
    x = lengths_of(1 if local else 3, D)
    noisy, quiet = (np.asarray(run(between(z), x)[0], np.float64) for z in (1.3, 0.0))
    assert_of_scale(noisy - quiet, 1.3 * C / M, distribution)


def test_clients_draw_apart():
    """Their sum has the standard deviation of independent draws, and no other."""
    x = 0 * lengths_of(16, D)
    channel = chain(clip(C), privacy.local_gaussian(1.3), mean(denominator=M))
    assert_of_scale(run(channel, x)[0], 4 * 1.3 * C / M, "norm")


def test_noise_behind_an_adaptive_clip_is_of_its_norm():
    x = lengths_of(3, D)
    channel = chain(
        privacy.adaptive_clip(0.5, initial=3.0, clients=3, count_std=0.0),
        mean(denominator=M),
        privacy.gaussian(1.3),
    )
    clipped = x * np.minimum(1, 3.0 / np.linalg.norm(x, axis=1))[:, None]
    decoded, _ = run(channel, x)
    assert_of_scale(decoded[0] - clipped.sum(0) / M, 3.0 * 1.3 / M, "norm")


@pytest.mark.parametrize("name", NOISES)
def test_noise_without_a_bound_is_refused(name):
    make, ord, *_ = NOISES[name]
    algorithm, _ = cohort_of(np.zeros((2, 3)))
    bounded, noise = clip(C, ord=ord), make(1.0)
    total = jaxfl.total()
    refused = [(chain(mean(denominator=M), noise), total)]
    if ord == 1:
        refused.append((chain(clip(C), noise), total))
    if name.startswith("local"):
        refused.append((chain(noise, bounded), total))
    else:
        refused.append((chain(bounded, mean(), noise), total))
        refused.append((chain(bounded, noise), jaxfl.median()))
    for channel, aggregator in refused:
        with pytest.raises(ValueError, match=f"{name}: nothing bounds"):
            jaxfl.federate(algorithm, channel, aggregator)
    with pytest.raises(ValueError, match="noise_multiplier must be"):
        make(-1.0)
    with pytest.raises(TypeError, match="floats"):
        make(1.0).init(jnp.arange(3))


def test_two_mechanisms_are_as_one():
    rest = privacy.noise_left(0.9, spent=3.0)
    assert rest**-2 + 3.0**-2 == pytest.approx(0.9**-2)
    with pytest.raises(ValueError, match="noise_multiplier must be between"):
        privacy.noise_left(1.0, spent=0.5)


def test_zero_out_passes_what_is_small_enough():
    channel = privacy.zero_out(5.0)
    for *x, passes in ((3, 4, 1), (3, 4.1, 0), (3e38, 0, 0), (1, np.nan, 0)):
        payload = {"a": jnp.float32(x[0]), "b": jnp.float32(x[1:])}
        full = Message(payload, jnp.float32(2.0), jnp.float32(64.0))
        message, _, report = channel.encode(None, full, (), ())
        assert length(message.payload) == (length(payload) if passes else 0)
        assert (message.weight, report["zeroed"]) == (2.0, not passes)
    assert channel.bound(core.Bound()) == core.Bound(l2=5.0)


def test_adaptive_zero_out_follows_the_quantile_of_the_norms():
    """Against the formula round by round, and until it has found the quantile."""
    rng = np.random.default_rng(0)
    norms = np.sort(rng.uniform(1.0, 3.0, 40)).astype(np.float32)
    norms[-1] = 1e6
    channel = privacy.adaptive_zero_out(0.8, 0.1, increment=0.5, learning_rate=0.3)
    sent = jnp.arange(41) < 40
    ctx = core.server_context(
        *(jax.random.key(0), jnp.int32(0), jnp.arange(41), sent, jnp.int32(41), ())
    )._replace(sent=sent)

    @jax.jit
    def round(estimate):
        def one(x):
            full = Message(x, jnp.float32(1.0), jnp.float32(32.0))
            message, _, report = channel.encode(ctx, full, estimate, ())
            return message.payload, message.header, report

        payload, header, report = jax.vmap(one)(norms)
        summed = jax.tree.map(jnp.sum, report)
        return payload, header, channel.decode(ctx, (), estimate, summed)[1]

    estimate, _ = channel.init(jnp.zeros(1))
    want = 0.1
    for _ in range(200):
        payload, header, estimate = round(estimate)
        np.testing.assert_array_equal(payload, norms * (norms <= 2 * want + 0.5))
        np.testing.assert_array_equal(header, np.ones(40))
        want *= np.exp(-0.3 * (np.mean(norms <= want) - 0.8))
        np.testing.assert_allclose(estimate, want, rtol=1e-4)
    assert norms[30] < estimate < norms[33]
    nobody = ctx._replace(sent=jnp.zeros(41, bool))
    same = channel.decode(nobody, (), estimate, {"below": jnp.int32(0)})[1]
    assert same == estimate


def test_zeroing_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="norm must be positive, got 0"):
        privacy.zero_out(0.0)
    for name, wrong in (
        ("quantile", 1.0),
        ("initial", 0.0),
        ("multiplier", 0.0),
        ("increment", -1.0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {wrong}"):
            privacy.adaptive_zero_out(**{name: wrong})


def test_adaptive_clip_refuses_what_makes_no_sense():
    right = {"quantile": 0.5, "initial": 1.0, "clients": 10}
    for name, wrong in (
        ("quantile", 1.0),
        ("initial", 0.0),
        ("clients", -1),
        ("count_std", -0.1),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            privacy.adaptive_clip(**right | {name: wrong})
