"""Sums of encrypted messages: what they are, how long, and who can read them."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import chain, clip, homomorphic, mean

tenseal = pytest.importorskip("tenseal", reason="needs the extra `he`")
pytest.importorskip("phe", reason="needs the extra `he`")

CKKS = homomorphic.ckks()
PAILLIER = homomorphic.paillier(limit=100.0, bits=40, key_bits=512)
both = pytest.mark.parametrize("keys", [CKKS, PAILLIER], ids=["CKKS", "Paillier"])


def encrypted_sum(keys, messages):
    public = keys.public()
    return homomorphic.add(public, *(homomorphic.encrypt(public, x) for x in messages))


# ---------------------------------------------------------------- sums, and their error


@both
@pytest.mark.parametrize("size", [0, 1, 2049])
def test_the_sum_is_numpys(keys, size):
    messages = np.random.default_rng(size).uniform(-99, 99, (3, size))
    summed = encrypted_sum(keys, messages)
    got = homomorphic.decrypt(keys, summed)
    np.testing.assert_allclose(got, messages.sum(0), rtol=0, atol=1e-6)
    assert got.dtype == np.float64 and (summed.size, summed.summands) == (size, 3)


@both
def test_sums_of_sums(keys):
    a, b, c = ([x, -x] for x in (1.0, 2.0, 4.0))
    nested = homomorphic.add(
        keys, encrypted_sum(keys, [a, b]), encrypted_sum(keys, [c])
    )
    assert nested.summands == 3
    got = homomorphic.decrypt(keys, nested)
    np.testing.assert_allclose(got, [7.0, -7.0], atol=1e-7)


@pytest.mark.parametrize("scale_bits", [38, 42])
def test_the_error_of_ckks_is_that_of_rounding(scale_bits):
    """`sqrt(n N / 2 (1 + 2 N / 3) / 12) / 2^s`, and not as much for another s."""
    keys = homomorphic.ckks(scale_bits=scale_bits)
    n, degree = 4, 4096
    messages = np.random.default_rng(0).normal(size=(n, 6 * 2048))
    error = homomorphic.decrypt(keys, encrypted_sum(keys, messages)) - messages.sum(0)
    std = np.sqrt(n * degree / 2 * (1 + 2 * degree / 3) / 12) / 2**scale_bits
    assert error.std() == pytest.approx(std, rel=0.1)
    assert np.log2(std * 2**scale_bits) == pytest.approx(9.42 + 1, abs=0.01)


def test_ckks_up_to_its_limit():
    keys = homomorphic.ckks(summands=4)
    messages = np.full((4, 2048), keys.limit) * np.resize([1, -1], 2048)
    got = homomorphic.decrypt(keys, encrypted_sum(keys, messages))
    np.testing.assert_allclose(got, messages.sum(0), rtol=1e-9)


def test_paillier_is_exact_in_integers():
    """Numbers at the limits, as many as may be added: nothing carries over."""
    summands, bits, limit = 5, 12, 3.0
    keys = homomorphic.paillier(limit=limit, bits=bits, summands=summands, key_bits=256)
    assert keys.slots == 255 // (12 + 3)
    rng = np.random.default_rng(0)
    messages = rng.uniform(-limit, limit, (summands, 3 * keys.slots + 1))
    messages[:, ::3], messages[:, 1::3] = limit, -limit
    step = 2 ** (bits - 1) - 1
    want = [sum(round(x / limit * step) for x in column) for column in messages.T]
    got = homomorphic.decrypt(keys, encrypted_sum(keys, messages)) * step / limit
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    bound = summands * limit / (2**bits - 2)
    assert np.abs(got * limit / step - messages.sum(0)).max() <= bound


# --------------------------------------------------------------- lengths, and processes


def test_lengths_are_as_stated():
    assert {len(b) for b in encrypted_sum(CKKS, np.ones((2, 5000))).blocks} == {65_676}
    assert homomorphic.encrypt(CKKS, np.zeros(2049)).num_bytes == 2 * 65_676
    keys = homomorphic.paillier(limit=1.0, bits=32, summands=100, key_bits=512)
    assert keys.slots == 511 // (32 + 7)
    assert homomorphic.encrypt(keys, np.ones(14)).num_bytes == 2 * 2 * 512 // 8


def test_processes_share_the_work(capsys):
    x = np.linspace(-9, 9, 5000)
    with homomorphic.workers(2) as pool:
        for keys in (CKKS, PAILLIER):
            how = {"pool": pool, "progress": True}
            c = homomorphic.encrypt(keys.public(), x, **how)
            np.testing.assert_allclose(
                homomorphic.decrypt(keys, c, **how), x, rtol=0, atol=1e-8
            )
        aggregator, sent = homomorphic.total(PAILLIER, pool=pool), jnp.ones(2, bool)
        summed, _, () = aggregator.apply(None, jnp.ones((2, 99)), sent, ())
        np.testing.assert_allclose(summed, np.full(99, 2.0), rtol=1e-6)
    shown = capsys.readouterr().out
    assert "encrypting" in shown and "decrypting" in shown and "100%" in shown


# -------------------------------------------------------------------- who can read what


@both
def test_the_server_cannot_decrypt(keys):
    server = keys.public()
    ciphertext = homomorphic.encrypt(server, [1.0, 2.0])
    assert server.secret is None
    with pytest.raises(ValueError, match="keys must have the secret key"):
        homomorphic.decrypt(server, ciphertext)
    with pytest.raises(ValueError, match="keys must have the secret key"):
        homomorphic.total(server)
    for secret in ("secret", "context", str(PAILLIER.secret)):
        assert secret not in repr(keys)


def test_the_servers_context_has_no_secret_key():
    """TenSEAL itself says so, and does not decrypt by it."""
    server = CKKS.public()
    context = tenseal.context_from(server.context)
    assert context.has_public_key() and not context.has_secret_key()
    (block,) = homomorphic.encrypt(server, [1.0]).blocks
    vector = tenseal.ckks_vector_from(context, block)
    with pytest.raises(ValueError, match="doesn't hold a secret_key"):
        vector.decrypt()
    other = homomorphic.decrypt(homomorphic.ckks(), encrypted_sum(CKKS, [[1.0]]))
    assert not abs(other - 1) < 1


@both
def test_the_same_message_is_never_the_same_ciphertext(keys):
    x = np.zeros(10)
    (a,), (b,) = (homomorphic.encrypt(keys.public(), x).blocks for _ in range(2))
    # The middle half: both ends hold headers that every ciphertext has.
    middle = slice(len(a) // 4, 3 * len(a) // 4)
    same = np.frombuffer(a, np.uint8)[middle] == np.frombuffer(b, np.uint8)[middle]
    assert len(a) == len(b) and same.mean() < 0.05


# ---------------------------------------------------------------------- in a federation


GATE = jaxfl.gate(lambda ctx, payload: optax.tree.norm(payload) > 0.5, keep=False)


@functools.cache
def run(aggregator):
    """Three rounds, in which not everyone sends."""
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.sgd(0.7), batch_size=2)
    channel = chain(clip(3.0), GATE, mean())
    return jaxfl.simulate(
        jaxfl.federate(algorithm, channel, aggregator, chunk_size=2),
        *(toy.params(), toy.data()),
        rounds=3,
        every=3,
        key=jax.random.key(0),
        progress=False,
    )


PLAIN = jaxfl.total()


@both
def test_three_rounds_are_as_without(keys):
    state, history = run(homomorphic.total(keys))
    want, plain = run(PLAIN)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        *(state.params, want.params),
    )
    sent = plain.clients.sent
    assert 0 < sent.sum() < sent.size
    np.testing.assert_array_equal(history.clients.sent, sent)
    np.testing.assert_array_equal(history.clients.bits_down, plain.clients.bits_down)
    length = 8 * homomorphic.encrypt(keys, np.zeros(4)).num_bytes
    flag, weight = 1, 32
    bits = np.where(sent, length + flag + weight, plain.clients.bits_up)
    np.testing.assert_array_equal(history.clients.bits_up, bits)


@both
def test_the_aggregate_is_that_of_who_sent_in_its_own_dtypes(keys):
    payload = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(3, jnp.bfloat16)}
    sent = jnp.array([True, False, True])
    got, delivered, () = homomorphic.total(keys).apply(None, payload, sent, ())
    np.testing.assert_allclose(got["w"], [4.0, 6.0], atol=1e-6)
    assert got["b"] == 2 and got["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(delivered, sent)


# -------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: homomorphic.ckks(scale_bits=51), "scale_bits must be .* 20 to 50"),
        (lambda: homomorphic.ckks(summands=0), "summands must be .*, got 0"),
        (lambda: homomorphic.paillier(limit=0), "limit must be positive, got 0"),
        (lambda: homomorphic.paillier(limit=1, bits=53), "bits must be .* 2 to 52"),
        (lambda: homomorphic.paillier(limit=1, summands=0), "summands must be"),
        (lambda: homomorphic.paillier(limit=1, key_bits=257), "key_bits must be even"),
        (lambda: homomorphic.paillier(limit=1, key_bits=64), "key_bits must be .* 128"),
        (lambda: homomorphic.encrypt(CKKS, [[1.0]]), r"x must be a vector.*\(1, 1\)"),
        (
            lambda: homomorphic.encrypt(CKKS, [np.nan]),
            "x has a number of magnitude nan",
        ),
        (lambda: homomorphic.encrypt(CKKS, [656.0]), "656, and these keys .* 655.36"),
        (lambda: homomorphic.encrypt(PAILLIER, [-100.5]), "100.5, and these keys"),
        (lambda: homomorphic.add(CKKS), "ciphertexts must be of one size"),
        (
            lambda: homomorphic.add(
                *(CKKS, homomorphic.encrypt(CKKS, [1.0])),
                homomorphic.encrypt(CKKS, [1.0, 2.0]),
            ),
            r"one size, got \[1, 2\]",
        ),
        (
            lambda: homomorphic.add(
                homomorphic.ckks(summands=2), *[homomorphic.encrypt(CKKS, [1.0])] * 3
            ),
            "summands: a sum of 3 messages is more than the keys were made for, 2",
        ),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_cohort_larger_than_the_keys_were_made_for():
    aggregator = homomorphic.total(homomorphic.ckks(summands=2))
    with pytest.raises(ValueError, match="summands: a sum of 3 messages"):
        jax.eval_shape(aggregator.apply, None, jnp.ones((3, 4)), jnp.ones(3, bool), ())


def test_a_message_beyond_the_limit_ends_the_round():
    aggregator = homomorphic.total(CKKS)
    payload = jnp.array([[1.0], [656.0]])
    with pytest.raises(jax.errors.JaxRuntimeError, match="656, and these keys take"):
        jax.jit(aggregator.apply)(None, payload, jnp.ones(2, bool), ())


def test_payloads_are_of_floats():
    with pytest.raises(TypeError, match="homomorphic.total: payload must be of floats"):
        homomorphic.total(CKKS).init(jnp.zeros(2, jnp.int32))


def test_a_mean_needs_a_sum():
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1))
    jaxfl.federate(algorithm, mean(), homomorphic.total(CKKS))
    with pytest.raises(ValueError, match="mean.*is not linear, nor does it make a sum"):
        jaxfl.federate(algorithm, mean(), jaxfl.median())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tenseal", homomorphic.ckks),
        ("phe", lambda: homomorphic.paillier(limit=1.0)),
    ],
)
def test_a_missing_library(name, make, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'jaxfl\[he\]'"):
        make()
