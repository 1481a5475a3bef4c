"""A cohort spread over devices gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl


@pytest.fixture
def mesh():
    return jaxfl.client_mesh(jax.devices()[:4])


def assert_close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )


def gradients(mesh):
    """Each client's gradient with respect to what all of them share: `c - x_i`."""

    def client(shared, x):
        gradient = jax.grad(lambda c: 0.5 * jnp.sum((c - x) ** 2))(shared)
        return gradient, gradient

    xs = jnp.arange(16.0).reshape(8, 2)
    return jaxfl.map_clients(client, jnp.ones(2), xs, mesh=mesh), 1.0 - xs


def final_params(optimizer, mesh=None, clients=range(toy.N), chunk_size=None):
    """The model after two rounds of clients that train for several steps."""
    data = toy.data()
    algorithm = jaxfl.fedavg(toy.loss, optimizer, batch_size=2, epochs=2)
    federation = jaxfl.federate(
        algorithm, jaxfl.mean(), mesh=mesh, chunk_size=chunk_size
    )
    state, cohort = federation.init(toy.params(), data), toy.cohort(data, clients)
    for _ in range(2):
        state, _ = jax.jit(federation.round)(jax.random.key(0), state, cohort)
    return state.params


def test_a_clients_gradient_is_its_own(mesh):
    (summed, stacked), want = gradients(mesh)
    np.testing.assert_array_equal(stacked, want)
    np.testing.assert_array_equal(summed, want.sum(0))


@pytest.mark.parametrize("case", ["gradients", "training"])
def test_the_tests_here_see_gradients_summed_over_devices(mesh, monkeypatch, case):
    """Without `check_vma=False` in map_clients the results are wrong, or refused."""
    want = final_params(optax.sgd(0.1))
    shard_map = jax.shard_map
    monkeypatch.setattr(
        jax, "shard_map", lambda f, **kw: shard_map(f, **{**kw, "check_vma": True})
    )
    with pytest.raises((AssertionError, TypeError, ValueError)):
        if case == "gradients":
            (_, stacked), each = gradients(mesh)
            np.testing.assert_array_equal(stacked, each)
        else:
            assert_close(final_params(optax.sgd(0.1), mesh), want)


@pytest.mark.parametrize("clients", [range(toy.N), [6, 0, 3], [2]], ids=str)
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, 0.9), optax.adam(0.1)])
def test_training_over_devices(mesh, optimizer, clients):
    """Cohorts of 7, of 3 and of 1, none of which 4 devices divide."""
    want = final_params(optimizer, None, clients)
    assert_close(final_params(optimizer, mesh, clients), want)
    assert_close(final_params(optimizer, mesh, clients, chunk_size=1), want)
    assert abs(want["b"] - toy.params()["b"]) > 1e-3


def test_hyper_parameters_traced_from_outside(mesh):
    """A part closes over a traced rate; vmap, and grad, go through the mesh."""
    data = toy.data((2, 2, 2, 2, 2))

    def final(rate, mesh):
        algorithm = jaxfl.fedavg(
            toy.loss, optax.sgd(rate), optax.sgd(2 * rate), batch_size=1
        )
        channel = jaxfl.chain(jaxfl.clip(10 * rate), jaxfl.mean())
        federation = jaxfl.federate(algorithm, channel, mesh=mesh)
        state = federation.init(toy.params(), data)
        state, _ = jaxfl.scan_rounds(
            federation, state, data, rounds=2, key=jax.random.key(0), cohort_size=3
        )
        return jnp.sum(state.params["w"] ** 2)

    rates = jnp.array([0.05, 0.1, 0.2])

    def alike(transform):
        one, many = (
            jax.jit(transform(lambda rate, m=m: final(rate, m))) for m in (None, mesh)
        )
        return one, many

    one, many = alike(jax.vmap)
    assert len(set(one(rates).tolist())) == 3
    assert_close(many(rates), one(rates))
    one, many = alike(jax.grad)
    assert abs(one(0.1)) > 0.1
    assert_close(many(0.1), one(0.1))


@pytest.mark.parametrize("cohort_size", [None, 3])
def test_simulate_over_devices(mesh, cohort_size):
    def run(mesh):
        algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
        channel = jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean())
        return jaxfl.simulate(
            jaxfl.federate(algorithm, channel, mesh=mesh),
            toy.params(),
            toy.data(),
            rounds=3,
            every=2,
            cohort_size=cohort_size,
            key=jax.random.key(0),
            evaluate=lambda state: {"b": state.params["b"]},
            progress=False,
        )

    (state, history), (want, want_history) = run(mesh), run(None)
    assert_close(state, want)
    assert_close(history.clients, want_history.clients)
    assert_close(history["b"], want_history["b"])
    assert history.round.tolist() == [2, 3]


def test_sums_of_16_bits_are_settled_after_all_devices(mesh):
    x = jnp.array([256, 1, 1, 1], jnp.bfloat16)
    for m in (None, mesh):
        total, _ = jaxfl.map_clients(lambda _, v: (v, ()), (), x, mesh=m)
        assert total == 260, m  # 259 in bfloat16; 256 + 1 is 256


def test_evaluation_over_devices(mesh):
    x = jnp.arange(11.0)
    got, want = (
        jaxfl.evaluate.mean_metrics(
            lambda c, batch: {"square": (batch - c) ** 2}, 2.0, x, batch_size=3, mesh=m
        )
        for m in (mesh, None)
    )
    assert_close(got, want)
    assert_close(want, {"square": np.mean((np.arange(11.0) - 2) ** 2)})
