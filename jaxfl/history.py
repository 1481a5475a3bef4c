"""What a run leaves to look at: plain arrays, and tables of them."""

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfl.core import Info
from jaxfl.mesh import NOBODY

Columns = dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """All rounds of a run, R of them, and its n evaluations.

    `history["accuracy"]` is an evaluation's metric, `history.round` where it was made.

    Attributes:
      clients: the `Info` of every round, stacked `[R, K, ...]`.
      evaluations: dictionary of `[n, ...]` arrays, what `evaluate` returned.
      round: int32 `[n]`, how many rounds had been done at each evaluation.
    """

    clients: Info
    evaluations: dict[str, Any]
    round: Any

    def __getitem__(self, metric: str) -> np.ndarray:
        if metric not in self.evaluations:
            raise KeyError(f"no metric {metric!r}, there are {[*self.evaluations]}")
        return self.evaluations[metric]

    def bits(self) -> Columns:
        """Bits that all clients together sent and received in each round, `[R]`."""
        up, down = self.clients.bits_up, self.clients.bits_down
        return {
            "up": np.asarray(up).astype(np.float64).sum(1),
            "down": np.asarray(down).astype(np.float64).sum(1),
        }

    @property
    def time(self) -> np.ndarray:
        """Seconds on the virtual clock at each evaluation, `[n]`.

        Raises:
          ValueError: if the run had none: it was of no `faults.Schedule` with times.
        """
        if self.clients.ended is None:
            raise ValueError("time: this run had no faults.Schedule with a clock.")
        return np.asarray(self.clients.ended)[np.asarray(self.round) - 1]

    def reached(self, metric: str, target: float) -> dict[str, float] | None:
        """When an evaluation first gave a target or more; None if none did.

        Args:
          metric: of one number an evaluation.
          target: of which more is better.

        Returns:
          `{"round": rounds done, "bits_up": bits sent by then}`, and of a run with a
          virtual clock `"time"`, in seconds.
        """
        there = np.flatnonzero(np.asarray(self[metric]) >= target)
        if not there.size:
            return None
        first = there[0]
        rounds = int(self.round[first])
        when = {"round": rounds, "bits_up": float(self.bits()["up"][:rounds].sum())}
        if self.clients.ended is not None:
            when["time"] = float(self.time[first])
        return when

    def evaluation_table(self) -> Columns:
        """One row an evaluation: the round, and every metric that is one number.

        `pandas.DataFrame(history.evaluation_table())` if you like.
        """
        scalars = {k: v for k, v in self.evaluations.items() if np.ndim(v) == 1}
        time = {} if self.clients.ended is None else {"time": self.time}
        return {"round": self.round, **time, **scalars}

    def client_table(self) -> Columns:
        """One row a client and round: who, what was sent, and every single metric."""
        rounds, k = self.clients.client.shape
        somebody = self.clients.client.reshape(-1) != NOBODY
        columns = {"round": np.repeat(np.arange(1, rounds + 1), k)[somebody]}
        metrics = self.clients.metrics
        named = self.clients._asdict() | (metrics if isinstance(metrics, dict) else {})
        for name, values in named.items():
            if isinstance(values, np.ndarray) and values.ndim == 2:
                columns[name] = values.reshape(-1)[somebody]
        return columns


def concatenate(pieces: list[History]) -> History:
    """The history of a run from those of its consecutive pieces."""
    return jax.tree.map(lambda *x: np.concatenate(x), *pieces)


def write_csv(path: str | os.PathLike, columns: Columns) -> None:
    """Writes a table, all of it or none.

    Args:
      path: the file; its folder is made if missing.
      columns: dictionary of arrays of one length.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
    os.replace(partial, path)
