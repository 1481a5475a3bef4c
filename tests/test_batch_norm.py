"""Batch normalisation: whose statistics, of which rows, and what moves them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfl
from jaxfl import evaluate, local, models, privacy, tree
from jaxfl.core import Cohort, lone_context

MOMENTUM, EPSILON = 0.8, 1e-5
SIZES = 5, 3, 4
IDS = np.repeat(range(3), SIZES)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)) * (1 + IDS[:, None]) + 5.0 * IDS[:, None]
X = X.astype(np.float32)
Y = RNG.integers(0, 2, 12)
DATA = jaxfl.from_arrays(X, Y, IDS)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, mask):
        x = nn.BatchNorm(not train, momentum=MOMENTUM)(x, mask=mask[:, None])
        return nn.Dense(2)(x)


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, momentum=MOMENTUM, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, *, mask):
        return self.out(self.norm(x, mask=mask[:, None]))


MODELS = {
    "linen": lambda: models.from_linen(Linen(), X[:1]),
    "nnx": lambda: models.from_nnx(Nnx),
}


def of(params):
    """Mean and variance."""
    return next(iter(params.statistics.values()))


def followed(client, batch_size=3, epochs=1, mean=0.0, var=1.0):
    """What the batches of one client, in their order, make of them, in float64."""
    mean, var = np.full(3, mean, np.float64), np.full(3, var, np.float64)
    x = X[client == IDS].astype(np.float64)
    for _ in range(epochs):
        for i in range(0, len(x), batch_size):
            batch = x[i : i + batch_size]
            mean = MOMENTUM * mean + (1 - MOMENTUM) * batch.mean(0)
            var = MOMENTUM * var + (1 - MOMENTUM) * batch.var(0)
    return {"mean": mean, "var": var}


def assert_close(statistics, want):
    for name in ("mean", "var"):
        np.testing.assert_allclose(statistics[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_one_client(name, key):
    """Of ragged batches, whatever the optimiser; evaluated, they are what is used."""
    model = MODELS[name]()
    start = model.init(key)
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1), local.proximal(3.0, start), optax.adamw(0.1)
    )
    trained = local.train(
        *(lone_context(key), local.gradient(model.loss, statistics=True), optimizer),
        *(start, DATA[0]),
        batch_size=3,
        epochs=3,
        shuffle=False,
    ).params
    assert_close(of(trained), followed(0, epochs=3))
    assert jax.eval_shape(lambda: trained) == jax.eval_shape(lambda: start)
    norm, out = sorted(trained.params.values(), key=lambda layer: "kernel" in layer)
    at = {k: np.float64(v) for k, v in of(trained).items()}
    x = (X.astype(np.float64) - at["mean"]) / np.sqrt(at["var"] + EPSILON)
    x = (x * norm["scale"] + norm["bias"]) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(model.apply(trained, X), x, rtol=1e-3, atol=1e-4)
    metrics = model.metrics(trained, {"x": X, "y": Y})
    np.testing.assert_array_equal(metrics["accuracy"], x.argmax(1) == Y)


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_fill_up_a_batch_are_no_examples(name, key):
    model = MODELS[name]()
    params = model.init(key)
    gradient = jax.jit(local.gradient(model.loss, statistics=True))
    batch = {"x": X[:5], "y": Y[:5]}
    mask = jnp.array([True, False, True, True, False])
    real = {"x": X[[0, 2, 3]], "y": Y[[0, 2, 3]]}
    got = gradient(params, batch, mask, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        got,
        gradient(params, real, jnp.ones(3, bool), key),
    )
    # A batch of none, as Poisson sampling draws: no step, and nothing infinite.
    value, grads = gradient(params, batch, jnp.zeros(5, bool), key)
    assert value == 0 and not any(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def run(algorithm, model, key, *, rounds=1, alive=(True, True, True)):
    federation = jaxfl.federate(algorithm, jaxfl.mean(), chunk_size=2)
    state = federation.init(model.init(key), DATA)
    cohort = Cohort(*(jnp.arange(3), DATA, jnp.float32(SIZES), jnp.array(alive)))
    for _ in range(rounds):
        state, _ = jax.jit(federation.round)(key, state, cohort)
    return state


WORK = local.Work(batch_size=3, shuffle=False)


def test_fedavg_averages_statistics_whatever_the_server_optimises_by(key):
    model = MODELS["linen"]()
    adam = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1))
    algorithm = jaxfl.fedavg(model.loss, optax.sgd(0.1), adam, **WORK)
    state = run(algorithm, model, key, alive=(True, False, True))
    each = followed(0), followed(2)
    want = {k: np.average([e[k] for e in each], 0, (5, 4)) for k in each[0]}
    assert_close(of(state.params), want)
    moved = optax.tree.sub(state.params.params, model.init(key).params)
    assert all(jnp.all(x != 0) for x in jax.tree.leaves(moved))


def test_fedbn(key):
    """Normalisation stays at home, the rest is shared; who is absent stays as it is."""
    model = MODELS["linen"]()
    algorithm = jaxfl.fedper(
        model.loss, optax.sgd(0.1), lambda path: "BatchNorm" in path, **WORK
    )
    state = run(algorithm, model, key, rounds=2, alive=(True, False, True))
    own = state.clients.algorithm
    assert set(own) == {
        *("params/BatchNorm_0/scale", "params/BatchNorm_0/bias"),
        *("statistics/BatchNorm_0/mean", "statistics/BatchNorm_0/var"),
    }
    for client, epochs in enumerate((2, 0, 2)):
        mine = jax.tree.map(lambda x, c=client: x[c], own)
        statistics = {k: mine[f"statistics/BatchNorm_0/{k}"] for k in ("mean", "var")}
        assert_close(statistics, followed(client, epochs=epochs))
        scale = mine["params/BatchNorm_0/scale"]
        assert jnp.all(scale != 1) if epochs else jnp.all(scale == 1)

    def personal(params, own, data, key):
        return tree.with_named(params, own)

    of_each = evaluate.on_clients(model.metrics, DATA, model=personal)(state)["loss"]
    for i in range(3):
        its = personal(state.params, jax.tree.map(lambda x, i=i: x[i], own), None, None)
        mine = {"x": X[i == IDS], "y": Y[i == IDS]}
        want = model.metrics(its, mine)["loss"].mean()
        np.testing.assert_allclose(of_each[i], want, rtol=1e-4)
    assert_close(of(state.params), {"mean": np.zeros(3), "var": np.ones(3)})


def test_running_statistics_in_full_precision(key):
    """Where the model computes in bfloat16 its statistics do not."""
    model = models.from_linen(Linen(), X[:1], dtype=jnp.bfloat16)
    params = model.init(key)
    gradient = jax.jit(local.gradient(model.loss, statistics=True))
    _, grads = gradient(params, {"x": X, "y": Y}, jnp.ones(12, bool), key)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    x = np.asarray(X.astype(jnp.bfloat16), np.float64)
    want = (1 - MOMENTUM) * x.mean(0)
    np.testing.assert_allclose(of(grads)["mean"], -want, rtol=1e-3)


LOSS = local.normalised(lambda *_: (jnp.zeros(2), 0.0))
SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scaffold", (0.1,)),
        ("feddyn", (SGD, 0.1)),
        ("fednova", (SGD,)),
        ("fedexp", (SGD,)),
        ("apfl", (SGD, 0.5)),
        ("pfedme", (0.1, 1.0, SGD)),
        ("qfedavg", (0.1, 1.0)),
        ("mime", (SGD,)),
    ],
)
def test_algorithms_that_would_ruin_statistics_refuse_them(name, arguments):
    with pytest.raises(TypeError, match="batch statistics"):
        getattr(jaxfl, name)(LOSS, *arguments)


def test_refuses(key):
    model = MODELS["linen"]()
    head = jaxfl.fedper(model.loss, SGD, lambda path: "Dense" in path, optax.adam(0.1))
    with pytest.raises(ValueError, match="server_optimizer: .*BatchNorm_0/mean"):
        run(head, model, key)
    with pytest.raises(TypeError, match="gradient of its own"):
        privacy.dp_sgd(model.loss, clip_norm=1.0, noise_multiplier=0, denominator=4)
