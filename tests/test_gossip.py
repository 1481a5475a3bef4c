"""Averaging with neighbours: consensus, absences, and every message on its edge."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import topology
from jaxfl.core import server_context
from jaxfl.local import Work

START = jnp.array([[1.0, 8.0], [2.0, -4.0], [4.0, 0.0], [-1.0, 3.0], [9.0, 5.0]])
N = len(START)


def context(roster):
    alive, n = jnp.ones(len(roster), bool), jnp.int32(len(roster))
    return server_context(jax.random.key(0), jnp.int32(0), roster, alive, n, ())


class Server(NamedTuple):
    params: jax.Array


def resting(start=START):
    """Nodes that only average: node i begins with row i, which is its data."""

    def client(ctx, reference, model, data):
        model = jnp.where(ctx.round == 0, data, model)
        return reference - model, model, {}

    def receive(reference, payload, model, delivered):
        return jnp.where(delivered, reference - payload, model)

    return jaxfl.Algorithm(
        lambda params: (Server(params), params),
        client,
        lambda ctx, state, outcome: Server(state.params - outcome.payload),
        receive,
        lambda state: state.params,
    )


def run(weights, rounds, channel=None, alive=None, start=START, ids=None):
    """The nodes' models after some rounds of this cohort, and the last info."""
    federation = jaxfl.federate(
        resting(), channel or jaxfl.identity(), jaxfl.mix(weights)
    )
    state = federation.init(jnp.zeros(start.shape[1]), start)
    ids = jnp.arange(len(start)) if ids is None else jnp.asarray(ids)
    everyone = jnp.ones(len(ids), bool)
    for i in range(rounds):
        # all are there in the first round, in which a node gets its model
        here = everyone if alive is None or i == 0 else jnp.asarray(alive)
        cohort = jaxfl.Cohort(ids, start[ids % len(start)], jnp.ones(len(ids)), here)
        state, info = jax.jit(federation.round)(jax.random.key(0), state, cohort)
    return state, info


@pytest.mark.parametrize("rounds", [1, 4])
def test_rounds_are_a_power_of_the_matrix(rounds):
    weights = topology.ring(N)
    state, _ = run(weights, rounds)
    power = np.linalg.matrix_power(weights.astype(np.float64), rounds)
    np.testing.assert_allclose(state.clients.algorithm, power @ START, rtol=1e-5)
    # what is called the reference is the average
    np.testing.assert_allclose(state.params, START.mean(0), rtol=1e-5)


def test_consensus_on_the_average_as_fast_as_the_spectral_gap_says():
    weights = topology.ring(N)
    state, _ = run(weights, 30)
    left = np.asarray(state.clients.algorithm) - np.asarray(START.mean(0))
    bound = (1 - topology.spectral_gap(weights)) ** 30
    first = np.linalg.norm(START - START.mean(0))
    assert np.linalg.norm(left) <= bound * first + 1e-5


def test_a_complete_graph_averages_all_at_once():
    state, _ = run(topology.complete(N), 1)
    want = np.tile(START.mean(0), (N, 1))
    np.testing.assert_allclose(state.clients.algorithm, want, rtol=1e-6)


def test_decentralised_gradient_descent_on_a_complete_graph_is_fedavg():
    data = toy.data()

    def final(algorithm, channel, aggregator):
        state = jaxfl.federate(algorithm, channel, aggregator).init(toy.params(), data)
        return jaxfl.scan_rounds(
            jaxfl.federate(algorithm, channel, aggregator),
            state,
            data,
            rounds=3,
            key=jax.random.key(0),
            weight=jnp.ones(toy.N),
        )[0]

    work = Work(batch_size=2, epochs=1)
    mixed = final(
        jaxfl.local_models(toy.loss, optax.sgd(0.1), **work),
        jaxfl.identity(),
        jaxfl.mix(topology.complete(toy.N)),
    )
    want = final(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), **work), jaxfl.mean(), jaxfl.total()
    )
    for i in range(toy.N):
        own = jax.tree.map(lambda x, i=i: x[i], mixed.clients.algorithm)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            own,
            want.params,
        )


