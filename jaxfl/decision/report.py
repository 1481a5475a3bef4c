"""The decision report: one call that runs, judges and writes it down."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxfl.core import Channel
from jaxfl.data.federated import ClientData, client_rows
from jaxfl.decision import page
from jaxfl.decision.curve import PowerLaw, fit_power_law
from jaxfl.decision.study import Study, rows_at, study
from jaxfl.decision.verdict import (
    FEWEST_HELDOUT,
    Effect,
    NodeEffects,
    Verdict,
    effect,
    judge,
    node_effects,
)
from jaxfl.models import Model

PyTree = Any
Judged = Literal["overall", "own"]


@dataclasses.dataclass(frozen=True)
class Report:
    """Whether to federate, and why: numbers and plain arrays.

    Attributes:
      title: of the report.
      verdict: the answer, and the rule that gave it.
      caveats: what the answer does not cover.
      score: the metric's name.
      higher: whether more of it is better.
      judged: the examples that the verdict is on, "overall" or "own".
      worth: the least gain that is worth it, in the unit of the score.
      confidence: of all intervals.
      setting: what was run.
      means: `{regime: {"overall": score, "own": score}}`.
      effects: differences, for the better; by name, each on both kinds of examples.
      examples: int `[N]`, that each node trains on.
      constant: bool `[N]`, nodes whose own labels are all the same.
      nodes: what each node gains on its own examples by the federated model.
      nodes_tuned: and after fine-tuning at home.
      sizes: `[F]`, examples a node, of the mean of nodes.
      counts: `[M]`, nodes.
      by_fraction, by_count: curves, see `Study`.
      alone: power law of isolated nodes over examples a node, on the judged examples.
      together: that of the federation.
      more: `[3, 3]`: for 2, 4 and 10 times the examples at every node, the score of
        isolated nodes by that law, and its interval.
      as_good_as: `[3]`, how many times the data every isolated node would need to be as
        good as the federation, and its interval.
      costs: of one client in the whole run: bytes up and down, FLOP; epsilon if there
        is a private channel.
    """

    title: str
    verdict: Verdict
    caveats: tuple[str, ...]
    score: str
    higher: bool
    judged: Judged
    worth: float
    confidence: float
    setting: dict[str, Any]
    means: dict[str, dict[str, float]]
    effects: dict[str, dict[str, Effect]]
    examples: np.ndarray
    constant: np.ndarray
    nodes: NodeEffects
    nodes_tuned: NodeEffects
    sizes: np.ndarray
    counts: np.ndarray
    by_fraction: dict[str, np.ndarray]
    by_count: dict[str, np.ndarray]
    alone: PowerLaw
    together: PowerLaw
    more: np.ndarray
    as_good_as: np.ndarray
    costs: dict[str, float]

    def markdown(self) -> str:
        """The report as Markdown, without figures."""
        return page.markdown(self)

    def html(self) -> str:
        """The report as one HTML page with its figures; it loads nothing.

        Raises:
          ImportError: matplotlib is missing.
        """
        return page.html(self)

    def json(self) -> str:
        """All numbers as JSON, from which `from_json` makes the report again.

        What is not finite is written as a string, "nan" or "inf".
        """
        return json.dumps(_plain(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Report":
        """The report that `json` wrote."""
        return _restored(json.loads(text))

    def write(self, folder: str | os.PathLike) -> None:
        """Writes `report.html`, `report.md` and `report.json`, each whole or not.

        Args:
          folder: made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("report.html", self.html()),
            ("report.md", self.markdown()),
            ("report.json", self.json()),
        ):
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, folder / name)


