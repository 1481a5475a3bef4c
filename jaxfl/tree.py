"""Helpers for pytrees of arrays, where `optax.tree` has none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def is_finite(tree: PyTree) -> jax.Array:
    """Whether every inexact number in the tree is finite, bool `[]`.

    >>> is_finite({"w": jnp.ones(3), "n": jnp.arange(2)})
    Array(True, dtype=bool)
    >>> is_finite({"w": jnp.array([1.0, jnp.inf])})
    Array(False, dtype=bool)
    """
    finite = jnp.array(True)
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            finite &= jnp.all(jnp.isfinite(x))
    return finite


def num_bits(tree: PyTree) -> int:
    """The length of all arrays of the tree in their own dtypes, in bits.

    >>> num_bits({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)})
    224
    """
    return sum(8 * x.dtype.itemsize * x.size for x in jax.tree.leaves(tree))


def require_floats(tree: PyTree, name: str) -> None:
    """Raises TypeError, in a channel's name, if its payload has an integer leaf."""
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f"{name}: payload must be of floats, got {x.dtype}.")


def of_floats(name: str, init: Callable = lambda payload: ()) -> Callable:
    """The init of a part, which refuses a payload that has an integer leaf."""

    def checked(payload):
        require_floats(payload, name)
        return init(payload)

    return checked


def norm(tree: PyTree, squared: bool = False) -> jax.Array:
    """The Euclidean norm over all leaves together, or its square, in float32.

    >>> norm({"w": jnp.array([3.0], jnp.bfloat16), "b": jnp.array([4.0])}).item()
    5.0
    """
    return optax.tree.norm(optax.tree.cast(tree, jnp.float32), squared=squared)


def mask(flag: jax.Array, tree: PyTree) -> PyTree:
    """The tree where the flag holds, zeros elsewhere; never a product with a NaN.

    >>> mask(jnp.array(False), jnp.array([jnp.nan, 1.0])).tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(lambda x: jnp.where(flag, x, jnp.zeros_like(x)), tree)


def scale(scalar: jax.Array | float, tree: PyTree) -> PyTree:
    """The tree times a scalar, each leaf in the dtype it had.

    >>> scale(jnp.float32(2.0), jnp.ones(2, jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    return jax.tree.map(lambda x: (x * scalar).astype(x.dtype), tree)


def divide(tree: PyTree, scalar: jax.Array | float) -> PyTree:
    """The tree over a scalar, each leaf in the dtype it had.

    What is subtracted from a model is rounded once, wherever it is subtracted: of a
    product, compilers make a fused multiply-add here and none there.

    >>> divide(jnp.ones(2, jnp.bfloat16), jnp.float32(2.0)).dtype
    dtype(bfloat16)
    """
    return jax.tree.map(lambda x: (x / scalar).astype(x.dtype), tree)


def where_rows(flags: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Row `i` of every leaf from `new` where `flags[i]`, else from `old`.

    >>> flags = jnp.array([True, False])
    >>> where_rows(flags, jnp.ones((2, 2)), jnp.zeros((2, 2))).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """

    def leaf(a, b):
        return jnp.where(flags.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, new, old)


def mean_rows(flags: jax.Array, tree: PyTree) -> PyTree:
    """The mean of the rows whose flag holds, each leaf in its dtype; of none, 0.

    >>> mean_rows(jnp.array([True, True, False]), jnp.array([1.0, 3.0, 7.0])).item()
    2.0
    """
    zeros = jax.tree.map(jnp.zeros_like, tree)
    summed = jax.tree.map(lambda x: jnp.sum(x, 0), where_rows(flags, tree, zeros))
    return divide(summed, jnp.maximum(jnp.sum(flags), 1).astype(jnp.float32))


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths.

    >>> named({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
    }


def with_named(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    """The tree with these leaves in place of those of the same paths.

    >>> with_named({"dense": {"kernel": 1, "bias": 2}}, {"dense/kernel": 3})
    {'dense': {'bias': 2, 'kernel': 3}}
    """
    every = named(tree) | leaves
    return jax.tree.structure(tree).unflatten(every.values())


def is_key(x: Any) -> bool:
    """Whether an array is of random keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def without_keys(tree: PyTree) -> PyTree:
    """Random keys as the integers that they are made of, which files can hold.

    >>> without_keys({"key": jax.random.key(3)})
    {'key': Array([0, 3], dtype=uint32)}
    """
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def with_keys(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of `without_keys`; `like` says where there were keys."""

    def leaf(x, like):
        if is_key(like):
            return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))
        return x

    return jax.tree.map(leaf, tree, like)
