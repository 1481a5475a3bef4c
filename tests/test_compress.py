"""Codecs: their encodings to the bit, their statistics, closed forms."""

import functools

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.linalg import hadamard as matrix
from scipy.special import ndtr

import jaxfl
from jaxfl import Context, Message, chain, compress
from jaxfl.compress.rotations import _lloyd_max, hadamard

RNG = np.random.default_rng(0)
# Skewed, as updates are: few of its numbers have most of its norm.
X = RNG.normal(size=1000) * np.abs(RNG.normal(size=1000)) ** 1.5
X = X.astype(np.float32)
TREE = {
    "a": jnp.asarray(X[:601].reshape(601, 1)),
    "b": jnp.asarray(X[601:].reshape(3, -1)),
}
BF16 = jnp.dtype(jnp.bfloat16)


def context(key, round=0):
    none = jnp.int32(0)
    shared_key = jax.random.key(99 + round)
    return Context(key, shared_key, jnp.int32(round), none, none, none, none)


def new_message(payload, weight=1.0):
    payload = jax.tree.map(jnp.asarray, payload)
    bits = jnp.float32(jaxfl.tree.num_bits(payload) if weight else 0)
    return Message(payload, jnp.float32(weight), bits)


def send(channel, payload, key=0, weight=1.0, states=None):
    """A message through a channel's encode: `(message, client_state, report)`."""
    states = (
        channel.init(jax.tree.map(jnp.zeros_like, payload))
        if states is None
        else states
    )
    encode = jax.jit(channel.encode)
    return encode(context(jax.random.key(key)), new_message(payload, weight), *states)


@functools.cache
def samples(name, n=2000, x=None):
    """What a channel makes of X with n keys, both ends of it, `[n, d]`, float64."""
    channel = CHANNELS[name]
    server_state, client_state = channel.init(jnp.asarray(X))

    @jax.jit
    @jax.vmap
    def both_ends(key):
        ctx = context(key)._replace(shared_key=jax.random.fold_in(key, 1))
        message, _, report = channel.encode(
            ctx, new_message(X), server_state, client_state
        )
        return channel.decode(ctx, message.payload, server_state, report)[0]

    return np.asarray(both_ends(jax.random.split(jax.random.key(5), n)), np.float64)


CHANNELS = {
    "qsgd": compress.qsgd(7),
    "qsgd, 1": compress.qsgd(1),
    "uniform": compress.uniform(3),
    "random_k": compress.random_k(0.25),
    "random_k of qsgd": compress.random_k(0.25, compress.qsgd(15)),
    "terngrad": compress.terngrad(clip=None),
    "rotation, uniform": chain(compress.rotation(), compress.uniform(2)),
    "drive": compress.drive(),
    "eden 2": compress.eden(2),
    "eden 3": compress.eden(3),
    "eden 4": compress.eden(4),
}


# --- the ledger: encodings are as long as it says, and hold what the server gets

