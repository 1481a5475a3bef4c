"""One round: sums and stacks, states, what is dropped, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import Aggregator, Algorithm, Channel, Cohort, map_clients

PLANS = {
    "whole": (None, None),
    "one by one": (1, None),
    "chunks": (4, None),
    "mesh": (None, 4),
    "mesh, chunks": (2, 4),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def execution(plan):
    chunk_size, devices = plan
    mesh = None if devices is None else jaxfl.client_mesh(jax.devices()[:devices])
    return {"chunk_size": chunk_size, "mesh": mesh}


# --- map_clients -------------------------------------------------------------


@every_plan
def test_sums_and_stacks(plan):
    xs = {"a": jnp.arange(16.0).reshape(8, 2), "n": jnp.arange(8)}
    summed, stacked = map_clients(
        lambda shared, x: ({"s": shared * x["a"], "n": x["n"]}, x["a"][::-1]),
        3.0,
        xs,
        **execution(plan),
    )
    np.testing.assert_array_equal(summed["s"], 3 * np.sum(xs["a"], 0))
    assert summed["n"] == 28 and summed["n"].dtype == jnp.int32
    np.testing.assert_array_equal(stacked, xs["a"][:, ::-1])


@every_plan
def test_flags_are_counted(plan):
    flags = jnp.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
    count, same = map_clients(lambda _, x: (x, x), (), flags, **execution(plan))
    assert count == 6 and jnp.result_type(count) == jnp.int32
    np.testing.assert_array_equal(same, flags)


@pytest.mark.parametrize("plan", [(None, None), (1, None), (8, None), (32, 4)], ids=str)
def test_sums_of_16_bits_do_not_lose_what_is_small(plan):
    ones = jnp.ones(512, jnp.bfloat16)
    total, _ = map_clients(lambda _, x: (x, ()), (), ones, **execution(plan))
    assert total == 512 and jnp.result_type(total) == jnp.bfloat16
    naive = jax.lax.scan(lambda s, x: (s + x, None), jnp.bfloat16(0), ones)[0]
    assert naive == 256  # where 256 + 1 = 256


@pytest.mark.parametrize(
    "word, plan",
    [
        ("chunk_size: 3", (3, None)),
        ("chunk_size: 4", (4, 4)),
        ("chunk_size: 0", (0, None)),
        ("mesh: 3", (None, 3)),
    ],
)
def test_chunks_and_devices_divide_the_clients(word, plan):
    with pytest.raises(ValueError, match=f"{word} .*must divide"):
        map_clients(lambda _, x: (x, x), (), jnp.ones(8), **execution(plan))


# --- federations by hand -----------------------------------------------------


def counting(**parts):
    """Data `{"a": [N, 2], "b": [N]}`, no model: clients count their own rounds.

    The server adds what it gets to `params`.
    """

    def client(ctx, broadcast, own, data):
        own = {"rounds": own["rounds"] + 1, "seen": own["seen"]}
        return data["b"] + 0 * data["a"].sum(), own, {"id": ctx.client}

    return Algorithm(
        **{
            "init": lambda params: (
                Server(params),
                {"rounds": jnp.int32(0), "seen": jnp.float32(-1)},
            ),
            "client": client,
            "server": lambda ctx, state, outcome: Server(
                state.params + outcome.payload
            ),
            **parts,
        }
    )


class Server(tuple):
    """A server state that is only its params."""

    params = property(lambda self: self[0])

    def __new__(cls, params):
        return super().__new__(cls, (params,))


jax.tree_util.register_pytree_node(
    Server, lambda s: ((s[0],), None), lambda _, c: Server(*c)
)

POPULATION = {"a": jnp.ones((7, 2)), "b": 2.0 ** jnp.arange(7)}


def some(clients, alive=None, population=POPULATION):
    clients = jnp.asarray(clients, jnp.int32)
    alive = jnp.ones(len(clients), bool) if alive is None else jnp.asarray(alive)
    data = jax.tree.map(lambda x: x[clients], population)
    return Cohort(clients, data, jnp.ones(len(clients)), alive)


def one_round(federation, cohort, params=0.0, population=POPULATION, key=0):
    state = federation.init(jnp.float32(params), population)
    return jax.jit(federation.round)(jax.random.key(key), state, cohort)


def test_any_pytree_is_data():
    federation = jaxfl.federate(counting(), jaxfl.identity())
    state, info = one_round(federation, some([5, 1, 2]))
    assert state.params == 2**5 + 2 + 4
    assert info.metrics["id"].tolist() == info.client.tolist() == [5, 1, 2]
    assert info.bits_up.tolist() == info.bits_down.tolist() == [32.0] * 3


@pytest.mark.parametrize("plan", [(None, None), (2, None), (None, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("clients", [[6, 0, 3], [2], [0, 1, 2, 4, 5], [1, 6]], ids=str)
def test_only_the_cohorts_states_are_written(plan, clients):
    """Padding must write into nobody's state, neither the last nor the first."""
    federation = jaxfl.federate(counting(), jaxfl.identity(), **execution(plan))
    state, info = one_round(federation, some(clients))
    want = np.isin(np.arange(7), clients).astype(int)
    np.testing.assert_array_equal(state.clients.algorithm["rounds"], want)
    assert state.params == sum(2**c for c in clients)
    assert info.sent.shape == (len(clients),) and info.sent.all()


