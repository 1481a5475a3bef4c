"""Populations larger than the device: what stays on the host, and how it gets there."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxfl import tree
from jaxfl.data.federated import ClientData

PyTree = Any
A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A population that `simulate` reads cohort by cohort; see `on_host`.

    Attributes:
      data: the population's, all of it on the host.
      states: where the clients' states are: False for the device, True for the host's
        memory, or a folder.
    """

    data: ClientData
    states: bool | str | os.PathLike = False


def on_host(data: ClientData, *, states: bool | str | os.PathLike = False) -> OnHost:
    """The population, for `simulate` to leave on the host and stream from there.

    Of every segment of rounds the device sees the examples of the clients drawn for
    it and no others, while the host reads those of the segment after: up to three
    segments' examples are held at a time, so `every` sets the memory. The run is the
    one with the data on the device, to the bit.

    Args:
      data: the population's. Its examples are NumPy arrays, in memory or mapped from
        files (`np.load(file, mmap_mode="r")`), or anything that has `shape` and
        `dtype` and gives an array for `a[rows]`, with int `[B]` rows that increase
        (an HDF5 data set does). They are read in one such operation a segment, in a
        thread. Pages of a mapped file count as this process's memory until the system
        needs it for something else.
      states: whether the clients' states `[N, ...]`, of algorithms and channels that
        have any, stay on the host too, and only those of a segment's clients go to
        the device and back. True keeps them in memory, of which a client never drawn
        takes none; a folder, in files there, which are this run's alone (a checkpoint
        has a copy). `evaluate` then sees `state.clients` as None, and in the last
        state `state.clients[ids]` gives the states of these clients.

    Returns:
      The population, which only `simulate` understands.

    Raises:
      TypeError: if data is no `ClientData`, or its examples are on a device.
      ValueError: if data is of one client, or a stack of partitions.

    Examples in files, written piece by piece and never read as a whole:

    >>> import tempfile
    >>> from jaxfl.data import group
    >>> folder = tempfile.TemporaryDirectory()
    >>> x = np.lib.format.open_memmap(
    ...     f"{folder.name}/x.npy", mode="w+", dtype=np.uint8, shape=(6, 28, 28, 1))
    >>> for row in range(6):
    ...     x[row] = row
    >>> x.flush()
    >>> x = np.load(f"{folder.name}/x.npy", mmap_mode="r")
    >>> population = on_host(group({"x": x}, client_ids=[0, 0, 1, 1, 1, 2]))
    >>> population.data.num_clients
    3
    >>> folder.cleanup()
    """
    if not isinstance(data, ClientData):
        raise TypeError(f"data must be a ClientData, got {type(data).__name__}.")
    for a in jax.tree.leaves(data.examples):
        if isinstance(a, jax.Array) or not (
            hasattr(a, "shape") and hasattr(a, "dtype")
        ):
            raise TypeError(
                "data.examples must be NumPy arrays, or have shape and dtype and be "
                f"indexed as they are; got {type(a).__name__}."
            )
    if np.ndim(data.start) != 1 or np.ndim(data.index) != 1:
        raise ValueError(
            "data must be of several clients and one partition; its start has the "
            f"shape {np.shape(data.start)}."
        )
    index, start, size = map(np.asarray, (data.index, data.start, data.size))
    data = dataclasses.replace(data, index=index, start=start, size=size)
    return OnHost(data, states)


def population_of(data: PyTree | OnHost) -> PyTree:
    """The population's data, wherever it is."""
    return data.data if isinstance(data, OnHost) else data


def gather(data: ClientData, client: np.ndarray) -> ClientData:
    """The data of these clients, and of no others, on the host.

    Args:
      data: the population's.
      client: int `[...]`, ids, of which any may come twice.

    Returns:
      A `ClientData` with `start` and `size` `[...]`, and every example that any of
      them holds once, in its order in the population. Its arrays are padded to one of
      four lengths in every octave, so that there are few for which to compile.

    >>> from jaxfl.data import group
    >>> data = group({"x": np.array([10, 11, 12, 13])}, [1, 0, 1, 3])
    >>> cohort = gather(data, np.array([3, 1]))
    >>> cohort.examples, cohort.index, cohort.start, cohort.size
    ({'x': array([10, 12, 13], dtype=int32)}, array([0, 1, 2], dtype=int32),
     array([2, 0], dtype=int32), array([1, 2], dtype=int32))
    """
    once, place = np.unique(client, return_inverse=True)
    size = data.size[once]
    start = np.cumsum(size) - size
    held = np.arange(size.sum()) + np.repeat(data.start[once] - start, size)
    rows = data.index[held]
    index = np.arange(len(rows))
    if np.any(np.diff(rows) <= 0):  # not in order, or shared by several clients
        rows, index = np.unique(rows, return_inverse=True)
    most = max(1, client.size * data.longest)

    def take(a):
        dtype = jax.dtypes.canonicalize_dtype(a.dtype)
        taken = np.zeros((_padded(len(rows), most), *a.shape[1:]), dtype)
        taken[: len(rows)] = a[rows]
        return taken

    extra = _padded(len(index), most) - len(index)
    return dataclasses.replace(
        data,
        examples=jax.tree.map(take, data.examples),
        index=np.pad(index, (0, extra)).astype(np.int32),
        start=start[place].reshape(client.shape).astype(np.int32),
        size=size[place].reshape(client.shape).astype(np.int32),
    )


