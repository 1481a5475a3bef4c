"""Who brings what to a federation, and how far its nodes drift apart.

Eight nodes with MNIST digits: three whose digits are their own and rightly labelled,
one that has the digits of another once more, two with wrong labels, one with few digits
and one with a single class. What is each worth? Every coalition of them trains a model
of its own, and leave-one-out and Shapley values (Ghorbani, Zou 2019, arXiv:1904.02868)
divide what all together reach; a sample of orders is held against the exact values.

Then ten nodes over rounds, alike and with one class each: the cosine between their
updates, their gradient diversity (Yin et al. 2018, arXiv:1706.05699), and the barrier
on the line between two of their models (Frankle et al. 2020, arXiv:1912.05671).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import jaxfl
from experiments import common
from jaxfl import contribution, drift, models
from jaxfl.data import dominant_class, from_arrays, mnist, stack, stack_axes


@dataclasses.dataclass(frozen=True)
class Settings:
    """An MLP by federated averaging, in both parts."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    examples: int
    """Digits of a node; of the one with few, a tenth."""
    rounds: int
    """Of every coalition's run."""
    seeds: int
    """Of the digits that nodes have, the initial model and the batches."""
    permutations: tuple[int, ...]
    """Orders drawn for the sampled Shapley values."""
    repeats: int
    """Samples of orders, of each size."""
    drift_rounds: int
    """Of the ten nodes that drift."""
    drift_examples: int
    """Digits of all those nodes together."""
    hidden: int
    """Units of the hidden layer."""
    heldout: int
    """Test digits on which all is measured."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    learning_rate: float = 0.1
    """Of the nodes."""
    batch_size: int = 20
    """Examples a step; one pass over a node's digits a round."""
    chunk_size: int = 32
    """Coalitions that train at once."""


PRESETS = {
    "ci": Settings(
        "ci",
        examples=40,
        rounds=4,
        seeds=1,
        permutations=(4, 16, 64),
        repeats=20,
        drift_rounds=4,
        drift_examples=500,
        hidden=16,
        heldout=300,
    ),
    "full": Settings(
        "full",
        examples=200,
        rounds=10,
        seeds=3,
        permutations=(5, 10, 20, 50, 100, 200, 500),
        repeats=100,
        drift_rounds=40,
        drift_examples=6000,
        hidden=64,
        heldout=2000,
        data="files",
    ),
}

NODES = (
    *("clean", "clean, others", "clean, and copied", "the copy"),
    *("half of labels wrong", "all labels wrong"),
    *("a tenth of the digits", "zeros only"),
)
COPIED, COPY, HALF, ALL, FEW, ZEROS = range(2, 8)


