"""Rounds on Flower: those of the program in one piece, over messages made to bytes."""

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.interop import flower, records
from jaxfl.interop.loopback import Loopback

needs_flower = pytest.mark.skipif(
    find_spec("flwr") is None, reason="needs the extra `flower`"
)
KEY = jax.random.key(3)
ROUNDS = 3


def fedavg(channel=None, aggregator=None):
    channel = jaxfl.mean() if channel is None else channel
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1, momentum=0.5), batch_size=2)
    return jaxfl.federate(algorithm, channel, aggregator)


def app_of(federation, params=None, **options):
    data, params = toy.data(), toy.params() if params is None else params

    def data_of(context):
        return data[jnp.array([context.node_config["partition-id"]])]

    return flower.client_app(federation, params, data_of, **options)


def nodes(clients=range(toy.N)) -> Any:
    return [{"partition-id": i} for i in clients]


def served(federation, grid, params=None, rounds=ROUNDS, **options):
    """The last state and the info of all rounds."""
    run = flower.serve(
        grid,
        federation,
        toy.params() if params is None else params,
        toy.data(),
        **{"population": toy.N, "key": KEY, "rounds": rounds} | options,
    )
    states, infos = zip(*run, strict=True)
    return states[-1], infos


def states_of_nodes(grid, like):
    """What the nodes have, stacked as in a state of a simulation."""
    own = []
    for row, node in enumerate(grid.get_node_ids()):
        state = grid.state_of(node)[flower.OWN]
        one = jax.tree.map(lambda x, row=row: x[row], like)
        own.append(records.unpack(state, one, "own"))
    return jax.tree.map(lambda *x: jnp.stack(x), *own)


def assert_same(got, want, rtol=1e-6):
    """Keys, integers and flags to the bit, floats to a few roundings."""
    got, want = jaxfl.tree.without_keys(got), jaxfl.tree.without_keys(want)

    def leaf(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.inexact):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree.map(leaf, got, want)


def scaffold_of_a_few():
    algorithm = jaxfl.scaffold(toy.loss, 0.1, batch_size=2)
    compress = jaxfl.compress.error_feedback(jaxfl.compress.top_k(0.5))
    return jaxfl.federate(algorithm, jaxfl.chain(compress, jaxfl.mean()))


def nodes_with_models():
    """Nodes are given the aggregate, some of them in each round."""
    algorithm = jaxfl.local_models(toy.loss, optax.sgd(0.1), batch_size=2)
    return jaxfl.federate(
        algorithm, jaxfl.identity(), jaxfl.dynamic_average(2.0), chunk_size=1
    )


def gossip():
    """Each node is given an aggregate of its own."""
    ring = jaxfl.topology.ring(toy.N)
    algorithm = jaxfl.local_models(toy.loss, optax.sgd(0.1), batch_size=2)
    return jaxfl.federate(algorithm, jaxfl.identity(), jaxfl.mix(ring))


def median_of_noised():
    """Keys in clients' states, and noise from the round's own; all messages needed."""
    channel = jaxfl.chain(
        jaxfl.at_client(optax.add_noise(0.1, 0.5, 7)),
        jaxfl.compress.qsgd(4),
    )
    return fedavg(channel, jaxfl.median())


def clipped():
    """A state of the channel at the server, which clients read, and a shared key."""
    clip = jaxfl.privacy.adaptive_clip(0.5, 0.3, clients=toy.N)
    return fedavg(jaxfl.chain(clip, jaxfl.compress.rotation(), jaxfl.mean()))


@needs_flower
@pytest.mark.parametrize(
    "make, cohort_size",
    [
        (scaffold_of_a_few, 4),
        (nodes_with_models, None),
        (gossip, None),
        (median_of_noised, None),
        (clipped, jaxfl.Poisson(3)),
    ],
)
def test_a_run_is_that_of_a_simulation(make, cohort_size):
    """The same key, cohorts and draws: states at both ends, and all that is seen."""
    federation, data = make(), toy.data()
    grid = Watched(app_of(federation), nodes())
    got, infos = served(federation, grid, cohort_size=cohort_size)

    state = federation.init(toy.params(), data)
    run = jax.jit(
        lambda state: jaxfl.scan_rounds(
            federation, state, data, rounds=ROUNDS, key=KEY, cohort_size=cohort_size
        )
    )
    want, (info, _) = run(state)
    assert_same(got.server, want.server)
    assert int(got.round) == ROUNDS and int(got.population) == toy.N
    assert info.delivered.any()  # something was done

    # Nodes that were never asked have no state yet.
    asked = np.unique(np.asarray(info.client)[np.asarray(info.alive)])
    grid.keep(asked)
    its = jax.tree.map(lambda x: x[asked], want.clients)
    assert_same(states_of_nodes(grid, its), its)

    seen = jax.tree.map(lambda *x: jnp.stack(x), *infos)
    for name in ("client", "alive", "sent", "delivered", "rejected", "bits_up"):
        assert_same(getattr(seen, name), getattr(info, name))
    assert_same((seen.metrics, seen.reports), (info.metrics, info.reports), 1e-5)
    assert not seen.lost.any()


