"""Checkpoints of a run: its state by orbax, and its history piece by piece."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfl.core import State
from jaxfl.history import concatenate

PyTree = Any


class Checkpoints:
    """A folder from which a killed run goes on, to the bit.

    A piece of history is written before the state that follows it, each atomically,
    so that whatever moment the process dies at, the newest complete state finds all
    the history before it. There are two states at most, and a file of history for each
    save; history is also flushed to the disk, the state as orbax does it.

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
        self._history.mkdir(parents=True, exist_ok=True)

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
            _bare(state),
        )
        try:
            saved = self._manager.restore(
                newest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
            )["state"]
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {self._path} holds the state of another federation."
            ) from error
        saved = jax.tree.map(_wrap, saved, state)
        pieces = []
        for file in sorted(self._history.glob("*.npz")):
            if int(file.stem) <= newest:
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
        for file in self._history.glob("[0-9]*.*"):
            if jax.process_index() == 0 and int(file.stem) > step:
                file.unlink()

    @staticmethod
    def copy(state: State) -> State:
        """A copy in the host's memory, begun and not waited for.

        The state may be donated at once: who overwrites it waits for the copy.
        """
        state = _bare(state)
        host = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)
        return jax.device_put(state, host, may_alias=False)

    def save(self, copied: State, pieces: list[PyTree]) -> None:
        """Saves a state and those pieces of history that are not yet saved.

        It waits for the copy and for the state saved before, and not until this one is
        written.

        Args:
          copied: what `copy` gave.
          pieces: all of the history up to that state.
        """
        if len(pieces) == self._pieces:
            return
        step = int(copied.round)
        piece = concatenate(pieces[self._pieces :])
        self._pieces = len(pieces)
        if jax.process_index() == 0:
            file = self._history / f"{step:09d}.npz"
            partial = file.with_suffix(".partial")
            with open(partial, "wb") as out:
                np.savez(out, **_named(piece))
                out.flush()
                os.fsync(out.fileno())  # a loss of power must not leave it empty
            os.replace(partial, file)
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(copied), run=ocp.args.JsonSave(self._run)
            ),
        )

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def digest(tree: PyTree, most: int | None = None) -> str:
    """A fingerprint of arrays.

    Args:
      tree: pytree of arrays, of the host or of a device.
      most: bytes to read of each array, in rows evenly spaced; None for all.
    """
    fingerprint = hashlib.sha256()
    for x in jax.tree.leaves(_bare(tree)):
        rows = x if most is None else x[:: max(1, x.nbytes // most)]
        fingerprint.update(f"{x.dtype}{x.shape}".encode())
        fingerprint.update(np.asarray(rows).tobytes())
    return fingerprint.hexdigest()


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


def _is_key(x) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _bare(tree: PyTree) -> PyTree:
    """Random keys as the integers that they are made of."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap(saved, like):
    if _is_key(like):
        return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(like))
    return saved
