"""Federated averaging against float64 NumPy, and against what it must reduce to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl

X, Y, IDS = toy.examples()
CLIENTS = [(X[IDS == i], Y[IDS == i]) for i in range(toy.N)]
START = {"w": np.array([0.5, -0.5, 1.0], np.float32), "b": np.float32(0.25)}


def loss(params, batch, key):
    """Least squares: unlike the toy's, a gradient that mixes all parameters."""
    return 0.5 * (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


def run(algorithm, data, rounds, start=START, seed=0):
    federation = jaxfl.federate(algorithm, jaxfl.mean())

    @jax.jit
    def whole(start):
        state = federation.init(start, data)
        key = jax.random.key(seed)
        return jaxfl.scan_rounds(federation, state, data, rounds=rounds, key=key)[0]

    return whole(start).params


def flat(params):
    return np.append(np.asarray(params["w"], np.float64), float(params["b"]))


# --- the reference -----------------------------------------------------------


def numpy_gradient(w, x, y):
    x = np.c_[x, np.ones(len(x))].astype(np.float64)
    return x.T @ (x @ w - y) / len(x)


def numpy_client(w, x, y, epochs, batch, rate, momentum):
    trace = 0.0
    for _ in range(epochs):
        for i in range(0, len(x), batch):
            trace = momentum * trace + numpy_gradient(w, x[i:][:batch], y[i:][:batch])
            w = w - rate * trace
    return w


def numpy_fedavg(w, rounds, server_rate=1.0, server_momentum=0.0, **work):
    trace = 0.0
    for _ in range(rounds):
        update = sum(
            len(x) / len(X) * (w - numpy_client(w, x, y, **work)) for x, y in CLIENTS
        )
        trace = server_momentum * trace + update
        w = w - server_rate * trace
    return w


@pytest.mark.parametrize("batch", [1, 2, 3, 10, None])
@pytest.mark.parametrize("epochs", [1, 3])
def test_equals_numpy(batch, epochs):
    """Ragged clients, one of them empty, and batches that divide no client's size."""
    algorithm = jaxfl.fedavg(
        loss,
        optax.sgd(0.004, momentum=0.5),
        optax.sgd(0.8, momentum=0.3),
        batch_size=batch,
        epochs=epochs,
        shuffle=False,
    )
    got = flat(run(algorithm, toy.data(), rounds=4))
    want = numpy_fedavg(
        flat(START),
        rounds=4,
        server_rate=0.8,
        server_momentum=0.3,
        epochs=epochs,
        batch=batch or len(X),
        rate=0.004,
        momentum=0.5,
    )
    assert np.abs(want - flat(START)).max() > 0.05
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


# --- what it reduces to ------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optax.sgd(0.01, 0.9), optax.adam(0.01)])
def test_one_client_is_plain_training(optimizer):
    data = jaxfl.from_arrays(X, Y, np.zeros(len(X), int))
    algorithm = jaxfl.fedavg(loss, optimizer, batch_size=4, epochs=2, shuffle=False)
    got = run(algorithm, data, rounds=1)

    params, state = START, optimizer.init(START)
    gradient = jax.jit(
        jax.grad(lambda p, x, y: jnp.mean(loss(p, {"x": x, "y": y}, None)))
    )
    for i in [*range(0, len(X), 4)] * 2:
        updates, state = optimizer.update(
            gradient(params, X[i:][:4], Y[i:][:4]), state, params
        )
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(flat(got), flat(params), rtol=1e-5)


@pytest.mark.parametrize("form", ["averaging", "FedSGD"])
def test_one_full_batch_step_of_everyone_is_gradient_descent(form):
    steps = functools.partial(jaxfl.fedavg, loss, batch_size=None, epochs=1)
    if form == "averaging":
        algorithm = steps(optax.sgd(0.01))
    else:
        algorithm = steps(optax.sgd(1.0), optax.sgd(0.01))
    w = flat(START)
    for _ in range(6):
        w = w - 0.01 * numpy_gradient(w, X, Y)
    np.testing.assert_allclose(
        flat(run(algorithm, toy.data(), rounds=6)), w, rtol=2e-5, atol=1e-6
    )


def test_fixed_point_of_quadratics():
    """E steps on F_k = a_k/2 (w - c_k)^2 rest where sum n_k s_k (w - c_k) = 0.

    With s_k = 1 - (1 - eta a_k)^E; not at the minimum of the mean of the F_k.
    """
    a, c, n = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 5.0]), np.array([1, 3, 2])

    def quadratic(w, batch, key):
        return 0.5 * batch["x"] * (w - batch["y"]) ** 2

    ids = np.repeat(np.arange(3), n)
    data = jaxfl.from_arrays(np.float32(a[ids]), np.float32(c[ids]), ids)
    algorithm = jaxfl.fedavg(quadratic, optax.sgd(0.2), batch_size=None, epochs=5)
    got = run(algorithm, data, rounds=80, start=jnp.float32(0.0))
    share = n * (1 - (1 - 0.2 * a) ** 5)
    resting = np.sum(share * c) / np.sum(share)
    np.testing.assert_allclose(got, resting, rtol=1e-5)
    assert abs(resting - np.sum(n * a * c) / np.sum(n * a)) > 0.1


def test_weights_can_be_given():
    """Equal weights in place of example counts, and all weight on one client."""
    federation = jaxfl.federate(
        jaxfl.fedavg(loss, optax.sgd(0.01), batch_size=None), jaxfl.mean()
    )
    for weight in (np.ones(toy.N), np.eye(toy.N)[2]):
        state, _ = jaxfl.simulate(
            federation,
            START,
            toy.data(),
            rounds=1,
            key=jax.random.key(0),
            weight=weight,
            progress=False,
        )
        w = flat(START)
        steps = [numpy_gradient(w, x, y) if len(x) else 0 * w for x, y in CLIENTS]
        want = w - 0.01 * np.average(steps, axis=0, weights=weight)
        np.testing.assert_allclose(flat(state.params), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "work", [{"epochs": 1, "steps": 1}, {"batch_size": 0}, {"epochs": 0}, {"steps": -1}]
)
def test_impossible_work(work):
    with pytest.raises(ValueError, match=next(iter(work))):
        jaxfl.fedavg(loss, optax.sgd(0.1), **work)
