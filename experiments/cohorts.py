"""How long a round takes as its cohort grows, and how near that is to the machine.

Federated averaging of the CNN (W1 of `experiments.speed`) and the 2NN (W4), clients of
600 images, E = 1 and B = 10, cohorts of 10 to 1,000: clients one after another, some at
a time, and all at once, with the convolution as slices and a matmul or as XLA's own,
computed in float32 or bfloat16; and by hand, as Python loops, on the smallest cohort.
All in one process, and all on one device.

A row has two limits. Its arithmetic: of floating-point operations a round has to do
what `jaxfl.dry_run` counts. And the memory: every client has weights of its own, and a
local step reads them at least twice (forward and back), and reads and writes them once
more to update them, so that a step moves four times their size, however it is done.
"""

import dataclasses
import gc
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich

import jaxfl
from experiments import common, speed
from jaxfl import models
from jaxfl.data import from_arrays

WORKLOADS = {"cnn": "W1", "2nn": "W4"}


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: Literal["ci", "full"]
    """Where the other settings start from: a cohort of two, or all of them."""
    models: tuple[Literal["cnn", "2nn"], ...]
    cohorts: tuple[int, ...]
    chunks: tuple[int, ...]
    """Clients at once, where the cohort has as many; 0 for all of it."""
    one_by_one: int
    """The largest cohort whose clients train one after another, or in small chunks."""
    variants: bool = True
    """Whether to try the other convolution and bfloat16, all clients at once."""
    examples: int = 600
    """Of one client."""
    rounds: int = 5
    """Rounds timed; the median counts."""


PRESETS = {
    "ci": Settings("ci", ("2nn",), (2,), (1, 0), 2, examples=20, rounds=1),
    "full": Settings(
        "full", ("cnn", "2nn"), (10, 100, 1000), (1, 10, 100, 0), one_by_one=100
    ),
}


