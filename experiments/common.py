"""What every experiment does the same way: settings, devices, data, and results."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import rich
import rich.console
import rich.progress
import rich.table
import tyro

import jaxfl

Settings = TypeVar("Settings")

_STARTED = time.perf_counter()

# Okabe and Ito's colours, told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)


def program() -> str:
    """`python -m experiments.NAME`, of this process."""
    return f"python -m experiments.{Path(sys.argv[0]).stem}"


def settings(presets: Mapping[str, Settings], description: str | None) -> Settings:
    """The command line: `--preset` picks the defaults, every field is an option.

    Args:
      presets: frozen dataclasses of one type, by the value of their field `preset`.
      description: of the experiment, for `--help`.
    """
    prog = program()
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)))
    preset = parser.parse_known_args()[0].preset
    default = presets[preset]
    return tyro.cli(type(default), prog=prog, default=default, description=description)


def in_processes(name: str, *each: Sequence[Any], timeout: float | None = None) -> list:
    """What `python -m experiments.NAME` prints last, as JSON, one run for each
    sequence of arguments, all at a time.

    Raises:
      RuntimeError: if one fails, with what it wrote to its standard error.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in each
    ]
    try:
        printed = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, arguments, (_, errors) in zip(started, each, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name} {' '.join(map(str, arguments))}:\n{errors}")
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def sweep(
    title: str,
    federation_of: Callable[[jax.Array], jaxfl.Federation],
    values: Any,
    params: Any,
    data: jaxfl.ClientData | Callable[[int], jaxfl.ClientData],
    *,
    rounds: int,
    key: jax.Array,
    look: Callable[[jaxfl.Info], Any],
    weight: jax.Array | None = None,
    evaluate: Any = None,
) -> tuple[jaxfl.State, Any, Any]:
    """A federation under every value of a parameter, all in one vmapped program.

    Args:
      title: beside the progress bar.
      federation_of: from one value.
      values: pytree of `[V, ...]` arrays.
      params: where all start.
      data: the population, all of which takes part in every round; or that of each
        round, from its number.
      rounds: R.
      key: of every run.
      look: what to keep of a round, whose arrays are `[1, K, ...]`.
      weight: `[N]`, see `sample_cohort`.
      evaluate: see `simulate`.

    Returns:
      The last states `[V, ...]`; what was looked at, and evaluated, `[V, R, ...]`.
    """

    def one_round(value, state, data, evaluate):
        state, (info, evaluations) = jaxfl.scan_rounds(
            *(federation_of(value), state, data),
            rounds=1,
            key=key,
            weight=weight,
            evaluate=evaluate,
        )
        return state, (look(info), jax.tree.map(lambda x: x[0], evaluations))

    data_at = data if callable(data) else lambda _: data
    init = jax.vmap(lambda value: federation_of(value).init(params, data_at(0)))
    step = jax.jit(jax.vmap(one_round, (0, 0, None, None)), donate_argnums=1)
    state, seen = jax.jit(init)(values), []
    for r in rich.progress.track(range(rounds), f"{title:40}"):
        state, outputs = step(values, state, data_at(r), evaluate)
        seen.append(outputs)
    return state, *jax.tree.map(lambda *x: np.stack(x, 1), *jax.device_get(seen))


def check_known(*pairs: tuple[Iterable[str], Iterable[str]]) -> None:
    """Ends the program if a name that was given is none of those known."""
    for given, known in pairs:
        if unknown := set(given) - set(known):
            sys.exit(f"unknown: {sorted(unknown)}; there are: {list(known)}")


def averaged(
    algorithm: jaxfl.Algorithm,
    channel: jaxfl.Channel,
    model: jaxfl.models.Model,
    params: Any,
    data: jaxfl.ClientData,
    test: Any,
    **options: Any,
) -> jaxfl.History:
    """A run whose messages pass a channel and are averaged, laid out as suits here.

    Args:
      algorithm, channel, params, data: as for `federate` and `simulate`.
      model: what is trained.
      test: examples to evaluate it on.
      **options: of `simulate`.
    """
    federation = jaxfl.federate(algorithm, jaxfl.chain(channel, jaxfl.mean()))
    federation = jaxfl.tune(federation, params, data, verbose=False)
    evaluate = jaxfl.on_server(model.metrics, test, mesh=federation.mesh)
    return jaxfl.simulate(federation, params, data, evaluate=evaluate, **options)[1]


def results_folder(name: str, root: str = "results") -> Path:
    """`results/NAME/`, made if missing."""
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, all of it or none, with how it came about.

    To `summary` it adds `run`, the command, device and seconds since the start, and
    `tables`, which `print_table` fills.
    """
    run = {"command": " ".join([program(), shlex.join(sys.argv[1:])]).strip()}
    run |= {"device": device(), "seconds": round(time.perf_counter() - _STARTED, 1)}
    write_json(folder / "summary.json", {**summary, "run": run, "tables": []})


def write_json(path: Path, value: Any) -> None:
    """All of it or none."""
    text = json.dumps(value, indent=2, default=_plain, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def device() -> str:
    """What jax computes on: `2 CPU cores`, `1 x NVIDIA H100`."""
    devices = jax.devices()
    if devices[0].platform == "cpu":  # which may be several devices of a core each
        return f"{os.cpu_count()} CPU cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def _plain(x):
    return x.tolist() if isinstance(x, np.ndarray | np.generic | jax.Array) else str(x)


def save_history(
    folder: Path, columns: Sequence[str], rows: Iterable[Sequence]
) -> None:
    """Writes `history.csv`, one row after another."""
    values = map(np.array, zip(*rows, strict=True))
    table = dict(zip(columns, values, strict=True))
    jaxfl.history.write_csv(folder / "history.csv", table)


def save_figure(folder: Path, figure: Any, name: str) -> None:
    """Writes `NAME.png` and `NAME.svg`."""
    for kind in ("png", "svg"):
        partial = folder / f"{name}.partial.{kind}"
        figure.savefig(partial, dpi=150)
        os.replace(partial, folder / f"{name}.{kind}")
    rich.print(f"figure: {folder / f'{name}.png'}")


def tidy(*all_axes: Any) -> None:
    """A light grid, no box, and plain numbers where the scale is logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                subs = (1, 2, 5) if high < 300 * low else (1,)
                axis.set_major_locator(LogLocator(subs=subs))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())


def print_table(
    folder: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence]
) -> None:
    """A table on the terminal, and in the summary that `save_summary` has written."""
    cells = [[str(cell) for cell in row] for row in rows]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    summary["tables"].append({"title": title, "columns": columns, "rows": cells})
    summary["run"]["seconds"] = round(time.perf_counter() - _STARTED, 1)
    write_json(folder / "summary.json", summary)
    table = rich.table.Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in cells:
        table.add_row(*row)
    console = rich.console.Console()
    if not console.is_terminal:  # a log has no width of its own
        console.width = 120
    console.print(table)