def should_i_federate(
    model: Model,
    optimizer: optax.GradientTransformation,
    clients: ClientData,
    test: PyTree = None,
    *,
    rounds: int,
    key: jax.Array,
    epochs: int = 1,
    batch_size: int = 32,
    heldout: ClientData | None = None,
    holdout: float = 0.2,
    score: str = "accuracy",
    higher: bool = True,
    judged: Judged = "overall",
    worth: float | None = None,
    confidence: float = 0.95,
    fractions: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1),
    counts: Sequence[int] | None = None,
    seeds: int = 3,
    server_optimizer: optax.GradientTransformation | None = None,
    isolated_optimizer: optax.GradientTransformation | None = None,
    pooled_optimizer: optax.GradientTransformation | None = None,
    channel: Channel | None = None,
    private: Channel | None = None,
    delta: float = 1e-5,
    dropout: float = 0.3,
    bytes_allowed: float | None = None,
    notes: Sequence[str] = (),
    title: str = "Should these nodes federate?",
    chunk_size: int | None = None,
    at_once: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Report:
    """Is it worth it to federate, for these nodes, this model and this budget?

    Trains the model isolated, federated and pooled, from the same initial parameters
    and with the same work, on growing parts of each node's examples and with growing
    numbers of nodes. In every run a node takes as many steps a round as `epochs` passes
    over the examples of a mean node are, so that points of a curve differ by data and
    not by work; all runs of a regime are one program, mapped over subsets and seeds.
    The verdict follows from rules, see `decision.judge`.

    Args:
      model: what is trained.
      optimizer: of every node.
      clients: the population, N >= 2 nodes of at least 4 examples; of 2 if `heldout`
        is given.
      test: common examples, a pytree of `[T, ...]` arrays: what all nodes together will
        meet. By default all nodes' held-out examples.
      rounds: R.
      key: of the study.
      epochs: passes of a mean node over its examples in a round.
      batch_size: B, examples a step.
      heldout: each node's own held-out examples, N nodes, if they are given, at least
        one each, and two if those are `judged`; else `holdout` of each node's examples
        are held out, the same in all runs.
      holdout: that share.
      score: the metric of `model.metrics` that decides.
      higher: whether more of it is better.
      judged: "overall" if each node is to be good at what all nodes together meet, on
        `test`; "own" if each will only ever meet what it has met itself.
      worth: the least gain that is worth the trouble, in the unit of the score; by
        default 0.02 of an accuracy, else a twentieth of what isolated nodes score.
      confidence: of all intervals.
      fractions: shares of each node's examples, F of them, the last of which is 1.
      counts: numbers of nodes, the last of which is N; five up to N by default.
      seeds: S, of initial weights, subsets and batches.
      server_optimizer: of the federation, see `fedavg`.
      isolated_optimizer: of nodes alone, if another suits them better.
      pooled_optimizer: of the pooled benchmark, likewise.
      channel: of the federation; `mean()` by default.
      private: a channel that adds noise, with which the federation is run once more;
        `accounting.epsilon` of it is reported, of whole clients, at `delta`.
      delta: see `accounting.epsilon`.
      dropout: share of the nodes that vanish in each round of one more run.
      bytes_allowed: that a client may send in the whole run.
      notes: caveats of your own, such as of the data.
      title: of the report.
      chunk_size: nodes at once, see `federate`.
      at_once: runs at once on each device.
      mesh: devices to spread the runs over, see `client_mesh`.

    Returns:
      A `Report`.

    Raises:
      ValueError: if there are fewer than two nodes, one has too few examples, an
        argument is out of range, the private channel has no guarantee, or the model
        has no such metric; after the runs, if a score is not finite.

    Example:
      ```python
      report = jaxfl.should_i_federate(
          model, optax.sgd(0.1), clients, test, rounds=20, key=jax.random.key(0))
      print(report.verdict.answer, report.verdict.because)
      report.write("report")
      ```
    """
    _check(
        *(model, clients, test, heldout),
        score=score,
        judged=judged,
        worth=worth,
        confidence=confidence,
        fractions=fractions,
        counts=counts,
        dropout=dropout,
        rounds=rounds,
        epochs=epochs,
        batch_size=batch_size,
        seeds=seeds,
        at_once=at_once,
    )
    n, guarantee = clients.num_clients, {}
    if private is not None:  # before the runs: it refuses what has no guarantee
        from jaxfl import accounting

        guarantee["epsilon"] = accounting.epsilon(
            private, population=n, cohort=None, rounds=rounds, delta=delta
        )
        guarantee["delta"] = delta
    found = study(
        *(model, optimizer, clients),
        rounds=rounds,
        key=key,
        score=score,
        epochs=epochs,
        batch_size=batch_size,
        test=test,
        heldout=heldout,
        holdout=holdout,
        fractions=fractions,
        counts=counts,
        seeds=seeds,
        server_optimizer=server_optimizer,
        isolated_optimizer=isolated_optimizer,
        pooled_optimizer=pooled_optimizer,
        channel=channel,
        private=private,
        dropout=dropout,
        chunk_size=chunk_size,
        at_once=at_once,
        mesh=mesh,
    )
    costs = {
        "bytes up": found.bytes_up,
        "bytes down": found.bytes_down,
        "FLOP": found.flops,
        **guarantee,
    }
    setting = {
        "nodes": n,
        "rounds": rounds,
        "epochs": epochs,
        "steps a round": found.local_steps,
        "batch size": batch_size,
        "seeds": seeds,
        "dropout": dropout,
    }
    return report_of(
        found,
        constant=_constant_labels(clients),
        score=score,
        higher=higher,
        judged=judged,
        worth=worth,
        confidence=confidence,
        costs=costs,
        bytes_allowed=bytes_allowed,
        setting=setting,
        notes=notes,
        title=title,
    )


