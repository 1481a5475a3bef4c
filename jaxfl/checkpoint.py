"""Checkpoints of a run: its state by orbax, and its history piece by piece."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfl import tree
from jaxfl.core import State
from jaxfl.history import concatenate
from jaxfl.stream import HostStates

PyTree = Any


class Copied(NamedTuple):
    """A state as it was, on the host.

    Attributes:
      state: what was on the device, random keys as integers.
      written: ids and states of the clients on the host that were written since the
        copy before, or None where no states are there.
    """

    state: State
    written: tuple[np.ndarray, PyTree] | None


class Checkpoints:
    """A folder from which a killed run goes on, to the bit.

    A piece of history is written before the state that follows it, each atomically,
    so that whatever moment the process dies at, the newest complete state finds all
    the history before it. Likewise the states of clients that are on the host: a piece
    has those written since the last, and all pieces in order give the newest of each.
    There are two states at most, and a file of history for each save; history is also
    flushed to the disk, the state as orbax does it.

    Args:
      path: the folder, made if missing.
      run: what must be the same for the run to go on (its key, its cohort size, ...),
        as JSON can hold it.
    """

    def __init__(self, path: str | os.PathLike, run: dict):
        import orbax.checkpoint as ocp  # heavy, and only needed here

        self._ocp = ocp
        self._path = Path(path).absolute()
        self._run = run
        self._pieces = 0  # of the history, saved so far
        self._manager = ocp.CheckpointManager(
            self._path / "state",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                cleanup_tmp_directories=True,  # what a killed process left
            ),
        )
        self._history = self._path / "history"
        self._clients = self._path / "clients"
        for folder in (self._history, self._clients):
            folder.mkdir(parents=True, exist_ok=True)

    def restore(self, state: State, piece: PyTree) -> tuple[State, list[PyTree]]:
        """The newest state and the pieces of history before it.

        Args:
          state: what a state looks like; it is returned if nothing was saved yet.
          piece: what a piece of history looks like.

        Returns:
          The state, and the pieces in order.

        Raises:
          ValueError: if the folder holds another run.
        """
        ocp, newest = self._ocp, self._manager.latest_step()
        if newest is None:
            self._forget_after(0)
            return state, []
        saved_run = self._manager.restore(
            newest, args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )["run"]
        for name, value in self._run.items():
            if saved_run.get(name) != value:
                raise ValueError(
                    f"checkpoint: {self._path} holds a run with {name} = "
                    f"{saved_run.get(name)}, and this one has {value}."
                )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            tree.without_keys(_on_device(state)),
        )
        try:
            saved = self._manager.restore(
                newest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
            )["state"]
            if isinstance(state.clients, HostStates):
                for file in _until(newest, self._clients):
                    with np.load(file) as named:
                        ids = named["client"]
                        rows = _unnamed(named, state.clients[ids[:0]])
                        state.clients.restore(ids, rows)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {self._path} holds the state of another federation."
            ) from error
        saved = tree.with_keys(saved, _on_device(state))
        if isinstance(state.clients, HostStates):
            saved = saved._replace(clients=state.clients)
        pieces = []
        for file in _until(newest, self._history):
            with np.load(file) as named:
                if set(named) != set(_named(piece)):
                    raise ValueError(
                        f"checkpoint: {self._path} holds a run with another "
                        "evaluate, or other metrics."
                    )
                pieces.append(_unnamed(named, piece))
        self._pieces = len(pieces)
        self._forget_after(newest)
        return saved, pieces

    def _forget_after(self, step: int) -> None:
        """Removes history whose state was never saved: its rounds are run again."""
        for folder in (self._history, self._clients):
            for file in folder.glob("[0-9]*.*"):
                if jax.process_index() == 0 and int(file.stem) > step:
                    file.unlink()

    @staticmethod
    def copy(state: State) -> "Copied":
        """A copy in the host's memory, begun and not waited for.

        The state may be donated at once: who overwrites it waits for the copy.
        """
        on_device = tree.without_keys(_on_device(state))
        host = jax.tree.map(
            lambda x: x.sharding.with_memory_kind("pinned_host"), on_device
        )
        clients = state.clients
        return Copied(
            jax.device_put(on_device, host, may_alias=False),
            clients.unsaved() if isinstance(clients, HostStates) else None,
        )

    def save(self, copied: "Copied", pieces: list[PyTree]) -> None:
        """Saves a state and those pieces of history that are not yet saved.

        It waits for the copy and for the state saved before, and not until this one is
        written.

        Args:
          copied: what `copy` gave.
          pieces: all of the history up to that state.
        """
        if len(pieces) == self._pieces:
            return
        step = int(copied.state.round)
        piece = concatenate(pieces[self._pieces :])
        self._pieces = len(pieces)
        _write(self._history, step, _named(piece))
        if copied.written is not None:
            ids, rows = copied.written
            _write(self._clients, step, {"client": ids, **_named(rows)})
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(copied.state),
                run=ocp.args.JsonSave(self._run),
            ),
        )

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def digest(arrays: PyTree, most: int | None = None) -> str:
    """A fingerprint of arrays.

    Args:
      arrays: pytree of arrays, of the host or of a device.
      most: bytes to read of each array, in rows evenly spaced; None for all.
    """
    fingerprint = hashlib.sha256()
    for x in jax.tree.leaves(tree.without_keys(arrays)):
        if isinstance(x, jax.Array) and not (
            x.is_fully_addressable or x.is_fully_replicated
        ):
            x = multihost_utils.process_allgather(x, tiled=True)
        fingerprint.update(f"{x.dtype}{x.shape}".encode())
        if most is not None:
            size = math.prod(x.shape) * x.dtype.itemsize
            x = x[np.arange(0, x.shape[0], max(1, size // most))]
        fingerprint.update(np.asarray(x).tobytes())
    return fingerprint.hexdigest()


def _on_device(state: State) -> State:
    """The state without what is on the host."""
    on_host = isinstance(state.clients, HostStates)
    return state._replace(clients=()) if on_host else state  # type: ignore[arg-type]


def _until(step: int, folder: Path) -> list[Path]:
    """The files of the steps up to this one, in order."""
    return [f for f in sorted(folder.glob("*.npz")) if int(f.stem) <= step]


def _write(folder: Path, step: int, named: dict[str, Any]) -> None:
    """Writes a step's file, all of it or none."""
    if jax.process_index() == 0:
        file = folder / f"{step:09d}.npz"
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as out:
            np.savez(out, **named)
            out.flush()
            os.fsync(out.fileno())  # a loss of power must not leave it empty
        os.replace(partial, file)


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _unnamed(named: Any, like: PyTree) -> PyTree:
    """The inverse; npz keeps bfloat16 and its kind as bytes without a type."""

    def leaf(path, like):
        x = named[jax.tree_util.keystr(path)]
        return x.view(like.dtype) if x.dtype.kind == "V" else x

    return jax.tree_util.tree_map_with_path(leaf, like)
