"""A million clients: rounds a second and memory, on the device and streamed to it.

Ten thousand of 10^6 clients a round, each with 10 MNIST digits of a pool that all
share, one batch and one epoch; logistic regression and the 2NN. Once with the
population on the device, once on the host with only cohorts fetched
(`jaxfl.on_host`), and with `--folder` once with a file that has every client's own
digits (7.8 GB). Each in a process of its own, so that its memory is its own; it is
measured after every segment of rounds.
"""

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import mnist

MODELS = {"logistic": models.logistic_regression, "2nn": models.two_nn}
RESIDENT, STREAMED, FROM_FILE = MODES = (
    *("on the device", "streamed from memory", "streamed from a file"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: Literal["ci", "full"]
    """Where the other settings start from."""
    models: tuple[Literal["logistic", "2nn"], ...]
    population: int
    """N."""
    cohort: int
    """K, clients a round."""
    rounds: int
    """Rounds of logistic regression."""
    rounds_2nn: int
    """Rounds of the 2NN."""
    every: int
    """Rounds a segment; up to three segments' examples are held when streamed."""
    folder: str | None = None
    """Where to put the file with every client's own digits; none is made if None."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """Where the pool of digits is from: 5,000 in the package, or all 60,000."""
    examples: int = 10
    """Of one client."""
    chunk: int = 1
    """Clients vmapped at once on each device."""
    one: tuple[str, str] | None = None
    """Run this model and mode only, in this process, and print JSON."""


PRESETS = {
    "ci": Settings("ci", ("logistic",), 20_000, 100, 12, 12, 2),
    "full": Settings(
        "full", ("logistic", "2nn"), 1_000_000, 10_000, 2000, 20, 2, data="files"
    ),
}


def population(config: Settings, mode: str) -> tuple[jaxfl.ClientData, dict]:
    """The clients' data on the host, and digits to test on."""
    train, test = mnist(config.data)
    rng = np.random.default_rng(0)
    total = config.population * config.examples
    index = rng.integers(0, len(train["x"]), total, np.int32)
    if mode == FROM_FILE:
        train = from_file(Path(config.folder or "."), train, index)
        index = np.arange(total, dtype=np.int32)
    start = np.arange(0, total, config.examples, dtype=np.int32)
    size = np.full(config.population, config.examples, np.int32)
    data = jaxfl.ClientData(train, index, start, size, config.examples, config.examples)
    return data, test


class File:
    """An array in a .npy file, a sixteenth of which is mapped at a time to be read.

    Pages of a file count as a process's memory for as long as they are mapped, though
    the system takes them back when it needs to.
    """

    def __init__(self, file: Path):
        self.file, x = file, np.load(file, mmap_mode="r")
        self.shape, self.dtype = x.shape, x.dtype

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        parts = np.array_split(rows, 16)  # which increase
        return np.concatenate([np.load(self.file, mmap_mode="r")[p] for p in parts])


def from_file(folder: Path, pool: dict, rows: np.ndarray) -> dict:
    """These rows of the pool, written to a file unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    file, shape = folder / f"x-{len(rows)}.npy", (len(rows), *pool["x"].shape[1:])
    if not file.exists():
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for some in np.array_split(rows, 1 + len(rows) // 100_000):
                out.write(pool["x"][some].tobytes())
        partial.rename(file)
    return {"x": File(file), "y": pool["y"][rows]}


def averages(federation: jaxfl.Federation) -> jaxfl.Federation:
    """The same, but of what is seen of clients the mean: histories do not grow by K."""

    def one_round(key, state, cohort):
        state, info = federation.round(key, state, cohort)
        return state, jax.tree.map(lambda x: jnp.mean(x, 0, keepdims=True), info)

    return federation._replace(round=one_round)


def measure(config: Settings, name: str, mode: str) -> dict:
    """One model, one mode, in this process."""
    jaxfl.cores_as_devices()
    data, test = population(config, mode)
    mesh = jaxfl.client_mesh() if len(jax.devices()) > 1 else None
    model = models.from_linen(MODELS[name](), test["x"][:1])
    federation = jaxfl.federate(
        jaxfl.fedavg(model.loss, optax.sgd(0.1), batch_size=10),
        jaxfl.mean(),
        chunk_size=config.chunk if jax.default_backend() == "cpu" else None,
        mesh=mesh,
    )
    process, seen = psutil.Process(), []

    def look(metrics):
        seen.append((time.perf_counter(), process.memory_info().rss))
        return False

    few = {name: values[:1000] for name, values in test.items()}
    _, history = jaxfl.simulate(
        averages(federation),
        model.init(jax.random.key(0)),
        data if mode == RESIDENT else jaxfl.on_host(data),
        rounds=config.rounds if name == "logistic" else config.rounds_2nn,
        cohort_size=config.cohort,
        every=config.every,
        key=jax.random.key(0),
        evaluate=jaxfl.on_server(model.metrics, few),
        until=look,
        progress=False,
    )
    seconds, memory = np.array(seen).T
    settled = history.round > history.round[-1] // 4
    slope = np.polyfit(history.round[settled], memory[settled], 1)[0]
    rates = np.diff(history.round[settled]) / np.diff(seconds[settled])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rounds_per_second": float(np.median(rates)),
        "peak_bytes": peak,
        "bytes_per_round": slope,
        "accuracy": float(history["accuracy"][-1]),
        "loss": float(history["loss"][-1]),
        "round": history.round.tolist(),
        "seconds": (seconds - seconds[0]).tolist(),
        "bytes": memory.tolist(),
    }


def in_own_process(config: Settings, name: str, mode: str) -> dict:
    options = dataclasses.asdict(config) | {"one": (name, mode)}
    arguments = []
    for option, value in options.items():
        if value is not None:
            values = value if isinstance(value, tuple | list) else (value,)
            arguments += [f"--{option.replace('_', '-')}", *values]
    return common.in_processes("many_clients", arguments)[0]


def draw(results: dict):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _ in results))
    figure, panels = plt.subplots(
        *(2, len(names)),
        figsize=(1 + 4 * len(names), 5.5),
        layout="constrained",
        squeeze=False,
    )
    colours = dict(zip(MODES, (common.BLACK, common.BLUE, common.ORANGE), strict=True))
    for (name, mode), row in results.items():
        top, bottom = panels[:, names.index(name)]
        rounds, seconds = np.array(row["round"]), np.array(row["seconds"])
        apart = max(1, len(rounds) // 40)  # segments
        rate = np.diff(rounds[::apart]) / np.diff(seconds[::apart])
        top.plot(rounds[::apart][1:], rate, label=mode, color=colours[mode])
        gibibytes = np.array(row["bytes"]) / 2**30
        bottom.plot(rounds, gibibytes, color=colours[mode])
        top.set_title(name)
        bottom.set_xlabel("round")
    for panel in panels.ravel():
        panel.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("rounds a second")
    panels[1, 0].set_ylabel("resident memory (GiB)")
    panels[0, 0].legend(frameon=False)
    common.tidy(*panels.ravel())
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    if config.one:
        print(json.dumps(measure(config, *config.one)))
        return
    modes = MODES if config.folder else MODES[:-1]
    results = {
        (name, mode): in_own_process(config, name, mode)
        for name in config.models
        for mode in modes
    }
    table = [
        (
            name,
            mode,
            row["round"][-1],
            f"{row['rounds_per_second']:.3g}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['bytes_per_round'] / 2**10:.1f}",
            f"{row['accuracy']:.3f}",
        )
        for (name, mode), row in results.items()
    ]
    folder = common.results_folder("many_clients")
    figure = draw(results)
    points = [
        (name, mode, *point)
        for (name, mode), row in results.items()
        for point in zip(
            *(row.pop(column) for column in ("round", "seconds", "bytes")), strict=True
        )
    ]
    columns = ("model", "population", "round", "seconds", "bytes")
    common.save_history(folder, columns, points)
    summary: dict = {name: {} for name in config.models}
    for (name, mode), row in results.items():
        summary[name][mode] = row
    summary["settings"] = dataclasses.asdict(config)
    common.save_summary(folder, summary)
    common.save_figure(folder, figure, "many_clients")
    common.print_table(
        folder,
        f"{config.cohort:,} of {config.population:,} clients a round",
        (
            *("model", "population", "rounds", "rounds / s", "peak GiB"),
            *("KiB / round", "test accuracy"),
        ),
        table,
    )


if __name__ == "__main__":
    main()
