"""Fixed point and masks inside a round: exact sums, and messages that say nothing."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from scipy.stats import chisquare, hypergeom

import jaxfl
from jaxfl import chain, mean
from jaxfl.core import Channel, Context, Message
from jaxfl.secure import (
    Graph,
    Residues,
    complete,
    fixed_point,
    masks,
    secure_sum,
    sparse,
    traffic,
)

GRAPHS = {"complete": complete, "sparse": lambda n: Graph(4, 2)}


def context(roster, sent=None, impl="threefry2x32", seed=3):
    roster = jnp.asarray(roster, jnp.int32)
    keys = jax.random.split(jax.random.key(seed, impl=impl))
    everyone = jnp.ones(len(roster), bool)
    return Context(
        keys[0], keys[1], *[jnp.int32(0)] * 2, roster, everyone, 99, sent=sent
    )


@functools.partial(jax.jit, static_argnames=("graph", "bits"))
def masked(x, roster, graph, bits, key):
    """What each client sends, `[K, d]`, one after another."""
    ctx = context(roster)._replace(shared_key=key)

    def one(client_x):
        client, x = client_x
        message = Message(Residues(x, bits), jnp.float32(1), jnp.float32(0))
        encode = secure_sum(graph).encode
        return encode(ctx._replace(client=client), message, (), ())[0].payload.values

    return jax.vmap(lambda *x: one(x))(ctx.roster, x)


@functools.partial(jax.jit, static_argnames=("graph", "bits"))
def unmasked(y, roster, sent, graph, bits, key):
    """What the server makes of the sum of what was sent."""
    ctx = context(roster, sent)._replace(shared_key=key)
    summed = jnp.sum(jnp.where(sent[:, None], y, 0), 0, dtype=jnp.uint32)
    decode = secure_sum(graph).decode
    return decode(ctx, Residues(summed, bits), (), ())[0].values


def numbers(shape, bits, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**bits, shape, np.uint32)


def looks_uniform(x, bits):
    """Chi-square tests of the highest and of the lowest five bits."""
    x = np.asarray(x).ravel()
    return all(
        chisquare(np.bincount(five, minlength=32)).pvalue > 1e-4
        for five in (x >> (bits - 5), x & 31)
    )


# --- the sum ----------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("bits, impl", [(32, "threefry2x32"), (20, "rbg")])
def test_the_sum_is_exact_whoever_drops_out(graph, bits, impl):
    """Of 10 clients with ids that are not their places, 0, 1 and 3 drop out."""
    roster = np.array([5, 0, 17, 2, 30, 8, 11, 4, 21, 9], np.int32)
    key = context(roster, impl=impl).shared_key
    x = numbers((10, 33), bits)
    y = masked(x, roster, graph, bits, key)
    assert (y < 2**bits).all() and not (y == x).all(1).any()
    for gone in ([], [4], [0, 4, 9]):
        sent = ~np.isin(np.arange(10), gone)
        got = unmasked(y, roster, sent, graph, bits, key)
        want = x[sent].sum(0, dtype=np.uint64) % 2**bits
        np.testing.assert_array_equal(got, want)


@functools.cache
def plain_and_masked(graph=complete):
    fixed = chain(mean(5.0), fixed_point(8.0, 2**20, stochastic=True))
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    both = []
    for channel in (fixed, chain(fixed, secure_sum(graph))):
        federation = jaxfl.federate(algorithm, channel)
        state = federation.init(toy.params(), toy.data())
        both.append((state, jax.jit(federation.round)))
    return both


def rounds(alive):
    cohort = toy.cohort(toy.data(), range(toy.N), alive)
    return [
        (state, *round_fn(jax.random.key(1), state, cohort))
        for state, round_fn in plain_and_masked()
    ]


@pytest.mark.parametrize("absent", [[], [2], [2, 6]], ids=str)
def test_a_round_is_that_without_masks_to_the_bit(absent):
    """Client 4 has no data and so sends nothing, which is one more that is missing."""
    (_, plain, _), (before, state, info) = rounds(~np.isin(np.arange(toy.N), absent))
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    assert info.sent.sum() == toy.N - 1 - len(absent)
    assert (info.delivered == info.sent).all()
    assert not (state.params["w"] == before.params["w"]).any()


def test_below_the_threshold_nothing_is_decoded():
    """4 of 7 must send; here 3 do, of 4 that are alive."""
    (_, _, plain), (before, state, info) = rounds(np.arange(toy.N) > 2)
    assert plain.delivered.sum() == 3
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    assert info.sent.sum() == 3 and not info.delivered.any()
    assert not info.rejected.any()


def test_a_threshold_holds_for_each_neighbourhood():
    """All neighbours of one client are gone, and most of the clients are there."""
    n, roster = 9, np.arange(9, dtype=np.int32)
    key = context(roster).shared_key
    ring = np.asarray(masks._ring(masks._keys(context(roster)), context(roster)))
    x = numbers((n, 5), 32)

    def graph(n):
        return Graph(2, 2)

    y = masked(x, roster, graph, 32, key)
    sent = np.ones(n, bool)
    sent[ring[[3, 5]]] = False  # on both sides of 4, which still has only itself
    got = unmasked(y, roster, sent, graph, 32, key)
    assert (got == 2**31).all()  # which is no sum
    sent[ring[5]] = True
    got = unmasked(y, roster, sent, graph, 32, key)
    np.testing.assert_array_equal(got, x[sent].sum(0, dtype=np.uint32))


# --- what the server sees ---------------------------------------------------


def test_messages_of_any_strict_subset_are_uniform():
    """Everyone's input is the same small number, which the test would find."""
    n, d, bits = 4, 5000, 20
    roster = np.arange(n, dtype=np.int32)
    ctx = context(roster)
    x = np.full((n, d), 3, np.uint32)
    y = np.asarray(masked(x, roster, complete, bits, ctx.shared_key))
    keys = masks._keys(ctx)
    own = np.stack([masks._own(keys, u, d) for u in range(n)])
    modulus = 2**bits - 1
    subsets = [s for r in (1, 2, 3) for s in itertools.combinations(range(n), r)]
    for who in subsets:
        seen = y[list(who)].sum(0, dtype=np.uint32)
        assert looks_uniform(seen & modulus, bits), who
        # Without masks of their own, those of pairs hide it as well ...
        bare = seen - own[list(who)].sum(0, dtype=np.uint32)
        assert looks_uniform(bare & modulus, bits), who
        assert not looks_uniform(x[list(who)].sum(0), bits)
    # ... of all but everyone, whose sum is what the server is to learn.
    everyone = y.sum(0, dtype=np.uint32)
    assert looks_uniform(everyone & modulus, bits)
    assert ((everyone - own.sum(0, dtype=np.uint32)) & modulus == 3 * n).all()


