"""The zoo's sizes, the adapters' contract, and losses against float64 NumPy."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfl import models

KEY = jax.random.key(0)
IMAGES = jax.random.randint(KEY, (6, 28, 28, 1), 0, 256).astype(jnp.uint8)
BATCH = {"x": IMAGES, "y": jnp.arange(6)}


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


class LinenDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.Dropout(0.5)(x, deterministic=deterministic))


class NnxDropout(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(784, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.hidden(x.reshape(x.shape[0], -1))))


def plain():
    return models.from_function(
        init=lambda key: {"w": jax.random.normal(key, (784, 10))},
        apply=lambda params, x, key: x.reshape(x.shape[0], -1) @ params["w"],
    )


MODELS = {
    "plain": plain,
    "logistic": lambda: models.from_linen(models.logistic_regression(), IMAGES),
    "2nn": lambda: models.from_linen(models.two_nn(), IMAGES),
    "cnn": lambda: models.from_linen(models.cnn(), IMAGES),
    "linen": lambda: models.from_linen(LinenDropout(), IMAGES),
    "deterministic": lambda: models.from_linen(LinenDeterministic(), IMAGES),
    "nnx": lambda: models.from_nnx(NnxDropout),
}
DROPOUT = ["linen", "deterministic", "nnx"]


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (models.logistic_regression(), 7_850),
        (models.mlp(), 235_146),
        (models.two_nn(), 199_210),
        (models.cnn(), 1_663_370),
        (models.cnn(62), 1_690_046),
    ],
)
def test_parameter_counts(module, size):
    params = jax.eval_shape(models.from_linen(module, IMAGES).init, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    model = MODELS[name]()
    params = jax.jit(model.init)(KEY)
    loss = jax.jit(model.loss)(params, BATCH, KEY)
    metrics = jax.jit(model.metrics)(params, BATCH)
    assert jnp.shape(loss) == (6,) and loss.dtype == jnp.float32
    assert set(metrics) == {"loss", "accuracy"}
    assert all(m.shape == (6,) and m.dtype == jnp.float32 for m in metrics.values())
    # params are an ordinary pytree, with gradients and updates of the same kind
    grads = jax.grad(lambda p: model.loss(p, BATCH, KEY).mean())(params)
    tx = optax.adam(0.1)
    updates, _ = tx.update(grads, tx.init(params))
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(new))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    many = jax.vmap(model.loss, (0, None, None))(stacked, BATCH, KEY)
    np.testing.assert_allclose(many[1], loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_losses_against_float64(name):
    model = MODELS[name]()
    params = model.init(KEY)
    z = np.asarray(model.apply(params, IMAGES), np.float64)
    y = np.asarray(BATCH["y"])
    top = z.max(1)
    want = np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(6), y]
    metrics = model.metrics(params, BATCH)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], z.argmax(1) == y)


def test_two_nn_against_float64():
    params = (model := MODELS["2nn"]()).init(KEY)
    x = np.asarray(IMAGES, np.float64).reshape(6, -1) / 255
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        w = jax.tree.map(lambda a: np.asarray(a, np.float64), params[layer])
        x = (np.maximum(x, 0) if layer != "Dense_0" else x) @ w["kernel"] + w["bias"]
    np.testing.assert_allclose(model.apply(params, IMAGES), x, rtol=1e-4, atol=1e-5)


def test_cnn_is_the_same_with_lax_conv():
    ours = MODELS["cnn"]()
    theirs = models.from_linen(
        models.cnn(convolution=jax.lax.conv_general_dilated), IMAGES
    )
    params = ours.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(KEY))
    np.testing.assert_allclose(
        ours.loss(params, BATCH, KEY), theirs.loss(params, BATCH, KEY), rtol=1e-4
    )


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_in_training_only(name):
    model = MODELS[name]()
    params = model.init(KEY)
    one, two = jax.random.split(jax.random.key(3))
    assert jnp.all(model.loss(params, BATCH, one) != model.loss(params, BATCH, two))
    again = model.loss(params, BATCH, one)
    np.testing.assert_array_equal(model.loss(params, BATCH, one), again)
    evaluated = model.metrics(params, BATCH)["loss"]
    assert jnp.all(evaluated != again)
    np.testing.assert_array_equal(model.metrics(params, BATCH)["loss"], evaluated)
    np.testing.assert_array_equal(
        model.apply(params, IMAGES), model.apply(params, IMAGES)
    )


def test_init_depends_on_the_key():
    for name in MODELS:
        model = MODELS[name]()
        one, two = model.init(KEY), model.init(jax.random.key(1))
        assert optax.tree.norm(optax.tree.sub(one, two)) > 0, name


def test_torch_uniform():
    model = models.from_linen(models.mlp(init=models.torch_uniform), IMAGES)
    params = model.init(KEY)
    assert params["Dense_0"]["kernel"].shape == (784, 256)
    for layer, fan_in in (("Dense_0", 784), ("Dense_1", 256), ("Dense_2", 128)):
        for leaf in params[layer].values():
            assert jnp.abs(leaf).max() <= fan_in**-0.5
        spread = jnp.std(params[layer]["kernel"]) * (3 * fan_in) ** 0.5
        assert spread == pytest.approx(1, abs=0.03)
        assert jnp.std(params[layer]["bias"]) > 0
    conv = models.from_linen(models.cnn(init=models.torch_uniform), IMAGES)
    kernel = conv.init(KEY)["Conv_1"]["kernel"]
    assert 0.99 < jnp.abs(kernel).max() * (25 * 32) ** 0.5 <= 1


def test_preprocess():
    np.testing.assert_allclose(
        models.scale(IMAGES), np.asarray(IMAGES) / 255, rtol=1e-6
    )
    tokens = jnp.arange(3)
    assert models.scale(tokens) is tokens
    np.testing.assert_allclose(
        models.standardize(0.1307, 0.3081)(IMAGES),
        (np.asarray(IMAGES) / 255 - 0.1307) / 0.3081,
        rtol=1e-4,
        atol=1e-6,
    )


def test_bfloat16_outputs_lose_in_float32():
    logits = jnp.zeros((2, 10), jnp.bfloat16)
    assert models.cross_entropy(logits, jnp.zeros(2, int)).dtype == jnp.float32


def test_sequences_give_one_loss_an_example():
    logits, labels = jnp.zeros((2, 7, 5)), jnp.zeros((2, 7), int)
    np.testing.assert_allclose(
        models.cross_entropy(logits, labels), np.log([5, 5]), 1e-6
    )
    assert models.accuracy(logits, labels)["accuracy"].shape == (2,)


def test_own_loss_and_metrics():
    def squared(out, y):
        return jnp.square(out[:, 0] - y)

    model = models.from_linen(
        models.mlp((4,), 1),
        jnp.zeros((1, 3)),
        loss=squared,
        metrics=lambda out, y: {"absolute": jnp.abs(out[:, 0] - y)},
    )
    metrics = model.metrics(model.init(KEY), {"x": jnp.ones((2, 3)), "y": jnp.ones(2)})
    np.testing.assert_allclose(metrics["absolute"] ** 2, metrics["loss"], rtol=1e-5)


def test_scan_compiles_once():
    model = MODELS["nnx"]()
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def train(loss, params, keys):
        traces.append(1)
        step = jax.grad(lambda p, key: loss(p, BATCH, key).mean())
        return jax.lax.scan(
            lambda p, key: (optax.tree.add_scale(p, -0.1, step(p, key)), None),
            params,
            keys,
        )[0]

    params = model.init(KEY)
    for seed in range(2):
        params = train(model.loss, params, jax.random.split(jax.random.key(seed), 3))
    assert len(traces) == 1


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.BatchNorm(use_running_average=not train)(x)


class NnxNorm(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class LinenCounter(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.variable("count", "calls", lambda: jnp.zeros(())).value


def test_refuses_variables_of_other_kinds_and_padding_in_statistics():
    with pytest.raises(ValueError, match="keyword mask"):
        models.from_linen(LinenNorm(), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="keyword mask"):
        models.from_nnx(NnxNorm)
    with pytest.raises(ValueError, match="no variables but .* got count"):
        models.from_linen(LinenCounter(), jnp.zeros((1, 3)))


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="module must be an instance"):
        models.from_linen(LinenDropout, IMAGES)  # pyright: ignore
    with pytest.raises(TypeError, match="make_module must make a module"):
        models.from_nnx(NnxDropout(rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"must make a flax\.nnx\.Module"):
        models.from_nnx(lambda rngs: None)
    with pytest.raises(TypeError, match=r"apply must take \(params, x, key\)"):
        models.from_function(lambda key: (), lambda params, x: x)  # pyright: ignore
    with pytest.raises(ValueError, match="x must be images"):
        models.from_linen(models.cnn(), jnp.zeros((1, 784)))


# --- precision --------------------------------------------------------------------


def small(dtype=None, kind="linen"):
    if kind == "nnx":
        return models.from_nnx(functools.partial(nnx.Linear, 784, 10), dtype=dtype)
    return models.from_linen(
        models.mlp((64,)), np.zeros((1, 784), np.float32), dtype=dtype
    )


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_computing_in_bfloat16(kind, key):
    """Products are of bfloat16; what is trained, and what comes out, is float32."""
    half, full = small(jnp.bfloat16, kind), small(None, kind)
    params = half.init(key)
    batch = {"x": jax.random.normal(key, (10, 784)), "y": jnp.arange(10)}

    def slope(model):
        return jax.grad(lambda p: jnp.mean(model.loss(p, batch, key)))(params)

    program = str(jax.make_jaxpr(half.apply)(params, batch["x"]))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", program)
    assert products and set(products) == {"bf16"}
    assert half.apply(params, batch["x"]).dtype == jnp.float32
    leaves = jax.tree.leaves((params, slope(half)))
    assert {x.dtype for x in leaves} == {jnp.dtype(jnp.float32)}
    got, want = half.loss(params, batch, key), full.loss(params, batch, key)
    assert (got != want).any()
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.02),
        slope(half),
        slope(full),
    )
