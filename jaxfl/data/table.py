"""A user's own rows: a CSV or NPZ file with a column that says whose each row is."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

# What is written where a value is missing, in small letters.
MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}


class Table(NamedTuple):
    """Rows of a file, as arrays.

    Attributes:
      x: float32 `[E, D]`; of an NPZ file with one array of more axes, `[E, ...]`.
      y: `[E]`, int32 classes from 0, or float32 numbers.
      client: int32 `[E]`, from 0.
      features: the columns of x.
      classes: what each class is called; empty for numbers.
      clients: what each client is called.
      dropped: rows left out, as a value was missing.
    """

    x: np.ndarray
    y: np.ndarray
    client: np.ndarray
    features: tuple[str, ...]
    classes: tuple[str, ...]
    clients: tuple[str, ...]
    dropped: int


def read_table(
    path: str | os.PathLike,
    *,
    client: str,
    label: str,
    task: Literal["classification", "regression"] = "classification",
    missing: Literal["error", "drop"] = "error",
    ignore: Sequence[str] = (),
) -> Table:
    """Reads the rows of many clients from one CSV file with a header, or one NPZ file.

    All other columns are features, and numbers. Clients and classes may have any names
    and are numbered in their order (numbers by size). An NPZ file has one array for
    each column, `[E]`, or an array of features `[E, ...]`.

    Args:
      path: a file whose name ends in `.csv` or `.npz`.
      client: the column that says whose a row is.
      label: the column to predict.
      task: whether labels are classes or numbers.
      missing: what to do where a value is missing (empty, NA, N/A, NaN, null, none, ?,
        in small letters or large, of clients and labels too): raise, or leave the row
        out.
      ignore: columns to leave out.

    Returns:
      A `Table`; `data.from_arrays(t.x, t.y, t.client)` is its federated data set.

    Raises:
      ValueError: a column is not there or has no name, values are missing, a feature is
        no number, all rows are of one client, all labels are the same, or the file has
        no rows.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "rows.csv")
    ...     _ = path.write_text("site,age,ill\\nrome,61,yes\\noslo,35,no\\noslo,,no\\n")
    ...     table = read_table(path, client="site", label="ill", missing="drop")
    >>> table.x.tolist(), table.y.tolist(), table.client.tolist(), table.dropped
    ([[61.0], [35.0]], [1, 0], [1, 0], 1)
    >>> table.clients, table.classes
    (('oslo', 'rome'), ('no', 'yes'))
    """
    path = Path(path)
    if task not in ("classification", "regression"):
        raise ValueError(f"task must be classification or regression, got {task!r}.")
    if missing not in ("error", "drop"):
        raise ValueError(f'missing must be "error" or "drop", got {missing!r}.')
    readers = {".csv": (_read_csv, "line"), ".npz": (_read_npz, "row")}
    if path.suffix.lower() not in readers:
        raise ValueError(f"path: {path.name} should end in .csv or .npz.")
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}.")
    read, place = readers[path.suffix.lower()]
    columns, numbers = read(path)
    for name, column in (("client", client), ("label", label)):
        if column not in columns:
            raise ValueError(
                f"{name}: {path.name} has no column {column!r}, there are {[*columns]}."
            )
    if client == label:
        raise ValueError(f"client and label are the same column, {client!r}.")
    for name, column in (("client", client), ("label", label)):
        if columns[column].ndim != 1:
            raise ValueError(
                f"{name}: the array {column!r} of {path.name} must be [E], got "
                f"{list(columns[column].shape)}."
            )
        if column in ignore:
            raise ValueError(f"ignore: {column!r} is the {name} column.")
    if unknown := sorted(set(ignore) - set(columns)):
        raise ValueError(
            f"ignore: {path.name} has no columns {unknown}, there are {[*columns]}."
        )
    columns = {k: v for k, v in columns.items() if k not in ignore}
    if "" in columns:
        raise ValueError(
            f"{path.name} has a column without a name, such as a number of the row; "
            'name it, or ignore "".'
        )
    features = tuple(k for k in columns if k not in (client, label))
    if not features:
        raise ValueError(f"{path.name} has no columns but {client!r} and {label!r}.")

    # By column, so that a message can name the one that is at fault.
    gone = {name: _is_missing(values) for name, values in columns.items()}
    bad = np.logical_or.reduce(list(gone.values()))
    if bad.any() and missing == "error":
        where = {name: int(m.sum()) for name, m in gone.items() if m.any()}
        rows = ", ".join(map(str, numbers[bad][:5]))
        raise ValueError(
            f"missing: {path.name} lacks values in {bad.sum()} of {len(bad)} rows "
            f"({place}s {rows}{', ...' if bad.sum() > 5 else ''}), by column {where}; "
            'missing="drop" leaves these rows out.'
        )
    columns = {name: values[~bad] for name, values in columns.items()}
    numbers = numbers[~bad]
    if not len(numbers):
        raise ValueError(f"{path.name} has no rows{' without gaps' * bool(len(bad))}.")

    def numeric(name):
        values = columns[name]
        try:
            found = values.astype(np.float32)
        except ValueError:
            i = next(i for i, v in enumerate(values) if not _is_number(v))
            raise ValueError(
                f"{path.name}: the column {name!r} has {str(values[i])!r} in {place} "
                f"{numbers[i]}, which is no number; code it as numbers, or ignore the "
                "column."
            ) from None
        if not np.isfinite(found).all():
            fine = np.isfinite(found).reshape(len(found), -1).all(1)
            raise ValueError(
                f"{path.name}: the column {name!r} is not finite in {place} "
                f"{numbers[np.argmin(fine)]}."
            )
        return found

    whose, clients = _codes(columns[client])
    if len(clients) < 2:
        raise ValueError(
            f"client: all rows of {path.name} are of one client, "
            f"{str(columns[client][0])!r}; there must be at least 2 to federate."
        )
    if task == "classification":
        y, classes = _codes(columns[label])
    else:
        y, classes = numeric(label), ()
    if len(np.unique(y)) == 1:
        only = str(columns[label][0])
        raise ValueError(
            f"label: {label!r} is {only!r} in all rows of {path.name}; there is "
            "nothing to learn."
        )
    arrays = [numeric(name) for name in features]
    if len(arrays) == 1 and arrays[0].ndim > 1:
        x = arrays[0]
    else:
        x = np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)
    return Table(x, y, whose, features, classes, clients, int(bad.sum()))


_Columns = tuple[dict[str, np.ndarray], np.ndarray]  # and where each row is


def _read_csv(path: Path) -> _Columns:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header):
            raise ValueError(f"{path.name} has a column twice in its header {header}.")
        body, lines = [], []
        for row in rows:
            if row:  # not an empty line
                body.append(row)
                lines.append(rows.line_num)
    for line, row in zip(lines, body, strict=True):
        if len(row) != len(header):
            raise ValueError(
                f"{path.name}: line {line} has {len(row)} values, the header "
                f"{len(header)} columns."
            )
    columns = [*zip(*body, strict=True)] if body else [[]] * len(header)
    found = (np.array([v.strip() for v in column], str) for column in columns)
    return dict(zip(header, found, strict=True)), np.array(lines, int)


def _read_npz(path: Path) -> _Columns:
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    lengths = {name: len(a) if a.ndim else 0 for name, a in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path.name}: its arrays differ in length: {lengths}.")
    return columns, np.arange(next(iter(lengths.values()), 0))


def _is_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "US":
        short = np.char.lower(values.astype(f"U{max(map(len, MISSING)) + 1}"))
        return np.asarray(np.isin(short, list(MISSING)))
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values.reshape(len(values), -1)).any(1))
    return np.zeros(len(values), bool)


def _is_number(value) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _codes(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers from 0 for names, in the order of the names; whole numbers by size."""
    names, code = np.unique(values, return_inverse=True)
    if names.dtype.kind in "US" and all(_is_number(name) for name in names):
        order = np.argsort(names.astype(float), kind="stable")
        code, names = np.argsort(order)[code], names[order]
    return code.astype(np.int32), tuple(str(name) for name in names)