def test_a_message_is_uniform_though_all_masks_of_pairs_are_known():
    """As for one that was taken for dropped out and whose message comes late."""
    n, d = 4, 5000
    roster = np.arange(n, dtype=np.int32)
    ctx = context(roster)
    x = np.full((n, d), 3, np.uint32)
    y = np.asarray(masked(x, roster, complete, 32, ctx.shared_key))
    keys = masks._keys(ctx)
    rest = y[1]
    for v in (0, 2, 3):
        rest = rest - np.asarray(masks._pairwise(keys, 1, v, d))
    assert looks_uniform(rest, 32)
    assert (rest - np.asarray(masks._own(keys, 1, d)) == 3).all()


def test_masks_are_new_in_each_round():
    x = np.zeros((4, 5000), np.uint32)
    roster = np.arange(4, dtype=np.int32)
    a, b = (
        np.asarray(masked(x, roster, complete, 32, context(roster, seed=s).shared_key))
        for s in (1, 2)
    )
    assert looks_uniform(a - b, 32)
    assert looks_uniform(a[0] - a[1], 32)


# --- whole numbers ----------------------------------------------------------


def rounded(x, channel, clients=3):
    ctx = context(range(clients))
    layout, _ = channel.init(x)
    message, _, report = channel.encode(
        ctx, Message(x, jnp.float32(1), jnp.float32(0)), layout, ()
    )
    return message, report, lambda p: channel.decode(ctx, p, layout, report)[0]


@pytest.mark.parametrize("bits", [8, 20, 32])
def test_rounding_is_that_of_float64(bits):
    rng = np.random.default_rng(0)
    x = rng.normal(size=999).astype(np.float32)
    scale = 2.0 ** (bits - 5)
    message, report, decode = rounded(
        jnp.asarray(x), fixed_point(1.5, scale, bits=bits)
    )
    level = np.rint(np.clip(x.astype(np.float64), -1.5, 1.5) * scale)
    np.testing.assert_array_equal(message.payload.values, level % 2**bits)
    assert report["clamped"] == (abs(x) > 1.5).sum() > 50
    assert message.bits == bits * 999
    np.testing.assert_array_equal(
        decode(message.payload), (level / scale).astype(np.float32)
    )