def report_of(
    found: Study,
    *,
    constant: np.ndarray,
    score: str,
    higher: bool,
    judged: Judged,
    worth: float | None,
    confidence: float,
    costs: dict[str, float],
    setting: dict[str, Any],
    bytes_allowed: float | None = None,
    notes: Sequence[str] = (),
    title: str = "Should these nodes federate?",
) -> Report:
    """What a study says; nothing is run.

    Args:
      found: the study.
      constant: bool `[N]`, nodes whose own labels are all the same.
      score, higher, judged, worth, confidence, bytes_allowed, notes, title: see
        `should_i_federate`.
      costs, setting: see `Report`.

    Raises:
      ValueError: if a score is not finite.
    """
    for name, s in found.scores.items():
        if not np.isfinite(s.overall).all():
            raise ValueError(
                f"score: some of {score!r} of {name} models is not finite: their "
                "training diverged. Let rates be smaller, of these models alone by an "
                "optimizer of their own."
            )
    sign = 1.0 if higher else -1.0
    means = {
        name: {
            "overall": float(s.overall.mean()),
            "own": float(np.nanmean(s.own, -1).mean()),
        }
        for name, s in found.scores.items()
    }
    if worth is None:
        worth = 0.02 if score == "accuracy" else 0.05 * abs(means["isolated"][judged])

    def change(better: str, than: str) -> dict[str, Effect]:
        a, b = found.scores[better], found.scores[than]
        return {
            "overall": effect(sign * (a.overall - b.overall)[:, None], confidence),
            "own": effect(sign * (a.own - b.own), confidence),
        }

    effects = {
        "federated over isolated": change("federated", "isolated"),
        "fine-tuned over isolated": change("tuned", "isolated"),
        "pooled over isolated": change("pooled", "isolated"),
        "pooled over federated": change("pooled", "federated"),
        "with dropouts over without": change("dropout", "federated"),
    }
    if "private" in found.scores:
        effects["private over not private"] = change("private", "federated")

    def of_nodes(name):
        return node_effects(
            sign * (found.scores[name].own - found.scores["isolated"].own),
            worth=worth,
            confidence=confidence,
            counted=~constant,
        )

    nodes, nodes_tuned = of_nodes("federated"), of_nodes("tuned")
    gain = effects["federated over isolated"][judged]
    own = judged == "own"
    verdict = judge(
        gain,
        effects["fine-tuned over isolated"]["own"] if own else gain,
        effects["pooled over isolated"][judged],
        worth=worth,
        losers=int(nodes.loses.sum()),
        losers_tuned=int((nodes.loses & nodes_tuned.loses).sum()),
        show=lambda x: page.difference(x, score),
    )

    sizes = rows_at(found.train, found.fractions).mean(1)
    suffix = ", own" if own else ""
    alone, together = (
        fit_power_law(
            sizes, found.by_fraction[f"{name}{suffix}"], confidence=confidence
        )
        for name in ("isolated", "federated")
    )
    more = alone.at(np.array([2.0, 4.0, 10.0]) * alone.now, confidence)
    as_good_as = alone.times(means["federated"][judged], confidence)
    if not alone.identifiable:
        more, as_good_as = np.full((3, 3), math.nan), np.full(3, math.nan)
    held = (~np.isnan(found.scores["isolated"].own[0])).sum(-1)
    return Report(
        title=title,
        verdict=verdict,
        caveats=(
            *notes,
            *_caveats(
                effects,
                held,
                constant,
                score=score,
                judged=judged,
                setting=setting,
                costs=costs,
                bytes_allowed=bytes_allowed,
                worth=worth,
            ),
        ),
        score=score,
        higher=higher,
        judged=judged,
        worth=worth,
        confidence=confidence,
        setting=setting,
        means=means,
        effects=effects,
        examples=found.train,
        constant=np.asarray(constant, bool),
        nodes=nodes,
        nodes_tuned=nodes_tuned,
        sizes=sizes,
        counts=found.counts,
        by_fraction=found.by_fraction,
        by_count=found.by_count,
        alone=alone,
        together=together,
        more=more,
        as_good_as=as_good_as,
        costs=costs,
    )


