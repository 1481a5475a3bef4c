"""A hundred runs as one program, against one after another.

Ten seeds times ten client learning rates of federated averaging (W2 of
`experiments.speed`: the 2NN, ten of 100 clients of 600 images a round, E = 1, B = 10).
A run is `jaxfl.scan_rounds`, a pure function of the seed and the rate, and
`jaxfl.map_clients` maps it as it maps clients: over the cores or GPUs, in chunks that
fit the memory. Against it, each under the plan that suits the machine best:

- one compiled run, called a hundred times
- `jaxfl.simulate` called a hundred times, as one would without thinking of it: the rate
  is part of the program, so that each call compiles anew

Both loops are timed on `--sample` runs and counted a hundred times over; the models
they end with are compared with those of the one program.
"""

import dataclasses
import itertools
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


@dataclasses.dataclass(frozen=True)
class Settings:
    preset: Literal["ci", "full"]
    """Where the other settings start from: four short runs, or a hundred."""
    workload: str
    """Of `experiments.speed`."""
    seeds: int
    rates: int
    """Client learning rates, from 0.001 to 1."""
    rounds: int
    """Of a run."""
    sample: int
    """Runs of which the loops are timed."""
    chunk: int
    """Runs at once on each device; 0 for all."""


PRESETS = {
    "ci": Settings("ci", "tiny", 2, 2, rounds=2, sample=2, chunk=1),
    "full": Settings("full", "W2", 10, 10, rounds=20, sample=10, chunk=1),
}


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known(([config.workload], speed.WORKLOADS))
    jaxfl.cores_as_devices()
    work = speed.WORKLOADS[config.workload]
    x, y = speed.pixels(work)
    network = {"2nn": models.two_nn, "logistic": models.logistic_regression}[work.model]
    model = models.from_linen(network(), x[:1])
    data = jax.tree.map(jnp.asarray, from_arrays(x, y, speed.client_ids(work)))
    params = model.init(jax.random.key(0))
    values = [
        np.array(value)
        for value in zip(
            *itertools.product(range(config.seeds), np.logspace(-3, 0, config.rates)),
            strict=True,
        )
    ]
    some: dict[str, Any] = {"rounds": config.rounds, "cohort_size": work.cohort}

    def federation_of(rate):
        averaging = jaxfl.fedavg(model.loss, optax.sgd(rate), batch_size=speed.BATCH)
        return jaxfl.federate(averaging, jaxfl.mean())

    plan = jaxfl.tune(
        *(federation_of(0.1), params, data), cohort_size=work.cohort, verbose=False
    )

    def run(shared, value, chunk_size=plan.chunk_size, mesh=None):
        """The model after a run."""
        (seed, rate), (params, data) = value, shared
        federation = jaxfl.federate(
            *federation_of(rate).parts, chunk_size=chunk_size, mesh=mesh
        )
        key = jax.random.fold_in(jax.random.key(0), seed)
        state = federation.init(params, data)
        return jaxfl.scan_rounds(federation, state, data, key=key, **some)[0].params

    def all_runs(shared, values):
        each = lambda shared, value: ((), run(shared, value))  # noqa: E731
        mesh = None if plan.mesh is None else jaxfl.client_mesh()
        chunk = config.chunk or None
        return jaxfl.map_clients(each, shared, values, chunk_size=chunk, mesh=mesh)[1]

    def timed(fn, *args):
        start = time.perf_counter()
        out = jax.block_until_ready(fn(*args))
        return time.perf_counter() - start, out

    total, shared = len(values[0]), (params, data)
    values = tuple(map(jnp.asarray, values))
    together = jax.jit(all_runs)
    first, _ = timed(together, shared, values)
    seconds = {"one program": timed(together, shared, values)}
    rich.print(f"one program: {seconds['one program'][0]:.1f} s, first {first:.1f} s")

    chosen = np.linspace(0, total - 1, config.sample).astype(int)
    single = jax.jit(lambda shared, value: run(shared, value, mesh=plan.mesh))
    one = lambda i: single(shared, jax.tree.map(lambda v: v[i], values))  # noqa: E731
    compile_one, _ = timed(one, 0)
    seconds["a compiled run, called"] = timed(lambda: [one(i) for i in chosen])

    def simulated(i):
        seed, rate = (v[i] for v in values)
        federation = jaxfl.federate(
            *federation_of(float(rate)).parts,
            chunk_size=plan.chunk_size,
            mesh=plan.mesh,
        )
        key = jax.random.fold_in(jax.random.key(0), seed)
        options = {**some, "every": config.rounds, "progress": False}
        return jaxfl.simulate(federation, params, data, key=key, **options)[0].params

    seconds["simulate, called"] = timed(lambda: [simulated(i) for i in chosen])

    same = [
        jax.tree.map(lambda p, i=i: p[i], seconds["one program"][1]) for i in chosen
    ]
    rows, summary = [], {}
    for name, (took, models_) in seconds.items():
        alone = name == "one program"
        whole = took if alone else took * total / config.sample
        apart = 0.0 if alone else _distance(models_, same)
        compiling = {"one program": first - took, "a compiled run, called": compile_one}
        ratio = whole / seconds["one program"][0]
        summary[name] = {"seconds": whole, "ratio": ratio, "distance": apart}
        rows.append(
            (
                name,
                f"{whole:.1f}",
                f"{ratio:.2f}",
                f"{compiling[name]:.1f}" if name in compiling else "in each",
                f"{apart:.1e}",
            )
        )
    folder = common.results_folder("sweeps")
    common.save_history(
        *(folder, ("how", "seconds")), [(n, r["seconds"]) for n, r in summary.items()]
    )
    settings = dataclasses.asdict(config)
    common.save_summary(folder, {"runs": summary, "settings": settings})
    common.print_table(
        folder,
        f"{total} runs of {config.rounds} rounds of {config.workload}",
        ("", "seconds", "x one program", "compile s", "relative distance of models"),
        rows,
    )


def _distance(ours, theirs) -> float:
    """The largest relative distance between two models of the same run."""
    norm = optax.tree.norm
    return max(
        float(norm(optax.tree.sub(jax.device_get(a), jax.device_get(b))) / norm(b))
        for a, b in zip(ours, theirs, strict=True)
    )


if __name__ == "__main__":
    main()
