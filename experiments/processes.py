"""What a second process is worth: a round on one core, and on two of one core each.

Federated averaging of the 2NN, 100 clients x 600 examples all of which take part, E = 1
and B = 10 (W4 of `experiments.speed`), one client after another. Either side runs in
processes of its own, each pinned to a core; two of them meet on the loopback, by gloo.
They alternate, because other load on the machine comes and goes.
"""

import dataclasses
import json
import os
import socket
import sys
import time
from typing import Literal

import jax
import numpy as np

from experiments import common, speed


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: Literal["ci", "full"]
    """Where the other settings start from: the tiny workload, or W4."""
    workload: str
    """One of those of `experiments.speed`."""
    pairs: int = 5
    """How often each side is started."""
    rounds: int = 5
    """Rounds timed at each start; the median of all counts."""
    one: tuple[int, int, int] | None = None
    """Time a round as process i of n that meet at a port, and print JSON."""


PRESETS = {
    "ci": Settings("ci", "tiny", pairs=1, rounds=2),
    "full": Settings("full", "W4"),
}


def measure(config: Settings, process: int, processes: int, port: int) -> list[float]:
    """Seconds of each round, in this process."""
    if sys.platform == "linux":  # before JAX starts its threads
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[process % len(cores)]})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    work = speed.WORKLOADS[config.workload]
    one_round = speed.with_jaxfl(work, "jaxfl, mesh, one by one", *speed.pixels(work))
    seconds = []
    for i in range(1 + config.rounds):
        start = time.perf_counter()
        jax.block_until_ready(one_round(i))
        seconds.append(time.perf_counter() - start)
    if processes > 1:
        jax.distributed.shutdown()
    return seconds[1:]  # the first compiled


def in_own_processes(config: Settings, processes: int) -> list[float]:
    """What the first of them measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("--preset", config.preset, "--workload", config.workload)
    settings += ("--rounds", config.rounds, "--one")
    each = [(*settings, process, processes, port) for process in range(processes)]
    return common.in_processes("processes", *each, timeout=600)[0]


def draw(seconds: dict[int, list[float]]):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 2), layout="constrained")
    for processes, each in seconds.items():
        axes.plot(each, [str(processes)] * len(each), "o", color="0.7")
        axes.plot(np.median(each), str(processes), "|", color=common.BLUE, ms=20, mew=3)
    axes.set(xlabel="time of a round (seconds)", ylabel="processes", xlim=(0, None))
    axes.margins(y=0.5)
    common.tidy(axes)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    if config.one:
        print(json.dumps(measure(config, *config.one)))
        return
    seconds = {1: [], 2: []}
    for _ in range(config.pairs):
        for processes, each in seconds.items():
            each += in_own_processes(config, processes)
    median = {n: float(np.median(each)) for n, each in seconds.items()}
    ratio = median[1] / median[2]
    folder = common.results_folder("processes")
    points = [(n, i, s) for n in seconds for i, s in enumerate(seconds[n], 1)]
    common.save_history(folder, ("processes", "round", "seconds"), points)
    summary = {"seconds": median, "ratio": ratio}
    summary |= {"settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary)
    common.save_figure(folder, draw(seconds), "processes")
    common.print_table(
        folder,
        f"{config.workload}: the median of {len(seconds[1])} rounds",
        ("processes x 1 core", "s / round", "x"),
        [(n, f"{s:.4f}", f"{median[1] / s:.2f}") for n, s in median.items()],
    )


if __name__ == "__main__":
    main()