def test_the_average_of_those_present_is_kept():
    weights, alive = topology.ring(N), np.ones(N, bool)
    alive[[1, 2]] = False
    before, _ = run(weights, 1)
    after, info = run(weights, 2, alive=alive)
    old, new = before.clients.algorithm, after.clients.algorithm
    np.testing.assert_array_equal(new[~alive], old[~alive])
    np.testing.assert_allclose(new[alive].mean(0), old[alive].mean(0), rtol=1e-5)
    # node 0 has lost node 1, node 3 node 2: 4 averages with both
    mixing = np.array([[2 / 3, 0, 1 / 3], [0, 2 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(new[alive], mixing @ old[alive], rtol=1e-5)
    assert info.delivered.tolist() == alive.tolist()
    # three nodes in a row, of which the one in the middle has two neighbours
    assert info.bits_up.tolist() == [64.0, 0, 0, 64.0, 128.0]
    down = info.bits_up + 64 * alive  # and this algorithm's reference
    assert info.bits_down.tolist() == down.tolist()


def test_a_part_of_the_population_in_any_order_with_padding():
    """Who is not in the cohort is as absent; an unknown id is nobody."""
    weights = topology.ring(N)
    ids, alive = [4, 3, N, 0, N + 7], [True, True, False, True, False]
    first, _ = run(weights, 1)
    federation = jaxfl.federate(resting(), jaxfl.identity(), jaxfl.mix(weights))
    cohort = jaxfl.Cohort(
        jnp.array(ids), START[jnp.array(ids) % N], jnp.ones(5), jnp.array(alive)
    )
    state, info = jax.jit(federation.round)(jax.random.key(0), first, cohort)
    want, _ = run(weights, 2, alive=np.array([True, False, False, True, True]))
    np.testing.assert_allclose(
        state.clients.algorithm, want.clients.algorithm, rtol=1e-6
    )
    assert info.bits_up.tolist() == [128.0, 64.0, 0.0, 64.0, 0.0]


def test_a_node_without_a_row_keeps_its_model():
    ctx = context(jnp.array([1, 3, 0]))
    payload, delivered, () = jaxfl.mix(topology.ring(3)).apply(
        ctx, START[:3], ctx.alive, ()
    )
    assert delivered.tolist() == [True, False, True]
    want = (2 * START[0] + START[2]) / 3, (START[0] + 2 * START[2]) / 3
    np.testing.assert_allclose(payload[jnp.array([0, 2])], want, rtol=1e-6)


def test_a_message_goes_along_each_edge_of_a_directed_graph():
    """Node 0 hears 1; 1 hears 2; 2 hears both: rows hear, columns send."""
    weights = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.25, 0.5]])
    ctx = context(jnp.arange(3))
    bits = jnp.array([10.0, 20.0, 40.0])
    up, down = jaxfl.mix(weights).traffic(ctx, bits, ctx.alive, jnp.float32(0))
    assert up.tolist() == [10.0, 40.0, 40.0]
    assert down.tolist() == [20.0, 40.0, 30.0]


def rounding(step):
    return jaxfl.at_client(
        optax.stateless(
            lambda x, _: jax.tree.map(lambda x: step * jnp.round(x / step), x)
        )
    )


def test_messages_can_be_encoded():
    """Each node averages what it and its neighbours have sent, to a whole number."""
    weights = topology.ring(N)
    start = START + 0.3
    state, _ = run(weights, 1, rounding(1.0), start=start)
    np.testing.assert_allclose(
        state.clients.algorithm, weights @ np.round(start), rtol=1e-5
    )


def test_a_node_that_withholds_keeps_its_model_and_sends_its_flag():
    gate = jaxfl.gate(lambda ctx, x: optax.tree.norm(x) > 3.0, keep=False)
    start = jnp.array([[9.0], [1.0], [3.5], [0.0], [6.0]])
    weights = topology.ring(N)
    state, info = run(weights, 1, gate, start=start)
    assert info.sent.tolist() == [True, False, True, False, True]
    models = state.clients.algorithm.ravel()
    want = [2 / 3 * 9 + 6 / 3, 1, 3.5, 0, 2 / 3 * 6 + 9 / 3]
    np.testing.assert_allclose(models, want, rtol=1e-5)
    np.testing.assert_array_equal(info.bits_up, 2 * np.array([33, 1, 33, 1, 33.0]))


def test_a_server_with_a_state_is_refused():
    """There is none between neighbours."""
    momentum = jaxfl.at_server(optax.trace(0.9))
    with pytest.raises(ValueError, match="state at the server"):
        run(topology.ring(N), 1, momentum)


def test_weights_may_be_traced():
    """A sweep over laziness: W(a) = a I + (1 - a) W."""

    def models(a):
        lazy = a * jnp.eye(N) + (1 - a) * topology.ring(N)
        payload, _, () = jaxfl.mix(lazy).apply(
            context(jnp.arange(N)),
            START,
            jnp.ones(N, bool),
            (),
        )
        return payload

    swept = jax.jit(jax.vmap(models))(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(swept[0], topology.ring(N) @ START, rtol=1e-5)
    np.testing.assert_allclose(swept[1], (swept[0] + START) / 2, rtol=1e-5)
    np.testing.assert_allclose(swept[2], START, rtol=1e-6)


@pytest.mark.parametrize(
    "weights, match",
    [
        (np.ones((2, 3)) / 3, "square"),
        (np.array([[1.5, -0.5], [-0.5, 1.5]]), "negative"),
        (np.full((2, 2), np.nan), "negative"),
        (np.ones((2, 2)), "sum to 1"),
    ],
)
def test_impossible_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        jaxfl.mix(weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_payloads_keep_their_dtype_and_are_floats(dtype):
    ctx = context(jnp.arange(N))
    mixed, _, () = jaxfl.mix(topology.ring(N)).apply(
        ctx, START.astype(dtype), ctx.alive, ()
    )
    assert mixed.dtype == dtype
    with pytest.raises(TypeError, match="mix: payload must be of floats"):
        jaxfl.mix(topology.ring(N)).init(jnp.zeros(2, jnp.int32))
