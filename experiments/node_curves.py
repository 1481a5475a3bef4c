"""The curves of every node, of one that never communicates, and of the federation.

Loss on common held-out digits, over rounds and inside each round: the nodes drift
apart while they train and are brought together when they average; the node that never
communicates, though it trains as often, learns its own digits and forgets the rest.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import models
from jaxfl.data import dominant_class, from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """The model and the optimiser of `mnist_skews`, on one partition."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    rounds: int
    """In each a node trains once and all of them average."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    nodes: int = 10
    """Clients; all take part in every round."""
    bias: float = 0.9
    """Share of each class that lies on its own node; 0 is uniform over all nodes."""
    isolated_node: int = 0
    """Which node is drawn that never communicates; all are in history.csv."""
    probes: int = 6
    """Points on every node's curve inside each round."""
    heldout: int = 1000
    """Test digits on which all curves are measured."""
    hidden: tuple[int, ...] = (256, 128)
    """Sizes of the MLP's hidden layers."""
    learning_rate: float = 0.01
    """Of the nodes, and of the pooled model."""
    momentum: float = 0.5
    """Begun afresh in every round."""
    batch_size: int = 64
    """Examples a step."""
    epochs: int = 1
    """Passes over a node's data in a round."""
    seed: int = 0
    """Of the partition, the initial weights and the batches."""


PRESETS = {
    "ci": Settings("ci", rounds=8, batch_size=16, learning_rate=0.05),
    "full": Settings("full", rounds=30, data="files", heldout=2000),
}


def curves(comparison: jaxfl.evaluate.Comparison) -> dict:
    """Times in rounds and losses at them: of nodes `[N, ...]`, of models `[...]`."""
    start = comparison.initial["loss"]
    federated = np.concatenate([[start], comparison.federated["loss"]])
    inside = np.moveaxis(comparison.federated.clients.metrics["probe"]["loss"], 1, 0)
    nodes, rounds, probes = inside.shape
    # Each round of a node begins with the model that the federation gave it.
    given = np.broadcast_to(federated[:-1, None], (nodes, rounds, 1))
    inside = np.concatenate([given, inside], -1).reshape(nodes, -1)
    alone = np.moveaxis(comparison.isolated.clients.metrics["probe"]["loss"], 1, 0)
    alone = alone.reshape(nodes, -1)
    steps = np.arange(probes + 1) / probes
    return {
        "rounds": np.arange(rounds + 1),
        "federated": federated,
        "node_times": (np.arange(rounds)[:, None] + steps).reshape(-1),
        "nodes": inside,
        "isolated_times": np.arange(rounds * probes + 1) / probes,
        "isolated": np.concatenate([np.full((nodes, 1), start), alone], 1),
    }


def draw(config, c):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes in panels:
        for i, node in enumerate(c["nodes"]):
            axes.plot(
                *(c["node_times"], node),
                color="0.65",
                lw=0.7,
                label=f"each of the {config.nodes} nodes, between averages"
                if i == 0
                else None,
            )
        axes.plot(
            *(c["isolated_times"], c["isolated"][config.isolated_node]),
            color=common.ORANGE,
            lw=1.8,
            label=f"node {config.isolated_node}, never communicating",
        )
        axes.plot(
            *(c["rounds"], c["federated"]),
            color=common.GREEN,
            lw=2.2,
            marker="o",
            ms=3,
            label="federated model",
        )
        axes.set(xlabel="round", yscale="log")
    panels[0].set_ylabel(f"loss on {config.heldout} held-out digits (nats)")
    panels[0].set_title("all rounds")
    first = min(3, config.rounds)
    panels[1].set(title=f"inside the first {first}", xlim=(0, first))
    common.tidy(*panels)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    heldout = jax.tree.map(lambda a: jnp.asarray(a[: config.heldout]), test)
    data = from_arrays(
        train["x"],
        train["y"],
        dominant_class(
            train["y"], num_clients=config.nodes, bias=config.bias, seed=config.seed
        ),
        config.nodes,
    )
    model = models.from_linen(
        models.mlp(config.hidden, init=models.torch_uniform),
        train["x"][:1],
        preprocess=models.standardize(0.1307, 0.3081),
    )
    key = jax.random.key(config.seed)
    optimizer = optax.sgd(config.learning_rate, momentum=config.momentum)
    federation = jaxfl.federate(
        jaxfl.fedavg(model.loss, optimizer, batch_size=config.batch_size), jaxfl.mean()
    )
    federation = jaxfl.tune(federation, jax.eval_shape(model.init, key), data)
    comparison = jaxfl.compare(
        model,
        optimizer,
        data,
        heldout,
        rounds=config.rounds,
        key=key,
        probes=config.probes,
        batch_size=config.batch_size,
        epochs=config.epochs,
        chunk_size=federation.chunk_size,
        mesh=federation.mesh,
    )
    c = curves(comparison)

    folder = common.results_folder("node_curves")
    final = {
        "federated": c["federated"][-1],
        "pooled": comparison.pooled["loss"][-1],
        "isolated_mean": c["isolated"][:, -1].mean(),
        "isolated_best": c["isolated"][:, -1].min(),
        "nodes_mean": c["nodes"][:, -1].mean(),
    }
    accuracy = {
        "federated": comparison.federated["accuracy"][-1],
        "pooled": comparison.pooled["accuracy"][-1],
        "isolated_mean": comparison.isolated.clients.metrics["probe"]["accuracy"][
            -1, :, -1
        ].mean(),
    }
    common.save_summary(
        folder,
        {"loss": final, "accuracy": accuracy, "settings": dataclasses.asdict(config)},
    )
    named = (
        ("federated", c["rounds"], c["federated"]),
        *((f"node {i}", c["node_times"], v) for i, v in enumerate(c["nodes"])),
        *(
            (f"isolated {i}", c["isolated_times"], v)
            for i, v in enumerate(c["isolated"])
        ),
    )
    points = (
        (time, name, loss)
        for name, times, losses in named
        for time, loss in zip(times, losses, strict=True)
    )
    common.save_history(folder, ("time", "curve", "loss"), points)
    common.save_figure(folder, draw(config, c), "node_curves")
    common.print_table(
        folder,
        f"Loss on held-out digits after {config.rounds} rounds, bias {config.bias:g}",
        ("model", "loss"),
        [(name.replace("_", ", "), f"{value:.3f}") for name, value in final.items()],
    )


if __name__ == "__main__":
    main()
