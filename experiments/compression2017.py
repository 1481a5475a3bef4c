"""Quantised updates with and without a random rotation, at 1, 2 and 4 bits.

Suresh et al. 2017, arXiv:1611.00429, and Konecny et al. 2016, arXiv:1610.05492: a
random rotation evens out the coordinates of an update before they are rounded to a few
levels between its least and its greatest, and the error falls from O(d) to O(log d).
Here on the updates of federated averaging on MNIST; beside them DRIVE and EDEN
(Vargaftik et al. 2021, 2022), which quantise the rotated coordinates as the normal
variables that they nearly are.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import compress, models
from jaxfl.data import from_arrays, iid, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging of the 2NN of McMahan et al. 2017 by plain SGD."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    rounds: int
    """All nodes take part in each."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    nodes: int = 10
    """Clients, among which the examples are divided at random."""
    bits: tuple[int, ...] = (1, 2, 4)
    """Of each coordinate."""
    learning_rate: float = 0.1
    """Of the nodes."""
    batch_size: int = 10
    """Examples a step; every node passes once over its own in a round."""
    seed: int = 0
    """Of partition, initial weights, batches and rounding."""


PRESETS = {
    "ci": Settings("ci", rounds=8, bits=(1, 4)),
    "full": Settings("full", rounds=30, data="files"),
}
STYLES = {  # family: colour, marker
    "float32": (common.BLACK, ""),
    "uniform": (common.ORANGE, "s"),
    "rotation + uniform": (common.BLUE, "o"),
    "EDEN": (common.GREEN, "^"),
}


def channels(config) -> dict[tuple[str, int], jaxfl.Channel]:
    """By family and bits."""
    return {("float32", 32): jaxfl.identity()} | {
        (family, bits): channel
        for bits in config.bits
        for family, channel in (
            ("uniform", compress.uniform(bits)),
            (
                "rotation + uniform",
                jaxfl.chain(compress.rotation(), compress.uniform(bits)),
            ),
            ("EDEN", compress.eden(bits)),
        )
    }


def relative_error(channel, updates, key) -> float:
    """`n E ||mean of what arrives - mean of updates||^2 / mean ||update||^2`.

    That is one client's normalised error, if the clients' errors are independent.
    """
    n = jax.tree.leaves(updates)[0].shape[0]
    average = jax.tree.map(lambda x: x.mean(0), updates)
    send = jaxfl.Algorithm(
        init=lambda zeros: (zeros, ()),
        client=lambda ctx, broadcast, own, update: (update, own, {}),
        server=lambda ctx, state, outcome: outcome.payload,
        broadcast=lambda state: (),
    )
    federation = jaxfl.federate(send, jaxfl.chain(channel, jaxfl.mean()))
    state = federation.init(average, updates)
    everyone = jnp.arange(n)
    cohort = jaxfl.Cohort(everyone, updates, jnp.ones(n), everyone >= 0)
    state, _ = jax.jit(federation.round)(key, state, cohort)
    error = optax.tree.sub(state.server.algorithm, average)
    size = optax.tree.norm(updates, squared=True) / n
    return float(n * optax.tree.norm(error, squared=True) / size)


def first_updates(algorithm, params, data, key):
    """What the nodes send in the first round, `[K, ...]`."""
    federation = jaxfl.federate(algorithm, jaxfl.tap("update"))
    state = federation.init(params, data)
    _, (info, _) = jaxfl.scan_rounds(federation, state, data, rounds=1, key=key)
    return jax.tree.map(lambda x: x[0], info.reports["update"])


def draw(config, runs):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rounds = np.arange(1, config.rounds + 1)
    lines = dict(zip(config.bits, ("-", "--", ":"), strict=False))
    for (family, bits), run in runs.items():
        colour, _ = STYLES[family]
        label = family if bits == 32 else f"{family}, {bits} bit{'s' * (bits > 1)}"
        left.plot(
            *(rounds, 100 * run["accuracy"]),
            lines.get(bits, "-"),
            color=colour,
            label=label,
        )
    for family, (colour, marker) in STYLES.items():
        of = {b: r["error"] for (f, b), r in runs.items() if f == family and b < 32}
        if of:
            right.plot(
                *zip(*of.items(), strict=True), marker + "-", color=colour, label=family
            )
    best = max(run["accuracy"].max() for run in runs.values())
    left.set(xlabel="round", ylabel="test accuracy (%)", ylim=(100 * best - 12, None))
    right.set(
        xlabel="bits a coordinate",
        ylabel="normalised squared error of an update",
        yscale="log",
        xticks=config.bits,
    )
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False)
    common.tidy(left, right)
    figure.suptitle(
        f"Quantised updates of federated averaging, MNIST, {config.nodes} nodes"
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    ids = iid(train["y"], num_clients=config.nodes, seed=config.seed)
    data = jax.tree.map(jnp.asarray, from_arrays(train["x"], train["y"], ids))
    model = models.from_linen(models.two_nn(), train["x"][:1])
    algorithm = jaxfl.fedavg(
        model.loss, optax.sgd(config.learning_rate), batch_size=config.batch_size
    )
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 1))
    updates = first_updates(algorithm, params, data, key)

    runs = {}
    for (family, bits), channel in channels(config).items():
        history = common.averaged(
            *(algorithm, channel, model, params, data, test),
            rounds=config.rounds,
            key=key,
        )
        runs[family, bits] = {
            "accuracy": history["accuracy"],
            "megabytes": float(history.bits()["up"].sum() / 8e6),
            "error": relative_error(channel, updates, key),
        }

    folder = common.results_folder("compression2017")
    rows = [
        {"family": family, "bits": bits}
        | {k: v for k, v in run.items() if k != "accuracy"}
        | {"final_accuracy": float(run["accuracy"][-1])}
        for (family, bits), run in runs.items()
    ]
    common.save_summary(folder, {"runs": rows, "settings": dataclasses.asdict(config)})
    points = (
        (*name, r, accuracy)
        for name, run in runs.items()
        for r, accuracy in enumerate(run["accuracy"], 1)
    )
    common.save_history(folder, ("family", "bits", "round", "accuracy"), points)
    common.save_figure(folder, draw(config, runs), "compression2017")
    common.print_table(
        folder,
        f"MNIST ({config.data}), {config.nodes} nodes, {config.rounds} rounds",
        ("update", "error", "accuracy %", "MB up"),
        [
            (
                f"{row['family']}, {row['bits']} bits",
                f"{row['error']:.3g}",
                f"{100 * row['final_accuracy']:.2f}",
                f"{row['megabytes']:.2f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
