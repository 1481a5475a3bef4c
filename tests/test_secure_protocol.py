"""The protocol with real cryptography: the same sums, the paper's bytes, no more told."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from test_secure import context, looks_uniform, masked, numbers, unmasked

from jaxfl.core import Message
from jaxfl.secure import (
    Graph,
    Residues,
    complete,
    protocol,
    secure_sum,
    shamir,
    traffic,
)
from jaxfl.secure.graph import neighbourhoods
from jaxfl.secure.protocol import Aborted, Client, Refused, Server, aggregate

N = 10
SPARSE = Graph(6, 3)
GRAPHS = {"complete": complete(N), "sparse": SPARSE}
DROPOUTS = {
    "nobody": [],
    "one": [[], [], [4]],
    "three": [[], [], [0, 4, 9]],
    "one in each round": [[1], [3], [5], [7]],
    "after sending": [[], [], [], [2, 8]],
}


def inputs(d=7, bits=32, n=N):
    return dict(enumerate(numbers((n, d), bits)))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("bits", [13, 32])
def test_the_sum_is_exact_whoever_drops_out(graph, dropouts, bits):
    x = inputs(bits=bits)
    run = aggregate(x, graph, bits=bits, dropouts=dropouts)
    gone = {u for before in dropouts[:3] for u in before}
    assert run.survivors == set(range(N)) - gone
    want = sum(x[u].astype(np.uint64) for u in run.survivors) % 2**bits
    np.testing.assert_array_equal(run.total, want)


@pytest.mark.parametrize("gone", [[], [4], [0, 4, 9]], ids=str)
def test_it_gives_what_the_compiled_form_gives(gone):
    x = inputs(d=33)
    roster = np.arange(N, dtype=np.int32)
    key = context(roster).shared_key
    y = masked(np.stack([*x.values()]), roster, complete, 32, key)
    sent = ~np.isin(roster, gone)
    compiled = unmasked(y, roster, sent, complete, 32, key)
    run = aggregate(x, complete(N), dropouts=[[], [], gone])
    np.testing.assert_array_equal(run.total, compiled)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize(
    "round, what", enumerate(["advertised", "shared", "sent inputs", "told"])
)
def test_below_the_threshold_it_aborts(graph, round, what):
    left = graph.threshold - 1
    dropouts = [*[[]] * round, range(left, N)]
    with pytest.raises(Aborted, match=f"only {left} clients {what}.*threshold is"):
        aggregate(inputs(), graph, dropouts=dropouts)


def test_too_few_shares_of_one_secret_abort():
    """In a sparse graph enough clients may be left, and too few near one of them."""
    x, graph = inputs(), Graph(2, 3)
    with pytest.raises(Aborted, match="shares of the secret"):
        aggregate(x, graph, dropouts=[[], [], [], [0]])
    with pytest.raises(Aborted, match="of it and its neighbours only 2"):
        aggregate(x, graph, dropouts=[[0]])


# --- what is told -----------------------------------------------------------


def until_inputs(gone=()):
    """A run up to the server's list of survivors, with everything in sight."""
    x, graph = inputs(d=3000, n=5), Graph(4, 3)
    x = {u: np.full_like(v, 3) for u, v in x.items()}
    clients = {u: Client(u, x.keys() - {u}, graph.threshold) for u in x}
    server = Server(neighbourhoods(list(x), graph), graph.threshold, 3000)
    keys = server.pass_on_keys({u: c.advertise_keys() for u, c in clients.items()})
    sent = {u: c.share_keys(keys[u]) for u, c in clients.items()}
    shares = server.pass_on_shares(sent)
    masked = {
        u: c.masked_input(shares[u], x[u]) for u, c in clients.items() if u not in gone
    }
    return clients, server, shares, masked, server.pass_on_survivors(masked)


def test_one_share_of_each_client_is_told_and_never_both():
    clients, server, _, _, survivors = until_inputs(gone=[1])
    told = {u: clients[u].unmask(survivors[u]) for u in survivors}
    for u, client in clients.items():
        shares = {
            v + 1: int.from_bytes(shares[u], "little")
            for v, shares in told.items()
            if len(shares[u]) == 32
        }
        assert len(shares) == 4
        secret = int.from_bytes(client._mask_key.private_bytes_raw(), "little")
        assert shamir.combine(shares) == (secret if u == 1 else client._seed)
    assert (server.unmask(told) == 4 * 3).all()


def test_a_client_does_not_tell_twice():
    clients, _, _, _, _ = until_inputs()
    clients[0].unmask({0, 1, 2, 3, 4})
    with pytest.raises(Refused, match="told once"):
        clients[0].unmask({0, 1, 2, 3})