class Watched(Loopback):
    """A grid whose nodes can go, fail, and be looked at."""

    gone: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()

    def client(self, node):
        return node - 100

    def keep(self, clients):
        self.gone = frozenset(range(toy.N)) - set(clients)

    def get_node_ids(self):
        return [i for i in super().get_node_ids() if self.client(i) not in self.gone]

    def state_of(self, node):
        return self._serde.context_from_proto(self._states[node]).state

    def send_and_receive(self, messages, *, timeout=None):
        app = importlib.import_module("flwr.app")
        for message in messages:
            client = self.client(message.metadata.dst_node_id)
            train = message.metadata.message_type == "train"
            if train and client in self.failing:
                yield self._travel(
                    app.Message(app.Error(0, "on fire"), reply_to=message)
                )
                continue
            (reply,) = super().send_and_receive([message])
            if not (train and client in self.silent):
                yield reply


@needs_flower
def test_clients_that_are_away_or_do_not_answer(caplog):
    """Round by round as `alive` and `arrives` say, in a model with bfloat16."""
    params = toy.params(jnp.bfloat16)
    federation, data = scaffold_of_a_few(), toy.data()
    grid = Watched(app_of(federation, params, weight=1.0), nodes())
    away = [{1, 5}, {0}, set()]
    silent = [set(), {2, 6}, {3}]
    failing = [set(), {1}, set()]

    state = federation.init(params, data)
    everyone = toy.cohort(data)._replace(weight=jnp.ones(toy.N))
    run_key = jax.random.split(KEY)[1]
    step = jax.jit(federation.round)
    grid.gone = frozenset(away[0])
    run = flower.serve(
        grid, federation, params, data, population=toy.N, rounds=3, key=KEY
    )
    for r in range(3):
        grid.gone = frozenset(away[r])
        grid.silent, grid.failing = frozenset(silent[r]), frozenset(failing[r])
        got, info = next(run)
        there = np.array([i not in away[r] | failing[r] for i in range(toy.N)])
        arrives = np.array([i not in silent[r] for i in range(toy.N)])
        cohort = everyone._replace(alive=jnp.array(there), arrives=jnp.array(arrives))
        state, want = step(run_key, state, cohort)
        assert_same(got.server, state.server, rtol=1e-2)
        np.testing.assert_array_equal(info.sent, want.sent)
        np.testing.assert_array_equal(
            info.lost, [i in silent[r] | failing[r] for i in range(toy.N)]
        )
        assert np.isnan(np.asarray(info.metrics["loss"])[~info.sent]).all()
    assert got.params["w"].dtype == jnp.bfloat16
    assert "node 101 failed: on fire" in caplog.text


@needs_flower
def test_a_message_that_is_withheld_does_not_travel():
    never = jaxfl.gate(lambda ctx, payload: jnp.array(False), keep=False)
    federation = fedavg(jaxfl.chain(never, jaxfl.mean()))
    seen = []

    class Wire(Watched):
        def _travel(self, message):
            seen.append(sorted(message.content))
            return super()._travel(message)

    state, (info,) = served(federation, Wire(app_of(federation), nodes()), rounds=1)
    assert ["letter"] in seen and not any("payload" in names for names in seen)
    assert not info.sent.any() and not info.lost.any()
    jax.tree.map(np.testing.assert_array_equal, state.params, toy.params())


@needs_flower
def test_a_secret_changes_what_is_drawn():
    """Local noise is refused without one; with one it is not from the server's key."""
    noised = jaxfl.chain(
        jaxfl.clip(1.0), jaxfl.privacy.local_gaussian(1.0), jaxfl.mean()
    )
    federation = fedavg(noised)
    with pytest.raises(ValueError, match="secret_of"):
        app_of(federation)

    def model(seed):
        def secret_of(context):
            node = context.node_config["partition-id"]
            return jax.random.fold_in(jax.random.key(seed), node)

        grid = Loopback(app_of(federation, secret_of=secret_of), nodes())
        return served(federation, grid, rounds=1)[0].params["w"]

    assert_same(model(1), model(1))
    assert np.abs(model(1) - model(2)).min() > 1e-3


@needs_flower
def test_what_arrives_must_be_of_the_federation():
    federation, big = fedavg(), {"w": jnp.zeros(5), "b": jnp.zeros(())}
    grid = Loopback(app_of(federation), nodes())
    with pytest.raises(ValueError, match=r"broadcast: \['w'\] must be float32\[3\]"):
        flower_loss = jaxfl.fedavg(lambda p, batch, key: 0 * batch["y"], optax.sgd(1.0))
        served(jaxfl.federate(flower_loss, jaxfl.mean()), grid, big)

    class Liar(Watched):
        def _travel(self, message):
            if "payload" in message.content:
                array = {"w": jnp.zeros(3, jnp.int32), "b": jnp.zeros(())}
                message.content["payload"] = records.pack(array)
            return super()._travel(message)

    with pytest.raises(ValueError, match=r"node 100: \['w'\] must be float32"):
        served(federation, Liar(app_of(federation), nodes()))


