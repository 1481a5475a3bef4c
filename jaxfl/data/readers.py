"""Client data in the files of other projects: LEAF, FedJAX, TensorFlow Federated."""

import contextlib
import functools
import json
import os
import pathlib
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from jaxfl.data.federated import ClientData, group

# What a file has of one client, to `{name: [n, ...]}` of numbers.
Parse = Callable[[dict[str, Any]], Mapping[str, Any]]


def read_leaf(
    folder: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    parse: Parse = dict,
) -> tuple[ClientData, list[str]]:
    """The clients in LEAF's JSON files, all `*.json` of a folder, in order of name.

    Each file has `{"users": [u, ...], "num_samples": [n, ...], "user_data": {u: {"x":
    [...], "y": [...]}}}`. Files are read one after another, and each client's lists
    become arrays as soon as they are read, so that memory holds the text of one file
    beside the arrays. JSON's numbers become int32 or float32.

    Args:
      folder: with the files, such as LEAF's `data/train`.
      names: which clients, in this order; clients of the files that are not among them
        are left out, and those that no file has have no examples. With the names of
        the training clients, a client has one id in `train` and in `test`. None for
        all, in the order of the files.
      parse: of one client, `{"x": array, "y": array} -> {name: [n, ...]}` of numbers.
        Text is there as JSON's lists, of which the codes of characters may be made.

    Returns:
      The data, and the names by id.

    Raises:
      FileNotFoundError: if the folder has no such file.
      ValueError: if a file or a client in it is not like that; says which.

    >>> import tempfile
    >>> content = {"users": ["ann", "bob"], "num_samples": [1, 2], "user_data": {
    ...     "ann": {"x": [[0.5, 1]], "y": [3]},
    ...     "bob": {"x": [[0, 0], [1, 1]], "y": [0, 1]}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (pathlib.Path(folder) / "all.json").write_text(json.dumps(content))
    ...     data, names = read_leaf(folder)
    >>> names, data.size.tolist(), data.examples["y"].tolist()
    (['ann', 'bob'], [1, 2], [3, 0, 1])

    Reference: Caldas et al. 2018, LEAF, arXiv 1812.01097.
    """
    files = sorted(pathlib.Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: there is no *.json in this folder.")

    def clients():
        for file in files:
            for name, values, size in _leaf_file(file):
                yield f"{file}: client {name!r}", name, lambda v=values: v, size

    return _collect(clients(), names, parse, str(folder))


def read_fedjax(
    path: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    parse: Parse = dict,
) -> tuple[ClientData, list[str]]:
    """The clients in an SQLite file of FedJAX.

    It has one table, `federated_data(client_id BLOB, data BLOB, num_examples INTEGER)`,
    one row a client; `data` is a dictionary of arrays in msgpack, compressed by zlib.
    Clients are read row after row, in the order of the file.

    Args:
      path: the file.
      names: see `read_leaf`; rows of others are not decoded.
      parse: of one client, `{name: array} -> {name: [n, ...]}` of numbers; of text,
        FedJAX has arrays of bytes.

    Returns:
      The data, its arrays in the dtypes they came in, and the names by id.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file or a client in it is not like that; says which.

    Reference: Ro et al. 2021, FedJAX, arXiv 2108.02117 (`SQLiteFederatedData`).
    """
    with _database(path, "federated_data", ("client_id", "data", "num_examples")) as db:
        rows = db.execute(
            "SELECT client_id, data, num_examples FROM federated_data ORDER BY rowid"
        )

        def clients():
            for name, blob, size in _rows_of(rows, path):
                name = _text(name)
                yield (
                    f"{path}: client {name!r}",
                    name,
                    functools.partial(_unpack, blob),
                    size,
                )

        return _collect(clients(), names, parse, str(path))


def read_tff(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    split: str | None = None,
    names: Sequence[str] | None = None,
    parse: Parse = dict,
) -> tuple[ClientData, list[str]]:
    """The clients in an SQLite file of TensorFlow Federated, without TensorFlow.

    It has a table `examples(split_name TEXT, client_id TEXT, serialized_example_proto
    BLOB)`, one row an example, a `tf.train.Example`. Clients are read one after
    another, in order of name, as TensorFlow Federated has them.

    Args:
      path: the file, unpacked: what is downloaded is `.sqlite.lzma`.
      shapes: the features to read and the shape of one example's, as the file has them
        flat: `{"pixels": (28, 28), "label": ()}`. Integers become int32, or int64
        where they are too large, of which `parse` has to make something; floats
        float32; text arrays of bytes.
      split: `split_name` of the examples to read, such as "train"; None for all.
      names: see `read_leaf`.
      parse: of one client, `{name: array} -> {name: [n, ...]}` of numbers.

    Returns:
      The data, and the names by id.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file or a client in it is not like that; says which.

    Reference: TensorFlow Federated, `simulation.datasets.SqlClientData`;
    TensorFlow, `example.proto` and `feature.proto`.
    """
    columns = "split_name", "client_id", "serialized_example_proto"
    with _database(path, "examples", columns) as db:
        rows = db.execute(
            "SELECT client_id, serialized_example_proto FROM examples "
            "WHERE ? IS NULL OR split_name = ? ORDER BY client_id, rowid",
            (split, split),
        )

        def clients():
            # One client's rows come together.
            name, protos = None, []
            for client, proto in _rows_of(rows, path):
                if protos and client != name:
                    yield _of_protos(path, _text(name), protos, shapes)
                    protos = []
                name = client
                protos.append(proto)
            if protos:
                yield _of_protos(path, _text(name), protos, shapes)

        return _collect(clients(), names, parse, f"{path}, split {split!r}")


# --- what they have in common --------------------------------------------------


def _collect(
    clients: Iterable[tuple[str, str, Callable[[], dict[str, Any]], int]],
    names: Sequence[str] | None,
    parse: Parse,
    source: str,
) -> tuple[ClientData, list[str]]:
    """One data set of clients that come one by one.

    Args:
      clients: of each, where it is, its name, what reads it, and how many examples it
        should have.
      names: see `read_leaf`.
      parse: see `read_leaf`.
      source: of all of them, for messages.
    """
    ids = {} if names is None else {name: i for i, name in enumerate(names)}
    if names is not None and len(ids) < len(names):
        raise ValueError("names had a client twice; each should be there once.")
    parts: list[dict[str, np.ndarray]] = []
    sizes: list[tuple[int, int]] = []  # (id, number of examples)
    seen = set()
    for where, name, read, size in clients:
        if name in seen:
            raise ValueError(f"{where} was there before; it should be there once.")
        seen.add(name)
        if names is not None and name not in ids:
            continue
        client = ids.setdefault(name, len(ids))
        part = _part(where, read, parse, size, parts[0] if parts else None)
        if part:
            parts.append(part)
            sizes.append((client, len(next(iter(part.values())))))
    if not parts:
        raise ValueError(f"{source}: there are no examples of any client asked for.")
    examples = {
        key: np.concatenate([part[key] for part in parts], dtype=_dtype(parts, key))
        for key in parts[0]
    }
    client_ids = np.repeat(*np.array(sizes).T)
    return group(examples, client_ids, len(ids)), list(ids)


def _part(where, read, parse, size, first) -> dict[str, np.ndarray]:
    """One client's arrays, like those of the first; none of one without examples."""
    try:
        values = read()
        told = {key: len(x) for key, x in values.items()}
        part = {key: _numbers(key, x) for key, x in parse(values).items()}
    except Exception as error:  # whatever parse raises, it has to do with this client
        raise ValueError(f"{where}: {error}") from error
    if set(told.values()) != {size}:
        raise ValueError(f"{where} had {told} examples, and should have {size}.")
    lengths = {key: len(x) for key, x in part.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{where} had arrays of unlike lengths: {lengths}.")
    if 0 in lengths.values():
        return {}
    if first is not None:
        got, want = ({k: x.shape[1:] for k, x in p.items()} for p in (part, first))
        if got != want:
            raise ValueError(
                f"{where} had examples of the shapes {got}, the first client {want}."
            )
    return part


def _numbers(key: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    numbers = array.dtype == bool or jnp.issubdtype(array.dtype, np.number)
    if not (numbers and array.ndim):
        raise ValueError(
            f"{key} was of {array.dtype} and shape {array.shape}; it should be numbers "
            "[n, ...]. Of text, parse should make numbers."
        )
    if array.dtype == np.int64 and not jax.config.read("jax_enable_x64"):
        if (array != array.astype(np.int32)).any():
            raise ValueError(
                f"{key} has integers of more than 32 bits, which JAX would cut off; "
                "parse should map them, or jax_enable_x64 be set."
            )
    return array


def _dtype(parts: list[dict[str, np.ndarray]], key: str) -> np.dtype:
    """Of all clients' arrays together: some have whole numbers where others do not."""
    dtypes = {part[key].dtype for part in parts}
    return functools.reduce(jnp.promote_types, dtypes)


def _narrow(array: np.ndarray) -> np.ndarray:
    """In 32 bits, which JAX computes in, the 64 of a format that has no other numbers.

    Integers that need them keep their 64, for `parse` to make something of.
    """
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype == np.int64 and (array == array.astype(np.int32)).all():
        return array.astype(np.int32)
    return array


def _text(name: Any) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else name


# --- LEAF ------------------------------------------------------------------------


def _leaf_file(file: pathlib.Path) -> Iterator[tuple[str, Any, int]]:
    """Each client's name, its values, and how many examples it should have."""

    def as_arrays(value: dict) -> Any:
        # The parser calls this when a client's lists are complete. What is wrong with
        # them is found where the client's name is known.
        if not {"x", "y"} <= value.keys():
            return value
        with contextlib.suppress(ValueError):
            arrays = {key: np.asarray(value[key]) for key in ("x", "y")}
            if all(a.dtype.kind in "biuf" for a in arrays.values()):
                return {key: _narrow(a) for key, a in arrays.items()}
        return value

    try:
        with file.open(encoding="utf-8") as stream:
            content = json.load(stream, object_hook=as_arrays)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    keys = "users", "num_samples", "user_data"
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file}: had {found}; LEAF's files have {list(keys)}.")
    users, sizes, values = (content[key] for key in keys)
    if len(users) != len(sizes):
        raise ValueError(
            f"{file}: had {len(users)} users and {len(sizes)} num_samples; there "
            "should be one for each."
        )
    for name, size in zip(users, sizes, strict=True):
        of_client = values.pop(name, None)
        if not isinstance(of_client, dict) or not {"x", "y"} <= of_client.keys():
            raise ValueError(f"{file}: client {name!r} has no x and y in user_data.")
        yield name, {key: of_client[key] for key in ("x", "y")}, size


# --- SQLite ----------------------------------------------------------------------


@contextlib.contextmanager
def _database(
    path: str | os.PathLike, table: str, columns: tuple[str, ...]
) -> Iterator[sqlite3.Connection]:
    """An SQLite file, to read only, that has this table with these columns."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    uri = f"{file.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        try:
            listed = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = sorted(name for (name,) in listed)
            found = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path}: not an SQLite file ({error}); one that is compressed, such "
                "as .lzma, has to be unpacked."
            ) from error
        if not set(columns) <= set(found):
            raise ValueError(
                f"{path}: should have a table {table} with the columns "
                f"{list(columns)}; it had {found} there, and the tables {tables}."
            )
        yield db


def _rows_of(rows: sqlite3.Cursor, path: str | os.PathLike) -> Iterator[tuple]:
    try:
        while (row := rows.fetchone()) is not None:
            yield row
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _unpack(blob: bytes) -> dict[str, Any]:
    """FedJAX's encoding: flax's msgpack, which has arrays of text besides; zlib."""
    import msgpack

    def array(value):
        if isinstance(value, msgpack.ExtType) and value.code == 4:
            shape, flat = msgpack.unpackb(value.data, raw=True)
            return np.array(flat, object).reshape(shape)
        return value

    values = flax.serialization.msgpack_restore(zlib.decompress(blob))
    if not isinstance(values, dict):
        raise ValueError(f"was a {type(values).__name__}, not a dictionary of arrays.")
    return {key: array(value) for key, value in values.items()}


# --- tf.train.Example --------------------------------------------------------------


def _of_protos(path, name, protos, shapes):
    def read():
        each = [_example(proto) for proto in protos]
        return {key: _stacked(key, each, shape) for key, shape in shapes.items()}

    return f"{path}: client {name!r}", name, read, len(protos)


def _stacked(key: str, each: list[dict], shape: tuple[int, ...]) -> np.ndarray:
    missing = [features for features in each if key not in features]
    if missing:
        raise ValueError(f"an example has no {key!r}; it has {sorted(missing[0])}.")
    for features in each:
        if features[key].size != np.prod(shape, dtype=int):
            raise ValueError(
                f"{key!r} of an example has {features[key].size} numbers, which are "
                f"not of the shape {tuple(shape)}."
            )
    return _narrow(np.stack([features[key].reshape(shape) for features in each]))


def _example(proto: bytes) -> dict[str, np.ndarray]:
    """The features of a `tf.train.Example`, flat.

    Example { Features features = 1 }; Features { map<string, Feature> feature = 1 };
    Feature { oneof { BytesList = 1, FloatList = 2, Int64List = 3 } }, each a list
    `repeated value = 1`, packed or not.
    """
    found = {}
    for features in _of_field(proto, 1):
        for entry in _of_field(features, 1):
            pair = dict(_fields(entry))
            key, feature = pair.get(1, b""), pair.get(2, b"")
            found[key.decode()] = np.zeros(0)
            for kind, values in _fields(feature):
                if kind in _LISTS:
                    found[key.decode()] = _LISTS[kind](_of_field(values, 1))
    return found


def _of_bytes(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _of_floats(values: list) -> np.ndarray:
    return np.frombuffer(b"".join(values), "<f4").astype(np.float32)


def _of_integers(values: list) -> np.ndarray:
    whole = []
    for value in values:
        if isinstance(value, int):
            whole.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            whole.append(number)
    return np.array(whole, np.uint64).astype(np.int64)


_LISTS = {1: _of_bytes, 2: _of_floats, 3: _of_integers}


def _of_field(message: bytes, number: int) -> list:
    return [value for field, value in _fields(message) if field == number]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: their numbers, and integers or bytes."""
    if not isinstance(message, bytes):
        raise ValueError("not a tf.train.Example: a field has another type.")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not a tf.train.Example: wire type {wire}.")
        if at + length > len(message):
            raise ValueError("not a tf.train.Example: cut short.")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, the least first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), at
    raise ValueError("not a tf.train.Example: cut short.")
