"""The container: examples kept once, and for every client the rows that are its own."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import rich.table

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClientData:
    """The examples of a population, of a cohort, or of one client.

    Client `i` holds the rows `examples[index[start[i] : start[i] + size[i]]]`. No
    example is copied: a partition, a cohort and a single client are the same
    `examples` behind other integers, so a vmap over clients, or over whole
    partitions, shares them.

    Attributes:
      examples: pytree of `[E, ...]` arrays, kept in the dtype they came in.
      index: int32 `[I]`, rows of `examples`, grouped by client.
      start: int32 `[N]` (`[]` for one client), where a client's rows begin in `index`.
      size: int32 `[N]` (`[]` for one client), how many rows it has.
      shortest: the smallest size of the population; static, part of the jit cache key.
      longest: the largest size of the population; static, the bound of local loops.
    """

    examples: PyTree
    index: Any
    start: Any
    size: Any
    shortest: int = dataclasses.field(metadata={"static": True})
    longest: int = dataclasses.field(metadata={"static": True})

    @property
    def num_clients(self) -> int:
        """N, the number of clients on the leading axis."""
        return self.start.shape[0]

    @property
    def static_size(self) -> int | None:
        """The size every client has, or None where clients are ragged."""
        return self.longest if self.shortest == self.longest else None

    def __len__(self) -> int:
        return self.num_clients

    def __iter__(self) -> "Iterator[ClientData]":
        return (self[i] for i in range(self.num_clients))

    def __getitem__(self, clients) -> "ClientData":
        """The clients with these ids; one client for a scalar id."""
        start, size = jnp.asarray(self.start), jnp.asarray(self.size)
        return dataclasses.replace(self, start=start[clients], size=size[clients])

    def take(self, position: jax.Array) -> PyTree:
        """Examples at these positions, `[B]` from 0, of ONE client's rows.

        A position past the end gives one of the client's own rows again: mask such
        rows with `position < size` (a client without rows gives another's).
        """
        position = jnp.clip(position, 0, jnp.maximum(self.size - 1, 0))
        rows = jnp.asarray(self.index).at[self.start + position].get(mode="clip")
        # `rows` are valid by construction; a check here costs more than the read.
        return jax.tree.map(
            lambda a: jnp.asarray(a).at[rows].get(mode="promise_in_bounds"),
            self.examples,
        )

    def describe(self, label: str | None = "y") -> "rich.table.Table":
        """A table of how many examples, and how many of each class, the clients have.

        One row a client; from 21 clients on, the quantiles of every column over the
        clients. Classes have no columns where there are more than 20 of them.

        Args:
          label: the key of the class labels in `examples`; None leaves classes out.

        Returns:
          A table for `rich.print`.

        Raises:
          ValueError, TypeError: as `label_counts`.

        Example:
          >>> import rich
          >>> data = from_arrays(np.zeros((5, 2)), [0, 1, 1, 0, 1], [0, 0, 0, 1, 1])
          >>> rich.print(data.describe())
                2 clients, 5 examples
          <BLANKLINE>
           client  examples  classes  0  1
           ───────────────────────────────
                0         3        2  1  2
                1         2        2  1  1
          <BLANKLINE>
        """
        return _describe(self, label)


def group(
    examples: PyTree, client_ids: Any, num_clients: int | None = None
) -> ClientData:
    """The federated data set in which example `e` belongs to client `client_ids[e]`.

    The examples are kept as they are, NumPy or JAX, and not copied. Inside a client
    they keep their order.

    Args:
      examples: pytree of `[E, ...]` arrays.
      client_ids: int `[E]`, from 0.
      num_clients: N; None means the largest id + 1. Clients without examples are
        allowed.

    Returns:
      The data of N clients, its integers on the host.

    Raises:
      TypeError: `client_ids` are not integers.
      ValueError: a shape is wrong, there are no examples, or an id is outside `[0, N)`.

    Example:
      >>> data = group({"x": np.array([10, 11, 12, 13])}, [1, 0, 1, 3])
      >>> data.size
      array([1, 2, 0, 1], dtype=int32)
      >>> data[1].take(np.arange(2))
      {'x': Array([10, 12], dtype=int32)}
    """
    ids = _integers("client_ids", client_ids)
    leaves = jax.tree.leaves(examples)
    if not leaves:
        raise ValueError(f"examples was {examples!r}; it should have an array")
    for leaf in leaves:
        if np.shape(leaf)[:1] != (len(ids),):
            raise ValueError(
                f"examples had an array of shape {np.shape(leaf)}; it should have "
                f"{len(ids)} rows, one for each of client_ids"
            )
    clients = int(ids.max()) + 1 if num_clients is None else num_clients
    if ids.min() < 0 or ids.max() >= clients:
        raise ValueError(
            f"client_ids were between {ids.min()} and {ids.max()}; they should be in "
            f"[0, {clients})"
        )
    size = np.bincount(ids, minlength=clients).astype(np.int32)
    return ClientData(
        examples=examples,
        index=np.argsort(ids, kind="stable").astype(np.int32),
        start=(np.cumsum(size) - size).astype(np.int32),
        size=size,
        shortest=int(size.min()),
        longest=int(size.max()),
    )


def from_arrays(
    x: Any, y: Any, client_ids: Any, num_clients: int | None = None
) -> ClientData:
    """The federated data set of inputs `x` and targets `y`: `group({"x": x, "y": y})`.

    Args:
      x: `[E, ...]` inputs.
      y: `[E, ...]` targets.
      client_ids: int `[E]`, from 0.
      num_clients: N; None means the largest id + 1.

    Returns:
      The data of N clients.

    Raises:
      TypeError, ValueError: as `group`.

    Example:
      >>> data = from_arrays(np.zeros((4, 2)), np.arange(4), [0, 1, 1, 1])
      >>> data.num_clients, data.shortest, data.longest
      (2, 1, 3)
    """
    x, y = (a if isinstance(a, jax.Array) else np.asarray(a) for a in (x, y))
    return group({"x": x, "y": y}, client_ids, num_clients)


def pool(data: ClientData) -> ClientData:
    """One client that holds the rows of all: the benchmark that is not federated.

    Rows are in the order of `examples`, so all partitions of the same rows have the
    same pool, and training on it takes the same course.

    Args:
      data: the data of N clients.

    Returns:
      The data of 1 client.

    Raises:
      ValueError: `data` is of one client, or a stack.

    Example:
      >>> pool(from_arrays(np.zeros((4, 2)), np.arange(4), [1, 0, 1, 0])).size
      array([4], dtype=int32)
    """
    return of_rows(data.examples, [np.sort(np.concatenate(client_rows(data)))])


def subset(data: ClientData, mask: Any) -> ClientData:
    """The clients with only those of their examples that a mask keeps.

    The mask may be traced, and vmapped over: the same examples behind other integers,
    as any partition. Hence the bounds of the sizes are those of every mask, 0 and what
    `data` has.

    Args:
      data: the data of N clients.
      mask: bool `[E]`, of `examples`.

    Returns:
      The data of N clients, in their old order.

    Raises:
      ValueError: the mask is not one of all examples, or `data` is of one client.

    Example:
      >>> data = from_arrays(np.zeros(4), np.arange(4), [1, 0, 1, 0])
      >>> kept = subset(data, [True, True, True, False])
      >>> kept.size.tolist(), kept[1].take(jnp.arange(2))["y"].tolist()
      ([1, 2], [0, 2])
    """
    mask, index = jnp.asarray(mask, bool), jnp.asarray(data.index)
    examples = jax.tree.leaves(data.examples)[0].shape[0]
    if mask.shape != (examples,):
        raise ValueError(f"mask had the shape {mask.shape}; it should be {(examples,)}")
    if np.ndim(data.start) != 1 or index.ndim != 1:
        raise ValueError("data was not of several clients; it should be, as in group")
    start, size = jnp.asarray(data.start), jnp.asarray(data.size)
    kept = mask[index]
    before = jnp.append(0, jnp.cumsum(kept, dtype=jnp.int32))
    place = jnp.arange(len(index))
    whose = jnp.searchsorted(jnp.sort(start), place, side="right")
    return dataclasses.replace(
        data,
        # What is left out goes to the end of its client's range.
        index=index[jnp.lexsort((place, ~kept, whose))],
        start=start,
        size=before[start + size] - before[start],
        shortest=0,
    )


def stack(datasets: Sequence[ClientData]) -> ClientData:
    """Several partitions of the same examples, for a vmap over partitions.

    `index`, `start` and `size` get a leading axis `[S]`, `examples` stay single; so do
    `shortest` and `longest`, over all partitions. `stack_axes` says it to `jax.vmap`.

    Args:
      datasets: S partitions of the very same `examples` arrays among N clients.

    Returns:
      The stack. Its own `[...]`, `take` and `describe` are for use inside the vmap.

    Raises:
      ValueError: there is none, they do not share their arrays, or their numbers of
        clients differ.

    Example:
      >>> examples = {"x": np.arange(6)}
      >>> stacked = stack([group(examples, ids) for ids in ([0] * 5 + [1], [0, 1] * 3)])
      >>> first_of_last = lambda data: data[1].take(jnp.arange(1))["x"][0]
      >>> jax.vmap(first_of_last, in_axes=(stack_axes(stacked),))(stacked)
      Array([5, 1], dtype=int32)
    """
    if not datasets:
        raise ValueError("datasets was empty; it should have at least one ClientData")
    first = datasets[0]
    for data in datasets:
        if not _same_arrays(data.examples, first.examples):
            raise ValueError(
                "datasets had different examples; they should be partitions of the "
                "very same arrays, such as group(examples, ids) for several ids"
            )
        if np.shape(data.start) != np.shape(first.start):
            raise ValueError(
                f"datasets had {first.num_clients} and {data.num_clients} clients; the "
                "number should be the same in all"
            )
    rows = max(len(data.index) for data in datasets)
    return dataclasses.replace(
        first,
        # The padding belongs to no client's range.
        index=np.stack([np.pad(d.index, (0, rows - len(d.index))) for d in datasets]),
        start=np.stack([data.start for data in datasets]),
        size=np.stack([data.size for data in datasets]),
        shortest=min(data.shortest for data in datasets),
        longest=max(data.longest for data in datasets),
    )


def stack_axes(stacked: ClientData) -> Any:
    """What `jax.vmap` should map over in a stack of partitions, for its `in_axes`.

    All partitions share the examples (None); the rest is mapped over axis 0.

    Args:
      stacked: what `stack` returned.

    Returns:
      The `in_axes` entry for `stacked`.

    Example:
      >>> stacked = stack([from_arrays(np.zeros(3), np.zeros(3), [0, 1, 1])] * 2)
      >>> total = lambda data: data.size.sum()
      >>> jax.vmap(total, in_axes=(stack_axes(stacked),))(stacked)
      Array([3, 3], dtype=int32)
    """
    # A prefix has to have the static fields of the tree that it is a prefix of.
    return dataclasses.replace(stacked, examples=None, index=0, start=0, size=0)


def client_rows(data: ClientData) -> list[np.ndarray]:
    """The rows of `examples` that each client holds.

    Args:
      data: the data of N clients.

    Returns:
      N integer arrays, of the clients' sizes.

    Raises:
      ValueError: `data` is of one client, or a stack.

    Example:
      >>> client_rows(from_arrays(np.zeros(3), np.zeros(3), [1, 0, 1]))
      [array([1], dtype=int32), array([0, 2], dtype=int32)]
    """
    if np.ndim(data.start) != 1 or np.ndim(data.index) != 1:
        raise ValueError(
            f"data had start of shape {np.shape(data.start)} and index of shape "
            f"{np.shape(data.index)}; both should have one axis: several clients, one "
            "partition"
        )
    index = np.asarray(data.index)
    ranges = zip(np.asarray(data.start), np.asarray(data.size), strict=True)
    return [index[start : start + size] for start, size in ranges]


def of_rows(examples: Any, rows: Sequence[np.ndarray]) -> ClientData:
    """The data of clients that hold these rows: the inverse of `client_rows`.

    Args:
      examples: pytree of `[E, ...]` arrays.
      rows: N integer arrays, each client's rows in its order.

    Returns:
      The data of N clients.

    Example:
      >>> data = of_rows({"x": np.arange(4)}, [np.array([3, 0]), np.array([1])])
      >>> client_rows(data)
      [array([3, 0], dtype=int32), array([1], dtype=int32)]
    """
    size = np.array([len(own) for own in rows], np.int32)
    return ClientData(
        examples=examples,
        index=np.concatenate(rows).astype(np.int32),
        start=(np.cumsum(size) - size).astype(np.int32),
        size=size,
        shortest=int(size.min()),
        longest=int(size.max()),
    )


def label_counts(
    data: ClientData, label: str = "y", num_classes: int | None = None
) -> np.ndarray:
    """How many examples of each class each client holds.

    Args:
      data: the data of N clients.
      label: the key of the class labels, int `[E]`, in `examples`.
      num_classes: C; None means the largest label of all examples + 1.

    Returns:
      int64 `[N, C]`.

    Raises:
      TypeError: the labels are not integers.
      ValueError: `examples` have no such key, the labels are not `[E]`, or a label is
        outside `[0, C)`.

    Example:
      >>> label_counts(from_arrays(np.zeros(4), [0, 2, 2, 1], [0, 0, 0, 1]))
      array([[1, 0, 2],
             [0, 1, 0]])
    """
    if not isinstance(data.examples, Mapping) or label not in data.examples:
        keys = list(data.examples) if isinstance(data.examples, Mapping) else "no keys"
        raise ValueError(
            f"label was {label!r}; it should be a key of examples, which had {keys}"
        )
    labels = _integers(f"examples[{label!r}]", data.examples[label])
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"examples[{label!r}] were between {labels.min()} and {labels.max()}; they "
            f"should be in [0, {classes})"
        )
    rows = client_rows(data)
    return np.stack([np.bincount(labels[r], minlength=classes) for r in rows])


def _integers(name: str, values: Any) -> np.ndarray:
    """The values as an int64 `[E]` array, E at least 1."""
    array = np.asarray(values)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} had the shape {array.shape}; it should be [E], with an E of at "
            "least 1"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} had the type {array.dtype}; it should be integers")
    return array.astype(np.int64)


def _same_arrays(a: PyTree, b: PyTree) -> bool:
    leaves, tree = jax.tree.flatten(a)
    others, other_tree = jax.tree.flatten(b)
    return tree == other_tree and all(
        x is y for x, y in zip(leaves, others, strict=True)
    )


_MAX_CLIENT_ROWS = 20
_MAX_CLASS_COLUMNS = 20


def _describe(data: ClientData, label: str | None) -> "rich.table.Table":
    import rich.box
    import rich.table

    columns = {"examples": np.asarray(data.size)}
    if label is not None:
        counts = label_counts(data, label)
        columns["classes"] = np.count_nonzero(counts, axis=1)
        if counts.shape[1] <= _MAX_CLASS_COLUMNS:
            columns |= {str(c): counts[:, c] for c in range(counts.shape[1])}
    values = np.stack(list(columns.values()), axis=1)
    if len(values) <= _MAX_CLIENT_ROWS:
        heading, names = "client", [str(i) for i in range(len(values))]
    else:
        heading, names = "quantile", ["min", "25 %", "median", "75 %", "max"]
        quantiles = [0, 0.25, 0.5, 0.75, 1]
        values = np.quantile(values, quantiles, axis=0, method="nearest")
    title = f"{data.num_clients:,} clients, {columns['examples'].sum():,} examples"
    table = rich.table.Table(
        title=title,
        min_width=len(title),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in (heading, *columns):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in zip(names, values, strict=True):
        table.add_row(name, *(f"{v:,d}" if v else "[dim]0[/dim]" for v in row))
    return table
