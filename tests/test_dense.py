"""fused_dot: the product, its derivatives, and that no gradient is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import fused_dot

MATMUL = (((1,), (0,)), ((), ()))


def arrays(rows=10, inputs=30, columns=64, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, inputs), (inputs, columns), (rows, columns)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def is_plain(x, w):
    """Whether it is handed to `lax.dot_general` unchanged."""
    return "custom_jvp" not in str(
        jax.make_jaxpr(fused_dot, static_argnums=2)(x, w, MATMUL)
    )


# Whose gradients are a sum of outer products, and which are turned.
WIDE, NARROW = (10, 30, 64), (40, 30, 10)
both = pytest.mark.parametrize("shape", [WIDE, NARROW], ids=["wide", "narrow"])


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_product_and_its_gradients(dtype, shape):
    x, w, y = arrays(*shape, dtype=dtype)
    assert not is_plain(x, w)

    def by(dot):
        out, pull = jax.vjp(lambda x, w: dot(x, w), x, w)
        return out, pull(y)

    got, want = by(lambda x, w: fused_dot(x, w, MATMUL)), by(jnp.matmul)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), tolerance, tolerance
        )


@both
@pytest.mark.parametrize("wide_sum", [None, jnp.float32], ids=["bf16", "f32"])
def test_gradients_of_16_bits_are_summed_in_32(shape, wide_sum):
    x, w, y = arrays(*shape, dtype=jnp.bfloat16)

    def error(dot):
        def product(w):
            return dot(x, w, MATMUL, preferred_element_type=wide_sum)

        out, pull = jax.vjp(product, w)
        (got,) = pull(y.astype(out.dtype))
        want = np.asarray(x, np.float64).T @ np.asarray(y, np.float64)
        return np.abs(np.asarray(got, np.float64) - want).max()

    assert error(fused_dot) <= 1.1 * error(jax.lax.dot_general)


@pytest.mark.parametrize("columns", [64, 10], ids=["wide", "narrow"])
def test_no_examples_have_no_gradient(columns):
    x, w, _ = arrays(0, 4, columns)
    got = jax.grad(lambda w: jnp.sum(fused_dot(x, w, MATMUL)))(w)
    np.testing.assert_array_equal(got, np.zeros((4, columns)))


@pytest.mark.parametrize("columns", [64, 10], ids=["wide", "narrow"])
def test_forward_mode_and_second_derivatives(columns):
    x, w, y = arrays(3, 4, columns)

    def by(dot):
        def f(w):
            return jnp.sum(jnp.tanh(dot(jnp.tanh(dot(x, w)), w.T)) ** 2)

        forward = jax.jvp(f, (w,), (jnp.cos(w),))
        hessian_product = jax.jvp(jax.grad(f), (w,), (jnp.sin(w),))
        return forward, hessian_product

    got, want = by(lambda x, w: fused_dot(x, w, MATMUL)), by(jnp.matmul)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), got, want)


@both
def test_each_client_has_weights_of_its_own(shape):
    x, w, y = arrays(*shape)
    many = jnp.stack([w, 2 * w, -w])

    def gradient(dot, w):
        return jax.grad(lambda w: jnp.sum(y * jnp.tanh(dot(x, w))))(w)

    got = jax.vmap(lambda w: gradient(lambda a, b: fused_dot(a, b, MATMUL), w))(many)
    want = jax.vmap(lambda w: gradient(jnp.matmul, w))(many)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(17, 30, 64), (10, 30, 63), (10, 30, 17)], ids=str)
def test_large_batches_and_layers_between_are_plain(shape):
    x, w, _ = arrays(*shape)
    assert is_plain(x, w)
    np.testing.assert_array_equal(fused_dot(x, w, MATMUL), x @ w)


def test_other_contractions_are_plain():
    x, w, _ = arrays()
    got = fused_dot(x, w.T, (((1,), (1,)), ((), ())))
    np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_wide_layer_is_never_stored():
    """A compiled SGD step needs no room for it, as the one with a matmul does."""

    x, w, _ = arrays(10, 512, 256)

    def temporary(dot):
        def step(w):
            return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(dot(x, w, MATMUL))))(w)

        lowered = jax.jit(step, donate_argnums=0).lower(w)
        compiled = lowered.compile({"xla_backend_optimization_level": "3"})
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    model = 4 * 512 * 256
    assert temporary(fused_dot) < model / 4
    assert temporary(jax.lax.dot_general) >= model


def test_wrong_shapes_are_refused():
    x, w, _ = arrays()
    with pytest.raises(TypeError, match="contracting"):
        fused_dot(x, w[1:], MATMUL)
