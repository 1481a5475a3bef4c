"""Averaging only when models have drifted apart: dynamic against periodic averaging.

Kamp et al. 2018, arXiv:1807.03210, on MNIST: nodes that each see a stream of examples
average their models after every batch (continuous averaging), after every b batches
(periodic), or when a model is further than delta from the last one that all had in
common (dynamic). What is compared is the cumulative loss, each batch's before the step
on it, and the accuracy of the average of all models in the end, against what was sent
up and down; dynamic averaging is charged for that last average. The paper claims an
order of magnitude. All deltas of a sweep are one vmapped run.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import aggregate, evaluate, models
from jaxfl.data import from_arrays, iid, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every node sees its examples as a stream, `passes` times."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    nodes: tuple[int, ...]
    """Numbers of nodes; the data are divided among them."""
    passes: int
    """Passes over the data in all."""
    deltas: tuple[float, ...]
    """Squared distances from the reference above which a model is in violation."""
    periods: tuple[int, ...]
    """Batches between the averages of periodic averaging; 1 is continuous averaging."""
    check: int
    """Batches between the checks of the local conditions of dynamic averaging."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    model: Literal["2nn", "cnn"] = "2nn"
    """The 2NN or the CNN of McMahan et al. 2017."""
    learning_rate: float = 0.1
    """Of plain SGD at the nodes."""
    batch_size: int = 10
    """Examples a step."""
    seed: int = 0
    """Of partition, initial weights and batches."""


PRESETS = {
    "ci": Settings(
        "ci", nodes=(10,), passes=2, deltas=(0.3, 3.0), periods=(1, 10), check=5
    ),
    "full": Settings(
        "full",
        nodes=(10, 100),
        passes=2,
        deltas=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, np.inf),
        periods=(1, 5, 10, 20, 60),
        check=5,
        data="files",
    ),
}
# Points of final accuracy by which a cheaper protocol may fall short.
MARGIN = 0.005


def protocol(config, model, nodes, train, test, steps, parts, values):
    """One protocol under all values of its parameter, as one program.

    Args:
      steps: batches in a round.
      parts: `value -> (channel, aggregator)`.
      values: `[V]`.

    Returns:
      Of each value, over the rounds: `loss` and `bits`, cumulative, `[V, rounds]`; and
      in the end, `[V]`: `messages`, the `accuracy` of the average of all models, and
      `nodes_accuracy`, the mean of theirs.
    """
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(train["y"]))
    ids = iid(train["y"], num_clients=nodes, seed=config.seed)
    data = from_arrays(train["x"][order], train["y"][order], ids, nodes)
    data = jax.tree.map(jnp.asarray, data)
    taken = steps * config.batch_size
    per_pass = data.shortest // taken

    def stream(r):
        """What the nodes see in round r: the next of their examples."""
        return dataclasses.replace(
            data,
            start=data.start + r % per_pass * taken,
            size=jnp.full(nodes, taken),
            shortest=taken,
            longest=taken,
        )

    algorithm = jaxfl.local_models(
        model.loss,
        optax.sgd(config.learning_rate),
        batch_size=config.batch_size,
    )
    key = jax.random.key(config.seed)

    def look(info):
        losses = info.metrics["loss"] * info.metrics["steps"] * config.batch_size
        bits = jnp.stack([info.bits_up, info.bits_down])
        return losses.sum(), bits.sum(), (bits > 0).sum()

    state, (losses, bits, messages), _ = common.sweep(
        f"{nodes} nodes, {steps} batch{'es' * (steps > 1)} a round",
        lambda value: jaxfl.federate(algorithm, *parts(value)),
        values,
        model.init(jax.random.fold_in(key, 1)),
        stream,
        rounds=max(1, config.passes * per_pass),
        key=key,
        look=look,
        weight=jnp.ones(nodes),
    )

    @jax.jit
    def accuracy(models, test):
        def of(params):
            return evaluate.mean_metrics(model.metrics, params, test)["accuracy"]

        return of(jax.tree.map(lambda x: x.mean(0), models)), jax.lax.map(of, models)

    rows = [
        jax.tree.map(lambda x, i=i: x[i], state.clients) for i in range(len(values))
    ]
    average, each = zip(*(accuracy(own.algorithm, test) for own in rows), strict=True)
    return {
        "loss": losses.astype(np.float64).cumsum(1),
        "bits": bits.astype(np.float64).cumsum(1),
        "messages": messages.sum(1),
        "accuracy": np.asarray(average, np.float64),
        "nodes_accuracy": np.asarray(each, np.float64).mean(1),
    }


def compare(config, model, nodes, train, test):
    """All protocols with so many nodes; one dictionary a protocol and parameter."""

    def periodic(value):
        return jaxfl.mean(), aggregate.total()

    def dynamic(delta):
        return jaxfl.identity(), aggregate.dynamic_average(delta)

    deltas = config.deltas
    runs = [
        *(("periodic", b, periodic, jnp.ones(1), (b,)) for b in config.periods),
        ("dynamic", config.check, dynamic, jnp.asarray(deltas), deltas),
    ]
    rows = []
    for name, steps, parts, values, parameters in runs:
        curves = protocol(config, model, nodes, train, test, steps, parts, values)
        if name == "dynamic":  # the average at the end: every model up and down
            size = jaxfl.tree.num_bits(model.init(jax.random.key(0)))
            curves["bits"][:, -1] += 2 * nodes * size
            curves["messages"] += 2 * nodes
        for i, parameter in enumerate(parameters):
            row = {"protocol": name, "nodes": nodes, "parameter": parameter}
            rows.append(row | {"steps": steps} | {k: v[i] for k, v in curves.items()})
    return rows


