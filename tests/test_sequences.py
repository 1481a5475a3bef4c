"""Models of sequences, residual networks: sizes, NumPy, causality, vmap, dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import models

KEY = jax.random.key(0)
TOKENS = jax.random.randint(KEY, (3, 7), 1, 12)
LABELS = jnp.where(jnp.arange(7) < jnp.array([7, 4, 0])[:, None], TOKENS[:, ::-1], 0)
IMAGES = jax.random.randint(KEY, (3, 8, 8, 3), 0, 256).astype(jnp.uint8)


def of_tokens(module, **options):
    return models.from_linen(
        module,
        TOKENS,
        loss=models.token_cross_entropy(),
        metrics=models.token_accuracy(),
        **options,
    )


def lstm(**options):
    return of_tokens(models.char_lstm(12, hidden=5), **options)


def transformer(**options):
    module = models.transformer(12, longest=9, width=8, heads=2, layers=1)
    return of_tokens(module, **options)


def resnet(**options):
    return models.from_linen(models.ResNet(3, (1, 1), width=4), IMAGES, **options)


def batch_of(model):
    images = {"x": IMAGES, "y": jnp.arange(3)}
    return images if model is resnet else {"x": TOKENS, "y": LABELS}


@pytest.mark.parametrize(
    ("module", "example", "size"),
    [
        (models.char_lstm(), jnp.zeros((1, 80), jnp.int32), 820_522),  # Reddi et al.
        (models.resnet18(), jnp.zeros((1, 32, 32, 3)), 11_173_962),
        (models.resnet18(100), jnp.zeros((1, 32, 32, 3)), 11_220_132),
        # 12 d^2 + 13 d a layer, tokens and places and the last two layers beside
        (
            models.transformer(),
            jnp.zeros((1, 80), jnp.int32),
            2 * (12 * 128**2 + 13 * 128) + (90 + 80 + 2) * 128 + 129 * 90,
        ),
    ],
)
def test_parameter_counts(module, example, size):
    params = jax.eval_shape(models.from_linen(module, example).init, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size


def test_lstm_against_float64():
    params = jax.jit((model := lstm()).init)(KEY)
    got = model.apply(params, TOKENS)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = params["embedding"]["kernel"][np.asarray(TOKENS)]
    for layer in ("LSTM_0", "LSTM_1"):
        dense = params[layer]["Dense_0"]
        assert (
            dense["bias"].reshape(4, 5).tolist() == [[0] * 5, [1] * 5] + [[0] * 5] * 2
        )
        h = c = np.zeros((3, 5))
        out = []
        for t in range(7):
            gates = x[:, t] @ dense["kernel"] + dense["bias"]
            i, f, g, o = np.split(gates + h @ params[layer]["recurrent"], 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        x = np.stack(out, 1)
    want = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [lstm, transformer])
def test_causal(model):
    params = jax.jit((model := model()).init)(KEY)
    apply = jax.jit(model.apply)
    before = apply(params, TOKENS)
    for t in (0, 3, 6):
        after = apply(params, TOKENS.at[:, t].set(0))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert jnp.all(jnp.any(before[:, t:] != after[:, t:], -1))


def test_a_transformer_knows_places():
    params = jax.jit((model := transformer()).init)(KEY)
    same = model.apply(params, jnp.full((1, 5), 3))
    assert jnp.all(jnp.any(same[:, 1:] != same[:, :-1], -1))
    shorter = model.apply(params, TOKENS[:, :4])
    np.testing.assert_allclose(shorter, model.apply(params, TOKENS)[:, :4], atol=1e-5)


@pytest.mark.parametrize("model", [lstm, transformer, resnet])
def test_vmapped_training_is_a_loop(model):
    batch, model = batch_of(model), model()
    many = jax.vmap(model.init)(jax.random.split(KEY, 2))

    def steps(params):
        def step(params, _):
            grads = jax.grad(lambda p: model.loss(p, batch, KEY).mean())(params)
            return optax.apply_updates(params, optax.tree.scale(-0.1, grads)), None

        return jax.lax.scan(step, params, length=2)[0]

    together = jax.jit(jax.vmap(steps))(many)
    alone = jax.jit(steps)
    for i in range(2):
        one = alone(jax.tree.map(lambda x, i=i: x[i], many))
        for got, want, start in zip(
            *map(jax.tree.leaves, (together, one, many)), strict=True
        ):
            np.testing.assert_allclose(got[i], want, rtol=2e-3, atol=2e-5)
            assert jnp.any(want != start[i])


@pytest.mark.parametrize("model", [lstm, transformer, resnet])
def test_bfloat16_inside_float32_outside(model):
    batch = batch_of(model)
    exact, rough = model(), model(dtype=jnp.bfloat16)
    params = jax.jit(exact.init)(KEY)
    value, grads = jax.jit(
        jax.value_and_grad(lambda p: rough.loss(p, batch, KEY).mean())
    )(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    want = exact.loss(params, batch, KEY).mean()
    assert value.dtype == jnp.float32 and value != want
    np.testing.assert_allclose(value, want, rtol=0.1)
    jaxpr = str(jax.make_jaxpr(lambda p: rough.apply(p, batch["x"]))(params))
    products = re.findall(r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general)", jaxpr)
    assert products and set(products) == {"bf16"}


def test_resnet_is_the_same_with_lax_conv():
    module = models.ResNet(3, (1, 1), width=4, convolution=jax.lax.conv_general_dilated)
    theirs, ours = models.from_linen(module, IMAGES), resnet()
    params = jax.jit(ours.init)(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(theirs.init)(KEY))
    np.testing.assert_allclose(
        *(m.apply(params, IMAGES) for m in (ours, theirs)), rtol=1e-3, atol=1e-4
    )


def test_losses_of_real_tokens_only():
    logits = np.random.default_rng(0).normal(size=(3, 7, 12))
    labels = np.asarray(LABELS)
    real = labels != 0
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    counts = np.maximum(real.sum(1), 1)
    want = (losses * real).sum(1) / counts
    loss = models.token_cross_entropy()
    got = loss(jnp.asarray(logits, jnp.float32), LABELS)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    right = (logits.argmax(-1) == labels) & real
    accuracy = models.token_accuracy()(jnp.asarray(logits), LABELS)["accuracy"]
    np.testing.assert_allclose(accuracy, right.sum(1) / counts)
    assert want[2] == 0 and got[2] == 0
    # No padding: as `cross_entropy`. Padding has no gradient, even of NaN logits.
    full = loss(jnp.asarray(logits), TOKENS)
    np.testing.assert_allclose(
        full, models.cross_entropy(jnp.asarray(logits), TOKENS), rtol=1e-6
    )
    slope = jax.grad(lambda z: loss(z, LABELS).sum())(jnp.asarray(logits))
    assert np.all(slope[~real] == 0) and np.all(np.abs(slope[real]).max(-1) > 0)
    assert np.isnan(loss(jnp.asarray(logits), LABELS.at[1, 0].set(12))[1])
    assert np.isfinite(loss(jnp.asarray(logits), LABELS.at[1, 0].set(12))[0])


def test_what_is_refused():
    with pytest.raises(ValueError, match="groups must divide width"):
        models.resnet18(width=5)
    with pytest.raises(ValueError, match="heads must divide width"):
        models.transformer(width=10, heads=4)
    with pytest.raises(ValueError, match="must be token numbers"):
        models.from_linen(models.char_lstm(), jnp.zeros((1, 8), jnp.uint8))
    with pytest.raises(ValueError, match="must be images"):
        models.from_linen(models.resnet18(), jnp.zeros((1, 8)))
    with pytest.raises(ValueError, match="longest is 9"):
        models.from_linen(models.transformer(longest=9), jnp.zeros((1, 10), jnp.int32))


def test_a_number_that_is_no_token_is_not_passed_over():
    params = jax.jit(lstm().init)(KEY)
    x = batch_of(lstm)["x"]
    good = lstm().apply(params, x)
    for wrong in (-1, 10**6):
        bad = lstm().apply(params, x.at[0, 0].set(wrong))
        assert np.isnan(bad[0]).all() and np.isfinite(good).all()
        np.testing.assert_array_equal(bad[1:], good[1:])