def peaks() -> dict[str, float]:
    """FLOP/s of large matrix products, and bytes/s of a large copy, the best of ten."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    key = jax.random.key(0)

    def product(dtype, precision=None):
        a = jax.random.normal(key, (n, n), dtype)
        multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
        multiply(a).block_until_ready()
        return 2 * n**3 / min(speed.timed(lambda: multiply(a)) for _ in range(10))

    x = jax.random.normal(key, (8 * n * n,))  # 2 GiB, or 32 MiB on a CPU
    negate = jax.jit(jnp.negative)
    negate(x).block_until_ready()
    copy = 2 * x.nbytes / min(speed.timed(lambda: negate(x)) for _ in range(10))
    return {
        "float32": product(jnp.float32, "highest"),
        "float32, as computed by default": product(jnp.float32),
        "bfloat16": product(jnp.bfloat16),
        "memory": copy,
    }


def federation_of(model: str, chunk: int, convolution: str, dtype: str):
    """The model and its federated averaging, under a plan."""
    if model == "cnn":
        native = convolution == "native"
        convolve = jax.lax.conv_general_dilated if native else jaxfl.matmul_conv
        network = models.cnn(convolution=convolve)
    else:
        network = models.two_nn()
    model_ = models.from_linen(
        *(network, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)),
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
    )
    federation = jaxfl.federate(
        jaxfl.fedavg(model_.loss, optax.sgd(0.1), batch_size=speed.BATCH),
        *(jaxfl.mean(),),
        chunk_size=chunk or None,
    )
    return model_, federation


def measure(config, model, data, cohort, chunk, convolution, dtype) -> dict:
    """Seconds of a round, and to compile it; the memory it takes, by the compiler."""
    model_, federation = federation_of(model, chunk, convolution, dtype)
    params = model_.init(jax.random.key(0))
    state = federation.init(params, data)
    some: Any = dict(rounds=1, key=jax.random.key(0), cohort_size=cohort)
    step = jax.jit(
        lambda state, data: jaxfl.scan_rounds(federation, state, data, **some),
        donate_argnums=0,
    )
    start = time.perf_counter()
    compiled = step.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    seconds = []
    for _ in range(1 + config.rounds):
        start = time.perf_counter()
        state, info = compiled(state, data)
        jax.block_until_ready((state, info))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": float(np.median(seconds[1:])),
        "compile_seconds": compile_seconds,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }


def by_hand(config, model, cohort, row) -> dict:
    """The same of a baseline of `experiments.speed`."""
    work = speed.Workload(model, cohort, config.examples, cohort)
    one_round = speed.hand_written(work, row, *speed.pixels(work))
    first = speed.timed(lambda: one_round(0))
    seconds = [speed.timed(lambda i=i: one_round(i)) for i in range(config.rounds)]
    median = float(np.median(seconds))
    return {
        "seconds": median,
        "compile_seconds": max(0.0, first - median),
        "temporary_bytes": None,
    }


def settings_of(config, model, cohort):
    """`(name, chunk, convolution, dtype)` of what is tried on a cohort."""
    for chunk in config.chunks:
        small = chunk and chunk < 100
        if chunk < cohort and not (small and cohort > config.one_by_one):
            at_once = {0: "all at once", 1: "one by one"}.get(chunk, f"{chunk} at once")
            yield at_once, chunk, "matmul", "float32"
    if config.variants:
        yield "all at once, bfloat16", 0, "matmul", "bfloat16"
        if model == "cnn":
            yield "all at once, native convolution", 0, "native", "float32"
            yield "all at once, native, bfloat16", 0, "native", "bfloat16"


STYLES = {  # name: (colour, marker and line)
    "(a) loop over clients, steps": (common.BLACK, "x"),
    "(b) loop over clients": (common.BLACK, "+"),
    "one by one": (common.BLUE, "o-"),
    "10 at once": (common.SKY, "s"),
    "100 at once": (common.SKY, "D"),
    "all at once": (common.ORANGE, "o-"),
    "all at once, bfloat16": (common.GREEN, "o-"),
    "all at once, native convolution": (common.ORANGE, "o:"),
    "all at once, native, bfloat16": (common.GREEN, "o:"),
}


def draw(results):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(1, len(results)), figsize=(3.2 + 3.4 * len(results), 4), layout="constrained"
    )
    lines = {}
    for axes, (model, rows) in zip(np.ravel(panels), results.items(), strict=True):
        for name, (colour, style) in STYLES.items():
            points = [
                (r["cohort"], r["microseconds_a_step"])
                for r in rows
                if r["row"] == name
            ]
            if points:
                (lines[name],) = axes.plot(
                    *zip(*points, strict=True), style, color=colour
                )
        axes.set(
            title=model.upper(), xlabel="clients in a round", xscale="log", yscale="log"
        )
    np.ravel(panels)[0].set_ylabel("time of a client's step (microseconds)")
    common.tidy(*np.ravel(panels))
    figure.legend(
        *(lines.values(), lines.keys()), frameon=False, loc="outside right upper"
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    limits = peaks()
    rich.print(
        f"{jax.devices()[0].device_kind}: "
        + ", ".join(f"{name} {value:.3g} /s" for name, value in limits.items())
    )
    results = {}
    for model in config.models:
        name = WORKLOADS[model]
        plain = federation_of(model, 0, "native", "float32")
        params = plain[0].init(jax.random.key(0))
        weights = sum(x.nbytes for x in jax.tree.leaves(params))
        results[model] = []
        for cohort in config.cohorts:
            work = speed.Workload(model, cohort, config.examples, cohort)
            data = from_arrays(*speed.pixels(work), speed.client_ids(work))
            flops = jaxfl.dry_run(plain[1], params, data).flops
            data = jax.tree.map(jnp.asarray, data)
            tried = list(settings_of(config, model, cohort))
            if cohort == min(config.cohorts):
                tried += [(row, None, None, None) for row in list(speed.BASELINES)[:2]]
            for row, chunk, convolution, dtype in tried:
                try:
                    if chunk is None:
                        measured = by_hand(config, model, cohort, row)
                    else:
                        measured = measure(
                            *(config, model, data, cohort, chunk, convolution, dtype)
                        )
                except jax.errors.JaxRuntimeError as error:
                    rich.print(f"{name} {cohort} {row}: {str(error).splitlines()[0]}")
                    continue
                steps = cohort * config.examples / speed.BATCH
                seconds = measured["seconds"]
                results[model].append(
                    {
                        **{"cohort": cohort, "row": row, **measured},
                        "flops_per_second": flops / seconds,
                        "weight_bytes_per_second": 4 * weights * steps / seconds,
                        "microseconds_a_step": 1e6 * seconds / steps,
                    }
                )
                rich.print(
                    f"{name} {cohort:5} {row:32} {seconds:9.4f} s, "
                    f"{flops / seconds / 1e12:7.2f} TFLOP/s, weights "
                    f"{4 * weights * steps / seconds / 1e9:6.0f} GB/s, "
                    f"{1e6 * seconds / steps:7.1f} us a step, compiled in "
                    f"{measured['compile_seconds']:.0f} s"
                )
                gc.collect()  # what the row held on the device

    rows = [
        (
            f"{WORKLOADS[model]}  {r['cohort']}  {r['row']}",
            f"{r['seconds']:.4f}",
            f"{r['microseconds_a_step']:.1f}",
            f"{r['flops_per_second'] / 1e12:.2f}",
            f"{100 * r['flops_per_second'] / limits['float32']:.0f}",
            f"{100 * r['weight_bytes_per_second'] / limits['memory']:.0f}",
            f"{r['compile_seconds']:.1f}",
        )
        for model, rows in results.items()
        for r in rows
    ]
    folder = common.results_folder("cohorts")
    points = (
        (model, r["cohort"], r["row"], r["seconds"])
        for model, rows in results.items()
        for r in rows
    )
    common.save_history(folder, ("model", "cohort", "row", "seconds"), points)
    common.save_figure(folder, draw(results), "cohorts")
    common.save_summary(
        folder,
        {
            "device": jax.devices()[0].device_kind,
            "peaks": limits,
            "rows": results,
            "settings": dataclasses.asdict(config),
        },
    )
    common.print_table(
        folder,
        f"A round, median of {config.rounds}",
        (
            *("workload, cohort, plan", "s / round", "us / client step", "TFLOP/s"),
            *("% of float32", "% of memory", "compile s"),
        ),
        rows,
    )


if __name__ == "__main__":
    main()
