"""The convolution by matmul equals lax's, in values and derivatives, everywhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxfl import conv
from jaxfl.conv import matmul_conv, max_pool

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance, tolerance
    )


def same(x, w, *args, tolerance=1e-4, **kwargs):
    """Values, gradients with respect to both, and forward mode."""

    def ours(x, w):
        return matmul_conv(x, w, *args, **kwargs)

    def lax_(x, w):
        return lax.conv_general_dilated(x, w, *args, **kwargs)

    out, vjp = jax.vjp(ours, x, w)
    want, want_vjp = jax.vjp(lax_, x, w)
    assert out.dtype == want.dtype
    close(out, want, tolerance)
    ct = normal(7, *out.shape, dtype=out.dtype)
    for got, expected in zip(vjp(ct), want_vjp(ct), strict=True):
        assert got.dtype == expected.dtype
        close(got, expected, tolerance)
    tangents = normal(8, *x.shape, dtype=x.dtype), normal(9, *w.shape, dtype=w.dtype)
    close(
        jax.jvp(ours, (x, w), tangents)[1],
        jax.jvp(lax_, (x, w), tangents)[1],
        tolerance,
    )
    close(jax.jit(ours)(x, w), out, tolerance)


@pytest.mark.parametrize("dilation", [None, (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER", [(1, 2), (-1, 3)]])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_2d(strides, padding, dilation):
    same(
        normal(0, 3, 13, 10, 4),
        normal(1, 3, 5, 4, 6),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=NHWC,
    )


@pytest.mark.parametrize(
    "spec", [None, NHWC, ("NCHW", "OIHW", "NHWC"), ("HWNC", "IHWO", "CNHW")]
)
def test_layouts(spec):
    dims = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, spec)
    x, w = np.zeros(4, int), np.zeros(4, int)
    x[list(dims.lhs_spec)] = 2, 3, 9, 8  # N C H W
    w[list(dims.rhs_spec)] = 4, 3, 2, 3  # O I H W
    same(normal(0, *x), normal(1, *w), (2, 1), "SAME", dimension_numbers=spec)


@pytest.mark.parametrize("n", [1, 3])
def test_other_dimensions(n):
    spec = {1: ("NWC", "WIO", "NWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}[n]
    x, w = normal(0, 2, *(7, 6, 5)[:n], 3), normal(1, *(3, 2, 2)[:n], 3, 4)
    same(x, w, (2,) * n, "SAME", dimension_numbers=spec)


def test_bfloat16_and_accumulation():
    x = normal(0, 2, 8, 8, 3, dtype=jnp.bfloat16)
    w = normal(1, 3, 3, 3, 4, dtype=jnp.bfloat16)
    same(x, w, (1, 1), "SAME", dimension_numbers=NHWC, tolerance=0.1)
    out = matmul_conv(
        *(x, w, (1, 1), "SAME"),
        dimension_numbers=NHWC,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ],
)
def test_falls_back_on_lax(kwargs):
    w = normal(1, 3, 3, 2 if "feature_group_count" in kwargs else 4, 4)
    x = normal(0, 2, 8, 8, 4)
    padding = [(1, 1), (1, 1)]
    jaxpr = jax.make_jaxpr(
        lambda x, w: matmul_conv(
            x, w, (1, 1), padding, dimension_numbers=NHWC, **kwargs
        )
    )(x, w)
    assert "conv_general_dilated" in str(jaxpr)
    same(x, w, (1, 1), padding, dimension_numbers=NHWC, **kwargs)


def test_empty_output():
    x, w = normal(0, 2, 2, 2, 1), normal(1, 3, 3, 1, 4)
    out = matmul_conv(x, w, (1, 1), "VALID", dimension_numbers=NHWC)
    assert out.shape == (2, 0, 0, 4)


def test_stays_a_matmul_under_vmap_over_kernels():
    x, w = normal(0, 5, 2, 8, 8, 3), normal(1, 5, 3, 3, 3, 4)

    def conv(fn):
        return lambda x, w: fn(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    def grads(fn):
        return jax.vmap(jax.grad(lambda *a: jnp.sin(conv(fn)(*a)).sum(), (0, 1)))

    out = jax.vmap(conv(matmul_conv))(x, w)
    close(out, jnp.stack([conv(matmul_conv)(*each) for each in zip(x, w, strict=True)]))
    want = grads(lax.conv_general_dilated)(x, w)
    jax.tree.map(close, grads(matmul_conv)(x, w), want)
    assert "convolution" not in jax.jit(grads(matmul_conv)).lower(x, w).as_text()
    shared = jax.vmap(conv(matmul_conv), (None, 0))(x[0], w)
    close(shared[2], conv(matmul_conv)(x[0], w[2]))


def test_second_derivatives():
    x, w = normal(0, 1, 4, 4, 1), normal(1, 3, 3, 1, 2)

    def loss(fn):
        return lambda x: jnp.sin(fn(x, w, (2, 1), "SAME", dimension_numbers=NHWC)).sum()

    want = jax.hessian(loss(lax.conv_general_dilated))(x)
    close(jax.hessian(loss(matmul_conv))(x), want)
    close(jax.jacrev(jax.grad(loss(matmul_conv)))(x), want)


@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map_and_scan(check):
    x, w = normal(0, 3, 2, 8, 8, 1), normal(1, 3, 3, 1, 2)

    def loss(w, x):
        return jnp.sin(matmul_conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC)).sum()

    def train(w, xs):
        w = lax.pcast(w, "clients", to="varying") if check else w
        step = lambda w, x: (w - 0.1 * jax.grad(loss)(w, x), None)  # noqa: E731
        return lax.psum(lax.scan(step, w, xs[0])[0], "clients")

    mesh = Mesh(np.array(jax.devices()[:1]), ("clients",))
    run = jax.shard_map(
        train, mesh=mesh, in_specs=(P(), P("clients")), out_specs=P(), check_vma=check
    )
    want = w
    for batch in x:
        want = want - 0.1 * jax.grad(loss)(want, batch)
    close(jax.jit(run)(w, x[None]), want)


def test_refuses_what_lax_refuses():
    x, w = normal(0, 2, 8, 8, 3), normal(1, 3, 3, 4, 4)
    with pytest.raises((ValueError, TypeError), match="feature"):
        matmul_conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC)


def test_linen_conv_takes_it_by_one_argument():
    x = normal(0, 2, 9, 9, 3)
    for kwargs in (
        {},
        {"strides": 2, "padding": "VALID"},
        {"padding": "CIRCULAR", "kernel_dilation": 2},
    ):
        theirs = nn.Conv(4, (3, 3), **kwargs)
        ours = nn.Conv(4, (3, 3), conv_general_dilated=matmul_conv, **kwargs)
        params = theirs.init(jax.random.key(0), x)
        close(ours.apply(params, x), theirs.apply(params, x))


def test_nnx_conv_takes_it_by_one_argument():
    x = normal(0, 2, 9, 9, 3)
    for kwargs in (
        {},
        {"strides": 2, "padding": "VALID"},
        {"preferred_element_type": jnp.float32},
    ):
        theirs = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **kwargs)
        ours = nnx.Conv(
            *(3, 4, (3, 3)),
            rngs=nnx.Rngs(0),
            conv_general_dilated=matmul_conv,
            **kwargs,
        )
        close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "dilation"),
    [
        ((9,), (3,), (2,), (1,)),
        ((8, 7), (5, 3), (1, 1), (1, 2)),
        ((9, 8), (2, 3), (3, 2), (2, 1)),
        ((5, 4, 6), (2, 2, 3), (1, 2, 1), (1, 1, 2)),
    ],
)
def test_what_a_gpu_does_instead(shape, kernel, strides, dilation):
    options = dict(kernel=kernel, strides=strides, dilation=dilation)
    x = normal(0, 2, *shape, 3)
    patches = conv._gather(x, **options)
    np.testing.assert_array_equal(conv._gather_at_once(x, **options), patches)
    ct, options["shape"] = normal(1, *patches.shape), shape
    close(conv._scatter_at_once(ct, **options), conv._scatter(ct, **options), 1e-5)


def test_a_gpu_is_given_it():
    x, w = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 5)
    step = jax.jit(
        jax.grad(lambda x: matmul_conv(x, w, (1, 1), "SAME", None, None, NHWC).sum())
    )
    lowered = step.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.scatter" not in lowered
    assert "stablehlo.scatter" in step.lower(x).as_text()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("window", [(2, 2), (3, 1), (4, 6)])
def test_max_pool_is_reduce_window(window, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = normal(0, 2, 12, 6, 3)

    def theirs(x):
        return nn.max_pool(x, window, strides=window)

    np.testing.assert_array_equal(max_pool(x, window), theirs(x))
    weight = normal(1, *theirs(x).shape)
    close(
        jax.grad(lambda x: (max_pool(x, window) * weight).sum())(x),
        jax.grad(lambda x: (theirs(x) * weight).sum())(x),
    )


def test_max_pool_shares_the_gradient_of_a_tie():
    x = jnp.zeros((1, 2, 2, 1))
    np.testing.assert_array_equal(jax.grad(lambda x: max_pool(x).sum())(x), x + 0.25)
    first = jax.grad(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)).sum())(x)
    assert sorted(first.ravel().tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("window", [(2, 2), (3,), (3, 0), (3, 1, 1)])
def test_max_pool_refuses(window):
    with pytest.raises(ValueError, match="window must have one size"):
        max_pool(jnp.zeros((1, 9, 8, 1)), window)


# --- Winograd's way, for 16 channels and more ---------------------------------


def is_winograd(x, w, strides=(1, 1), **kwargs):
    """Whether the matmul has a batch axis, the 6 evaluation points."""
    program = jax.make_jaxpr(lambda x, w: matmul_conv(x, w, strides, "SAME", **kwargs))(
        x, w
    )
    return "([0], [0])" in str(program)


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(0, 3), (2, 1)]], ids=str)
@pytest.mark.parametrize("width", [3, 4, 5])
def test_winograd(width, padding):
    """Also where the tiles do not fill the last one."""
    x, w = normal(0, 2, 7, 9, 16), normal(1, 2, width, 16, 5)
    assert is_winograd(x, w, dimension_numbers=NHWC)
    same(x, w, (1, 1), padding, dimension_numbers=NHWC)


@pytest.mark.parametrize("n", [1, 3])
def test_winograd_in_other_dimensions(n):
    x, w = normal(0, 2, 16, *(6, 5, 8)[:n]), normal(1, 3, 16, *(2, 1, 3)[-n:])
    same(x, w, (1,) * n, "SAME")


def test_winograd_layouts():
    spec = ("HWNC", "IHWO", "CNHW")
    x, w = normal(0, 8, 9, 2, 16), normal(1, 16, 3, 5, 4)
    assert is_winograd(x, w, dimension_numbers=spec)
    same(x, w, (1, 1), "SAME", dimension_numbers=spec)


def test_what_is_not_winograds():
    x, w = normal(0, 2, 8, 8, 16), normal(1, 3, 3, 16, 4)
    assert is_winograd(x, w, dimension_numbers=NHWC)
    half = jnp.bfloat16
    for arguments, options in (
        ((x, w, (1, 2)), {}),
        ((x, w), {"rhs_dilation": (1, 2)}),
        ((x[..., :8], w[:, :, :8]), {}),
        ((x, normal(1, 3, 6, 16, 4)), {}),
        ((x, normal(1, 3, 1, 16, 4)), {}),
        ((x.astype(half), w.astype(half)), {}),
    ):
        assert not is_winograd(*arguments, **options, dimension_numbers=NHWC)


@pytest.mark.parametrize("shape", [(10, 14, 14, 32), (10, 8, 8, 32)])
@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_winograd_loses_few_digits(shape, kernel):
    """Less than eight times the error of the plain sum, against float64."""
    x, w = normal(0, *shape), normal(1, kernel, kernel, 32, 64)
    dy = normal(2, *shape[:-1], 64)

    def all_three(conv, *args):
        *args, dy = (jnp.asarray(a) for a in args)
        y, pull = jax.vjp(
            lambda x, w: conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC), *args
        )
        return [np.asarray(a, np.float64) for a in (y, *pull(dy))]

    with jax.enable_x64(True):
        exact = all_three(
            lax.conv_general_dilated, *(np.asarray(a, np.float64) for a in (x, w, dy))
        )
    plain = all_three(lax.conv_general_dilated, x, w, dy)
    for ours, theirs, truth in zip(
        all_three(matmul_conv, x, w, dy), plain, exact, strict=True
    ):
        error = np.linalg.norm(ours - truth) / np.linalg.norm(truth)
        assert error < 8 * np.linalg.norm(theirs - truth) / np.linalg.norm(truth)
        assert error < 3e-6
