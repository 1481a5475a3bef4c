"""Derivatives of a whole run by its learning rates, against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl.simulate import scan_rounds

CURVATURE = np.array([[1.0, 0.3], [0.2, 2.0], [0.7, 0.7]])
CENTRE = np.array([[1.0, -1.0], [-2.0, 0.5], [0.5, 3.0]])


def loss(w, batch, key):
    return 0.5 * jnp.sum(batch["x"] * (w - batch["y"]) ** 2, -1)


def fedavg(client_rate, server_rate):
    client, server = optax.sgd(client_rate), optax.sgd(server_rate)
    return jaxfl.fedavg(loss, client, server, batch_size=None, epochs=3)


def scaffold(client_rate, server_rate):
    server = optax.sgd(server_rate)
    return jaxfl.scaffold(loss, client_rate, server, batch_size=None, epochs=3)


def final_loss(algorithm):
    """Of the mean quadratic, after four rounds of two of three clients."""
    data = jaxfl.from_arrays(jnp.array(CURVATURE), jnp.array(CENTRE), [0, 1, 2])

    def final(rates):
        federation = jaxfl.federate(algorithm(*rates), jaxfl.mean())
        state = federation.init(jnp.array([3.0, -2.0]), data)
        key = jax.random.key(0)
        options = {"rounds": 4, "key": key, "cohort_size": 2}
        state, _ = scan_rounds(federation, state, data, **options)
        return jnp.mean(loss(state.params, data.examples, key))

    return final


@pytest.mark.parametrize("algorithm", [fedavg, scaffold])
def test_gradient_by_the_rates_of_client_and_server(algorithm):
    with jax.enable_x64(True):
        rates, step = jnp.array([0.1, 0.7]), 1e-5 * jnp.eye(2)
        assert rates.dtype == jnp.float64
        run = jax.jit(jax.vmap(jax.value_and_grad(final_loss(algorithm))))
        values, slopes = run(jnp.concatenate([rates[None], rates + step, rates - step]))
        plain = np.array(values[1:3] - values[3:]) / 2e-5
    assert np.abs(plain).min() > 0.1
    np.testing.assert_allclose(slopes[0], plain, rtol=1e-6)


def test_the_rates_of_fedavg_by_hand():
    """One round of one client: `w - s w (1 - (1 - c)^3)`, with curvature 1 at 0."""
    one = jnp.ones((1, 1))
    data = jaxfl.from_arrays(one, 0 * one, [0])

    def final(client_rate, server_rate):
        algorithm = fedavg(client_rate, server_rate)
        federation = jaxfl.federate(algorithm, jaxfl.mean())
        state = federation.init(2 * one[0], data)
        key = jax.random.key(0)
        return scan_rounds(federation, state, data, rounds=1, key=key)[0].params[0]

    c, s = 0.1, 0.7
    by_client, by_server = jax.grad(final, (0, 1))(c, s)
    np.testing.assert_allclose(by_client, -2 * s * 3 * (1 - c) ** 2, rtol=1e-5)
    np.testing.assert_allclose(by_server, -2 * (1 - (1 - c) ** 3), rtol=1e-5)
