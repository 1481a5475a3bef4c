"""How fast a round is, against federated averaging written by hand.

Workloads on images of MNIST's shape (random pixels: speed does not depend on them),
E = 1 and B = 10:

- W1: CNN, 100 clients x 600 examples, cohort 10
- W2: 2NN, the same
- W3: logistic regression, 1,000 clients x 60, cohort 100
- W4: 2NN, 100 clients x 600, cohort 100
- scale: logistic regression, 10,000 clients x 60, cohort 1,000, in chunks
- W1 all, W3 all: as W1 and W3, the whole population at once, for accelerators
- one: 2NN, a cohort of one client of 600, against the same SGD without federation (d)
- equal, writers, log-normal: 2NN, cohort 100 of 539 clients, with as many examples in
  equal parts, in those of the writers of MNIST, and in log-normal ones (sigma 1)
- tiny: logistic regression, 20 clients x 20, cohort 10

Each with jaxfl under several execution plans (also as `jaxfl.tune` chooses, and with
clipping and noise), and by hand (`experiments.baselines`): loops in Python over clients
and steps (a) or clients only (b), a plain vmap (c), and centralised SGD on as many
examples (d). Every row runs in a process of its own, so that its compile time and peak
memory are its own, and the rows take turns, as other load on a machine comes and goes.

With `--channels` instead: what each channel adds to a round of W2 (of tiny in the small
preset), all in one process, taking turns round by round.
"""

import dataclasses
import json
import resource
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.progress

import jaxfl
from experiments import baselines, common
from jaxfl import communicate, compress, models
from jaxfl.data import from_arrays, mnist_writers, natural

BATCH = 10


@dataclasses.dataclass(frozen=True)
class Workload:
    model: Literal["cnn", "2nn", "logistic"]
    clients: int
    examples: int
    cohort: int
    sizes: Literal["equal", "writers", "log-normal"] = "equal"


WORKLOADS = {
    "W1": Workload("cnn", 100, 600, 10),
    "W2": Workload("2nn", 100, 600, 10),
    "W3": Workload("logistic", 1000, 60, 100),
    "W4": Workload("2nn", 100, 600, 100),
    "W1 all": Workload("cnn", 100, 600, 100),
    "W3 all": Workload("logistic", 1000, 60, 1000),
    "scale": Workload("logistic", 10_000, 60, 1000),
    "one": Workload("2nn", 100, 600, 1),
    "equal": Workload("2nn", 539, 111, 100),
    "writers": Workload("2nn", 539, 111, 100, "writers"),
    "log-normal": Workload("2nn", 539, 111, 100, "log-normal"),
    "tiny": Workload("logistic", 20, 20, 10),
}
BASELINES = {
    "(a) loop over clients, steps": baselines.loop_over_steps,
    "(b) loop over clients": baselines.loop_over_clients,
    "(c) vmap": baselines.vmapped,
    "(d) centralised": baselines.centralised,
}
TUNED, PRIVATE = "jaxfl, tuned", "jaxfl, tuned, clip and noise"
# name: (clients vmapped at once, or None for all; whether cores or GPUs are a mesh)
PLANS = {
    "jaxfl, mesh, one by one": (1, True),
    "jaxfl, one by one": (1, False),
    "jaxfl, all at once": (None, False),
    "jaxfl, mesh, chunks of 10": (10, True),
}
OURS = (*PLANS, TUNED, PRIVATE)
POOLED = "(a) with reshape pooling"  # a baseline that someone has tuned


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: Literal["ci", "full"]
    """Where the other settings start from: the tiny workload, or all the others."""
    workloads: tuple[str, ...]
    """Which of those above."""
    rows: tuple[str, ...]
    """Which baselines and plans to run; all of them by default."""
    rounds: int = 7
    """Rounds timed; the median counts."""
    seconds: float = 20.0
    """After this long no further round of a row is timed in its turn."""
    turns: int = 1
    """How often each row has its turn, in a new process."""
    channels: bool = False
    """Time channels instead."""
    only: tuple[str, ...] = ()
    """Which of the channels; all by default."""
    one: bool = False
    """Time the one workload and row given, in this process, and print JSON."""