CODECS = {
    # name: (channel, its encoder, relative error where sums may be fused or not)
    "top_k": (compress.top_k(0.05), encoders.top_k(0.05), 0),
    "random_k": (compress.random_k(0.03), encoders.random_k(0.03), 0),
    "random_k, raw": (
        compress.random_k(0.03, unbiased=False),
        encoders.random_k(0.03, unbiased=False),
        0,
    ),
    "cast": (compress.cast(jnp.bfloat16), encoders.numbers(jnp.bfloat16), 0),
    "cast, half": (compress.cast(jnp.float16), encoders.numbers(np.float16), 0),
    "uniform": (compress.uniform(3), encoders.uniform(3), 1e-6),
    "uniform, 1 bit": (compress.uniform(1), encoders.uniform(1), 1e-6),
    "qsgd": (compress.qsgd(7), encoders.qsgd(7), 0),
    "qsgd, 8": (compress.qsgd(8), encoders.qsgd(8), 0),
    "qsgd, 1": (compress.qsgd(1), encoders.qsgd(1), 0),
    "terngrad": (compress.terngrad(), encoders.terngrad(), 0),
    "scaled_sign": (compress.scaled_sign(), encoders.scaled_sign(), 0),
    "sign_majority": (compress.sign_majority(), encoders.sign_majority(), 0),
    "rotation": (compress.rotation(), encoders.numbers(), 0),
    "drive, 2^n": (compress.drive(), encoders.eden(1), 2e-6),
    "eden, 2^n": (compress.eden(3), encoders.eden(3), 2e-6),
    "fetchsgd": (compress.fetchsgd(3, 50, 0.01), encoders.numbers(), 0),
    "leafwise": (compress.leafwise(compress.qsgd(7)), encoders.qsgd(7), 0),
    # of two
    "rotation, uniform": (CHANNELS["rotation, uniform"], encoders.uniform(2), 1e-6),
    "top_k of qsgd": (
        compress.top_k(0.05, compress.qsgd(15)),
        encoders.top_k(0.05, encoders.qsgd(15)),
        0,
    ),
    "random_k of bfloat16": (
        compress.random_k(0.1, compress.cast(jnp.bfloat16)),
        encoders.random_k(0.1, encoders.numbers(jnp.bfloat16)),
        0,
    ),
    "feedback of top_k of terngrad": (
        compress.error_feedback(compress.top_k(0.05, compress.terngrad())),
        encoders.top_k(0.05, encoders.terngrad()),
        0,
    ),
    "qsgd of bfloat16": (
        chain(compress.cast(jnp.bfloat16), compress.qsgd(7)),
        encoders.qsgd(7),
        0,
    ),
    "differences of signs": (
        compress.differences(compress.scaled_sign()),
        encoders.scaled_sign(),
        0,
    ),
}


FILLED = jnp.asarray(np.resize(X, 1024).reshape(2, 512))


def through_bytes(bits):
    assert set(np.unique(bits)) <= {0, 1}
    sent = np.packbits(bits).tobytes()
    assert len(sent) == -(-len(bits) // 8)
    return np.unpackbits(np.frombuffer(sent, np.uint8))[: len(bits)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("key", [0, 1])
def test_the_ledger_is_the_length_of_an_encoding(name, key):
    channel, reference, tolerance = CODECS[name]
    leafwise = name.startswith("leafwise")
    whole = (encoders.leafwise if leafwise else encoders.whole)(reference)
    payload = {"x": FILLED} if "2^n" in name else TREE
    message, _, _ = send(channel, payload, key)
    layer = jax.random.key(key)
    if channel.layers is not None:
        layer = jax.random.fold_in(layer, len(channel.layers) - 1)
    payload = jax.tree.map(np.asarray, message.payload)
    bits = whole.encode(payload, layer)
    decoded = whole.decode(through_bytes(bits), payload)
    assert len(bits) == message.bits and message.header == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * float(np.abs(b).max())
        ),
        decoded,
        payload,
    )


@pytest.mark.parametrize("name", CODECS)
def test_nothing_is_sent_in_no_bits(name):
    message, _, _ = send(CODECS[name][0], TREE, weight=0.0)
    assert message.bits == 0 and message.weight == 0


@pytest.mark.parametrize("name", CODECS)
def test_zeros_are_sent_as_numbers(name):
    """A vector without a norm, range or largest number has no division by it."""
    channel = CODECS[name][0]
    message, _, _ = send(channel, jax.tree.map(jnp.zeros_like, TREE))
    sent = ravel_pytree(message.payload)[0]
    assert jnp.isfinite(sent).all()
    assert not sent.any() or name == "sign_majority"


@pytest.mark.parametrize("name", CODECS)
def test_dtypes_are_kept(name):
    channel = CODECS[name][0]
    payload = {"a": TREE["a"].astype(BF16), "b": TREE["b"]}
    states = channel.init(payload)
    message, _, report = send(channel, payload, states=states)
    ctx = context(jax.random.key(0))
    back, _ = channel.decode(ctx, message.payload, states[0], report)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(
        lambda x: (x.shape, x.dtype), payload
    )
    like = jax.eval_shape(channel.sends, payload)
    assert jax.tree.map(jnp.shape, message.payload) == jax.tree.map(jnp.shape, like)


