"""Sending one coordinate in a hundred: what error feedback is for.

Stich et al. 2018, arXiv:1809.07599, and Karimireddy et al. 2019, arXiv:1901.09847: a
client that sends the largest coordinates of its update only, and forgets the rest,
loses them for good; one that adds the rest to its next update loses nothing but time.
Federated averaging on MNIST with whole updates, with the top coordinates of each, and
with those and error feedback.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import jaxfl
from experiments import common
from jaxfl import compress, models
from jaxfl.data import dominant_class, from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging by plain SGD; all nodes take part in every round."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    model: Literal["2nn", "cnn"]
    """The 2NN or the CNN of McMahan et al. 2017."""
    rounds: int
    """In each a node takes `steps` steps."""
    every: int = 1
    """Rounds between evaluations."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    nodes: int = 10
    """Clients."""
    bias: float = 0.5
    """Share of each class that lies on its own node."""
    fraction: float = 0.01
    """Of the coordinates, sent by every node in every round."""
    steps: int = 60
    """Of a node in a round."""
    batch_size: int = 10
    """Examples a step."""
    learning_rate: float = 0.05
    """Of the nodes."""
    seed: int = 0
    """Of partition, initial weights and batches."""


PRESETS = {
    "ci": Settings("ci", model="2nn", rounds=20),
    "full": Settings("full", model="cnn", rounds=30, every=5, data="files", bias=0.9),
}


def channels(config) -> dict[str, tuple[jaxfl.Channel, str]]:
    """What is sent, and the colour of its line."""
    top_k = compress.top_k(config.fraction)
    share = f"{100 * config.fraction:g} %"
    return {
        "whole updates": (jaxfl.identity(), common.BLACK),
        f"top {share}, error feedback": (compress.error_feedback(top_k), common.BLUE),
        f"top {share}, the rest forgotten": (top_k, common.ORANGE),
    }


def draw(config, runs):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained", sharey=True
    )
    for name, run in runs.items():
        colour = channels(config)[name][1]
        accuracy = 100 * run["accuracy"]
        axes[0].plot(run["round"], accuracy, color=colour, label=name)
        axes[1].plot(run["megabytes"], accuracy, color=colour)
    best = 100 * max(run["accuracy"].max() for run in runs.values())
    axes[0].set(
        xlabel="round", ylabel="test accuracy (%)", ylim=(best - 10, best + 0.5)
    )
    axes[1].set(xlabel="sent by all nodes so far (MB)", xscale="log")
    axes[0].legend(frameon=False, loc="lower right")
    common.tidy(*axes)
    figure.suptitle(f"MNIST, {config.model.upper()}, {config.nodes} nodes")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    ids = dominant_class(
        train["y"], num_clients=config.nodes, bias=config.bias, seed=config.seed
    )
    data = from_arrays(train["x"], train["y"], ids, config.nodes)
    data = jax.tree.map(jnp.asarray, data)
    network = models.two_nn() if config.model == "2nn" else models.cnn()
    model = models.from_linen(network, train["x"][:1])
    algorithm = jaxfl.fedavg(
        model.loss,
        optax.sgd(config.learning_rate),
        batch_size=config.batch_size,
        steps=config.steps,
    )
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 1))

    runs = {}
    for name, (channel, _) in channels(config).items():
        history = common.averaged(
            *(algorithm, channel, model, params, data, test),
            rounds=config.rounds,
            key=key,
            every=config.every,
        )
        sent = history.bits()["up"].cumsum() / 8e6
        runs[name] = {
            "round": history.round,
            "accuracy": history["accuracy"],
            "megabytes": sent[history.round - 1],
        }

    folder = common.results_folder("error_feedback")
    last = {
        name: {k: float(v[-1]) for k, v in run.items()} for name, run in runs.items()
    }
    common.save_summary(folder, {"runs": last, "settings": dataclasses.asdict(config)})
    points = (
        (name, *point)
        for name, run in runs.items()
        for point in zip(*run.values(), strict=True)
    )
    columns = ("updates", "round", "accuracy", "megabytes")
    common.save_history(folder, columns, points)
    common.save_figure(folder, draw(config, runs), "error_feedback")
    common.print_table(
        folder,
        f"MNIST ({config.data}), {config.model.upper()}, {config.rounds} rounds",
        ("sent", "accuracy %", "MB up"),
        [
            (name, f"{100 * run['accuracy']:.2f}", f"{run['megabytes']:.1f}")
            for name, run in last.items()
        ],
    )


if __name__ == "__main__":
    main()