def channels() -> dict[str, jaxfl.Channel]:
    """By name: channels to put left of the mean."""
    feedback = compress.error_feedback(compress.top_k(0.01))
    noise = jaxfl.at_server(optax.add_noise(1e-4, 0.0, key=0))
    return {
        "nothing": jaxfl.identity(),
        "clip and noise": jaxfl.chain(jaxfl.clip(1.0), noise),
        "norm_threshold": communicate.norm_threshold(0.1, keep=True),
        "relative_threshold": communicate.relative_threshold(0.01, keep=True),
        "target_rate": communicate.target_rate(0.5, initial=1.0, step=0.5, keep=True),
        "last_sent_threshold": communicate.last_sent_threshold(0.1),
        "cmfl": communicate.cmfl(0.5, keep=False),
        "lag": communicate.lag(1.0),
        "gaia": communicate.gaia(0.1),
        "cast to bfloat16": compress.cast(jnp.bfloat16),
        "uniform, 4 bits": compress.uniform(4),
        "qsgd, 15 levels": compress.qsgd(15),
        "terngrad": compress.terngrad(),
        "scaled_sign": compress.scaled_sign(),
        "sign_majority": compress.sign_majority(),
        "random_k, 1 %": compress.random_k(0.01),
        "top_k, 1 %": compress.top_k(0.01),
        "top_k, 1 %, error feedback": feedback,
        "top_k, 1 %, of qsgd": compress.top_k(0.01, compress.qsgd(15)),
        "rotation, uniform": jaxfl.chain(compress.rotation(), compress.uniform(4)),
        "drive": compress.drive(),
        "eden, 4 bits": compress.eden(4),
        "fetchsgd": compress.fetchsgd(5, 10_000, 0.01),
        "entropy": compress.entropy(),
    }


ROWS = (*BASELINES, POOLED, *OURS)
RAGGED = ("equal", "writers", "log-normal")
PRESETS = {
    "ci": Settings("ci", ("tiny",), ROWS, rounds=2),
    "full": Settings(
        "full", ("W1", "W2", "W3", "W4", "scale", "one", *RAGGED), ROWS, turns=3
    ),
}


def wanted(workload: str, row: str) -> bool:
    if workload == "scale" or workload in RAGGED:
        return row == TUNED
    if workload == "one":
        return row in ("(d) centralised", TUNED)
    if row == PRIVATE:
        return workload in ("W2", "tiny")
    if row == "jaxfl, all at once" and jax.default_backend() == "cpu":
        return workload in ("W2", "W3", "tiny")
    return row != POOLED or workload == "W1"


def matmul_peak() -> float:
    """FLOP/s of a large float32 matrix product, the best of ten."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = min(timed(lambda: product(a)) for _ in range(10))
    return 2 * n**3 / best


def timed(fn) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def flops_of_round(network, work: Workload) -> float:
    """What a round has to compute: the compiler's count for one step, times steps."""
    params = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    x, y = jnp.zeros((BATCH, 28, 28, 1)), jnp.zeros(BATCH, jnp.int32)
    step = jax.jit(jax.grad(baselines.loss_of(network))).lower(params, x, y).compile()
    cost = step.cost_analysis() or {}
    return cost.get("flops", np.nan) * work.cohort * work.examples / BATCH


def hand_written(work: Workload, row: str, x, y):
    """A baseline's round on fixed cohorts of host data, as `() -> params`."""
    network = baselines.Network(work.model, reshape_pool=row == POOLED)
    make = BASELINES.get(row, baselines.loop_over_steps)
    round_of = make(network, optax.sgd(0.1), BATCH)
    x = x[: work.cohort * work.examples].reshape(work.cohort, work.examples, 28, 28, 1)
    y = y[: work.cohort * work.examples].reshape(work.cohort, work.examples)
    if make is not baselines.loop_over_steps:  # which feeds the device step by step
        x, y = jnp.asarray(x), jnp.asarray(y)
    params = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    held = [params]

    def one_round(i):
        held[0] = round_of(held[0], x, y, jax.random.key(i))
        return held[0]

    return one_round


