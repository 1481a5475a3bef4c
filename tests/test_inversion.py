"""Gradient inversion: closed forms, references, and what a federation really sends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl import attack, models

D, C = 5, 3


def linear(key):
    """A linear classifier with labels as distributions, and its weights."""

    def logits(params, x, key):
        return x.reshape(len(x), -1) @ params["w"] + params["b"]

    model = models.from_function(
        lambda key: {}, logits, loss=optax.softmax_cross_entropy
    )
    return model, {"w": jax.random.normal(key, (D, C)), "b": jnp.arange(3.0) / 3}


def client(key, size=1):
    x_key, y_key = jax.random.split(key)
    y = jax.random.randint(y_key, (size,), 0, C)
    return {"x": jax.random.uniform(x_key, (size, D)), "y": jax.nn.one_hot(y, C)}


def sgd(model, rate=1.0, **work):
    return jaxfl.fedavg(model.loss, optax.sgd(rate), **{"batch_size": None} | work)


def observe(algorithm, params, examples, *channels):
    """What a tap behind these channels reports of clients `[K, B, ...]`."""
    k, size = examples["x"].shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
    data = jaxfl.from_arrays(flat["x"], flat["y"], np.repeat(np.arange(k), size))
    channel = jaxfl.chain(*channels, jaxfl.tap("seen"), jaxfl.mean())
    federation = jaxfl.federate(algorithm, channel)
    cohort = jaxfl.Cohort(jnp.arange(k), data, jnp.ones(k), jnp.ones(k, bool))
    state = federation.init(params, data)
    return federation.round(jax.random.key(3), state, cohort)[1].reports[-2]["seen"]


@pytest.fixture
def victims(key):
    """Four clients of one example each, and what the server saw of them."""
    model, params = linear(key)
    examples = jax.vmap(client)(jax.random.split(key, 4))
    return model, params, examples, observe(sgd(model), params, examples)


# ------------------------------------------------------------------------- inversion


def by_lbfgs(model, params, seen, label, key):
    again, y = attack.replay(sgd(model), params), jax.nn.one_hot(label, C)[None]
    start = jax.random.normal(key, (1, D))
    return attack.invert(
        *(seen, lambda x: again({"x": x, "y": y}), start, optax.lbfgs()), steps=30
    )


def test_of_a_linear_layer_the_input_is_a_quotient_and_the_search_finds_it(victims):
    model, params, examples, seen = victims
    quotient = seen["w"][:, :, 0] / seen["b"][:, :1]
    np.testing.assert_allclose(quotient, examples["x"][:, 0], rtol=1e-5)

    label = jax.vmap(attack.infer_label)(seen["b"])
    np.testing.assert_array_equal(label, jnp.argmax(examples["y"][:, 0], -1))

    def search(seen, label, key):
        return by_lbfgs(model, params, seen, label, key)

    keys = jax.random.split(jax.random.key(1), 3)
    starts = jax.vmap(search, (None, None, 0))
    found = jax.jit(jax.vmap(starts, (0, 0, None)))(seen, label, keys)
    nearest = jax.vmap(attack.best)(found)
    np.testing.assert_allclose(nearest.candidate, examples["x"], atol=1e-3)
    np.testing.assert_array_equal(nearest.loss, found.loss.min(1))

    alone = jax.jit(search)(jax.tree.map(lambda s: s[2], seen), label[2], keys[1])
    np.testing.assert_allclose(found.candidate[2, 1], alone.candidate, atol=1e-3)


def test_dlg_finds_the_label_with_the_input(victims):
    model, params, examples, seen = victims
    again = attack.replay(sgd(model), params)

    def search(seen, key):
        start = {"x": jax.random.normal(key, (1, D)), "y": jnp.zeros((1, C))}
        return attack.invert(
            seen,
            lambda c: again({"x": c["x"], "y": jax.nn.softmax(c["y"])}),
            *(start, optax.lbfgs()),
            steps=60,
        )

    keys = jax.random.split(jax.random.key(1), 3)
    found = jax.jit(jax.vmap(jax.vmap(search, (None, 0)), (0, None)))(seen, keys)
    found = jax.vmap(attack.best)(found).candidate
    np.testing.assert_array_equal(found["y"].argmax(-1), examples["y"].argmax(-1))
    np.testing.assert_allclose(found["x"], examples["x"], atol=0.05)


def test_a_direction_is_enough(victims):
    """The cosine distance heeds no clip; the box holds; the best point is kept."""
    model, params, examples, _ = victims
    seen = observe(sgd(model), params, examples, jaxfl.clip(0.01))
    again = attack.replay(sgd(model), params)

    def search(seen, y, steps=400, rate=0.05):
        return attack.invert(
            *(seen, lambda x: again({"x": x, "y": y}), jnp.full((1, D), 0.5)),
            attack.signed_adam(rate, steps),
            steps=steps,
            distance=attack.cosine_distance,
            project=lambda x: jnp.clip(x, 0, 1),
        )

    found = jax.jit(jax.vmap(search))(seen, examples["y"])
    np.testing.assert_allclose(found.candidate, examples["x"], atol=0.02)
    one = jax.tree.map(lambda s: s[0], seen)
    far = search(one, examples["y"][0], steps=3, rate=1e3)
    assert 0 <= far.candidate.min() and far.candidate.max() <= 1
    start = again({"x": jnp.full((1, D), 0.5), "y": examples["y"][0]})
    assert far.loss <= attack.cosine_distance(start, one)


def test_a_prior_weighs():
    def sent(x):
        return {"x": x}

    found = attack.invert(
        *({"x": jnp.ones(2)}, sent, jnp.zeros(2), optax.lbfgs()),
        steps=20,
        prior=lambda x: 3 * jnp.sum(x * x),
    )
    np.testing.assert_allclose(found.candidate, 1 / 4, rtol=1e-4)
    np.testing.assert_allclose(found.loss, 2 * (9 / 16 + 3 / 16), rtol=1e-4)


@pytest.mark.parametrize("kind", ["gradient", "epochs", "batches", "clipped", "top_k"])
def test_replay_is_what_the_federation_sends(key, kind):
    model, params = linear(key)
    algorithm, channel = {
        "gradient": (sgd(model), jaxfl.identity()),
        "epochs": (sgd(model, 0.3, epochs=3), jaxfl.identity()),
        "batches": (sgd(model, 0.3, batch_size=2, shuffle=False), jaxfl.identity()),
        "clipped": (sgd(model, 0.3, epochs=2), jaxfl.clip(0.1)),
        "top_k": (sgd(model), jaxfl.compress.top_k(0.5)),
    }[kind]
    examples = jax.vmap(lambda key: client(key, 4))(jax.random.split(key, 3))
    seen = observe(algorithm, params, examples, channel)
    again = jax.vmap(attack.replay(algorithm, params, channel))(examples)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(seen), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    if kind == "gradient":
        plain = jax.vmap(
            jax.grad(lambda p, e: model.loss(p, e, key).mean()), (None, 0)
        )(params, examples)
        np.testing.assert_allclose(again["w"], plain["w"], atol=1e-6)


def test_replay_is_differentiated_through_local_steps(key):
    model, params = linear(key)
    again = attack.replay(sgd(model, 0.3, epochs=3), params)
    examples = client(key, 2)

    def first(x):
        return again(examples | {"x": x})["w"][0, 0]

    slope, step = jax.grad(first)(examples["x"]), 1e-2
    moved = [first(examples["x"].at[1, 2].add(d)) for d in (step, -step)]
    np.testing.assert_allclose(
        slope[1, 2], (moved[0] - moved[1]) / (2 * step), rtol=0.02, atol=1e-4
    )


def test_bad_input_of_invert():
    x, adam = jnp.zeros(2), optax.adam(0.1)
    with pytest.raises(ValueError, match="steps"):
        attack.invert(x, lambda x: x, x, adam, steps=0)
    with pytest.raises(TypeError, match="start"):
        attack.invert(x, lambda x: x, jnp.zeros(2, int), adam, steps=1)
    with pytest.raises(ValueError, match="replay"):
        attack.invert(x, lambda x: {"w": x}, x, adam, steps=1)
    with pytest.raises(ValueError, match="replay"):
        attack.invert(x, lambda x: x[:1], x, adam, steps=1)


def test_distances():
    a, b = (
        {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)},
        {"w": jnp.ones(2), "b": 0.0},
    )
    assert attack.squared_error(a, b) == 4 + 1 + 16
    np.testing.assert_allclose(attack.cosine_distance(a, b), 1 - 3 / (5 * 2**0.5))
    scaled = jax.tree.map(lambda x: 7 * x, a)
    np.testing.assert_allclose(
        attack.cosine_distance(scaled, b), attack.cosine_distance(a, b), rtol=1e-6
    )
    nothing = jax.tree.map(jnp.zeros_like, a)
    slope = jax.grad(attack.cosine_distance)(nothing, a)
    assert attack.cosine_distance(nothing, a) == 1
    assert all(jnp.isfinite(s).all() for s in jax.tree.leaves(slope))


def test_signed_adam_heeds_signs_and_slows_down():
    optimizer, x = attack.signed_adam(1.0, steps=80), jnp.array([1e-3, -1e3])
    state, sizes = optimizer.init(x), []
    for _ in range(80):
        updates, state = optimizer.update(x, state)
        sizes.append(jnp.abs(updates))
    assert jnp.allclose(sizes[0], 1) and jnp.allclose(sizes[29], 1)
    for place, size in (31, 0.1), (51, 0.01), (71, 0.001):
        np.testing.assert_allclose(sizes[place], size, rtol=1e-4)


# ----------------------------------------------------------------------------- labels


def test_label_of_one_example_is_exact(key):
    model, params = linear(key)
    again = attack.replay(sgd(model), params)
    examples = jax.vmap(client)(jax.random.split(key, 200))
    seen = jax.vmap(again)(examples)
    label = examples["y"][:, 0].argmax(-1)
    assert set(label.tolist()) == {0, 1, 2}
    for layer in "w", "b":
        found = jax.vmap(attack.infer_label)(seen[layer])
        np.testing.assert_array_equal(found, label)
        scaled = jax.vmap(attack.infer_label)(1e-6 * seen[layer])
        np.testing.assert_array_equal(scaled, label)


def test_label_counts(key):
    """Exact with what is predicted; near without; no more than there are examples."""
    rng = np.random.default_rng(0)
    for examples in 1, 2, 7, 30:
        for _ in range(10):
            labels = rng.integers(0, 10, examples)
            counts = np.bincount(labels, minlength=10)
            p = rng.dirichlet(np.full(10, 0.5))
            gradient = jnp.asarray(p - counts / examples, jnp.float32)
            found = attack.label_counts(gradient, examples, jnp.asarray(p))
            np.testing.assert_array_equal(found, counts)
            guess = attack.label_counts(gradient, examples)
            assert guess.sum() == examples and guess.min() >= 0
    uniform = attack.label_counts(jnp.full(10, 0.1) - jnp.eye(10)[4], 1)
    assert uniform.tolist() == np.eye(10, dtype=int)[4].tolist()
    noise = -jnp.arange(1.0, 11.0)
    assert attack.label_counts(noise, 3).tolist() == [0] * 7 + [1] * 3
    with pytest.raises(ValueError, match="gradient"):
        attack.label_counts(jnp.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match="examples"):
        attack.label_counts(jnp.zeros(3), 0)


# ----------------------------------------------------------------------- how good it is


def reference_ssim(x, y):
    """Window by window, in float64, from the definition."""
    w = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(w, w) / np.outer(w, w).sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + 1e-4)
                * (2 * cov + 9e-4)
                / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            )
    return np.mean(values)


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 4, 15, 18, 2))
    y[2] = 0.7 * x[2] + 0.3 * y[2]
    expected = [
        np.mean([reference_ssim(a[..., c], b[..., c]) for c in range(2)])
        for a, b in zip(x, y, strict=True)
    ]
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    np.testing.assert_allclose(attack.ssim(x, y), expected, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(attack.ssim)(x, y), expected, atol=1e-4)
    np.testing.assert_allclose(
        attack.psnr(x, y),
        [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(x, y, strict=True)],
        rtol=1e-5,
    )
    assert attack.psnr(x[0], x[0]) == jnp.inf
    with pytest.raises(ValueError, match="image"):
        attack.ssim(x[:, :8], y[:, :8])


def test_match_undoes_an_order():
    rng = np.random.default_rng(0)
    originals, order = rng.random((6, 4, 4, 1)), rng.permutation(6)
    images = (originals + 0.01 * rng.random(originals.shape))[order]
    found = attack.match(images, originals)
    np.testing.assert_array_equal(order[found], np.arange(6))
