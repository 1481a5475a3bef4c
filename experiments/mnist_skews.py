"""Federated averaging on MNIST under four label distributions.

Not federated, uniform, 90 % of one class on each node, 100 % of one class on each
node: how much accuracy does federation cost, and skew? The preset `full` is a setting
known to reproduce a published figure, whose numbers are printed beside ours.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import dominant_class, from_arrays, mnist, pool, stack, stack_axes


@dataclasses.dataclass(frozen=True)
class Settings:
    """An MLP, trained by SGD whose momentum starts afresh in every round."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    rounds: int
    """In each a node trains once and all of them average."""
    seeds: int
    """Runs of every case, vmapped: own partition, initial weights and batches each."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    nodes: int = 10
    """Clients; all take part in every round."""
    biases: tuple[float, ...] = (0.0, 0.9, 1.0)
    """Share of each class that lies on its own node; 0 is uniform over all nodes."""
    hidden: tuple[int, ...] = (256, 128)
    """Sizes of the MLP's hidden layers."""
    learning_rate: float = 0.01
    """Of the nodes."""
    pooled_learning_rate: float = 0.1
    """Of the model that is not federated."""
    momentum: float = 0.5
    """Begun afresh in every round."""
    batch_size: int = 64
    """Examples a step."""
    epochs: int = 1
    """Passes over a node's data in a round."""
    seed: int = 0
    """The first of the seeds."""


PRESETS = {
    "ci": Settings("ci", rounds=30, seeds=2, batch_size=16, learning_rate=0.05),
    "full": Settings("full", rounds=50, seeds=3, data="files"),
}

# Read off the figure: final accuracy in percent, test loss at round 10.
PUBLISHED = {
    "pooled": (98.5, None),
    "uniform": (96.8, 0.245),
    "dominant_90": (93.2, 0.45),
    "dominant_100": (80.3, 1.70),
}
COLOURS = (common.BLACK, common.BLUE, common.GREEN, common.ORANGE, common.PINK)


def case_name(bias: float) -> str:
    return f"dominant_{100 * bias:g}" if bias else "uniform"


def run_case(config, model, train, test, bias):
    """All seeds of one case as one program; accuracy and loss, `[seeds, rounds]`."""
    x, y = jnp.asarray(train["x"]), jnp.asarray(train["y"])
    partitions = []
    for s in range(config.seeds):
        ids = dominant_class(
            train["y"], num_clients=config.nodes, bias=bias or 0.0, seed=config.seed + s
        )
        partition = from_arrays(x, y, ids, config.nodes)
        partitions.append(pool(partition) if bias is None else partition)
    data = jax.tree.map(jnp.asarray, stack(partitions))
    rate = config.pooled_learning_rate if bias is None else config.learning_rate
    federation = jaxfl.federate(
        jaxfl.fedavg(
            model.loss,
            optax.sgd(rate, momentum=config.momentum),
            batch_size=config.batch_size,
            epochs=config.epochs,
        ),
        jaxfl.mean(),
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    federation = jaxfl.tune(federation, params, partitions[0])
    test = jax.tree.map(jnp.asarray, test)
    evaluate = jaxfl.on_server(model.metrics, test, mesh=federation.mesh)

    def init(key, data):
        return federation.init(model.init(jax.random.fold_in(key, 1)), data)

    def one_round(key, state, data, evaluate):
        return jaxfl.scan_rounds(
            federation, state, data, rounds=1, key=key, evaluate=evaluate
        )

    seeds = jnp.arange(config.seeds) + config.seed
    keys = jax.vmap(jax.random.key)(seeds)
    axes = stack_axes(data)
    state = jax.jit(jax.vmap(init, (0, axes)))(keys, data)
    step = jax.jit(jax.vmap(one_round, (0, 0, axes, None)), donate_argnums=1)
    curves = []
    name = "pooled" if bias is None else case_name(bias)
    for _ in rich.progress.track(range(config.rounds), f"{name:12}"):
        state, (_, evaluations) = step(keys, state, data, evaluate)
        curves.append(jax.tree.map(lambda v: np.asarray(v[:, 0]), evaluations))
    return jax.tree.map(lambda *v: np.stack(v, 1), *curves)


def summarise(config, curves) -> dict:
    at = min(10, config.rounds)
    return {
        name: {
            "accuracy_mean": float(c["accuracy"][:, -1].mean()),
            "accuracy_std": float(c["accuracy"][:, -1].std()),
            f"loss_at_round_{at}": float(c["loss"][:, at - 1].mean()),
        }
        for name, c in curves.items()
    } | {"settings": dataclasses.asdict(config)}


def draw(config, curves):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rounds = np.arange(1, config.rounds + 1)
    for colour, (name, c) in zip(COLOURS, curves.items(), strict=False):
        for axes, values in ((left, 100 * c["accuracy"]), (right, c["loss"])):
            middle, band = values.mean(0), values.std(0)
            axes.plot(rounds, middle, color=colour, label=label(name), lw=1.8)
            axes.fill_between(
                rounds, middle - band, middle + band, color=colour, alpha=0.2, lw=0
            )
    left.set(xlabel="round", ylabel="test accuracy (%)", ylim=(None, 100))
    right.set(xlabel="round", ylabel="test loss (nats)", yscale="log")
    left.legend(loc="lower right", frameon=False)
    figure.suptitle(
        f"Federated averaging on MNIST, {config.nodes} nodes "
        f"(mean and deviation of {config.seeds} seeds)"
    )
    common.tidy(left, right)
    return figure


def label(name: str) -> str:
    if name == "pooled":
        return "not federated"
    return name.replace("dominant_", "") + (" % one class" if "_" in name else "")


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    model = models.from_linen(
        models.mlp(config.hidden, init=models.torch_uniform),
        train["x"][:1],
        preprocess=models.standardize(0.1307, 0.3081),
    )
    curves = {"pooled": run_case(config, model, train, test, None)}
    for bias in config.biases:
        curves[case_name(bias)] = run_case(config, model, train, test, bias)

    folder = common.results_folder("mnist_skews")
    summary = summarise(config, curves)
    common.save_summary(folder, summary)
    rows = (
        (name, config.seed + s, r + 1, c["accuracy"][s, r], c["loss"][s, r])
        for name, c in curves.items()
        for s, r in np.ndindex(c["loss"].shape)
    )
    columns = ("case", "seed", "round", "accuracy", "loss")
    common.save_history(folder, columns, rows)
    common.save_figure(folder, draw(config, curves), "mnist_skews")

    at = min(10, config.rounds)
    full = PRESETS["full"]
    free = {"seeds": full.seeds, "seed": full.seed, "biases": full.biases}
    published = PUBLISHED if dataclasses.replace(config, **free) == full else {}
    rows = []
    for name in curves:
        ours = summary[name]
        accuracy, spread = 100 * ours["accuracy_mean"], 100 * ours["accuracy_std"]
        loss = ours[f"loss_at_round_{at}"]
        rows.append((label(name), f"{accuracy:.1f} ± {spread:.1f}", f"{loss:.3f}"))
        rows[-1] += tuple("" if v is None else v for v in published.get(name, ()))
    columns = ("case", "accuracy %", f"loss at round {at}")
    theirs = ("figure's accuracy", "figure's loss") if published else ()
    title = f"MNIST ({config.data}), {config.rounds} rounds, {config.seeds} seeds"
    common.print_table(folder, title, columns + theirs, rows)


if __name__ == "__main__":
    main()
