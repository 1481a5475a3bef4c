"""Checkpoints of a run: its state by orbax, and its history piece by piece."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfl import tree
from jaxfl.core import State
from jaxfl.history import concatenate
from jaxfl.stream import HostStates

PyTree = Any


class Checkpoints:
    """A folder from which a killed run goes on, to the bit.

    A piece of history is written before the state that follows it, each atomically,
    so that whatever moment the process dies at, the newest complete state finds all
    the history before it. Likewise the states of clients that are on the host: a piece
    has those written since the last, and all pieces in order give the newest of each.

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
            self._path / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2)
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
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
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
        saved = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding),
            saved,
            tree.without_keys(_on_device(state)),
        )
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
            for file in folder.glob("*.npz"):
                if jax.process_index() == 0 and int(file.stem) > step:
                    file.unlink()

    def save(self, state: State, pieces: list[PyTree]) -> None:
        """Saves a state and those pieces of history that are not yet saved."""
        if len(pieces) == self._pieces:
            return
        step = int(state.round)
        piece = concatenate(pieces[self._pieces :])
        self._pieces = len(pieces)
        _write(self._history, step, _named(piece))
        if isinstance(state.clients, HostStates):
            ids, rows = state.clients.unsaved()
            _write(self._clients, step, {"client": ids, **_named(rows)})
        ocp = self._ocp
        # A copy: the state's own buffers are donated to the next segment.
        copy = jax.tree.map(
            lambda x: np.array(x, copy=True), tree.without_keys(_on_device(state))
        )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(copy), run=ocp.args.JsonSave(self._run)
            ),
        )

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


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