def _caveats(
    effects, held, constant, *, score, judged, setting, costs, bytes_allowed, worth
):
    """What a reader must know beside the verdict."""
    gain = effects["federated over isolated"]
    if bytes_allowed is not None and costs["bytes up"] > bytes_allowed:
        yield (
            f"Over budget: a client sends {costs['bytes up'] / 1e6:.3g} MB, "
            f"{costs['bytes up'] / bytes_allowed:.1f} times the "
            f"{bytes_allowed / 1e6:.3g} MB that it may send; jaxfl.compress and "
            "jaxfl.communicate make messages shorter and fewer."
        )
    if constant.any():
        k = int(constant.sum())
        yield (
            f"{k} of {len(constant)} nodes have only one label of their own: on their "
            "own examples a constant answers everything, so that they are not counted "
            "among those who lose there."
        )
    other = "own" if judged == "overall" else "overall"
    a, b = gain[judged], gain[other]
    if abs(b.mean) >= worth and b.mean * a.mean < 0 and b.low * b.high > 0:
        kind = {
            "overall": "what all nodes together meet",
            "own": "each node's own examples",
        }
        yield (
            f"The verdict is on {kind[judged]}; on {kind[other]} the sign is the other."
        )
    few = int((held < FEWEST_HELDOUT).sum())
    if few:
        yield (
            f"{few} of {len(held)} nodes have fewer than {FEWEST_HELDOUT} held-out "
            "examples; it is not said of them whether they lose."
        )
    if setting["seeds"] == 1:
        yield "There was one seed: the intervals know nothing of other runs."
    lost = effects["with dropouts over without"][judged]
    if lost.mean <= -worth and lost.high < 0:
        yield (
            f"That {setting['dropout']:.0%} of the nodes vanish in every round changes "
            f"the score by {page.difference(lost.mean, score)}."
        )
    noise = effects.get("private over not private")
    if noise is not None and noise[judged].mean <= -max(gain[judged].mean, 0):
        yield "The noise costs as much as federating gains, or more."