def final(rows):
    """The same without the curves."""
    return [
        row
        | {
            "loss": row["loss"][-1],
            "megabytes": row["bits"][-1] / 8e6,
        }
        for row in rows
    ]


def factors(rows) -> dict:
    """How many times fewer bytes the cheapest dynamic run that is as accurate needs."""
    by = {(r["protocol"], r["parameter"]): r for r in rows}
    continuous = by["periodic", 1]
    enough = continuous["accuracy"] - MARGIN

    def cheapest(name):
        good = [r for r in rows if r["protocol"] == name and r["accuracy"] >= enough]
        return min(good, key=lambda r: r["bits"][-1], default=None)

    dynamic, periodic = cheapest("dynamic"), cheapest("periodic") or continuous
    if dynamic is None:
        return {"delta": None, "of_continuous": None, "of_periodic": None}
    sent = dynamic["bits"][-1]
    return {
        "delta": str(dynamic["parameter"]),
        "of_continuous": continuous["bits"][-1] / sent,
        "of_periodic": periodic["bits"][-1] / sent,
        "period": periodic["parameter"],
    }


def draw(config, rows):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        *(2, len(config.nodes)),
        figsize=(5 * len(config.nodes) + 1, 7),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    styles = {
        "periodic": (common.ORANGE, "s--", "b"),
        "dynamic": (common.BLUE, "o-", "Δ"),
    }
    for (above, below), nodes in zip(axes.T, config.nodes, strict=True):
        for name, (colour, style, symbol) in styles.items():
            of = [r for r in rows if (r["protocol"], r["nodes"]) == (name, nodes)]
            sent = np.array([r["bits"][-1] / 8e6 for r in of])
            for panel, values in (
                (above, [r["loss"][-1] / 1e3 for r in of]),
                (below, [100 * r["accuracy"] for r in of]),
            ):
                label = f"{name} averaging"
                panel.plot(sent, values, style, color=colour, label=label, ms=5)
                for x, y, row in zip(sent, values, of, strict=True):
                    high = name == "dynamic" and np.isfinite(row["parameter"])
                    panel.annotate(
                        f"{symbol}={row['parameter']:g}".replace("inf", "∞"),
                        (x, y),
                        (-3, 7 if high else -14),
                        textcoords="offset points",
                        fontsize=7,
                        color=colour,
                    )
        for row in rows:
            if (row["nodes"], row["parameter"]) == (nodes, np.inf):
                alone = 100 * row["nodes_accuracy"]
                below.axhline(alone, color="0.4", ls=":", label="nodes that never send")
        above.set(
            title=f"{nodes} nodes",
            ylabel="cumulative loss (thousand nats)",
            xscale="log",
        )
        below.set(xlabel="sent up and down (MB)", ylabel="the average's accuracy (%)")
        common.tidy(above, below)
    axes[1, 0].legend(frameon=False)
    figure.suptitle(
        f"MNIST, {config.model.upper()}, {config.passes} passes: what averaging costs"
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = mnist(config.data)
    test = jax.tree.map(jnp.asarray, test)
    network = models.two_nn() if config.model == "2nn" else models.cnn()
    model = models.from_linen(network, train["x"][:1])

    rows = []
    for nodes in config.nodes:
        rows += compare(config, model, nodes, train, test)
    ratios = {
        nodes: factors([r for r in rows if r["nodes"] == nodes])
        for nodes in config.nodes
    }
    folder = common.results_folder("kamp2018")
    common.save_summary(
        folder,
        {
            "runs": [
                {k: v for k, v in row.items() if k != "bits"}
                | {"parameter": str(row["parameter"])}
                for row in final(rows)
            ],
            "factors": ratios,
            "settings": dataclasses.asdict(config)
            | {"deltas": list(map(str, config.deltas))},
        },
    )
    columns = ("protocol", "nodes", "parameter", "batches", "loss", "bits")
    points = (
        (
            *(row["protocol"], row["nodes"], row["parameter"]),
            *((r + 1) * row["steps"], row["loss"][r], row["bits"][r]),
        )
        for row in rows
        for r in range(len(row["loss"]))
    )
    common.save_history(folder, columns, points)
    common.save_figure(folder, draw(config, rows), f"kamp2018_{config.model}")
    common.print_table(
        folder,
        f"MNIST ({config.data}), {config.model.upper()}, {config.passes} passes",
        ("protocol", "cumulative loss", "accuracy %", "nodes' own", "messages", "MB"),
        [
            (
                f"{row['nodes']} nodes, {row['protocol']} {row['parameter']:g}",
                f"{row['loss']:,.0f}",
                f"{100 * row['accuracy']:.2f}",
                f"{100 * row['nodes_accuracy']:.2f}",
                f"{row['messages']:,.0f}",
                f"{row['megabytes']:,.1f}",
            )
            for row in final(rows)
        ],
    )
    for nodes, ratio in ratios.items():
        if ratio["delta"] is None:
            continue
        print(
            f"{nodes} nodes, within {100 * MARGIN:g} points of continuous averaging: "
            f"dynamic (delta {ratio['delta']}) sends {ratio['of_continuous']:.1f} "
            f"times less than it, and {ratio['of_periodic']:.2f} times less than "
            f"periodic averaging (b={ratio['period']}) that is as good"
        )


if __name__ == "__main__":
    main()