@pytest.mark.parametrize("name", CODECS)
def test_integers_are_refused(name):
    with pytest.raises(TypeError, match="payload must be of floats"):
        CODECS[name][0].init({"a": jnp.arange(8)})


# --- statistics --------------------------------------------------------------

UNBIASED = [n for n in CHANNELS if "drive" not in n and "eden" not in n]


def biased(drawn, x=X):
    """Whether the mean over the rows is not x, looked at along some directions."""
    rng = np.random.default_rng(1)
    directions = np.array([x, np.abs(x), np.sign(x), *rng.normal(size=(8, len(x)))])
    along = (drawn - x) @ directions.T
    error = along.std(0, ddof=1) / np.sqrt(len(drawn))
    return bool((np.abs(along.mean(0)) > 4.5 * error).any())


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name):
    drawn = samples(name)
    assert not biased(drawn)
    assert biased(1.05 * drawn) and biased(drawn / 1.05)
    assert biased(drawn + 0.05 * np.abs(X))


@pytest.mark.parametrize("name", ["drive", "eden 2"])
def test_eden_is_unbiased_up_to_what_a_hadamard_matrix_allows(name):
    """Its share of x is exact; of others, 2 % is within what a rotation would give."""

    def bias(drawn):
        directions = np.array([X, np.sign(X), X.astype(float) ** 3])
        return np.abs((drawn.mean(0) - X) @ directions.T / (directions @ X))

    drawn = samples(name)
    assert bias(drawn).max() < 0.02
    assert bias(1.05 * drawn).min() > 0.02


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_eden_is_the_papers(bits):
    """In float64, from the message itself, with d no power of two."""
    message, _, _ = send(compress.eden(bits), TREE)
    x = np.asarray(ravel_pytree(TREE)[0], np.float64)
    seed = np.asarray(jax.random.bits(jax.random.key(0)))
    rotated, levels = encoders.rotation(seed, len(x)) @ x, _lloyd_max(bits)
    normal = rotated * np.sqrt(len(rotated)) / np.linalg.norm(x)
    rank = np.abs(normal[:, None] - levels).argmin(1)
    scale = (x @ x) / (rotated @ levels[rank])
    parts = [encoders.to_bits(seed, 32), encoders.one(scale)]
    encoded = np.concatenate([*parts, encoders.to_bits(rank, bits)])
    assert len(encoded) == message.bits
    decoded, _ = encoders.eden(bits).decode(through_bytes(encoded), len(x))
    got = ravel_pytree(message.payload)[0]
    np.testing.assert_allclose(got, decoded, atol=3e-6 * np.abs(x).max())