def _constant_labels(clients: ClientData) -> np.ndarray:
    """Which nodes have one class only, `[N]`; none where labels are no classes."""
    n = clients.num_clients
    examples = clients.examples
    labels = examples.get("y") if isinstance(examples, dict) else None
    if labels is None or np.ndim(labels) != 1:
        return np.zeros(n, bool)
    y = np.asarray(labels)
    return np.array([len(np.unique(y[rows])) == 1 for rows in client_rows(clients)])


def _check(
    model: Model,
    clients: ClientData,
    test: PyTree,
    heldout: ClientData | None,
    *,
    score: str,
    judged: str,
    worth: float | None,
    confidence: float,
    fractions: Sequence[float],
    counts: Sequence[int] | None,
    dropout: float,
    **positive: int,
) -> None:
    """Raises ValueError unless the arguments of `should_i_federate` make sense."""
    n = clients.num_clients
    if n < 2:
        raise ValueError(f"clients: there must be at least 2 to federate, got {n}.")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if judged not in ("overall", "own"):
        raise ValueError(f'judged must be "overall" or "own", got {judged!r}.')
    if worth is not None and not worth > 0:
        raise ValueError(f"worth must be positive, got {worth}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}.")
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or not len(shares) or shares.min() <= 0 or shares.max() != 1:
        raise ValueError(f"fractions must be in (0, 1], with a 1, got {fractions}.")
    if counts is not None and (not len(counts) or min(counts) < 1 or max(counts) != n):
        raise ValueError(f"counts must be from 1 to {n}, the last {n}, got {counts}.")
    if heldout is not None and heldout.num_clients != n:
        raise ValueError(
            f"heldout has {heldout.num_clients} clients and clients {n}; node i's own "
            "examples should be client i's of both."
        )
    # On one example alone there is no telling how much examples differ.
    least = 2 if judged == "own" else 1
    if heldout is not None and np.min(heldout.size) < least:
        raise ValueError(
            f"heldout: every node must have {least} examples of its own or more, and "
            f"node {np.argmin(heldout.size)} has {np.min(heldout.size)}."
        )
    if heldout is not None and np.min(clients.size) < 2:
        raise ValueError(
            f"clients: each must have 2 examples to train on or more, and client "
            f"{np.argmin(clients.size)} has {np.min(clients.size)}."
        )
    if test is not None and not all(len(a) for a in jax.tree.leaves(test)):
        raise ValueError("test: there are no examples.")
    row = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), jax.numpy.result_type(a)),
        clients.examples,
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    metrics = jax.eval_shape(model.metrics, params, row)
    if score not in metrics:
        raise ValueError(
            f"score: model.metrics has no {score!r}, there are {[*metrics]}."
        )


def _plain(x: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(x):
        x = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    elif hasattr(x, "_asdict"):
        x = x._asdict()
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def _restored(d: dict[str, Any]) -> Report:
    """The report of what `_plain` made of it."""

    def array(x):
        found = np.array(x)
        return found.astype(np.float64) if found.dtype.kind == "U" else found

    def arrays(x):
        return {k: array(v) for k, v in x.items()}

    def law(x):
        return PowerLaw(**x | {"samples": array(x["samples"])})

    def numbers(x):
        return {k: float(v) for k, v in x.items()}

    return Report(
        **d
        | {
            "verdict": Verdict(**d["verdict"]),
            "caveats": tuple(d["caveats"]),
            "means": {k: numbers(v) for k, v in d["means"].items()},
            "effects": {
                k: {on: Effect(**numbers(e)) for on, e in v.items()}
                for k, v in d["effects"].items()
            },
            **{k: array(d[k]) for k in ("examples", "constant", "sizes", "counts")},
            **{k: array(d[k]) for k in ("more", "as_good_as")},
            **{k: NodeEffects(**arrays(d[k])) for k in ("nodes", "nodes_tuned")},
            **{k: arrays(d[k]) for k in ("by_fraction", "by_count")},
            **{k: law(d[k]) for k in ("alone", "together")},
            "costs": numbers(d["costs"]),
        }
    )
