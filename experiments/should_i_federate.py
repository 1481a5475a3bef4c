"""Should these nodes federate? A verdict in words, with its evidence.

Learning curves of nodes alone, of their federation and of all data in one place, over
examples a node and over nodes; what each node gains; what it costs; and what follows.
The presets are cases whose answer is known: digits of which each node has one class
only (federate), plenty of digits dealt out evenly (not worth it), and four fleets of
turbofan engines. Or a file of one's own, a row an example:

    python -m experiments.should_i_federate --preset own --data my.csv \\
        --client-column site --label-column ill
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common, turbofan, turbofan_models
from jaxfl import decision, models
from jaxfl.data import (
    dominant_class,
    from_arrays,
    mnist,
    natural,
    of_rows,
    read_table,
)
from jaxfl.decision.study import split


@dataclasses.dataclass(frozen=True)
class Settings:
    """The data, a perceptron, and the budget."""

    preset: Literal["ci", "mnist_one_class", "mnist_iid", "turbofan", "own"]
    """Where the other settings start from: a small run, three cases, or a file."""
    data: str
    """`embedded` or `files` (digits), `cmapss`, or the path of a .csv or .npz file."""
    rounds: int
    """In each all nodes train once."""
    client_column: str = "client"
    """Of a file: the column that says whose a row is."""
    label_column: str = "label"
    """Of a file: the column to predict."""
    task: Literal["classification", "regression"] = "classification"
    """Of a file: whether labels are classes or numbers."""
    missing: Literal["error", "drop"] = "error"
    """Of a file: stop where values are missing, or leave such rows out."""
    ignore: tuple[str, ...] = ()
    """Of a file: columns to leave out."""
    fewest: int = 20
    """Of a file: clients with fewer rows are left out, and the report says so."""
    nodes: int = 10
    """Of digits: clients."""
    bias: float = 1.0
    """Of digits: share of each class that lies on its own node; 0 deals out evenly."""
    stride: int = 10
    """Of engines: of so many windows that follow one another, one is taken."""
    heldout: int = 2000
    """Of digits: common test digits."""
    epochs: int = 1
    """Passes of a mean node over its examples in a round."""
    batch_size: int = 20
    """Examples a step."""
    hidden: tuple[int, ...] = (64,)
    """Sizes of the hidden layers."""
    learning_rate: float = 0.1
    """Of SGD."""
    seeds: int = 3
    """Of initial weights, subsets and batches."""
    judged: Literal["overall", "own"] = "overall"
    """Whether a node is to be good at what all meet, or at what it meets itself."""
    worth: float | None = None
    """The least gain that is worth it: of accuracy as a fraction, else in its unit."""
    noise_multiplier: float = 0.0
    """Above 0, one more federation with so much noise, and its epsilon."""
    clip_norm: float = 1.0
    """Of updates, where there is noise."""
    megabytes: float | None = None
    """That a client may send in the whole run."""


PRESETS = {
    "ci": Settings(
        *("ci", "embedded", 6),
        batch_size=100,
        learning_rate=0.2,
        hidden=(16,),
        heldout=500,
    ),
    "mnist_one_class": Settings("mnist_one_class", "embedded", rounds=40),
    "mnist_iid": Settings(
        *("mnist_iid", "files", 6),
        nodes=4,
        bias=0.0,
        batch_size=32,
        heldout=5000,
    ),
    "turbofan": Settings(
        *("turbofan", "cmapss", 30),
        batch_size=32,
        hidden=(64, 32),
        learning_rate=0.02,
    ),
    "own": Settings("own", "rows.csv", rounds=40),
}


class Case(NamedTuple):
    """What the library is asked about, and what suits it."""

    title: str
    clients: jaxfl.ClientData
    test: Any
    model: models.Model
    optimizer: optax.GradientTransformation
    options: dict[str, Any]


def digits(config: Settings) -> Case:
    train, test = mnist(config.data)  # pyright: ignore[reportArgumentType]
    ids = dominant_class(train["y"], num_clients=config.nodes, bias=config.bias, seed=0)
    return Case(
        f"MNIST, {config.nodes} nodes, {config.bias:.0%} of a class on its own node",
        from_arrays(train["x"], train["y"], ids, config.nodes),
        {name: a[: config.heldout] for name, a in test.items()},
        models.from_linen(models.mlp(config.hidden), train["x"][:1]),
        optax.sgd(config.learning_rate),
        {},
    )


def engines(config: Settings) -> Case:
    """Four fleets; each is also tested on its own engines."""
    windows = dataclasses.replace(turbofan.PRESETS["full"], fleet_stride=config.stride)
    clients, test, subset = turbofan.windows(windows, "fleets")

    def error(outputs, life):
        capped = turbofan_models.in_cycles(outputs, life)["capped"]
        return {"error (cycles)": jnp.sqrt(capped)}

    return Case(
        "C-MAPSS turbofans, the fleets FD001 to FD004",
        clients,
        test,
        models.from_linen(
            models.mlp(config.hidden, 1),
            test["x"][:1],
            loss=turbofan_models.squared_error,
            metrics=error,
        ),
        optax.sgd(config.learning_rate, momentum=0.9),
        {
            "heldout": from_arrays(test["x"], test["y"], subset),
            "score": "error (cycles)",
            "higher": False,
            "notes": [
                "The remaining life is capped at 125 cycles, in training and test.",
            ],
        },
    )


def own_file(config: Settings) -> Case:
    """A user's rows; features and numeric labels standardised by sums over clients.

    The sums are over what clients train on: held-out rows are for scores alone.
    """
    path = Path(config.data)
    try:
        table = read_table(
            path,
            client=config.client_column,
            label=config.label_column,
            task=config.task,
            missing=config.missing,
            ignore=config.ignore,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{error}")
    notes = []
    if table.dropped:
        notes.append(f"{table.dropped} rows with missing values were left out.")
    rows = np.bincount(table.client)
    kept = rows[table.client] >= config.fewest
    if few := int((rows < config.fewest).sum()):
        notes.append(
            f"{few} of {len(rows)} clients have fewer than {config.fewest} rows and "
            "were left out."
        )
    if len(np.unique(table.client[kept])) < 2:
        sys.exit(
            f"{path.name}: fewer than two clients have {config.fewest} rows; the most "
            f"that one has is {rows.max()}."
        )
    names = [
        name for name, k in zip(table.clients, rows, strict=True) if k >= config.fewest
    ]
    listed = ", ".join(f"{i} is {name}" for i, name in enumerate(names[:50]))
    more = ", ..." if len(names) > 50 else ""
    notes.append(f"Nodes by their numbers: {listed}{more}.")
    x, y, ids = table.x[kept], table.y[kept], natural(table.client[kept])
    try:
        train, heldout = split(from_arrays(x, y, ids), 0.2, seed=0)
    except ValueError as error:
        sys.exit(f"{error}")
    scale = np.ones(1)
    if x.ndim == 2:
        seen = of_rows({"x": x}, train)
        x = np.asarray(jaxfl.moments(seen).standardize(x))
        notes.append(
            "Features are standardised by sums over all nodes' training rows, also for "
            "nodes on their own, who could not know them."
        )
    if config.task == "regression":
        of_y = jaxfl.moments(of_rows({"x": y[:, None]}, train))
        y, scale = np.asarray(of_y.standardize(y[:, None]))[:, 0], np.asarray(of_y.std)
    clients = of_rows({"x": x, "y": y}, train)
    heldout = dataclasses.replace(heldout, examples=clients.examples)
    example = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    optimizer = optax.sgd(config.learning_rate)
    if config.task == "classification":
        network = models.mlp(config.hidden, len(table.classes))
        model = models.from_linen(network, example)
        options: dict[str, Any] = {"notes": notes, "heldout": heldout}
        return Case(path.name, clients, None, model, optimizer, options)
    score, unit = f"error of {config.label_column}", float(scale.ravel()[0])
    model = models.from_linen(
        models.mlp(config.hidden, 1),
        example,
        loss=lambda outputs, y: (outputs[:, 0] - y) ** 2,
        metrics=lambda outputs, y: {score: unit * jnp.abs(outputs[:, 0] - y)},
    )
    options = {"notes": notes, "heldout": heldout, "score": score, "higher": False}
    return Case(path.name, clients, None, model, optimizer, options)


def draw(report: decision.Report):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.8), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False)
    decision.draw_growth(report, parts[0, 0])
    decision.draw_nodes(report, parts[1, 0])
    figure.suptitle(f"{report.title}: {report.verdict.answer}")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    if config.data in ("embedded", "files"):
        case = digits(config)
    else:
        case = engines(config) if config.data == "cmapss" else own_file(config)
    algorithm = jaxfl.fedavg(
        case.model.loss, case.optimizer, batch_size=config.batch_size
    )
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    params = jax.eval_shape(case.model.init, jax.random.key(0))
    federation = jaxfl.tune(federation, params, case.clients, verbose=False)
    private = None
    if config.noise_multiplier > 0:
        private = jaxfl.chain(
            jaxfl.clip(config.clip_norm),
            jaxfl.mean(denominator=case.clients.num_clients),
            jaxfl.privacy.gaussian(config.noise_multiplier),
        )
    try:
        report = jaxfl.should_i_federate(
            *(case.model, case.optimizer, case.clients, case.test),
            rounds=config.rounds,
            key=jax.random.key(0),
            seeds=config.seeds,
            judged=config.judged,
            worth=config.worth,
            private=private,
            bytes_allowed=None if config.megabytes is None else 1e6 * config.megabytes,
            title=case.title,
            chunk_size=federation.chunk_size,
            mesh=jaxfl.client_mesh(),
            epochs=config.epochs,
            batch_size=config.batch_size,
            **case.options,
        )
    except ValueError as error:
        sys.exit(f"{error}")

    folder = "should_i_federate"
    if config.preset != "ci":
        folder += f"/{config.preset}"
    folder = common.results_folder(folder)
    report.write(folder)
    summary = {
        "verdict": report.verdict._asdict(),
        "caveats": report.caveats,
        "means": report.means,
        "costs": report.costs,
        "settings": dataclasses.asdict(config),
    }
    common.save_summary(folder, summary)
    curves = [
        *(("examples a node", report.sizes, r) for r in report.by_fraction.items()),
        *(("nodes", report.counts, r) for r in report.by_count.items()),
    ]
    rows = [
        (over, regime, seed, x, scores[seed, i])
        for over, at, (regime, scores) in curves
        for seed in range(len(scores))
        for i, x in enumerate(at)
    ]
    common.save_history(folder, ("over", "regime", "seed", "at", report.score), rows)
    common.save_figure(folder, draw(report), "should_i_federate")
    common.print_table(
        folder,
        f"{report.title}: {report.verdict.answer}; {report.score}",
        ("", "on all", "of nodes on their own"),
        [
            (regime, *(f"{mean[on]:.4g}" for on in ("overall", "own")))
            for regime, mean in report.means.items()
        ],
    )
    print(report.markdown())
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