def _padded(length: int, most: int) -> int:
    step = 1 << max(0, length.bit_length() - 3)
    return min(most, max(1, -(-length // step) * step))


def placeholder(data: ClientData) -> ClientData:
    """The population's data with one row of zeros for all examples.

    It has the shapes and dtypes that clients see, which is all that is needed of it
    where only a state is made.
    """

    def row(a):
        return np.zeros((1, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))

    examples = jax.tree.map(row, data.examples)
    return dataclasses.replace(data, examples=examples, index=np.zeros(1, np.int32))


def prefetch(make: Callable[[A], B], arguments: Iterable[A]) -> Generator[B]:
    """`map(make, arguments)`, by a thread that is one ahead of who uses it.

    What `make` raises is raised where its result would have come. Close the iterator
    to end the thread before the arguments do.

    >>> list(prefetch(lambda x: x**2, range(4)))
    [0, 1, 4, 9]
    """
    with ThreadPoolExecutor(1) as thread:
        ahead = deque()
        for argument in arguments:
            ahead.append(thread.submit(make, argument))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class HostStates:
    """The states of N clients in NumPy; one that was never written takes no memory.

    Args:
      first: `ids [M] -> rows [M, ...]`, the states that clients begin with.
      population: N.
      folder: where to map the arrays from files, or None for memory.
    """

    def __init__(
        self,
        first: Callable[[np.ndarray], PyTree],
        population: int,
        folder: str | os.PathLike | None = None,
    ):
        self._first = first
        self._like = first(np.zeros(1, np.int32))
        self._written = np.zeros(population, bool)
        self._unsaved = np.zeros(population, bool)
        files = iter(range(len(jax.tree.leaves(self._like))))

        def array(x):  # zeros, which the system provides when they are written to
            shape = (population, *x.shape[1:])
            if folder is None or 0 in shape:
                return np.zeros(shape, x.dtype)
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            file = path / f"{jax.process_index()}-{next(files)}.states"
            return np.memmap(file, x.dtype, "w+", shape=shape)

        self._rows = jax.tree.map(array, tree.without_keys(self._like))

    def __len__(self) -> int:
        return len(self._written)

    def __getitem__(self, ids: np.ndarray) -> PyTree:
        """The states `[M, ...]` of these clients, copied."""
        ids = np.asarray(ids)
        written = self._written[ids]
        rows = jax.tree.map(lambda all: np.asarray(all[ids]), self._rows)
        if not written.all():
            first = tree.without_keys(self._first(ids))
            rows = jax.tree.map(
                lambda a, b: np.where(written.reshape(-1, *[1] * (a.ndim - 1)), a, b),
                *(rows, jax.device_get(first)),
            )
        return tree.with_keys(rows, self._like)

    def __setitem__(self, ids: np.ndarray, rows: PyTree) -> None:
        """Writes the states of these clients, each of which comes once."""

        def write(all, new):
            all[ids] = new

        jax.tree.map(write, self._rows, jax.device_get(tree.without_keys(rows)))
        self._written[ids] = self._unsaved[ids] = True

    def unsaved(self) -> tuple[np.ndarray, PyTree]:
        """Ids and states of who was written since this was asked, keys as integers."""
        ids = np.flatnonzero(self._unsaved)
        self._unsaved[:] = False
        return ids, jax.tree.map(lambda all: np.asarray(all[ids]), self._rows)

    def restore(self, ids: np.ndarray, rows: PyTree) -> None:
        """Writes again what `unsaved` gave."""
        self[ids] = rows
        self._unsaved[ids] = False