def test_clients_receive_the_aggregate():
    """They see it, and to whom it is delivered; the absent see none."""

    def receive(broadcast, payload, own, delivered):
        return {**own, "seen": jnp.where(delivered, payload, -2.0)}

    def only_large(ctx, payload, sent, state):
        return jnp.sum(payload), sent & (payload > 3), state

    federation = jaxfl.federate(
        counting(receive=receive),
        jaxfl.identity(),
        Aggregator(lambda payload: (), only_large),
    )
    cohort = some([1, 3, 6, 0], [True, True, False, True])
    state, info = one_round(federation, cohort)
    assert state.params == 2 + 8 + 1
    assert info.delivered.tolist() == [False, True, False, False]
    assert state.clients.algorithm["seen"].tolist() == [-2, -2, -1, 11, -1, -1, -1]
    assert state.clients.algorithm["rounds"].tolist() == [1, 1, 0, 1, 0, 0, 0]


@every_plan
def test_an_aggregator_that_stacks_sees_zeros_and_who_sent(plan):
    """Clients 4 (withheld) and 2 (absent) are zeros in it, and flagged."""
    above = jaxfl.gate(lambda ctx, payload: payload != 16, keep=False)

    def apply(ctx, payload, sent, state):
        return {"stack": payload, "sent": sent, "roster": ctx.roster}, sent, state

    algorithm = Algorithm(
        lambda params: (params, ()),
        lambda ctx, broadcast, own, data: (data["b"], own, ()),
        lambda ctx, state, outcome: outcome.payload,
    )
    federation = jaxfl.federate(
        algorithm, above, Aggregator(lambda p: (), apply), **execution(plan)
    )
    start = {
        "stack": jnp.zeros(5),
        "sent": jnp.zeros(5, bool),
        "roster": jnp.zeros(5, jnp.int32),
    }
    state = federation.init(start, POPULATION)
    cohort = some([6, 4, 2, 0, 1], [True, True, False, True, True])
    state, _ = jax.jit(federation.round)(jax.random.key(0), state, cohort)
    seen = state.server.algorithm
    assert seen["stack"].tolist() == [64.0, 0.0, 0.0, 1.0, 2.0]
    assert seen["sent"].tolist() == [True, False, False, True, True]
    assert seen["roster"].tolist() == [6, 4, 2, 0, 1]


def test_a_payload_is_what_the_server_had_minus_what_the_client_has():
    """So one SGD step of one client is sent as `rate * gradient`, not its opposite."""
    data = toy.data()
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=None)
    channel = jaxfl.chain(jaxfl.tap("sent"), jaxfl.mean())
    federation = jaxfl.federate(algorithm, channel)
    state = federation.init(toy.params(), data)
    state, info = federation.round(jax.random.key(0), state, toy.cohort(data, [2]))
    x, y, ids = toy.examples()
    gradient = toy.params()["w"] - x[ids == 2].mean(0)
    np.testing.assert_allclose(
        info.reports[0]["sent"]["w"][0], 0.1 * gradient, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.params["w"], toy.params()["w"] - 0.1 * gradient, rtol=1e-5
    )


