"""Evaluation, and the three regimes of `compare` on a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.evaluate import mean_metrics
from jaxfl.models import Model

ROUNDS, PROBES = 3, 2
RATE = 0.01


def error(params, batch):
    return batch["x"] @ params["w"] + params["b"] - batch["y"]


def linear():
    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (3,)), "b": jnp.float32(0)}

    def apply(params, x, key=None):
        return x @ params["w"] + params["b"]

    def loss(params, batch, key):
        return 0.5 * error(params, batch) ** 2

    def metrics(params, batch):
        wrong = error(params, batch)
        return {"loss": 0.5 * wrong**2, "accuracy": jnp.abs(wrong) < 1}

    return Model(init, apply, loss, metrics)


# --- averages ----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 5, 17, 100])
def test_mean_metrics_is_the_mean(batch_size):
    """Of 17 examples, whatever the batches; flags as well as numbers."""
    x, y, _ = toy.examples()
    params = {"w": jnp.array([0.1, 0.2, -0.1]), "b": jnp.float32(0.5)}
    got = mean_metrics(
        linear().metrics, params, {"x": x, "y": y}, batch_size=batch_size
    )
    each = linear().metrics(params, {"x": x, "y": y})
    np.testing.assert_allclose(got["loss"], np.mean(each["loss"]), rtol=1e-5)
    np.testing.assert_allclose(got["accuracy"], np.mean(each["accuracy"]), rtol=1e-6)
    assert 0 < got["accuracy"] < 1


def test_mean_metrics_errors():
    metrics = linear().metrics
    with pytest.raises(ValueError, match="examples"):
        mean_metrics(metrics, {}, jnp.zeros((0, 3)))
    with pytest.raises(ValueError, match="batch_size"):
        mean_metrics(metrics, {}, jnp.zeros((2, 3)), batch_size=0)


def test_on_server_evaluates_the_federated_model():
    x, y, _ = toy.examples()
    heldout = {"x": x[:7], "y": y[:7]}
    model = linear()
    evaluate = jaxfl.on_server(model.metrics, heldout, batch_size=3)
    federation = jaxfl.federate(jaxfl.fedavg(model.loss, optax.sgd(RATE)), jaxfl.mean())
    state, history = jaxfl.simulate(
        federation,
        model.init(jax.random.key(0)),
        toy.data(),
        rounds=2,
        key=jax.random.key(0),
        evaluate=evaluate,
        progress=False,
    )
    want = np.mean(model.metrics(state.params, heldout)["loss"])
    np.testing.assert_allclose(history["loss"][-1], want, rtol=1e-5)
    assert history["loss"][0] != history["loss"][1]


# --- three regimes -----------------------------------------------------------


def heldout():
    x, y, _ = toy.examples(seed=1)
    return {"x": x, "y": y}


@pytest.fixture(scope="module")
def comparison():
    return jaxfl.compare(
        linear(),
        optax.sgd(RATE),
        toy.data(),
        heldout(),
        rounds=ROUNDS,
        key=jax.random.key(0),
        progress=False,
        probes=PROBES,
        batch_size=4,
        shuffle=False,
    )


def descend(params, x, y, rounds):
    """Plain SGD over the examples in order, as often as in the comparison."""
    gradient = jax.jit(
        jax.grad(lambda p, x, y: jnp.mean(0.5 * error(p, {"x": x, "y": y}) ** 2))
    )
    for _ in range(rounds):
        for i in range(0, len(x), 4):
            step = gradient(params, x[i:][:4], y[i:][:4])
            params = jax.tree.map(lambda p, g: p - RATE * g, params, step)
    return params


def score(params):
    return float(np.mean(linear().metrics(params, heldout())["loss"]))


def start():
    return linear().init(jax.random.split(jax.random.key(0))[0])


def test_shapes(comparison):
    for history, nodes in (
        (comparison.federated, toy.N),
        (comparison.isolated, toy.N),
        (comparison.pooled, 1),
    ):
        probe = history.clients.metrics["probe"]
        assert set(probe) == {"loss", "accuracy"}
        assert probe["loss"].shape == (ROUNDS, nodes, PROBES)
        assert np.isfinite(probe["loss"]).all()
    for history in (comparison.federated, comparison.pooled):
        assert history["loss"].shape == (ROUNDS,)
    np.testing.assert_allclose(comparison.initial["loss"], score(start()), rtol=1e-5)


def test_isolated_nodes_are_trained_apart(comparison):
    x, y, ids = toy.examples()
    probe = comparison.isolated.clients.metrics["probe"]["loss"]
    for node in range(toy.N):
        for r in range(ROUNDS):
            alone = descend(start(), x[ids == node], y[ids == node], r + 1)
            np.testing.assert_allclose(probe[r, node, -1], score(alone), rtol=1e-4)
    assert not comparison.isolated.clients.bits_up.any()


def test_pooled_is_centralised_training(comparison):
    x, y, _ = toy.examples()
    want = [score(descend(start(), x, y, r + 1)) for r in range(ROUNDS)]
    np.testing.assert_allclose(comparison.pooled["loss"], want, rtol=1e-4)
    probe = comparison.pooled.clients.metrics["probe"]["loss"][:, 0]
    np.testing.assert_allclose(probe[:, -1], want, rtol=1e-4)
    assert (np.abs(probe[:, 0] - probe[:, 1]) > 1e-4).all()


def test_federated_nodes_begin_each_round_from_the_average(comparison):
    x, y, ids = toy.examples()
    params, share = start(), np.array(toy.SIZES) / sum(toy.SIZES)
    probe = comparison.federated.clients.metrics["probe"]["loss"]
    for r in range(ROUNDS):
        nodes = [descend(params, x[ids == i], y[ids == i], 1) for i in range(toy.N)]
        for i, node in enumerate(nodes):
            np.testing.assert_allclose(probe[r, i, -1], score(node), rtol=1e-4)
        params = jax.tree.map(
            lambda *p: sum(s * q for s, q in zip(share, p, strict=True)), *nodes
        )
        np.testing.assert_allclose(
            comparison.federated["loss"][r], score(params), rtol=1e-4
        )