def client_ids(work: Workload) -> np.ndarray:
    """Whose each example is."""
    if work.sizes == "writers":
        return natural(mnist_writers()[0])
    share = np.ones(work.clients)
    if work.sizes == "log-normal":
        share = np.random.default_rng(1).lognormal(sigma=1.0, size=work.clients)
    total = work.clients * work.examples
    sizes = np.diff(np.cumsum([0, *share]) / share.sum() * total // 1).astype(int)
    return np.repeat(np.arange(work.clients), sizes)


def pixels(work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels, as many as the population has."""
    rng = np.random.default_rng(0)
    total = len(client_ids(work))
    x = rng.integers(0, 256, (total, 28, 28, 1), np.uint8)
    return x, rng.integers(0, 10, total).astype(np.int32)


def with_jaxfl(work: Workload, row: str, x, y, channel: jaxfl.Channel | None = None):
    """A round of jaxfl: sampling, training, averaging, and every client's metrics."""
    network = {
        "cnn": models.cnn,
        "2nn": models.two_nn,
        "logistic": models.logistic_regression,
    }[work.model]()
    model = models.from_linen(network, x[:1])
    federation = jaxfl.federate(
        jaxfl.fedavg(model.loss, optax.sgd(0.1), batch_size=BATCH),
        jaxfl.chain(channel or jaxfl.identity(), jaxfl.mean()),
    )
    data = from_arrays(x, y, client_ids(work))
    params = model.init(jax.random.key(0))
    if row in PLANS:
        chunk, over_mesh = PLANS[row]
        mesh = jaxfl.client_mesh() if over_mesh and len(jax.devices()) > 1 else None
        federation = jaxfl.federate(*federation.parts, chunk_size=chunk, mesh=mesh)
    else:
        federation = jaxfl.tune(
            federation, params, data, cohort_size=work.cohort, verbose=False
        )
    place = jnp.asarray
    if federation.mesh is not None:
        everywhere = jax.sharding.NamedSharding(
            federation.mesh, jax.sharding.PartitionSpec()
        )
        place = lambda a: jax.device_put(a, everywhere)  # noqa: E731
    data = jax.tree.map(place, data)
    state = federation.init(params, data)
    held = [jax.tree.map(place, state)]
    step = jax.jit(
        lambda state, data: jaxfl.scan_rounds(
            federation,
            state,
            data,
            rounds=1,
            key=jax.random.key(0),
            cohort_size=work.cohort,
        ),
        donate_argnums=0,
    )

    def one_round(i):
        held[0], info = step(held[0], data)
        return held[0], info

    return one_round


def measure(config: Settings) -> dict:
    """One workload, one row, in this process."""
    (name,), (row,) = config.workloads, config.rows
    if row in OURS and PLANS.get(row, (None, True))[1]:
        jaxfl.cores_as_devices()
    work = WORKLOADS[name]
    flops = flops_of_round(baselines.Network(work.model), work)
    x, y = pixels(work)
    if row in OURS:
        channel = channels()["clip and noise"] if row == PRIVATE else None
        one_round = with_jaxfl(work, row, x, y, channel)
    else:
        one_round = hand_written(work, row, x, y)
    del x, y
    first = timed(lambda: one_round(0))
    seconds = []
    while len(seconds) < config.rounds and sum(seconds) < config.seconds:
        seconds.append(timed(lambda: one_round(1 + len(seconds))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        peak = stats["peak_bytes_in_use"]
    return {
        "seconds": float(np.median(seconds)),
        "fastest": min(seconds),
        "rounds": len(seconds),
        "each": seconds,
        "compile_seconds": max(0.0, first - float(np.median(seconds))),
        "peak_bytes": peak,
        "flops_per_second": flops / float(np.median(seconds)),
    }


def in_own_process(name: str, row: str, config: Settings) -> dict:
    arguments = ("--preset", config.preset, "--workloads", name, "--rows", row, "--one")
    arguments += ("--rounds", config.rounds, "--seconds", config.seconds)
    return common.in_processes("speed", arguments)[0]


def together(turns: list[dict]) -> dict:
    """The turns of a row as one: the median of all rounds, the most memory."""
    each = [seconds for turn in turns for seconds in turn["each"]]
    median = float(np.median(each))
    flops = turns[0]["flops_per_second"] * turns[0]["seconds"]
    return {
        "seconds": median,
        "fastest": min(each),
        "rounds": len(each),
        "each": each,
        "compile_seconds": float(np.median([t["compile_seconds"] for t in turns])),
        "peak_bytes": max(t["peak_bytes"] for t in turns),
        "flops_per_second": flops / median,
    }


def measure_channels(config: Settings) -> None:
    """Every channel's round, in turns; a table of how much longer it is than plain."""
    jaxfl.cores_as_devices()
    common.check_known((config.only, channels()))
    name = "tiny" if config.preset == "ci" else "W2"
    x, y = pixels(WORKLOADS[name])
    rounds = {
        channel: with_jaxfl(WORKLOADS[name], TUNED, x, y, how)
        for channel, how in channels().items()
        if channel in (*config.only, "nothing") or not config.only
    }
    compiled = {
        channel: timed(lambda go=go: go(0))
        for channel, go in rich.progress.track(rounds.items(), "compiling")
    }
    seconds = {channel: [] for channel in rounds}
    for i in rich.progress.track(range(5 * config.rounds), "timing"):
        for channel, go in rounds.items():
            seconds[channel].append(timed(lambda go=go, i=i: go(1 + i)))
    median = {channel: float(np.median(each)) for channel, each in seconds.items()}
    added = {c: median[c] / median["nothing"] - 1 for c in median}
    folder = common.results_folder("speed_channels")
    points = ((c, i, t) for c, each in seconds.items() for i, t in enumerate(each, 1))
    common.save_history(folder, ("channel", "round", "seconds"), points)
    summary = {"workload": name, "seconds": median, "added": added}
    summary |= {"settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary)
    common.print_table(
        folder,
        f"A round of {name}, median of {5 * config.rounds} in turns",
        ("channel", "s / round", "added %", "compile s"),
        [
            (c, f"{median[c]:.4f}", f"{100 * added[c]:.0f}", f"{compiled[c]:.1f}")
            for c in median
        ],
    )


def ratios(summary: dict) -> dict[str, float]:
    """What federation, privacy and ragged clients cost, where all was measured."""
    seconds = {
        (name, row): results["seconds"]
        for name, workload in summary.items()
        for row, results in workload["rows"].items()
    }
    pairs = {
        "a cohort of one / SGD alone": (("one", TUNED), ("one", "(d) centralised")),
        "clip and noise / plain, W2": (("W2", PRIVATE), ("W2", TUNED)),
        "writers / equal clients": (("writers", TUNED), ("equal", TUNED)),
        "log-normal / equal clients": (("log-normal", TUNED), ("equal", TUNED)),
    }
    return {
        what: seconds[a] / seconds[b]
        for what, (a, b) in pairs.items()
        if a in seconds and b in seconds
    }


def draw(summary: dict):
    import matplotlib.pyplot as plt

    counts = [len(workload["rows"]) for workload in summary.values()]
    figure, panels = plt.subplots(
        *(len(counts), 1),
        figsize=(7.5, 0.8 + 0.4 * len(counts) + 0.28 * sum(counts)),
        height_ratios=counts,
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, workload) in zip(panels[:, 0], summary.items(), strict=True):
        rows = workload["rows"]
        bars = axes.barh(
            list(rows),
            [row["seconds"] for row in rows.values()],
            color=[common.BLUE if row in OURS else "0.7" for row in rows],
        )
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_title(name, loc="left")
        axes.margins(x=0.2)
        axes.invert_yaxis()
    panels[-1, 0].set_xlabel("time of a round, median (seconds)")
    common.tidy(*panels[:, 0])
    for axes in panels[:, 0]:
        axes.grid(visible=False, axis="y")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known((config.workloads, WORKLOADS), (config.rows, ROWS))
    if config.channels:
        measure_channels(config)
        return
    if config.one:
        print(json.dumps(measure(config)))
        return
    peak = matmul_peak()
    rich.print(
        f"{jax.devices()[0].device_kind}, {len(jax.devices())} device(s); "
        f"a large float32 matmul: {peak / 1e9:.0f} GFLOP/s"
    )
    summary, rows = {}, []
    for name in config.workloads:
        turns = {row: [] for row in config.rows if wanted(name, row)}
        for _ in range(config.turns):
            for row, done in turns.items():
                done.append(in_own_process(name, row, config))
        results = {row: together(done) for row, done in turns.items()}
        by_hand = [
            results[row]["seconds"] for row in list(BASELINES)[:3] if row in results
        ]
        ours = {row: results[row]["seconds"] for row in OURS if row in results}
        ours.pop(PRIVATE, None)
        best = min(ours, key=lambda row: ours[row]) if ours else None
        for row, r in results.items():
            ratio = min(by_hand) / r["seconds"] if by_hand else None
            rows.append(
                (
                    f"{name}  {row}" + (" *" if row == best else ""),
                    f"{r['seconds']:.4f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    f"{r['compile_seconds']:.1f}",
                    f"{r['peak_bytes'] / 2**20:.0f}",
                    f"{r['flops_per_second'] / 1e9:.1f}",
                    f"{100 * r['flops_per_second'] / peak:.0f}",
                )
            )
        summary[name] = {"rows": results, "best_plan": best}
        if best and by_hand:
            summary[name]["speedup"] = min(by_hand) / ours[best]
    costs = ratios(summary)
    folder = common.results_folder("speed")
    figure = draw(summary)
    points = [
        (name, row, i, seconds)
        for name, workload in summary.items()
        for row, results in workload["rows"].items()
        for i, seconds in enumerate(results.pop("each"), 1)
    ]
    common.save_history(folder, ("workload", "row", "round", "seconds"), points)
    summary |= {"ratios": costs, "matmul_flops_per_second": peak}
    summary |= {"settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary)
    common.save_figure(folder, figure, "speed")
    common.print_table(
        folder,
        f"Seconds a round, median of up to {config.rounds} (* our best plan)",
        (
            *("workload", "s / round", "x best of a-c", "compile s"),
            *("peak MiB", "GFLOP/s", "% of matmul"),
        ),
        rows,
    )
    for what, ratio in costs.items():
        rich.print(f"{what}: {ratio:.2f}")


if __name__ == "__main__":
    main()