@needs_flower
def test_a_client_that_sends_nan_is_dropped():
    class Broken(Watched):
        def _travel(self, message):
            if message.metadata.src_node_id == 100 and "payload" in message.content:
                array = {"w": jnp.full(3, jnp.nan), "b": jnp.zeros(())}
                message.content["payload"] = records.pack(array)
            return super()._travel(message)

    federation = fedavg()
    got, (info,) = served(federation, Broken(app_of(federation), nodes()), rounds=1)
    absent = Watched(app_of(federation), nodes())
    absent.gone = frozenset([0])
    want, _ = served(federation, absent, rounds=1)
    assert_same(got.params, want.params)
    np.testing.assert_array_equal(info.rejected, np.arange(toy.N) == 0)


@needs_flower
def test_a_round_waits_for_enough_clients(monkeypatch):
    federation = fedavg()
    grid = Watched(app_of(federation), nodes())
    grid.gone, slept = frozenset(range(1, toy.N)), []

    def sleep(seconds):
        slept.append(seconds)
        grid.gone = frozenset(range(7 - 3 * len(slept), toy.N))

    monkeypatch.setattr(flower.time, "sleep", sleep)
    _, (info,) = served(federation, grid, rounds=1, min_clients=3)
    assert len(slept) == 1 and info.alive.tolist() == [True] * 4 + [False] * 3


@needs_flower
@pytest.mark.parametrize(
    "clients, match",
    [([0, 7], "node 101 is client 7"), ([3, 3], "100 and 101 are both client 3")],
)
def test_every_node_is_a_client_of_its_own(clients, match):
    federation = fedavg()
    grid = Loopback(app_of(federation), nodes(clients))
    with pytest.raises(ValueError, match=match):
        served(federation, grid)


@needs_flower
def test_a_node_without_an_id_says_so():
    federation = fedavg()
    with pytest.raises(ValueError, match="partition-id"):
        served(federation, Loopback(app_of(federation), [{"id": 0}]))
    whole = flower.client_app(federation, toy.params(), lambda context: toy.data())
    with pytest.raises(ValueError, match="one client's data, got 7"):
        served(federation, Loopback(whole, nodes()))


@needs_flower
def test_pack_keeps_every_dtype():
    arrays = {
        "bf16": jnp.array([1.5, -2.0], jnp.bfloat16),
        "f16": jnp.ones((2, 1), jnp.float16),
        "flags": jnp.array([True, False]),
        "u32": jnp.uint32(2**32 - 1),
        "i8": jnp.array([-3], jnp.int8),
        "none": jnp.zeros((0, 2)),
        "f8": jnp.array([0.5], jnp.float8_e4m3fn),
        "keys": jax.random.split(KEY, 2),
        "rbg": jax.random.key(1, impl="rbg"),
        "nest": ({"a/b": jnp.float32(1)}, [jnp.float32(2)]),
    }
    got = records.unpack(records.pack(arrays), arrays, "all")
    assert_same(got, arrays, 0)
    assert jax.random.key_impl(got["rbg"]) == jax.random.key_impl(arrays["rbg"])
    with pytest.raises(ValueError, match=r"all must .* missing: \[.*'f8'"):
        records.unpack({}, arrays, "all")


@pytest.mark.parametrize(
    "federation, match",
    [
        (lambda: jaxfl.federate(late(), jaxfl.mean()), "older broadcasts"),
        (lambda: fedavg(jaxfl.identity(), encrypted()), "encrypts"),
        (lambda: fedavg(distributed()), "every summand"),
    ],
)
def test_what_only_a_simulation_can_have(federation, match):
    with pytest.raises(ValueError, match=match):
        app_of(federation())
    with pytest.raises(ValueError, match=match):
        served(federation(), None)


def late():
    plain = jaxfl.fedavg(toy.loss, optax.sgd(0.1))
    return jaxfl.asynchronous(plain, versions=2)


def encrypted():
    return jaxfl.total()._replace(bits=lambda payload, bits: 10 * bits)


def distributed():
    skellam = jaxfl.privacy.skellam(1.0, clients=toy.N, dimension=4, bits=16)
    return jaxfl.chain(jaxfl.clip(1.0), jaxfl.mean(toy.N), skellam)


@needs_flower
def test_masks_whose_keys_the_server_has_are_refused():
    masked = jaxfl.chain(
        jaxfl.secure.fixed_point(4.0, 100.0), jaxfl.secure.secure_sum()
    )
    with pytest.raises(ValueError, match="secure sums"):
        served(fedavg(masked), None)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"population": 0}, "population"),
        ({"rounds": 0}, "rounds"),
        ({"min_clients": 8}, "min_clients"),
        ({"cohort_size": 8}, "cohort_size"),
        ({"cohort_size": jaxfl.faults.Schedule(np.zeros((3, 1), int))}, "schedule"),
        ({"key": jax.random.key(0, impl="rbg")}, "generator"),
    ],
)
def test_errors_of_serve(options, match):
    with pytest.raises(ValueError, match=match):
        served(fedavg(), None, **options)


def test_without_flower(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    records.flower_library.cache_clear()
    with pytest.raises(ImportError, match=r"jaxfl\[flower\]"):
        app_of(fedavg())