def eight_nodes(train, config, seed: int) -> jaxfl.ClientData:
    """What each node has, drawn anew from a seed."""
    rng, e = np.random.default_rng(seed), config.examples
    y = train["y"].astype(np.int32)
    order = rng.permutation(len(y))
    zeros = order[y[order] == 0][:e]  # all that there are, where they are fewer
    of_any = order[~np.isin(order, zeros)]
    if len(of_any) < 6 * e:
        raise ValueError(
            f"examples: six nodes of {e} digits take more than the {len(of_any)} that "
            "there are."
        )
    rows = [of_any[i * e : (i + 1) * e] for i in range(6)]
    rows[COPY:COPY] = [rows[COPIED]]
    rows = [*rows[:FEW], rows[FEW][: e // 10], zeros]
    labels = [y[r] for r in rows]
    for node, share in ((HALF, 0.5), (ALL, 1.0)):
        wrong = rng.permutation(e) < share * e
        other = (labels[node] + rng.integers(1, 10, e)) % 10
        labels[node] = np.where(wrong, other, labels[node])
    ids = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    x = train["x"][np.concatenate(rows)]
    return from_arrays(x, np.concatenate(labels), ids, len(rows))


def values_of_all(config, model, train, heldout, seed: int) -> np.ndarray:
    """The accuracy that each of the 2^N coalitions reaches, float64 `[2^N]`, in %."""
    key = jax.random.key(seed)
    federation = jaxfl.federate(fedavg(config, model), jaxfl.mean())

    def accuracy(state):
        return 100 * jnp.mean(model.metrics(state.params, heldout)["accuracy"])

    game = contribution.game(
        federation,
        model.init(key),
        eight_nodes(train, config, seed),
        utility=accuracy,
        rounds=config.rounds,
        key=key,
        chunk_size=config.chunk_size,
    )
    n = len(NODES)
    masks = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    chunks = np.split(masks, range(config.chunk_size, 2**n, config.chunk_size))
    title = f"coalitions, seed {seed}"
    return np.concatenate([game(chunk) for chunk in track(chunks, f"{title:40}")])


def fedavg(config, model):
    optimizer = optax.sgd(config.learning_rate)
    return jaxfl.fedavg(model.loss, optimizer, batch_size=config.batch_size)


def shares(config, table: np.ndarray) -> tuple[dict, list]:
    """How values of coalitions are divided, and how near samples of orders come."""
    n = len(NODES)

    def game(masks):
        return table[masks @ (1 << np.arange(n))]

    exact = contribution.shapley(game, n)
    found = {
        "shapley": exact,
        "leave_one_out": contribution.leave_one_out(game, n),
        "alone": table[1 << np.arange(n)] - table[0],
    }
    samples = []
    for permutations in config.permutations:
        estimates = [
            contribution.sampled_shapley(game, n, permutations=permutations, seed=s)
            for s in range(config.repeats)
        ]
        off = np.array([e.value - exact for e in estimates])
        error = np.array([e.error for e in estimates])
        samples.append(
            (
                permutations,
                np.mean([e.coalitions for e in estimates]),
                np.sqrt(np.mean(off**2)),
                np.sqrt(np.mean(error**2)),
            )
        )
    return found, samples


CASES = {"uniform": 0.0, "one_class": 1.0}  # which part of a class is on one node


def drifting(config, model, train, heldout) -> dict[str, dict[str, np.ndarray]]:
    """Of every round of ten nodes: how far apart they are, and what models score."""
    order = np.random.default_rng(0).permutation(len(train["y"]))
    rows = order[: config.drift_examples]
    x, y, key = train["x"][rows], train["y"][rows], jax.random.key(0)
    # Both cases are one program.
    data = stack(
        [
            from_arrays(x, y, dominant_class(y, num_clients=10, bias=bias, seed=0), 10)
            for bias in CASES.values()
        ]
    )
    channel = jaxfl.chain(jaxfl.tap("update"), jaxfl.mean())
    federation = jaxfl.federate(fedavg(config, model), channel)

    def loss(params):
        return jnp.mean(model.metrics(params, heldout)["loss"])

    def one_round(state, data):
        before = state.params
        state, (info, _) = jaxfl.scan_rounds(federation, state, data, rounds=1, key=key)
        updates = jax.tree.map(lambda x: x[0], info.reports[0]["update"])
        a = jax.tree.map(lambda x, u: x - u[0], before, updates)
        b = jax.tree.map(lambda x, u: x - u[1], before, updates)
        cosines = drift.pairwise_cosine(updates)
        return state, {
            "cosine": (jnp.sum(cosines) - 10) / 90,
            "diversity": drift.gradient_diversity(updates),
            "barrier": drift.barrier(drift.linear_path(loss, a, b)),
            "node_loss": (loss(a) + loss(b)) / 2,
            "average_loss": loss(state.params),
        }

    axes = stack_axes(data)
    params = model.init(key)
    init = jax.vmap(lambda data: federation.init(params, data), (axes,))
    step = jax.jit(jax.vmap(one_round, (0, axes)))
    state, seen = jax.jit(init)(data), []
    for _ in track(range(config.drift_rounds), f"{'ten nodes':40}"):
        state, values = step(state, data)
        seen.append(jax.device_get(values))
    return {
        case: {name: np.array([v[name][i] for v in seen]) for name in seen[0]}
        for i, case in enumerate(CASES)
    }


COLOURS = {"uniform": common.BLUE, "one_class": common.ORANGE}


def draw(config, found, samples, drifts):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        *(2, 2), figsize=(11, 7.6), layout="constrained", width_ratios=(1.25, 1)
    )
    (bars, near), (alike, hill) = panels
    place = np.arange(len(NODES))[::-1]
    for shift, name, label, colour in (
        (0.2, "shapley", "Shapley value", common.BLUE),
        (-0.2, "leave_one_out", "leave-one-out", common.ORANGE),
    ):
        each = np.array([f[name] for f in found])
        bars.barh(place + shift, each.mean(0), 0.38, color=colour, label=label)
        for values in each:
            bars.plot(values, place + shift, "k.", ms=3)
    bars.set_yticks(place, NODES)
    bars.axvline(0, color=common.BLACK, lw=0.8)
    bars.set(xlabel="worth (points of test accuracy); a dot a seed")
    bars.set_title("eight nodes: what each is worth")

    played, off, error = np.array(samples)[:, :, 1:].mean(0).T
    near.plot(played, off, "o-", color=common.BLUE, label="from the exact values")
    near.plot(played, error, "s--", color=common.ORANGE, label="standard error stated")
    for (permutations, *_), x, y in zip(samples[0], played, off, strict=True):
        near.annotate(
            f"{permutations}", (x, y), (4, 6), textcoords="offset points", fontsize=8
        )
    near.set(
        yscale="log",
        xlabel=f"coalitions played, of {2 ** len(NODES)} (numbers: orders drawn)",
        ylabel="root mean square (points)",
    )
    near.set_title("Shapley values from a sample of orders")
    near.legend(frameon=False)

    rounds = np.arange(1, config.drift_rounds + 1)
    for case, d in drifts.items():
        name, colour = case.replace("_", " "), COLOURS[case]
        alike.plot(rounds, d["cosine"], color=colour, label=f"{name}: mean cosine")
        alike.plot(
            *(rounds, d["diversity"]),
            color=colour,
            ls="--",
            label=f"{name}: gradient diversity",
        )
        hill.plot(rounds, d["node_loss"], color=colour, label=f"{name}: two nodes")
        hill.plot(
            *(rounds, d["average_loss"]),
            color=colour,
            ls="--",
            label=f"{name}: average of ten",
        )
        hill.plot(
            *(rounds, d["barrier"]), color=colour, ls=":", label=f"{name}: barrier"
        )
    alike.set(xlabel="round", ylabel="cosine, diversity (no unit)")
    alike.set_yscale("symlog", linthresh=1)  # a cosine is within 1, diversity is not
    alike.yaxis.set_major_formatter("{x:g}")
    alike.set_title("ten nodes: how their updates agree")
    hill.set(xlabel="round", ylabel="loss on held-out digits (nats)")
    hill.set_title("ten nodes: what their models score")
    for axes in (bars, alike, hill):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axes.legend(**below, frameon=False, fontsize=8)
    for axes in (alike, hill):
        axes.xaxis.get_major_locator().set_params(integer=True)
    common.tidy(*panels.flat)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = mnist(config.data)
    heldout = jax.tree.map(lambda a: jnp.asarray(a[: config.heldout]), test)
    model = models.from_linen(models.mlp((config.hidden,)), train["x"][:1])

    tables = [
        values_of_all(config, model, train, heldout, seed)
        for seed in range(config.seeds)
    ]
    found, samples = zip(*(shares(config, table) for table in tables), strict=True)
    drifts = drifting(config, model, train, heldout)

    def mean(name):
        return np.mean([f[name] for f in found], 0)

    folder = common.results_folder("contribution")
    worth = {
        node: {name: mean(name)[i] for name in found[0]} for i, node in enumerate(NODES)
    }
    common.save_summary(
        folder,
        {
            "worth": worth,
            "accuracy": {
                "nobody": np.mean([t[0] for t in tables]),
                "everyone": np.mean([t[-1] for t in tables]),
                "without_wrong_labels": np.mean(
                    [t[2 ** len(NODES) - 1 - (1 << HALF) - (1 << ALL)] for t in tables]
                ),
            },
            "sampled": [
                dict(zip(("orders", "coalitions", "off", "error"), s, strict=True))
                for s in np.mean(samples, 0)
            ],
            "drift": {
                case: {name: x[-1] for name, x in d.items()}
                for case, d in drifts.items()
            },
            "settings": dataclasses.asdict(config),
        },
    )
    common.save_history(
        folder,
        ("case", "round", *drifts["uniform"]),
        (
            (case, r + 1, *(x[r] for x in d.values()))
            for case, d in drifts.items()
            for r in range(config.drift_rounds)
        ),
    )
    common.save_figure(folder, draw(config, found, samples, drifts), "contribution")
    common.print_table(
        folder,
        "What each node is worth, in points of test accuracy",
        ("node", "Shapley value", "leave-one-out", "alone"),
        [(node, *(f"{v:.2f}" for v in w.values())) for node, w in worth.items()],
    )
    common.print_table(
        folder,
        "Sampled Shapley values",
        ("orders", "coalitions", "from the exact ones", "standard error stated"),
        [
            (f"{p:.0f}", f"{c:.0f}", f"{o:.2f}", f"{e:.2f}")
            for p, c, o, e in np.mean(samples, 0)
        ],
    )
    common.print_table(
        folder,
        f"Drift in round {config.drift_rounds}",
        ("nodes", *(name.replace("_", " ") for name in drifts["uniform"])),
        [
            (case.replace("_", " "), *(f"{x[-1]:.3f}" for x in d.values()))
            for case, d in drifts.items()
        ],
    )


if __name__ == "__main__":
    main()