# --- what is not finite ------------------------------------------------------


@every_plan
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_dropped_and_counted(plan, bad):
    population = {**POPULATION, "b": POPULATION["b"].at[2].set(bad)}
    federation = jaxfl.federate(counting(), jaxfl.mean(), **execution(plan))
    cohort = some([0, 2, 5], population=population)
    state, info = one_round(federation, cohort, population=population)
    assert info.rejected.tolist() == [False, True, False]
    assert info.sent.tolist() == [True, False, True]
    assert state.params == (1 + 32) / 2
    assert state.clients.algorithm["rounds"].tolist() == [1, 0, 0, 0, 0, 1, 0]


def test_a_message_that_a_channel_made_infinite_is_dropped_too():
    def encode(ctx, message, server_state, own):
        factor = jnp.where(ctx.client == 2, jnp.inf, 1.0)
        return message._replace(payload=message.payload * factor), own + 1, ()

    channel = Channel(
        lambda payload: ((), jnp.int32(0)), encode, lambda ctx, p, s, r: (p, s)
    )
    federation = jaxfl.federate(counting(), jaxfl.chain(channel, jaxfl.mean()))
    state, info = one_round(federation, some([0, 2, 5]))
    assert info.rejected.tolist() == [False, True, False]
    assert state.params == (1 + 32) / 2
    assert state.clients.channel[0].tolist() == [1, 0, 0, 0, 0, 1, 0]
    assert state.clients.algorithm["rounds"].tolist() == [1, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("why", ["withheld", "not finite", "no weight"])
def test_when_nothing_arrives_a_server_adam_does_not_move(why):
    """Its momentum would, from earlier rounds."""
    data = toy.data()
    shut = jaxfl.gate(lambda ctx, payload: ctx.round == 0, keep=False)
    federation = jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.adam(0.1), batch_size=None),
        jaxfl.chain(shut, jaxfl.mean()) if why == "withheld" else jaxfl.mean(),
    )
    state = federation.init(toy.params(), data)
    round_fn, everyone = jax.jit(federation.round), toy.cohort(data)
    before, info = round_fn(jax.random.key(0), state, everyone)
    assert info.sent.any() and before.params["b"] != state.params["b"]
    if why == "not finite":
        nan = jax.tree.map(lambda x: x * jnp.nan, data.examples)
        everyone = toy.cohort(jaxfl.from_arrays(nan["x"], nan["y"], toy.examples()[2]))
    if why == "no weight":
        everyone = everyone._replace(weight=jnp.zeros(toy.N))
    after, info = round_fn(jax.random.key(0), before, everyone)
    assert not info.sent.any() and after.round == 2
    jax.tree.map(
        np.testing.assert_array_equal, after.server.algorithm, before.server.algorithm
    )


# --- what is refused ---------------------------------------------------------


def passing(**parts):
    """The identity as a channel with states."""
    return Channel(
        **{
            "init": lambda payload: (jnp.float32(0), jnp.float32(0)),
            "encode": lambda ctx, message, server, own: (message, own, ()),
            "decode": lambda ctx, payload, server, report: (payload, server),
            **parts,
        }
    )


WRONG_STATES = {
    "algorithm.server": lambda to: (
        counting(server=lambda ctx, state, outcome: to(state)),
        passing(),
        None,
    ),
    "algorithm.client": lambda to: (
        counting(client=lambda ctx, b, own, data: (data["b"], to(own), ())),
        passing(),
        None,
    ),
    "algorithm.receive": lambda to: (
        counting(receive=lambda broadcast, payload, own, delivered: to(own)),
        passing(),
        None,
    ),
    "channel.encode": lambda to: (
        counting(),
        passing(encode=lambda ctx, message, server, own: (message, to(own), ())),
        None,
    ),
    "channel.decode": lambda to: (
        counting(),
        passing(decode=lambda ctx, payload, server, r: (payload, to(server))),
        None,
    ),
    "aggregator.apply": lambda to: (
        counting(),
        passing(),
        Aggregator(
            lambda payload: jnp.float32(0),
            lambda ctx, payload, sent, state: (payload, sent, to(state)),
            linear=True,
        ),
    ),
}