@pytest.mark.parametrize("bits", [5, 16, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_does_not_wrap(bits, sign):
    clients = 3
    highest = (2 ** (bits - 1) - 1) // clients
    channel = fixed_point(1.0, highest, bits=bits)
    message, _, decode = rounded(sign * jnp.array([9.0, 1.0]), channel)
    summed = jax.tree.map(lambda x: x * jnp.uint32(clients), message.payload)
    np.testing.assert_allclose(decode(summed), sign * 3.0, rtol=1e-6)


def test_a_sum_that_might_wrap_is_refused_before_it_compiles():
    x = jnp.zeros(2)
    for clients, fits in ((7, True), (8, False)):
        channel = fixed_point(4.0, 4.5, bits=8)  # 18 steps, 127 at most
        trace = functools.partial(
            jax.eval_shape, lambda x, k=clients, c=channel: rounded(x, c, k)[:2], x
        )
        if fits:
            trace()
            continue
        with pytest.raises(ValueError, match="cohort of 8.*limit=4.0.*at most 7 clie"):
            trace()


def test_stochastic_rounding_is_unbiased():
    x = jnp.full(40000, 2.3 / 16)
    message, _, _ = rounded(x, fixed_point(1.0, 16, stochastic=True))
    level = np.asarray(message.payload.values)
    assert set(level) == {2, 3}
    assert abs(level.mean() - 2.3) < 4 * math.sqrt(0.3 * 0.7 / 40000)


def test_no_sum_is_no_number():
    _, _, decode = rounded(jnp.zeros(2), fixed_point(1.0, 4, bits=6))
    got = decode(Residues(jnp.array([32, 33], jnp.uint32), 6))
    np.testing.assert_array_equal(got, [np.nan, -31 / 4])


def test_what_is_not_finite_is_dropped():
    """Whole numbers are finite, but what they were made of may not have been."""

    def spoil(ctx, message, server_state, client_state):
        bad = jnp.where(ctx.client == 2, jnp.nan, 1.0)
        payload = jaxfl.tree.scale(bad, message.payload)
        return message._replace(payload=payload), client_state, ()

    federation = jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=None),
        chain(Channel(encode=spoil), mean(5.0), fixed_point(8.0, 2**20)),
    )
    data = toy.data()
    state = federation.init(toy.params(), data)
    state, info = federation.round(jax.random.key(0), state, toy.cohort(data))
    assert np.flatnonzero(info.rejected).tolist() == [2] and not info.sent[2]
    assert jaxfl.tree.is_finite(state.params)


# --- graphs and costs -------------------------------------------------------


@pytest.mark.parametrize(
    "n, corrupt, dropout, k, t",
    [
        (100, 0.45, 0.45, 92, 46),
        (1000, 0.45, 0.45, 822, 417),
        (100, 0.33, 0.33, 68, 34),
        (1000, 0.33, 0.33, 286, 150),
        (10000, 0.33, 0.33, 422, 221),
        (1000000, 0.05, 0.33, 102, 34),
        (10, 0.33, 0.05, 4, 4),
        (1000, 0.33, 0.05, 78, 60),
        (10, 0.05, 0.05, 2, 2),
        (1000, 0.05, 0.05, 30, 17),
    ],
)
def test_graphs_are_those_of_the_authors(n, corrupt, dropout, k, t):
    """The values in the tests of federated-compute, for an honest-but-curious server."""
    assert sparse(corrupt=corrupt, dropout=dropout)(n) == Graph(k, t)


def test_graphs_are_safe_and_no_larger_than_needed():
    n, corrupt, dropout = 500, 0.1, 0.2
    graph = sparse(corrupt=corrupt, dropout=dropout, security=30, correctness=15)(n)
    k, t = graph
    colluding, remaining = hypergeom(n, 50, k), hypergeom(n, 400, k)
    assert n * colluding.sf(t - 1) <= 2.0**-31 < n * colluding.sf(t - 2)
    assert n * remaining.cdf(t - 1) <= 2.0**-15
    stricter = sparse(corrupt=corrupt, dropout=dropout)(n)
    assert k < stricter.neighbours < n - 1
    assert sparse(corrupt=0.4, dropout=0.4)(20) == Graph(19, 9)  # too few for less


@pytest.mark.parametrize(
    "n, d, bits, expansion", [(10, 20, 26, 1.73), (14, 24, 30, 1.98)]
)
def test_costs_are_those_of_the_paper(n, d, bits, expansion):
    """2^n clients with 2^d inputs of 16 bits."""
    n, d = 2**n, 2**d
    assert bits == math.ceil(math.log2(n * (2**16 - 1) + 1))
    total = sum(traffic(complete(n), d, bits, tag=0))
    assert total == 2 * n * 256 + (5 * n - 4) * 256 + bits * d
    assert round(total / (16 * d), 2) == expansion


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: fixed_point(0.0, 4), "limit must be positive"),
        (lambda: fixed_point(1.0, math.inf), "scale must be positive"),
        (lambda: fixed_point(1.0, 4, bits=33), "bits must be"),
        (lambda: sparse(corrupt=-0.1, dropout=0), "corrupt must be"),
        (lambda: sparse(corrupt=0.5, dropout=0.5), "corrupt [+] dropout"),
        (lambda: jaxfl.secure.graph.offsets(Graph(3, 2), 7), "cannot have 3"),
        (lambda: jaxfl.secure.graph.offsets(Graph(4, 6), 7), "threshold must be"),
        (
            lambda: jaxfl.federate(
                jaxfl.fedavg(toy.loss, optax.sgd(0.1)), secure_sum(), jaxfl.median()
            ),
            "not linear",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_payloads_are_of_the_right_kind():
    with pytest.raises(TypeError, match="fixed_point to its left"):
        secure_sum().init(jnp.zeros(3))
    with pytest.raises(TypeError, match="payload must be of floats"):
        fixed_point(1.0, 4).init(jnp.zeros(3, int))