@pytest.mark.parametrize("survivors", [{1, 2, 3, 4}, {0, 1, 2, 9}], ids=str)
def test_a_client_does_not_tell_of_others(survivors):
    clients, _, _, _, _ = until_inputs()
    with pytest.raises(Refused, match="survivors must be"):
        clients[0].unmask(survivors)
    with pytest.raises(Aborted, match="only 2 sent inputs"):
        clients[0].unmask({0, 1})


def test_only_the_receiver_reads_a_share():
    clients, _, shares, _, _ = until_inputs()
    assert len(clients[2]._open(1, shares[2][1])) == 64
    for reader, sender in ((3, 1), (2, 4)):
        with pytest.raises(InvalidTag):
            clients[reader]._open(sender, shares[2][1])
    pairs = [c for each in shares.values() for c in each.values()]
    assert len(set(pairs)) == 5 * 4


def test_what_the_server_sees_is_uniform():
    _, _, _, masked, _ = until_inputs()
    seen = {u: protocol.unpack(y, 3000, 32) for u, y in masked.items()}
    for who in ([0], [3], [0, 1], [1, 2, 4], [0, 1, 2, 3], range(5)):
        assert looks_uniform(sum(seen[u] for u in who), 32), who
    assert not looks_uniform(np.full(3000, 9, np.uint32), 32)


# --- what it costs ----------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_bytes_are_those_of_the_formula(graph):
    run = aggregate(inputs(d=16, bits=17), graph, bits=17)
    up, down = traffic(graph, 16, 17)
    assert set(run.up.values()) == {up // 8} and up % 8 == 0
    assert set(run.down.values()) == {down // 8}

    ctx = context(range(N))  # the compiled form says the same
    x = Residues(jnp.zeros(16, jnp.uint32), 17)
    message = Message(x, jnp.float32(1), jnp.float32(17 * 16))
    sent, _, _ = jax.jit(secure_sum(lambda n: graph).encode)(ctx, message, (), ())
    assert sent.bits + sent.header == up


@pytest.mark.parametrize("bits", [1, 5, 8, 26, 32])
def test_packing_loses_nothing(bits):
    x = numbers(37, bits)
    packed = protocol.pack(x, bits)
    assert len(packed) == -(-37 * bits // 8)
    np.testing.assert_array_equal(protocol.unpack(packed, 37, bits), x)
    wide = numbers(37, 32, seed=1)
    np.testing.assert_array_equal(
        protocol.unpack(protocol.pack(wide, bits), 37, bits), wide & (2**bits - 1)
    )


def test_inputs_are_of_the_right_kind():
    client = Client(0, [], 1, bits=8)
    client.share_keys({})
    for wrong in (np.array([256], np.uint32), np.array([1.0]), np.uint32([[1]])):
        with pytest.raises(ValueError, match="x must be uint32"):
            client.masked_input({}, wrong)


# --- shares -----------------------------------------------------------------


def test_shares_of_the_published_example():
    """Six shares of 1234, any three of which give it back, modulo 1613 (Wikipedia)."""
    want = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    got = {x: shamir.evaluate([1234, 166, 94], x, 1613) for x in want}
    assert got == want
    assert shamir.combine({x: want[x] for x in (1, 2, 3)}, 1613) == 1234
    assert shamir.combine({x: want[x] for x in (2, 4, 5)}, 1613) == 1234


def test_any_t_shares_give_the_secret_back():
    secret = shamir.PRIME - 1
    shares = shamir.split(secret, 4, range(1, 10))
    for start in range(6):
        some = {x: shares[x] for x in range(start + 1, start + 5)}
        assert shamir.combine(some) == secret
        del some[start + 1]
        assert shamir.combine(some) != secret
    assert len({*shares.values()}) == 9


def test_fewer_than_t_shares_say_nothing():
    """Whatever the secret, two of three shares take all 49 pairs of values alike."""
    for secret in (0, 5):
        drawn = collections.Counter(
            tuple(shamir.split(secret, 3, [1, 2, 6], prime=7)[x] for x in (1, 6))
            for _ in range(9800)
        )
        assert len(drawn) == 49
        assert sum((n - 200) ** 2 / 200 for n in drawn.values()) < 95  # 1 in 10^4


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((7, 2, [1, 2], 7), "secret must be"),
        ((1, 2, [0, 2], 7), "holders must be"),
        ((1, 2, [2, 2], 7), "holders must be"),
        ((1, 3, [1, 2], 7), "threshold must be"),
    ],
)
def test_shares_that_cannot_be(arguments, match):
    with pytest.raises(ValueError, match=match):
        shamir.split(*arguments)