@pytest.mark.parametrize("part", WRONG_STATES)
@pytest.mark.parametrize(
    "change, word",
    [
        (lambda state: (state, state), "structure"),
        (
            lambda state: jax.tree.map(lambda x: x.astype(jnp.float16), state),
            "shapes and dtypes",
        ),
        (
            lambda state: jax.tree.map(lambda x: jnp.stack([x, x]), state),
            "shapes and dtypes",
        ),
    ],
    ids=["structure", "dtype", "shape"],
)
def test_a_state_that_changes_its_form_is_named(part, change, word):
    federation = jaxfl.federate(*WRONG_STATES[part](change))
    with pytest.raises(TypeError, match=f"{part} .*{word}"):
        one_round(federation, some([0, 1, 2]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"client": jnp.arange(2)},
        {"weight": jnp.ones(4)},
        {"alive": jnp.array(True)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_cohort_shapes(wrong):
    federation = jaxfl.federate(counting(), jaxfl.identity())
    with pytest.raises(ValueError, match=f"cohort.{next(iter(wrong))} .*shape"):
        one_round(federation, some([0, 1, 2])._replace(**wrong))


@pytest.mark.parametrize(
    "data", [{}, jnp.float32(1), {"a": jnp.ones(3), "b": jnp.ones(4)}], ids=str
)
def test_population_has_one_client_axis(data):
    federation = jaxfl.federate(counting(), jaxfl.identity())
    with pytest.raises(ValueError, match="data"):
        federation.init(jnp.float32(0), data)


@pytest.mark.parametrize(
    "error, word, arguments",
    [
        (TypeError, "algorithm", lambda: (jaxfl.mean(), jaxfl.mean())),
        (TypeError, "channel", lambda: (counting(), jaxfl.mean)),
        (TypeError, "aggregator", lambda: (counting(), jaxfl.mean(), jaxfl.mean())),
    ],
    ids=["algorithm", "channel", "aggregator"],
)
def test_parts_have_their_types(error, word, arguments):
    with pytest.raises(error, match=f"{word} must be a jaxfl"):
        jaxfl.federate(*arguments())


def test_execution_plans_are_checked():
    with pytest.raises(ValueError, match="chunk_size"):
        jaxfl.federate(counting(), jaxfl.mean(), chunk_size=0)
    other = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="mesh .*clients"):
        jaxfl.federate(counting(), jaxfl.mean(), mesh=other)


def test_an_overflowing_sum_changes_no_model():
    """Each message is finite, their sum in float16 is not."""

    def client(ctx, broadcast, client_state, data):
        return jnp.float16(60_000), client_state, {}

    algorithm = jaxfl.Algorithm(
        init=lambda params: (params, ()),
        client=client,
        server=lambda ctx, state, outcome: state - outcome.payload,
    )
    federation = jaxfl.federate(algorithm, jaxfl.identity())
    data = toy.data()
    state = federation.init(jnp.float16(1), data)
    state, info = federation.round(jax.random.key(0), state, toy.cohort(data, [0, 1]))
    assert state.server.algorithm == 1
    assert info.sent.all() and not info.delivered.any()
    assert not info.rejected.any()


def test_a_run_goes_on_after_an_overflow():
    """The momentum of the channel is not left infinite by the one bad round."""

    def client(ctx, broadcast, client_state, data):
        return jnp.where(ctx.round == 0, 3e38, 1.0), client_state, {}

    algorithm = jaxfl.Algorithm(
        init=lambda params: (params, ()),
        client=client,
        server=lambda ctx, state, outcome: state - outcome.payload,
    )
    channel = jaxfl.chain(jaxfl.at_server(optax.trace(0.5)), jaxfl.mean(2.0))
    federation = jaxfl.federate(algorithm, channel)
    data = toy.data()
    state = federation.init(jnp.float32(5), data)
    for _ in range(2):
        cohort = toy.cohort(data, [0, 1])
        state, info = federation.round(jax.random.key(0), state, cohort)
    assert info.delivered.all() and state.server.algorithm == 4


def test_a_report_that_is_not_finite_is_one_clients_own_loss():
    def encode(ctx, message, server_state, client_state):
        return message, client_state, {"x": jnp.where(ctx.client == 1, jnp.nan, 1.0)}

    def decode(ctx, payload, server_state, report):
        return jax.tree.map(lambda x: x / report["x"], payload), server_state

    channel = jaxfl.Channel(encode=encode, decode=decode)
    federation = jaxfl.federate(jaxfl.fedavg(toy.loss, optax.sgd(0.1)), channel)
    data = toy.data()
    state = federation.init(toy.params(), data)
    new, info = federation.round(jax.random.key(0), state, toy.cohort(data, [0, 1, 2]))
    assert info.rejected.tolist() == [False, True, False]
    assert info.delivered.tolist() == [True, False, True]
    assert new.params["b"] != state.params["b"]


def test_each_client_has_a_random_key_of_its_own():
    noise = jaxfl.at_client(optax.add_noise(1.0, 0.0, key=0))
    channel = jaxfl.chain(noise, jaxfl.tap(), jaxfl.mean())
    federation = jaxfl.federate(jaxfl.fedavg(toy.loss, optax.sgd(0.0)), channel)
    data = toy.data()
    state = federation.init(toy.params(), data)
    _, info = federation.round(jax.random.key(0), state, toy.cohort(data, [0, 1, 2]))
    assert len(set(np.asarray(info.reports[1]["tap"]["b"]).tolist())) == 3


def test_a_mean_of_what_is_no_sum_is_refused():
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1))
    median = jaxfl.Aggregator(lambda payload: (), lambda ctx, x, sent, s: (x, sent, s))
    for channel in (
        jaxfl.mean(),
        jaxfl.chain(jaxfl.clip(1.0), jaxfl.mean(3.0)),
        jaxfl.on("w", jaxfl.mean()),
    ):
        with pytest.raises(ValueError, match="mean.*not linear"):
            jaxfl.federate(algorithm, channel, median)


