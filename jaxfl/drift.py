"""How far clients drift apart: their updates, and the way from one model to another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Params

PyTree = Any


def pairwise_cosine(updates: PyTree) -> jax.Array:
    """The cosine of the angle between the updates of every two clients.

    `<g_i, g_j> / (||g_i|| ||g_j||)`, over all leaves together: 1 where two clients pull
    the same way, -1 where each undoes the other's work.

    Args:
      updates: pytree of `[K, ...]` arrays, for instance what a `tap` reported of one
        round; `jax.vmap` takes those of many.

    Returns:
      float32 `[K, K]`, NaN for an update that is zero or not finite.

    >>> updates = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])}
    >>> pairwise_cosine(updates).tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    length = jax.vmap(tree.norm)(updates)
    unit = [_rows(x) / length[:, None] for x in jax.tree.leaves(updates)]
    # Full precision, which a TPU or GPU would not take by itself.
    highest = jax.lax.Precision.HIGHEST
    return sum(
        (jnp.matmul(x, x.T, precision=highest) for x in unit), start=jnp.float32(0)
    )


def gradient_diversity(updates: PyTree, sent: jax.Array | None = None) -> jax.Array:
    """How little the updates of clients have in common.

    `sum_i ||g_i||^2 / ||sum_i g_i||^2`: `1 / K` where all are the same, 1 where they
    are orthogonal, more where they cancel. Times K it is how many clients a sum can
    have until another brings no speed.

    Args:
      updates: pytree of `[K, ...]` arrays, see `pairwise_cosine`.
      sent: bool `[K]`, whose updates count, such as `info.sent`; all if None.

    Returns:
      float32 `[]`; NaN where nobody counts, infinite where they cancel.

    >>> same = jnp.ones((4, 3))
    >>> gradient_diversity(same).item(), gradient_diversity(jnp.eye(4)).item()
    (0.25, 1.0)
    >>> gradient_diversity(jnp.array([[1.0], [jnp.nan]]), jnp.array([1, 0]) > 0).item()
    1.0

    Reference: Yin et al. 2018, arXiv 1706.05699, definition 1.
    """
    leaves = [_rows(x) for x in jax.tree.leaves(updates)]
    if sent is not None:
        leaves = [jnp.where(jnp.asarray(sent)[:, None], x, 0.0) for x in leaves]
    each = sum(jnp.sum(x**2) for x in leaves)
    return jnp.asarray(each / sum(jnp.sum(x.sum(0) ** 2) for x in leaves))


def linear_path(
    value: Callable[[Params], PyTree], a: Params, b: Params, points: int = 11
) -> PyTree:
    """What a model scores all along the straight line from one model to another.

    `value((1 - t) a + t b)` for t from 0 to 1 in equal steps.

    Args:
      value: `params -> ` a scalar, or a pytree of them: a loss on held-out examples.
      a: the model at the start.
      b: the model at the end.
      points: P, models looked at, those two among them.

    Returns:
      What value returns, `[P]`. One model at a time is held.

    Raises:
      ValueError: if there are fewer than 2 points.

    >>> def loss(w):
    ...     return (w**2 - 1) ** 2  # two minima with a hill between
    >>> along = linear_path(loss, jnp.float32(-1), jnp.float32(1), points=5)
    >>> along.tolist(), barrier(along).item()
    ([0.0, 0.5625, 1.0, 0.5625, 0.0], 1.0)

    Reference: Frankle et al. 2020, arXiv 1912.05671, section 2.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}.")

    def at(t):
        def mixed(x, y):
            return ((1 - t) * x + t * y).astype(jnp.result_type(x))

        return value(jax.tree.map(mixed, a, b))

    return jax.lax.map(at, jnp.linspace(0.0, 1.0, points))


def barrier(along: jax.Array) -> jax.Array:
    """The height of the hill between two models: their instability.

    `max_t L_t - (L_0 + L_1) / 2`, of losses along a line between them. Two models whose
    barrier is about 0 lie in one valley, where averaging them does no harm.

    Args:
      along: float `[P]`, losses, see `linear_path`.

    Returns:
      float `[]`, not negative.

    >>> barrier(jnp.array([1.0, 5.0, 2.0])).item()
    3.5

    Reference: Frankle et al. 2020, arXiv 1912.05671, section 2.
    """
    return jnp.max(along) - (along[0] + along[-1]) / 2


def _rows(x: jax.Array) -> jax.Array:
    """Each client's numbers in a row, float32."""
    x = jnp.asarray(x, jnp.float32)
    return x.reshape(x.shape[0], -1)
