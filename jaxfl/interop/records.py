"""Pytrees of arrays as Flower's records."""

import functools
import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import tree

PyTree = Any


def pack(arrays: PyTree) -> Any:
    """A pytree of arrays as a Flower `ArrayRecord`, by the paths of its leaves.

    Random keys go as the integers that they are made of, and dtypes that NumPy has not,
    such as bfloat16, as unsigned integers of the same bits.

    >>> record = pack({"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)})
    >>> {name: array.dtype for name, array in record.items()}
    {"['n']": 'int32', "['w']": 'uint16'}
    """
    flower = flower_library()
    leaves = jax.tree_util.tree_leaves_with_path(tree.without_keys(arrays))
    return flower.ArrayRecord(
        {
            jax.tree_util.keystr(path): flower.Array(_to_wire(np.asarray(x)))
            for path, x in leaves
        }
    )


def unpack(record: Mapping[str, Any], like: PyTree, name: str) -> PyTree:
    """The inverse of `pack`.

    Args:
      record: what arrived.
      like: a pytree of arrays, or of their shapes and dtypes.
      name: of what it is, for an error.

    Raises:
      ValueError: if it is of other arrays, or one has another shape or dtype.

    >>> like = {"w": jnp.zeros(2, jnp.bfloat16)}
    >>> unpack(pack({"w": jnp.ones(2, jnp.bfloat16)}), like, "model")
    {'w': Array([1, 1], dtype=bfloat16)}
    >>> unpack(pack({"w": jnp.ones(3)}), like, "model")
    Traceback (most recent call last):
    ValueError: model: ['w'] must be uint16[2] on the wire, got float32[3].
    """
    shapes = jax.eval_shape(tree.without_keys, like)
    expected, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path) for path, _ in expected]
    if set(names) != set(record):
        missing, unknown = set(names) - set(record), set(record) - set(names)
        raise ValueError(
            f"{name} must have the arrays of this federation; missing: "
            f"{sorted(missing)}, unknown: {sorted(unknown)}."
        )
    arrays = []
    for key, (_, want) in zip(names, expected, strict=True):
        got, wire = record[key].numpy(), _wire_dtype(want.dtype)
        if (got.shape, got.dtype) != (want.shape, wire):
            raise ValueError(
                f"{name}: {key} must be {wire}{list(want.shape)} on the wire, got "
                f"{got.dtype}{list(got.shape)}."
            )
        arrays.append(jnp.asarray(got.view(want.dtype)))
    return tree.with_keys(structure.unflatten(arrays), jax.tree.map(_some_key, like))


def _some_key(x):
    """A key of the generator that is asked for, of which a shape does not tell."""
    return jnp.empty((), x.dtype) if tree.is_key(x) else x


def _wire_dtype(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _to_wire(x: np.ndarray) -> np.ndarray:
    return x.view(_wire_dtype(x.dtype))


@functools.cache
def flower_library() -> SimpleNamespace:
    """What is used of Flower."""
    try:
        app = importlib.import_module("flwr.app")
        client = importlib.import_module("flwr.clientapp")
    except ImportError as error:
        raise ImportError(
            "jaxfl.interop.flower needs flwr: pip install 'jaxfl[flower]'"
        ) from error

    def message(content: dict, node: int, kind: str, number: int):
        return app.Message(app.RecordDict(content), node, kind, group_id=str(number))

    def reply(to, **content):
        return app.Message(app.RecordDict(content), reply_to=to)

    return SimpleNamespace(
        ClientApp=client.ClientApp,
        message=message,
        reply=reply,
        Array=app.Array,
        ArrayRecord=app.ArrayRecord,
        ConfigRecord=app.ConfigRecord,
        Context=app.Context,
        RecordDict=app.RecordDict,
    )