def test_lloyd_max():
    """Max 1960, table I; and every level is the mean of what is nearest to it."""
    np.testing.assert_allclose(_lloyd_max(1), [-0.7979, 0.7979], atol=1e-4)
    np.testing.assert_allclose(_lloyd_max(2)[2:], [0.4528, 1.510], atol=1e-3)
    np.testing.assert_allclose(
        _lloyd_max(4)[8:],
        [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
        atol=1e-3,
    )
    for bits in range(1, 9):
        levels = _lloyd_max(bits)
        ends = np.array([-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf])
        density = np.exp(-(ends**2) / 2) / np.sqrt(2 * np.pi)
        means = -np.diff(density) / np.diff(ndtr(ends))
        np.testing.assert_allclose(levels, means, atol=1e-9)


def error_of(name):
    """The mean squared error over that of sending zeros."""
    return ((samples(name) - X) ** 2).sum(1).mean() / (X.astype(float) ** 2).sum()


def rounding_error(level, step):
    """`step^2 sum f (1 - f)`: the variance of rounding at random to whole levels."""
    part = level - np.floor(level)
    return step**2 * (part * (1 - part)).sum()


@pytest.mark.parametrize("name, s", [("qsgd", 7), ("qsgd, 1", 1)])
def test_error_of_qsgd(name, s):
    x = X.astype(float)
    norm = np.linalg.norm(x)
    exact = rounding_error(np.abs(x) * s / norm, norm / s) / norm**2
    np.testing.assert_allclose(error_of(name), exact, rtol=0.02)
    assert error_of(name) <= min(len(x) / s**2, np.sqrt(len(x)) / s)


def test_error_of_uniform():
    x = X.astype(float)
    span = x.max() - x.min()
    exact = rounding_error((x - x.min()) * 7 / span, span / 7) / (x @ x)
    np.testing.assert_allclose(error_of("uniform"), exact, rtol=0.02)
    assert error_of("uniform") <= len(x) * span**2 / (4 * 7**2) / (x @ x)


def test_error_of_terngrad():
    """`sum |x_i| (s - |x_i|)`."""
    x = np.abs(X.astype(float))
    exact = (x * (x.max() - x)).sum() / (x @ x)
    np.testing.assert_allclose(error_of("terngrad"), exact, rtol=0.02)


def test_error_of_random_k():
    np.testing.assert_allclose(error_of("random_k"), 1 / 0.25 - 1, rtol=0.02)


# The distortions of Max 1960, table I, for 2, 4, 8 and 16 levels.
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", DISTORTION)
def test_error_of_eden(bits):
    name = "drive" if bits == 1 else f"eden {bits}"
    expected = DISTORTION[bits] / (1 - DISTORTION[bits])
    np.testing.assert_allclose(error_of(name), expected, rtol=0.05)
    if bits == 1:
        np.testing.assert_allclose(expected, np.pi / 2 - 1, rtol=1e-3)


def test_rotation_makes_uniform_better():
    """Suresh et al. 2017, theorem 3: `(2 log d + 2) / (k - 1)^2 ||x||^2` at most."""
    x = X.astype(float)
    rotated = error_of("rotation, uniform")
    assert rotated <= (2 * np.log(1024) + 2) / 3**2
    span = x.max() - x.min()
    plain = rounding_error((x - x.min()) * 3 / span, span / 3) / (x @ x)
    assert rotated < plain / 5


def test_hadamard_is_the_matrix():
    for log in (0, 1, 5, 6, 9):
        x = np.asarray(RNG.normal(size=2**log), np.float32)
        want = matrix(2**log) @ x / 2 ** (log / 2)
        got = jax.jit(hadamard)(x)
        np.testing.assert_allclose(got, want, atol=1e-5)


# --- selection ---------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10, 499, 500])
def test_top_k_is_exact_and_takes_the_first_of_equals(k):
    x = RNG.integers(-9, 9, size=500).astype(np.float32) * np.float32(1e-30)
    message, _, _ = send(compress.top_k(k / 500), x)
    want = np.zeros_like(x)
    chosen = np.argsort(-np.abs(x), kind="stable")[:k]
    want[chosen] = x[chosen]
    np.testing.assert_array_equal(message.payload, want)


def test_top_k_sweeps_k_in_one_compile():
    fractions = jnp.array([0.001, 0.1, 0.5])

    def sent(fraction):
        channel = compress.top_k(fraction)
        message, _, _ = channel.encode(
            context(jax.random.key(0)), new_message(X), *channel.init(jnp.asarray(X))
        )
        return jnp.count_nonzero(message.payload), message.bits

    k, bits = jax.jit(jax.vmap(sent))(fractions)
    assert k.tolist() == [1, 100, 500]
    assert bits.tolist() == [42.0, 4200.0, 17000.0]  # the last with a bitmap


def test_values_must_not_need_the_server():
    with pytest.raises(ValueError, match="nothing to do at the server"):
        compress.top_k(0.1, compress.rotation())
    with pytest.raises(ValueError, match="nothing to do at the server"):
        compress.random_k(0.1, chain(compress.qsgd(7), jaxfl.mean()))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: compress.top_k(0.0), "fraction .* got 0.0"),
        (lambda: compress.random_k(1.5), "fraction .* got 1.5"),
        (lambda: compress.uniform(0), "bits .* got 0"),
        (lambda: compress.uniform(2.5), "bits .* got 2.5"),  # type: ignore
        (lambda: compress.qsgd(0), "levels .* got 0"),
        (lambda: compress.terngrad(-1.0), "clip .* got -1.0"),
        (lambda: compress.eden(9), "bits .* got 9"),
        (lambda: compress.fetchsgd(0, 5, 0.1), "rows .* got 0"),
        (lambda: compress.fetchsgd(5, 5, 2.0), "fraction .* got 2.0"),
        (lambda: compress.fetchsgd(5, 5, 0.1, 1.0), "momentum .* got 1.0"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_cast_takes_floats():
    with pytest.raises(TypeError, match="floating-point format"):
        compress.cast(jnp.int8)


# --- signs -------------------------------------------------------------------


def test_majority_is_of_votes_weighted_by_mean():
    votes = [np.array(v, np.float32) for v in ([1, -2, 3], [-1, -5, 1], [-3, 9, 0])]

    def elected(weights):
        channel = chain(compress.sign_majority(), jaxfl.mean())
        messages = [
            channel.encode(context(jax.random.key(0)), new_message(v, w), *STATELESS)
            for v, w in zip(votes, weights, strict=True)
        ]
        payload = sum(m.payload for m, _, _ in messages)
        report = jax.tree.map(lambda *x: sum(x), *[r for _, _, r in messages])
        ctx = context(jax.random.key(0))
        return channel.decode(ctx, payload, STATELESS[0], report)[0].tolist()

    assert elected([1, 1, 1]) == [-1, -1, 1]
    assert elected([3, 1, 1]) == [1, -1, 1]
    assert elected([2, 0, 2]) == [0, 0, 1]


STATELESS = ((), ()), ((), ())


# --- memories ----------------------------------------------------------------


def rounds_of(channel, payloads, weights=None):
    """A client's messages, one a payload, and its last state."""
    server_state, state = channel.init(jnp.zeros_like(payloads[0]))
    encode, messages = jax.jit(channel.encode), []
    for i, x in enumerate(payloads):
        ctx = context(jax.random.key(i), i)
        weight = 1.0 if weights is None else weights[i]
        message, state, _ = encode(ctx, new_message(x, weight), server_state, state)
        messages.append(message)
    return messages, state


INTEGERS = RNG.integers(-8, 9, size=(12, 40)).astype(np.float32)


def two_rounds_in_three(ctx, payload):
    return ctx.round % 3 != 1


@pytest.mark.parametrize(
    "channel",
    [
        compress.top_k(0.1),
        compress.random_k(0.25, unbiased=False),
        chain(jaxfl.gate(two_rounds_in_three, keep=False), compress.top_k(0.2)),
    ],
    ids=["top_k", "random_k", "gated top_k"],
)
def test_error_feedback_sends_all_but_the_last_error(channel):
    """`sum C(p_t) = sum x_t - e_T`, exactly, in whole numbers."""
    messages, (error, _) = rounds_of(compress.error_feedback(channel), INTEGERS)
    arrived = [m.payload for m in messages if m.weight > 0]
    assert len(arrived) in (8, 12)
    np.testing.assert_array_equal(sum(arrived), INTEGERS.sum(0) - error)
    assert np.any(error)


def test_error_feedback_of_a_channel_that_decodes_at_the_server():
    channel = chain(compress.rotation(), compress.uniform(8))
    messages, (error, _) = rounds_of(compress.error_feedback(channel), INTEGERS)
    want = INTEGERS.sum(0) - error
    got = sum(m.payload for m in messages)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(error).max() < 0.2  # the client knows what the server will make of it
    assert {m.bits.item() for m in messages} == {8.0 * 64 + 64}
    assert {m.payload.shape for m in messages} == {(40,)}


@pytest.mark.parametrize("memory", [compress.error_feedback, compress.differences])
def test_what_was_withheld_before_is_not_remembered(memory):
    weights = [1.0, 0.0, 1.0, 0.0]
    messages, state = rounds_of(memory(compress.top_k(0.1)), INTEGERS[:4], weights)
    want_messages, want = rounds_of(memory(compress.top_k(0.1)), INTEGERS[[0, 2]])
    np.testing.assert_array_equal(state[0], want[0])
    np.testing.assert_array_equal(messages[2].payload, want_messages[1].payload)
    assert [m.bits.item() > 0 for m in messages] == [True, False, True, False]


def test_differences_reach_a_payload_that_stays():
    """EF21: of 40 numbers 4 in each round are the payload's, in order of size."""
    x = RNG.permutation(np.arange(1.0, 41.0)).astype(np.float32)
    messages, (known, _) = rounds_of(
        compress.differences(compress.top_k(0.1)), [x] * 10
    )
    for i, message in enumerate(messages):
        want = np.where(x > 40 - 4 * (i + 1), x, 0)
        np.testing.assert_array_equal(message.payload, want)
        assert message.bits == 4 * (32 + 6)
    np.testing.assert_array_equal(known, x)


def test_differences_that_are_withheld_leave_the_server_what_it_has():
    large = jaxfl.gate(lambda ctx, payload: jnp.max(jnp.abs(payload)) > 2, keep=False)
    x = [np.array([v], np.float32) for v in (3, 4, 6, 7)]
    messages, _ = rounds_of(compress.differences(large), x)
    assert [m.payload.item() for m in messages] == [3, 3, 6, 6]
    assert [m.weight.item() for m in messages] == [1, 1, 1, 1]
    assert [m.bits.item() + m.header.item() for m in messages] == [33, 1, 33, 1]


@pytest.mark.parametrize("memory", [compress.error_feedback, compress.differences])
def test_memories_are_of_what_a_client_can_decode(memory):
    with pytest.raises(ValueError, match="one message alone"):
        memory(compress.sign_majority())
    at_server = jaxfl.at_server(optax.trace(0.9))
    with pytest.raises(ValueError, match="no state at the server"):
        memory(at_server).init(jnp.zeros(3))


# --- FetchSGD ----------------------------------------------------------------


def test_fetchsgd_is_algorithm_1():
    """In float64, with the sketch as a matrix that the cells of each number give."""
    d, rows, columns, rho, k = 60, 3, 8, 0.5, 6
    channel = compress.fetchsgd(rows, columns, k / d, rho, seed=3)
    state, _ = channel.init(jnp.zeros((d, 1)))
    cell = np.asarray(state.tables.cell)
    sketch = np.zeros((rows, columns, d))
    for r in range(rows):
        sketch[r, cell[r] % columns, np.arange(d)] = np.where(cell[r] < columns, 1, -1)
    assert (np.abs(sketch).sum(2) <= -(-d // columns)).all()  # none is fuller
    assert set(np.unique(sketch)) == {-1, 0, 1}

    momentum = error = np.zeros((rows, columns))
    for _ in range(4):
        updates = RNG.normal(size=(2, d, 1)).astype(np.float32) ** 3
        encoded = [
            channel.encode(context(jax.random.key(0)), new_message(x), state, ())
            for x in updates
        ]
        payload, state = jax.jit(channel.decode)(
            None,
            sum(m.payload for m, _, _ in encoded) / 2,
            state,
            {"messages": jnp.int32(2)},
        )
        momentum = rho * momentum + sketch @ updates[..., 0].astype(float).mean(0)
        error = error + momentum
        estimates = np.median(np.einsum("rcd,rc->rd", sketch, error), 0)
        chosen = np.argsort(-np.abs(estimates), kind="stable")[:k]
        found = np.where(np.isin(np.arange(d), chosen), estimates, 0)
        error = error - sketch @ found
        np.testing.assert_allclose(payload[:, 0], found, atol=1e-4)
        np.testing.assert_allclose(state.momentum, momentum, atol=1e-4)
        np.testing.assert_allclose(state.error, error, atol=1e-4)


def test_fetchsgd_waits_in_a_round_without_messages():
    channel = compress.fetchsgd(3, 8, 0.1)
    state, _ = channel.init(jnp.zeros(60))
    state = state._replace(error=state.error + 1.0)
    payload, after = channel.decode(
        None, jnp.zeros((3, 8)), state, {"messages": jnp.int32(0)}
    )
    assert not payload.any()
    jax.tree.map(np.testing.assert_array_equal, after, state)


# --- entropy -----------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 3, 15])
def test_entropy_is_the_length_of_an_arithmetic_code(levels):
    message, _, report = send(
        chain(compress.qsgd(levels), compress.entropy()), jnp.asarray(X)
    )
    values, symbols, counts = np.unique(
        message.payload, return_inverse=True, return_counts=True
    )
    share = counts / len(X)
    code = -len(X) * (share * np.log2(share)).sum()
    table = 32 + len(values) * (32 + 10)
    np.testing.assert_allclose(report[1]["entropy_bits"], code + table, rtol=1e-5)
    assert message.bits > code  # the fixed-length one stays

    encoded = encoders.arithmetic(counts, symbols)
    assert abs(encoded.bit_length() - 1 - code) <= max(2, 0.02 * code)
    assert encoders.arithmetic_decode(counts, len(X), encoded) == symbols.tolist()


def test_entropy_of_one_value_is_its_table():
    _, _, report = send(compress.entropy("bits"), jnp.full(7, 2.0, jnp.bfloat16))
    assert report["bits"] == 32 + 16 + 3
    _, _, report = send(compress.entropy("bits"), jnp.zeros(7), weight=0.0)
    assert report["bits"] == 0


# --- some layers, and each layer ---------------------------------------------


def test_leafwise_is_a_codec_for_each_array():
    channel = compress.leafwise(compress.random_k(0.1))
    message, _, _ = send(channel, TREE)
    bits = 0
    for i, name in enumerate(("a", "b")):
        key = jax.random.fold_in(jax.random.key(0), i)
        one, _, _ = compress.random_k(0.1).encode(
            context(key), new_message(TREE[name]), (), ()
        )
        np.testing.assert_array_equal(message.payload[name], one.payload)
        bits += one.bits
    assert message.bits == bits


def test_leafwise_rotates_each_array_there_and_back():
    channel = compress.leafwise(chain(compress.rotation(), compress.uniform(8)))
    states = channel.init(TREE)
    message, _, report = send(channel, TREE, states=states)
    assert jax.tree.map(jnp.shape, message.payload) == {"a": (1024,), "b": (512,)}
    assert message.bits == 8 * (1024 + 512) + 2 * 64
    payload, _ = jax.jit(channel.decode)(
        context(jax.random.key(3)), message.payload, states[0], report
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), payload, TREE)


def test_leafwise_sends_zeros_for_an_array_that_is_withheld():
    large = jaxfl.gate(lambda ctx, payload: jnp.max(payload) > 2, keep=False)
    message, _, _ = send(
        compress.leafwise(large), {"a": jnp.ones(2), "b": jnp.array([3.0])}
    )
    assert message.payload["a"].tolist() == [0, 0] and message.payload["b"] == 3
    assert (message.weight, message.bits, message.header) == (1, 32, 2)


def test_on_some_layers_by_their_path():
    payload = {"dense": {"kernel": TREE["b"], "bias": jnp.ones(3)}, "out": [TREE["a"]]}
    seen = []

    def chosen(path):
        seen.append(path)
        return path.endswith("kernel") or path == "out/0"

    channel = jaxfl.on(chosen, compress.top_k(0.1))
    message, _, _ = send(channel, payload)
    assert set(seen) == {"dense/bias", "dense/kernel", "out/0"}
    together = {"dense/kernel": TREE["b"], "out/0": TREE["a"]}
    want, _, _ = send(compress.top_k(0.1), together)
    np.testing.assert_array_equal(
        message.payload["dense"]["kernel"], want.payload["dense/kernel"]
    )
    np.testing.assert_array_equal(message.payload["out"][0], want.payload["out/0"])
    np.testing.assert_array_equal(message.payload["dense"]["bias"], np.ones(3))


def test_on_takes_some_layers_and_keeps_their_shapes():
    with pytest.raises(ValueError, match="chooses none of .*'a', 'b'"):
        jaxfl.on(lambda path: path == "c", compress.qsgd(7)).init(TREE)
    with pytest.raises(TypeError, match="one array for each"):
        jaxfl.on(lambda path: True, compress.rotation()).init(TREE)
