"""Local models: what they are when they average always, never, and with some away."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.local import Work

START = toy.params()


def run(algorithm, channel, aggregator=None, rounds=3):
    """Some rounds of everyone, with equal weights; the last state and info."""
    data = toy.data()
    federation = jaxfl.federate(algorithm, channel, aggregator)
    state = federation.init(START, data)
    cohort = toy.cohort(data)._replace(weight=jnp.ones(toy.N))
    for _ in range(rounds):
        state, info = jax.jit(federation.round)(jax.random.key(5), state, cohort)
    return state, info


def models(**work):
    return jaxfl.local_models(toy.loss, optax.sgd(0.1, momentum=0.5), **work)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


@pytest.mark.parametrize("work", [{"epochs": 2, "batch_size": 2}, {"steps": 1}])
def test_periodic_averaging_of_everyone_is_fedavg(work):
    state, info = run(models(**work), jaxfl.mean())
    fedavg = jaxfl.fedavg(toy.loss, optax.sgd(0.1, momentum=0.5), **work)
    want, _ = run(fedavg, jaxfl.mean())
    assert_close(state.params, want.params)
    for i in range(toy.N):
        own = jax.tree.map(lambda x, i=i: x[i], state.clients.algorithm)
        jax.tree.map(np.testing.assert_array_equal, own, state.params)
    assert (info.bits_up == 128 + 32).all()  # a model and its weight
    assert (info.bits_down == 128).all()  # the average, and no reference


def test_without_averaging_nodes_are_isolated():
    work = Work(epochs=2, batch_size=2)
    state, info = run(models(**work), jaxfl.identity(), jaxfl.dynamic_average(jnp.inf))
    isolated = jaxfl.isolated(toy.loss, optax.sgd(0.1, momentum=0.5), **work)
    want, _ = run(isolated, jaxfl.identity())
    assert_close(state.clients.algorithm, want.clients.algorithm)
    jax.tree.map(np.testing.assert_array_equal, state.params, START)
    assert not info.bits_up.any() and not info.bits_down.any()


def test_by_hand_with_a_node_away():
    """One full step of 1/2 to each node's own y; node 2 is away in the first round."""
    y = jnp.array([2.0, 6.0, 4.0])
    data = jaxfl.from_arrays(y, y, [0, 1, 2])
    algorithm = jaxfl.local_models(
        lambda w, batch, key: 0.5 * (w - batch["y"]) ** 2, optax.sgd(0.5)
    )
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    state = federation.init(jnp.float32(0.0), data)
    seen = []
    for alive in ([1, 1, 0], [1, 1, 1]):
        cohort = jaxfl.Cohort(
            jnp.arange(3), data, jnp.ones(3), jnp.array(alive, dtype=bool)
        )
        state, info = federation.round(jax.random.key(0), state, cohort)
        seen.append([float(state.params), *np.asarray(state.clients.algorithm)])
        np.testing.assert_array_equal(info.bits_down, 32.0 * np.array(alive))
    first = [2.0, 2.0, 2.0, 0.0]  # the mean of 1 and 3; node 2 keeps its 0
    second = [8 / 3] * 4  # of 2, 4 and 2
    np.testing.assert_allclose(seen, [first, second], rtol=1e-6)


def test_the_reference_stays_unless_all_have_moved():
    """An aggregator that gives its sum to node 0 alone."""

    def apply(ctx, payload, sent, state):
        return payload, sent & (ctx.roster == 0), state

    some = jaxfl.Aggregator(lambda payload: (), apply, linear=True)
    state, info = run(models(steps=1), jaxfl.mean(), some, rounds=1)
    jax.tree.map(np.testing.assert_array_equal, state.params, START)
    np.testing.assert_array_equal(info.bits_down, 128.0 * (np.arange(toy.N) == 0))
    fedavg = jaxfl.fedavg(toy.loss, optax.sgd(0.1), steps=1)
    want, _ = run(fedavg, jaxfl.mean(), rounds=1)
    assert_close(jax.tree.map(lambda x: x[0], state.clients.algorithm), want.params)
