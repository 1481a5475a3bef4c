"""When to send, what to send, and both: accuracy against bytes.

Every rule for when an update is sent, every codec for what is sent of it, and their
products, on federated averaging of MNIST among nodes that each have mostly one class.
The thresholds of a rule are one vmapped program. What matters is the front: no other
run is as accurate with fewer bytes.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import communicate, compress, models
from jaxfl.data import dominant_class, from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging of the 2NN of McMahan et al. 2017 by plain SGD."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    rounds: int
    """All nodes take part in each."""
    thresholds: int
    """Values of a rule's threshold, spread evenly on a logarithmic scale."""
    rules: tuple[str, ...]
    """When to send, of `RULES`."""
    codecs: tuple[str, ...]
    """What to send, of `CODECS`."""
    products: tuple[str, ...]
    """Codecs that are combined with every rule."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    nodes: int = 10
    """Clients."""
    bias: float = 0.5
    """Share of each class that lies on its own node."""
    learning_rate: float = 0.05
    """Of the nodes."""
    batch_size: int = 10
    """Examples a step."""
    steps: int = 60
    """Of a node in a round."""
    seed: int = 0
    """Of partition, initial weights, batches and rounding."""


# name: (threshold -> channel, the least and the greatest threshold)
RULES = {
    "norm, kept": (lambda t: communicate.norm_threshold(t, keep=True), 0.5, 4.0),
    "norm, dropped": (lambda t: communicate.norm_threshold(t, keep=False), 0.5, 2.0),
    "relative, kept": (
        lambda t: communicate.relative_threshold(t, keep=True),
        *(0.03, 0.3),
    ),
    "target rate": (
        lambda t: communicate.target_rate(t, initial=1.0, step=0.5, keep=True),
        *(0.1, 0.8),
    ),
    "CMFL": (lambda t: communicate.cmfl(t, keep=False), 0.45, 0.65),
    "Gaia": (lambda t: communicate.gaia(t), 0.02, 1.0),
}
CODECS = {
    "float32": jaxfl.identity(),
    "bfloat16": compress.cast(jnp.bfloat16),
    "QSGD, 15 levels": compress.leafwise(compress.qsgd(15)),
    "EDEN, 1 bit": compress.eden(1),
    "EDEN, 2 bits": compress.eden(2),
    "sign, feedback": compress.error_feedback(
        compress.leafwise(compress.scaled_sign())
    ),
    "top 10 %, feedback": compress.error_feedback(compress.top_k(0.1)),
    "top 1 %, feedback": compress.error_feedback(compress.top_k(0.01)),
    "top 1 % in 8 bits, feedback": compress.error_feedback(
        compress.top_k(0.01, compress.uniform(8))
    ),
    "random 10 %": compress.random_k(0.1),
}
PRESETS = {
    "ci": Settings(
        "ci",
        rounds=8,
        thresholds=2,
        rules=("norm, kept", "CMFL", "Gaia"),
        codecs=("float32", "EDEN, 2 bits", "top 1 %, feedback"),
        products=("EDEN, 2 bits",),
    ),
    "full": Settings(
        "full",
        rounds=30,
        thresholds=4,
        rules=tuple(RULES),
        codecs=tuple(CODECS),
        products=("EDEN, 2 bits", "top 10 %, feedback", "top 1 %, feedback"),
        data="files",
    ),
}
COLOURS = {
    "always": common.BLACK,
    "norm, kept": common.BLUE,
    "norm, dropped": common.SKY,
    "relative, kept": common.GREEN,
    "target rate": common.RED,
    "CMFL": common.ORANGE,
    "Gaia": common.PINK,
}
MARKERS = "osD^v<>P*X"


def points(config, model, train, test) -> list[dict]:
    """Every run: its rule, codec, threshold, final accuracy and what it sent."""
    ids = dominant_class(
        train["y"], num_clients=config.nodes, bias=config.bias, seed=config.seed
    )
    data = from_arrays(train["x"], train["y"], ids, config.nodes)
    data = jax.tree.map(jnp.asarray, data)
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 1))
    algorithm = jaxfl.fedavg(
        model.loss,
        optax.sgd(config.learning_rate),
        batch_size=config.batch_size,
        steps=config.steps,
    )
    plan = jaxfl.tune(jaxfl.federate(algorithm, jaxfl.mean()), params, data)

    def run(rule, codec, channel_of, values):
        def federation_of(threshold):
            return jaxfl.federate(
                *(algorithm, jaxfl.chain(channel_of(threshold), jaxfl.mean())),
                chunk_size=plan.chunk_size,
                mesh=plan.mesh,
            )

        _, (bits, sent), evaluations = common.sweep(
            f"{rule}; {codec}",
            federation_of,
            jnp.asarray(values, jnp.float32),
            params,
            data,
            rounds=config.rounds,
            key=key,
            look=lambda info: (info.bits_up.sum(), info.sent.mean()),
            evaluate=jaxfl.on_server(model.metrics, test, mesh=plan.mesh),
        )
        return [
            {
                "rule": rule,
                "codec": codec,
                "threshold": float(value) if rule != "always" else None,
                "megabytes": float(bits[i].astype(np.float64).sum() / 8e6),
                "sent": float(sent[i].mean()),
                "accuracy": float(evaluations["accuracy"][i, -1]),
            }
            for i, value in enumerate(values)
        ]

    found = []
    for codec in config.codecs:
        found += run("always", codec, lambda _, codec=codec: CODECS[codec], [0.0])
    for rule in config.rules:
        gate, least, most = RULES[rule]
        values = np.geomspace(least, most, config.thresholds)
        for codec in ("float32", *config.products):
            if rule == "Gaia" and codec != "float32":
                continue  # it is a codec itself

            def both(threshold, gate=gate, channel=CODECS[codec]):
                return jaxfl.chain(gate(threshold), channel)

            found += run(rule, codec, both, values)
    return found


def front(found: list[dict]) -> list[dict]:
    """Those that no other run beats in bytes without being less accurate."""
    best, kept = -np.inf, []
    for point in sorted(found, key=lambda p: (p["megabytes"], -p["accuracy"])):
        if point["accuracy"] > best:
            best = point["accuracy"]
            kept.append(point)
    return kept


def draw(config, found):
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    names = list(CODECS)
    for point in found:
        axes.plot(
            *(point["megabytes"], 100 * point["accuracy"]),
            MARKERS[names.index(point["codec"])],
            color=COLOURS[point["rule"]],
            alpha=0.8,
            ms=5,
        )
    best = front(found)
    axes.step(
        [p["megabytes"] for p in best],
        [100 * p["accuracy"] for p in best],
        where="post",
        color="0.4",
        lw=1,
        zorder=0,
    )
    used = [n for n in names if any(p["codec"] == n for p in found)]
    handles = [Line2D([], [], marker="s", ls="", color=c) for c in COLOURS.values()]
    whens = axes.legend(
        handles, COLOURS, title="when", loc="upper left", bbox_to_anchor=(1, 1)
    )
    axes.add_artist(whens)
    handles = [
        Line2D([], [], marker=MARKERS[names.index(n)], ls="", color="0.4") for n in used
    ]
    whats = axes.legend(
        handles, used, title="what", loc="upper left", bbox_to_anchor=(1, 0.62)
    )
    for legend in (whens, whats):
        legend.set_frame_on(False)
    top = max(p["accuracy"] for p in found)
    shown = [p["megabytes"] for p in found if p["accuracy"] > top - 0.25]
    axes.set(
        xlabel="sent by all nodes (MB)",
        ylabel="test accuracy (%)",
        xscale="log",
        xlim=(min(shown) / 1.5, max(shown) * 1.5),
        ylim=(100 * top - 25, 100 * top + 1),
        title=f"MNIST, {config.nodes} nodes, {config.rounds} rounds, and the front",
    )
    common.tidy(axes)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known(
        (config.rules, RULES), (config.codecs, CODECS), (config.products, CODECS)
    )
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    model = models.from_linen(models.two_nn(), train["x"][:1])
    found = points(config, model, train, jax.tree.map(jnp.asarray, test))

    folder = common.results_folder("threshold_front")
    best = front(found)
    common.save_summary(
        folder, {"runs": found, "front": best, "settings": dataclasses.asdict(config)}
    )
    columns = tuple(found[0])
    common.save_history(folder, columns, (tuple(p.values()) for p in found))
    common.save_figure(folder, draw(config, found), "threshold_front")
    plain = next(p for p in found if (p["rule"], p["codec"]) == ("always", "float32"))
    common.print_table(
        folder,
        f"The front; always float32: {100 * plain['accuracy']:.2f} % for "
        f"{plain['megabytes']:.1f} MB",
        ("when", "what", "threshold", "sent", "MB up", "accuracy %"),
        [
            (
                p["rule"],
                p["codec"],
                "" if p["threshold"] is None else f"{p['threshold']:.3g}",
                f"{100 * p['sent']:.0f} %",
                f"{p['megabytes']:.3g}",
                f"{100 * p['accuracy']:.2f}",
            )
            for p in best
        ],
    )


if __name__ == "__main__":
    main()
