"""A convolution that stays a matmul, and a max pool that stays a reshape.

XLA's CPU convolution is about ten times slower inside a loop (`lax.scan` over local
steps) than outside it, and `vmap` over clients, each with a kernel of its own, turns
it into a grouped convolution, which is no faster. A matmul has neither problem, and
on a CPU, where local steps are bound by arithmetic, Winograd's takes half of it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def matmul_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    r"""Drop-in for `jax.lax.conv_general_dilated`: strided slices and one matmul.

    .. math:: y_{b,s,o} = \sum_{k,c} x_{b,\; s \cdot stride + k \cdot dilation,\; c}
              \; w_{k,c,o}

    The slices of every kernel offset `k` are concatenated along the channels to
    patches `[B, *S', prod(kernel) * C]`, which one matmul contracts with the kernel.
    Any number of spatial dimensions, every layout, stride, padding, kernel dilation and
    dtype; `jit`, `vmap`, and forward, reverse and higher derivatives.

    On a CPU, kernels 3 to 5 wide with unit strides, no dilation and at least 16
    channels in float32 or float64 take Winograd's way along the last spatial dimension:
    t products for every `t + 1 - width` outputs, where the definition has
    `width (t + 1 - width)`, and t is 6 or 8, whichever needs fewer for the image. It
    halves the time of the 5x5 convolution of 32 channels and its gradients; the
    rounding error is 2 to 5 times that of the plain sum.

    The patches take `prod(kernel)` times the memory of the input and are kept for the
    backward pass. What has no such form is handed to `lax.conv_general_dilated`
    unchanged: `lhs_dilation` other than 1 (a transposed convolution),
    `feature_group_count` or `batch_group_count` other than 1, an `out_sharding`,
    and an empty output.

    Args:
      lhs: Input, `[B, *S, C]` (in Flax's layout).
      rhs: Kernel, `[*kernel, C, O]` (in Flax's layout).
      window_strides: One stride per spatial dimension.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"` or one `(low, high)` pair per
        spatial dimension.
      lhs_dilation: Dilation of the input; see above.
      rhs_dilation: Dilation of the kernel, one number per spatial dimension.
      dimension_numbers: As in `lax`; note that `None` means NCHW, OIHW, NCHW.
      feature_group_count: See above.
      batch_group_count: See above.
      precision: Of the matmul, as in `lax.dot_general`.
      preferred_element_type: Of the matmul, as in `lax.dot_general`.
      out_sharding: See above.

    Returns:
      The convolution, `[B, *S', O]` in the output layout.

    Raises:
      ValueError, TypeError: Whatever `lax.conv_general_dilated` raises for these
        arguments, raised by the same code.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> layer = nn.Conv(8, (5, 5), conv_general_dilated=matmul_conv)
      >>> images = jax.numpy.ones((2, 28, 28, 1))
      >>> layer.init_with_output(jax.random.key(0), images)[0].shape
      (2, 28, 28, 8)

    Reference:
      Chellapilla, Puri and Simard (2006), High Performance Convolutional Neural
      Networks for Document Processing, IWFHR (unrolling a convolution to a matrix
      product). Lavin and Gray (2016), Fast Algorithms for Convolutional Neural
      Networks, arXiv:1509.09308 (`F(m, r)` in one dimension, section 4).
    """
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    out = jax.eval_shape(conv, lhs, rhs)  # also refuses bad input, in lax's words
    if (
        any(d != 1 for d in lhs_dilation or ())
        or (feature_group_count, batch_group_count) != (1, 1)
        or out_sharding is not None
        or out.size == 0
    ):
        return conv(lhs, rhs)

    n = lhs.ndim - 2
    dims = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    (b, c, *s), (o, i, *k), (out_b, out_c, *out_s) = dims
    lhs = lax.transpose(lhs, (b, *s, c))
    rhs = lax.transpose(rhs, (*k, i, o))
    kernel = rhs.shape[:n]
    dilation = tuple(rhs_dilation or (1,) * n)
    if isinstance(padding, str):
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], extents, window_strides, padding)
    edges = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    padded = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
    dot = functools.partial(
        lax.dot_general,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if (
        jax.default_backend() == "cpu"
        and 3 <= kernel[-1] <= 5
        and {*window_strides, *dilation} == {1}
        and rhs.shape[-2] >= 16
        and lhs.dtype in (jnp.float32, jnp.float64)
    ):
        y = _winograd(padded, rhs, dot)
    else:
        patches = _patches_p.bind(
            padded, kernel=kernel, strides=tuple(window_strides), dilation=dilation
        )
        kernels = rhs.reshape(-1, rhs.shape[-1])
        y = dot(patches, kernels, (((n + 1,), (0,)), ((), ())))
    return lax.transpose(y, np.argsort((out_b, *out_s, out_c)))


def _toom_cook(r: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`A [t, m], G [t, r], B [t, t]` of `F(m, r)`, where m = t + 1 - r and t <= 8.

    `A^T ((G g) * (B x))` are the m inner products of the r numbers g with the r
    successive ones of the t numbers x: evaluation of polynomials at 0, ±1, ±2, ±1/2 and
    infinity, a product at each, and the transpose of an interpolation. More points
    would be 3 and more, which lose digits.
    """

    def evaluate(k):
        points = np.array([0.0, 1, -1, 2, -2, 0.5, -0.5])[: tile - 1]
        return np.vstack([points[:, None] ** np.arange(k), np.eye(k)[-1]])

    interpolate = np.linalg.inv(evaluate(tile)).T
    interpolate[np.abs(interpolate) < 1e-12] = 0
    size = np.abs(interpolate).max(1, keepdims=True)
    return evaluate(tile + 1 - r), evaluate(r) * size, interpolate / size


def _winograd(x, w, dot):
    """`[B, *S, C]` with `[*kernel, C, O]`, unit strides: `F(m, r)` along the last S."""

    def products(tile):
        return tile * -(-width // (tile + 1 - r))

    def transform(matrix, xs):
        # One more matrix product: XLA would work out sums anew wherever they are used.
        flat = matrix.astype(xs.dtype) @ xs.reshape(len(xs), -1)
        return flat.reshape(-1, *xs.shape[1:])

    *kernel, r, _, features = w.shape
    axis = x.ndim - 2
    width = x.shape[axis] - r + 1
    tile = min(6, 8, key=products)
    m = tile + 1 - r
    tiles = -(-width // m)
    short = (tiles - 1) * m + tile - x.shape[axis]
    edges = [(0, short * (i == axis), 0) for i in range(x.ndim)]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    a, g, b = _toom_cook(r, tile)

    entries = [
        lax.slice_in_dim(x, i, i + (tiles - 1) * m + 1, m, axis) for i in range(tile)
    ]
    x = transform(b, jnp.stack(entries))  # [t, B, *S, tiles, C]
    ones = (1,) * len(w.shape[:-2])
    x = x.reshape(-1, *x.shape[2:])
    x = _patches_p.bind(x, kernel=(*kernel, 1), strides=ones, dilation=ones)
    w = transform(g, jnp.moveaxis(w, -3, 0))
    y = dot(
        x.reshape(tile, -1, x.shape[-1]),
        w.reshape(tile, -1, features),
        (((2,), (1,)), ((0,), (0,))),
    )
    # Not m slices: the transpose of a split is a concatenation, theirs would be a sum.
    parts = lax.split(transform(a.T, y), [1] * m)
    y = jnp.stack([part[0] for part in parts], 1)
    y = y.reshape(-1, *x.shape[1:-2], tiles * m, features)
    return lax.slice_in_dim(y, 0, width, axis=axis)


def max_pool(x: jax.Array, window: Sequence[int] = (2, 2)) -> jax.Array:
    r"""Maximum over windows that tile the input exactly, by reshaping.

    .. math:: y_{b,s,c} = \max_{0 \le k < window} x_{b,\; s \cdot window + k,\; c}

    The values are those of `flax.linen.max_pool(x, window, strides=window)`; the
    backward pass is several times faster on a CPU. Where entries of a window tie, they
    share the gradient (on a CPU by halves, an axis after another; on a GPU equally),
    whereas `lax.reduce_window` gives all of it to the first.

    Args:
      x: Input, `[B, *S, C]`.
      window: One size per spatial dimension, each a divisor of that dimension.

    Returns:
      The maxima, `[B, *(S / window), C]`.

    Raises:
      ValueError: `window` has not one size per spatial dimension, or does not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)
    """
    sizes = x.shape[1:-1]
    if len(window) != len(sizes) or any(
        w < 1 or size % w for size, w in zip(sizes, window, strict=False)
    ):
        raise ValueError(
            f"window must have one size per spatial dimension of x, each dividing it; "
            f"got window={tuple(window)} for x of shape {x.shape} ([B, *S, C]). Use "
            f"flax.linen.max_pool for windows that overlap or need padding."
        )
    if jax.default_backend() == "gpu":  # where one pass is faster than one an axis
        pairs = [
            n for size, w in zip(sizes, window, strict=True) for n in (size // w, w)
        ]
        axes = range(2, 2 + 2 * len(window), 2)
        return jnp.max(x.reshape(len(x), *pairs, x.shape[-1]), axes)
    for axis, w in enumerate(window, start=1):
        x = x.reshape(*x.shape[:axis], -1, w, *x.shape[axis + 1 :])
        parts = (lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(w))
        x = functools.reduce(jnp.maximum, parts)
    return x


# Gathering patches is linear, so JAX could transpose it by itself, but would add padded
# copies up where slice-adds in place do: 18 % of a local step of the CNN on two CPU
# cores. A custom_vjp could say so too but would forbid forward mode, and `linear_call`
# has no batching rule; hence two primitives, each the transpose of the other.


def _gather(x, *, kernel, strides, dilation):
    """`[B, *S, C]` to `[B, *S', prod(kernel) * C]`, by slices."""
    for axis in reversed(range(1, x.ndim - 1)):
        k, stride, d = kernel[axis - 1], strides[axis - 1], dilation[axis - 1]
        stop = x.shape[axis] - (k - 1) * d
        x = lax.concatenate(
            [lax.slice_in_dim(x, i * d, i * d + stop, stride, axis) for i in range(k)],
            x.ndim - 1,
        )
    return x


def _scatter(y, *, shape, kernel, strides, dilation):
    """`[B, *S', prod(kernel) * C]` to `[B, *S, C]`, by slice-adds."""
    for axis in range(1, y.ndim - 1):
        k, stride, d = kernel[axis - 1], strides[axis - 1], dilation[axis - 1]
        # A stride leaves holes between the entries: fill them, so that every slice is
        # contiguous and the additions happen in place.
        holes = [(0, 0, 0)] * y.ndim
        holes[axis] = (0, 0, stride - 1)
        parts = jnp.split(lax.pad(y, jnp.zeros((), y.dtype), holes), k, -1)
        size = (*y.shape[:axis], shape[axis - 1], *parts[0].shape[axis + 1 :])
        total = jnp.zeros(size, y.dtype)
        for i, part in enumerate(parts):
            window = [slice(None)] * axis
            window.append(slice(i * d, i * d + part.shape[axis]))
            total = total.at[tuple(window)].add(part)
        y = total
    return y


# On a GPU a step is bound by memory, and what is above takes up to three times as long
# as to read and write the patches once. What follows takes hardly longer.


def _gather_at_once(x, *, kernel, strides, dilation):
    """`_gather`, each value looked up at its place in x."""
    n, spatial = len(kernel), x.shape[1:-1]
    coordinates = []
    for axis, (size, k, stride, d) in enumerate(
        zip(spatial, kernel, strides, dilation, strict=True)
    ):
        starts = np.arange(0, size - (k - 1) * d, stride)
        place = starts[:, None] + d * np.arange(k)
        others = [i for i in range(2 * n) if i not in (axis, n + axis)]
        coordinates.append(np.expand_dims(place, others))
    places = np.ravel_multi_index(np.broadcast_arrays(*coordinates), spatial)
    rows = x.reshape(len(x), -1, x.shape[-1])
    patches = rows.at[:, places.reshape(-1)].get(mode="promise_in_bounds")
    return patches.reshape(len(x), *places.shape[:n], -1)


def _scatter_at_once(y, *, shape, kernel, strides, dilation):
    """`_scatter`, as one sum of all the offsets' slices."""
    parts = jnp.split(y, np.prod(kernel), -1)
    total = jnp.zeros((), y.dtype)
    for part, offset in zip(parts, np.ndindex(*kernel), strict=True):
        edges = [(0, 0, 0)]
        for i, d, stride, n, size in zip(
            *(offset, dilation, strides, part.shape[1:-1], shape), strict=True
        ):
            edges.append((i * d, size - i * d - (n - 1) * stride - 1, stride - 1))
        total += lax.pad(part, jnp.zeros((), y.dtype), [*edges, (0, 0, 0)])
    return total


def _primitive(name, fn, on_gpu):
    primitive = Primitive(name)
    primitive.def_impl(fn)
    mlir.register_lowering(primitive, mlir.lower_fun(fn, multiple_results=False))
    for platform in ("cuda", "rocm"):
        rule = mlir.lower_fun(on_gpu, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)

    def abstract(x, **params):
        out = jax.eval_shape(
            functools.partial(fn, **params), jax.ShapeDtypeStruct(x.shape, x.dtype)
        )
        return x.update(shape=out.shape)

    def batch(args, axes, **params):
        # Patches do not mix examples: a mapped axis is more examples.
        x = jnp.moveaxis(args[0], axes[0], 0)
        y = primitive.bind(x.reshape(-1, *x.shape[2:]), **params)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    return primitive


_patches_p = _primitive("jaxfl_patches", _gather, _gather_at_once)
_unpatches_p = _primitive("jaxfl_unpatches", _scatter, _scatter_at_once)
ad.deflinear2(
    _patches_p,
    lambda ct, x, **params: [_unpatches_p.bind(ct, shape=x.aval.shape[1:-1], **params)],
)
ad.deflinear2(
    _unpatches_p,
    lambda ct, _, *, shape, **params: [_patches_p.bind(ct, **params)],
)