@pytest.mark.parametrize("channel", [jaxfl.mean(), jaxfl.clip(1.0)])
def test_integers_are_not_scaled(channel):
    with pytest.raises(TypeError, match="payload must be of floats, got int32"):
        channel.init({"w": jnp.zeros(2), "n": jnp.zeros(2, jnp.int32)})


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_the_roster_is_the_cohort_whatever_the_chunk(chunk_size):
    def client(ctx, broadcast, client_state, data):
        return jnp.zeros(()), (), {"roster": ctx.roster, "alive": ctx.alive}

    algorithm = jaxfl.Algorithm(
        lambda params: ((), ()), client, lambda ctx, state, outcome: state
    )
    federation = jaxfl.federate(algorithm, jaxfl.identity(), chunk_size=chunk_size)
    data = toy.data()
    cohort = toy.cohort(data, [6, 0, 3], [True, True, False])
    _, info = federation.round(jax.random.key(0), federation.init((), data), cohort)
    assert info.metrics["roster"][0].tolist() == [6, 0, 3]
    assert info.metrics["alive"][1].tolist() == [True, True, False]


@pytest.mark.parametrize("padding", [toy.N, np.iinfo(np.int32).max])
def test_a_row_of_padding_is_nobody(padding):
    """A cohort of fixed size is filled with an id that no client has, not alive."""
    data = toy.data()
    last = toy.N - 1
    channel = jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean())
    federation = jaxfl.federate(jaxfl.fedavg(toy.loss, optax.sgd(0.1)), channel)
    state = federation.init(toy.params(), data)
    cohort = toy.cohort(data, [0, last])
    want, _ = federation.round(jax.random.key(0), state, cohort)
    padded = jaxfl.Cohort(
        jnp.array([0, last, padding, padding]),
        data[jnp.array([0, last, last, 0])],
        jnp.array([*cohort.weight, 1.0, 1.0]),
        jnp.array([True, True, False, False]),
    )
    got, info = federation.round(jax.random.key(0), state, padded)
    jax.tree.map(np.testing.assert_array_equal, got.clients, want.clients)
    np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=1e-6)
    assert info.sent.tolist() == [True, True, False, False]
