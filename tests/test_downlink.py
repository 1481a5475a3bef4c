"""The broadcast as encoded differences: what clients know, and what it cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import downlink, mean


def fedavg(rate=0.1):
    return jaxfl.fedavg(toy.loss, optax.sgd(rate), optax.sgd(0.7), batch_size=2)


def rounding(step, bits=4):
    """Every number to a multiple of a step, in that many bits."""

    def encode(ctx, message, server_state, client_state):
        payload = jax.tree.map(lambda x: step * jnp.round(x / step), message.payload)
        size = sum(x.size for x in jax.tree.leaves(payload))
        return message._replace(payload=payload, bits=1.0 * bits * size), (), ()

    return jaxfl.Channel(encode=encode)


def run(algorithm, rounds=5, **options):
    federation = jaxfl.federate(algorithm, mean())
    return jaxfl.simulate(
        federation,
        toy.params(),
        toy.data(),
        rounds=rounds,
        key=jax.random.key(2),
        progress=False,
        **options,
    )


def assert_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def test_a_difference_sent_whole_is_the_plain_broadcast():
    got, _ = run(downlink(fedavg(), jaxfl.identity()), cohort_size=4)
    want, _ = run(fedavg(), cohort_size=4)
    assert_close(got.params, want.params, rtol=1e-5, atol=1e-6)
    assert_close(got.server.algorithm.known, got.params, rtol=1e-6, atol=1e-6)


def test_what_clients_know_follows_the_model_by_hand():
    """Rounding to whole numbers: the model moves by 0.8, what is known by 0 or 1."""
    algorithm = jaxfl.fedavg(
        lambda w, batch, key: -0.8 * (w + 0 * batch["y"]), optax.sgd(1.0)
    )
    y = jnp.zeros(2)
    federation = jaxfl.federate(downlink(algorithm, rounding(1.0)), mean())
    data = jaxfl.from_arrays(y, y, [0, 1])
    state = federation.init(jnp.float32(0.0), data)
    everyone = jaxfl.Cohort(jnp.arange(2), data, jnp.ones(2), jnp.ones(2, bool))
    seen = []
    for _ in range(5):
        state, _ = federation.round(jax.random.key(0), state, everyone)
        seen.append((state.params.item(), state.server.algorithm.known.item()))
    want = [(0.8, 1.0), (1.6, 2.0), (2.4, 2.0), (3.2, 3.0), (4.0, 4.0)]
    np.testing.assert_allclose(seen, want, rtol=1e-6)


def test_a_coarse_difference_follows_the_model():
    """Within half a step of it after every round, and to where it goes."""
    state, _ = run(downlink(fedavg(), rounding(0.25)), rounds=40)
    plain, _ = run(fedavg(), rounds=40)
    assert_close(state.server.algorithm.known, state.params, atol=0.125 + 1e-5)
    assert_close(state.params, plain.params, atol=0.5)
    apart = optax.tree.norm(optax.tree.sub(state.params, plain.params))
    assert apart > 1e-3  # clients did train from another model


def test_bits_by_hand():
    """16 bits a difference of 4 numbers, 128 a model: 8 missed rounds cost as much."""
    there = [[0, 1], [0, 2], [1, 2], *[[0]] * 9, [0, 1, 3], [0, 1, 2, 3]]
    data = toy.data((2, 2, 2, 2))
    federation = jaxfl.federate(downlink(fedavg(), rounding(0.01)), mean())
    state = federation.init(toy.params(), data)
    heard, round_fn = {}, jax.jit(federation.round)
    for t, clients in enumerate(there):
        alive = np.isin(np.arange(4), clients)
        cohort = toy.cohort(data, range(4), alive)
        state, info = round_fn(jax.random.key(0), state, cohort)
        want = np.zeros(4)
        for i in clients:
            want[i] = min((t - heard[i]) * 16, 128) if i in heard else 128
            heard[i] = t
        np.testing.assert_array_equal(info.bits_down, want)


def test_a_round_that_moves_nothing_sends_no_difference():
    data = toy.data()
    federation = jaxfl.federate(downlink(fedavg(), rounding(0.25)), mean())
    state = federation.init(toy.params(), data)
    round_fn = jax.jit(federation.round)
    state, _ = round_fn(jax.random.key(0), state, toy.cohort(data))
    nobody = toy.cohort(data, range(toy.N), np.zeros(toy.N, bool))
    new, _ = round_fn(jax.random.key(0), state, nobody)
    jax.tree.map(
        np.testing.assert_array_equal, new.server.algorithm, state.server.algorithm
    )


def test_a_channel_with_states_and_reports_at_both_ends():
    """Two flags of one sender, and a server that remembers what it decoded."""
    gate = jaxfl.gate(lambda ctx, x: optax.tree.norm(x) > 0.2, keep=False)
    follow = jaxfl.communicate.cmfl(0.0, keep=False)
    channel = jaxfl.chain(rounding(0.01), gate, follow)
    state, history = run(downlink(fedavg(), channel), rounds=30)
    assert_close(state.server.algorithm.known, state.params, atol=0.2)
    down = history.bits()["down"][1:] / toy.N
    assert set(down) == {1.0, 16.0 + 2}  # what one gate withholds no other flags


def test_local_models_can_be_inside():
    """What is given back to a client still reaches it, and is counted."""
    algorithm = jaxfl.local_models(toy.loss, optax.sgd(0.1), batch_size=2)
    got, history = run(downlink(algorithm, jaxfl.identity()), weight=np.ones(toy.N))
    want, plain = run(algorithm, weight=np.ones(toy.N))
    assert_close(
        got.clients.algorithm.algorithm, want.clients.algorithm, rtol=1e-4, atol=1e-5
    )
    assert history.bits()["down"].tolist() == plain.bits()["down"].tolist()


def test_wrong_parts():
    with pytest.raises(TypeError, match="algorithm must be a jaxfl.Algorithm"):
        downlink(mean(), mean())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="channel must be a jaxfl.Channel"):
        downlink(fedavg(), fedavg())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one server sends"):
        downlink(fedavg(), jaxfl.chain(jaxfl.clip(1.0), mean()))
