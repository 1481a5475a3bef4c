"""Was this digit in the training data? Membership inference against federated models.

Yeom et al. 2018, arXiv:1709.01604 (a threshold on the loss), and Carlini et al. 2022,
arXiv:2112.03570 (LiRA: a likelihood ratio by shadow models): networks are trained by
federated averaging, each on a random half of some MNIST digits, and each is attacked
with all the others as shadow models. So is what a server sees of single updates, and
what it sees of their sum. Defences stand beside.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import attack, compress, models, privacy, secure
from jaxfl.data import client_rows, from_arrays, iid, mnist, subset


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated averaging of a network with one hidden layer, until it overfits."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    examples: int
    """E, candidates; each model is trained on half of them."""
    clients: int
    """N, among whom the candidates are dealt out."""
    models: int
    """S, each attacked with the S - 1 others."""
    rounds: int
    """In each a client passes once over its digits."""
    every: int
    """Rounds between those whose model is attacked."""
    hidden: int
    """Units of the hidden layer."""
    cases: tuple[str, ...]
    """What is attacked beside the network that overfits, and DP-SGD."""
    noise_multipliers: tuple[float, ...]
    """z of DP-SGD at the clients."""
    updates_after: tuple[int, ...]
    """Rounds before the one whose updates are attacked."""
    targets: int
    """Models whose updates are attacked."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    learning_rate: float = 0.2
    """Of the clients."""
    batch_size: int = 10
    """Examples a step."""
    weight_decay: float = 0.02
    """Of the network that is regularised."""
    clip_norm: float = 0.3
    """Of the updates, where they are clipped."""
    fraction: float = 0.01
    """Of each update's coordinates that are sent, where they are compressed."""
    delta: float = 1e-4
    """The probability with which epsilon need not hold."""


PRESETS = {
    "ci": Settings(
        "ci",
        examples=200,
        clients=4,
        models=8,
        rounds=6,
        every=3,
        hidden=16,
        cases=("weight decay",),
        noise_multipliers=(1.0,),
        updates_after=(0,),
        targets=1,
    ),
    "full": Settings(
        "full",
        examples=2000,
        clients=10,
        models=16,
        rounds=24,
        every=4,
        hidden=100,
        cases=("weight decay", "clipped updates", "sparse updates", "secure sum"),
        noise_multipliers=(1.0, 4.0),
        updates_after=(0, 6, 23),
        targets=4,
    ),
}

FPR = np.geomspace(1e-3, 1, 61)


def plain(config, model, *transforms) -> jaxfl.Algorithm:
    optimizer = optax.chain(*transforms, optax.sgd(config.learning_rate))
    return jaxfl.fedavg(model.loss, optimizer, batch_size=config.batch_size)


def private(config, model, z) -> tuple[jaxfl.Algorithm, float]:
    """DP-SGD at each client, of whose examples those not in the model are blank: that
    one is or is not is what its epsilon, returned beside it, is about."""

    def loss(params, batch, key):
        return jnp.where(batch["in"], model.loss(params, batch, key), 0)

    examples = config.examples // config.clients
    work = {"batch_size": examples // 4, "steps": 2, "poisson": True}
    private_loss = privacy.dp_sgd(
        loss,
        clip_norm=1.0,
        noise_multiplier=z,
        denominator=work["batch_size"] / 2,
        microbatch_size=work["batch_size"],
    )
    algorithm = jaxfl.fedavg(private_loss, optax.sgd(config.learning_rate), **work)
    budget = {"rounds": config.rounds, "delta": config.delta}
    return algorithm, privacy.example_epsilon(z, examples=examples, **budget, **work)


def with_examples(data, mask):
    return subset(data, mask)


def with_blanks(data, mask):
    return dataclasses.replace(data, examples=data.examples | {"in": mask})


def attacked(config, data, model, test, masks, algorithm, channel, of):
    """What S models, of every few rounds, give of all candidates.

    Returns:
      `phi` `[S, T, E]`; `unseen` the same of test digits, in no model; `accuracy`.
    """
    federation = jaxfl.federate(algorithm, channel, chunk_size=1)

    def train(key, mask):
        own = of(data, mask)
        return jaxfl.scan_rounds(
            *(federation, federation.init(model.init(key), own), own),
            rounds=config.rounds,
            key=key,
            evaluate=lambda state: {"params": state.params},
            every=config.every,
        )[1][1]["params"]

    def observe(params):
        def of_round(params):
            logits = model.apply(params, test["x"])
            seen = model.apply(params, data.examples["x"])
            return {
                "phi": attack.confidence(seen, data.examples["y"]),
                "unseen": attack.confidence(logits, test["y"]),
                "accuracy": jnp.mean(logits.argmax(-1) == test["y"]),
            }

        return jax.lax.map(of_round, params)

    at_once = 1 if jax.default_backend() == "cpu" else None
    run = jax.jit(
        lambda masks: attack.shadow_scores(
            train, observe, jax.random.key(1), masks, at_once=at_once
        )
    )
    return jax.device_get(run(masks))


def measures(score, member) -> dict[str, np.ndarray]:
    """Of scores `[S, ..., E]`, the mean over S models."""
    member = np.broadcast_to(
        np.expand_dims(member, tuple(range(1, score.ndim - 1))), score.shape
    )
    roc = attack.tpr_at_fpr(score, member, [0.001, 0.01, *FPR]).mean(0)
    area = attack.auc(score, member).mean(0)
    return {"auc": area, "0.1%": roc[..., 0], "1%": roc[..., 1], "roc": roc[..., 2:]}


@functools.partial(jax.jit, static_argnames="online")
def lira(phi, masks, online=True):
    """With one variance for all candidates where models are few, as in the paper."""
    few = len(masks) < 64
    return attack.lira_each(phi, masks, online=online, shared_variance=few)


def attacks(phi, masks) -> dict[str, dict[str, np.ndarray]]:
    """A threshold on the loss orders candidates as their confidence does."""
    return {
        "threshold": measures(phi, masks),
        "offline": measures(lira(phi, masks, online=False), masks),
        "online": measures(lira(phi, masks), masks),
    }


def of_updates(config, data, model, masks, at) -> dict[str, dict]:
    """The cosine of candidates' gradients with a client's update, and with the mean.

    Args:
      at: rounds before the one whose messages are seen.
    """
    algorithm = plain(config, model)
    federation = jaxfl.federate(algorithm, jaxfl.mean(), chunk_size=1)
    tapped = jaxfl.federate(algorithm, jaxfl.chain(jaxfl.tap("sent"), jaxfl.mean()))
    rows = jnp.asarray(np.stack(client_rows(data)))

    def of_target(s):
        own, key = subset(data, masks[s]), jax.random.fold_in(jax.random.key(2), s)
        state = federation.init(model.init(key), own)
        if at:
            state = jaxfl.scan_rounds(federation, state, own, rounds=at, key=key)[0]
        cohort = jaxfl.sample_cohort(key, own)
        _, info = tapped.round(key, tapped.init(state.params, own), cohort)
        sent = info.reports[0]["sent"]
        everybody = jax.tree.map(lambda x: jnp.mean(x, 0), sent)

        def of_client(client):
            candidates = jax.tree.map(lambda x: x[rows[client]], data.examples)
            own = jax.tree.map(lambda x: x[client], sent)
            return [
                attack.alignment(model.loss, state.params, candidates, update, key)
                for update in (own, everybody)
            ]

        return *jax.lax.map(of_client, jnp.arange(len(rows))), masks[s][rows]

    own, everybody, member = jax.device_get(
        jax.jit(lambda s: jax.lax.map(of_target, s))(jnp.arange(config.targets))
    )

    def of_all(score):
        flat = score.reshape(-1, score.shape[-1]), member.reshape(-1, score.shape[-1])
        return measures(*flat)

    return {"single": of_all(own), "sum": of_all(everybody)}


def draw(config, results, epsilons, rounds):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    roc = {name: row["online"]["roc"][-1] for name, row in results.items()}
    curves = {"overfitted": common.RED, "weight decay": common.ORANGE}
    shades = (common.BLUE, common.SKY)
    for (name, epsilon), colour in zip(epsilons.items(), shades, strict=False):
        curves[name] = colour
        bound = attack.private_tpr(FPR, epsilon, config.delta)
        if bound.min() < 0.99:  # else it says nothing
            label = f"bound for epsilon {epsilon:.2g}"
            left.plot(FPR, bound, color=colour, ls="--", lw=1, label=label)
    for name, colour in curves.items():
        left.plot(FPR, roc[name], color=colour, label=f"LiRA, {name}")
    threshold = results["overfitted"]["threshold"]["roc"][-1]
    left.plot(FPR, threshold, color=common.PINK, label="threshold, overfitted")
    left.plot(FPR, FPR, color=common.BLACK, ls=":", lw=1, label="guessing")
    left.set(
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        xscale="log",
        yscale="log",
        xlim=(1e-3, 1),
        ylim=(5e-4, 1.1),
    )
    left.legend(frameon=False, fontsize=7.5, loc="lower right")

    row = results["overfitted"]
    for name, colour, label in (
        ("threshold", common.PINK, "threshold on the loss"),
        ("offline", common.GREEN, "LiRA, offline"),
        ("online", common.RED, "LiRA, online"),
    ):
        area = row[name]["auc"]
        right.plot(rounds, area, color=colour, marker="o", ms=3, label=label)
    area = results["in no model"]["online"]["auc"]
    style = {"color": common.BLACK, "ls": ":", "marker": "s", "ms": 3}
    right.plot(rounds, area, **style, label="LiRA, digits in no model")
    right.set(xlabel="round", ylabel="AUC", xticks=rounds)
    right.legend(frameon=False, fontsize=7.5)
    common.tidy(left, right)
    figure.suptitle(
        f"MNIST, {config.examples // 2} of {config.examples} digits, "
        f"{config.clients} clients; {config.models} models, each attacked by the others"
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = jax.tree.map(jnp.asarray, mnist(config.data))
    x, y = (train[k][: config.examples] for k in ("x", "y"))
    test = jax.tree.map(lambda v: v[: config.examples], test)
    ids = iid(np.asarray(y), num_clients=config.clients, seed=0)
    data = jax.tree.map(jnp.asarray, from_arrays(x, y, ids, config.clients))
    model = models.from_linen(models.mlp((config.hidden,)), x[:1])
    masks = attack.random_halves(jax.random.key(0), config.models, config.examples)
    rounds = config.every * np.arange(1, config.rounds // config.every + 1)

    overfitted, mean = plain(config, model), jaxfl.mean()
    decay = plain(config, model, optax.add_decayed_weights(config.weight_decay))
    clipped = jaxfl.chain(jaxfl.clip(config.clip_norm), mean)
    sparse = jaxfl.chain(compress.top_k(config.fraction), mean)
    masked = jaxfl.chain(
        jaxfl.mean(denominator=config.clients),
        *(secure.fixed_point(8.0, 2.0**20), secure.secure_sum()),
    )
    known = {
        "overfitted": (overfitted, mean),
        "weight decay": (decay, mean),
        "clipped updates": (overfitted, clipped),
        "sparse updates": (overfitted, sparse),
        "secure sum": (overfitted, masked),
    }
    common.check_known((config.cases, known))
    cases = {
        name: (*known[name], with_examples) for name in ("overfitted", *config.cases)
    }
    epsilons = {}
    for z in config.noise_multipliers:
        algorithm, epsilon = private(config, model, z)
        name = f"DP-SGD, epsilon {epsilon:.2g}"
        epsilons[name], cases[name] = epsilon, (algorithm, mean, with_blanks)

    results, accuracy = {}, {}
    for name, case in cases.items():
        seen = attacked(config, data, model, test, masks, *case)
        results[name] = attacks(seen["phi"], masks)
        accuracy[name] = seen["accuracy"].mean(0)
        if name == "overfitted":
            # Members by another draw: `masks` are what these models were trained by.
            count = seen["unseen"].shape[-1]
            called = attack.random_halves(jax.random.key(3), config.models, count)
            results["in no model"] = attacks(seen["unseen"], called)
            by_round = np.asarray(lira(seen["phi"], masks))
            every_round = measures(by_round.cumsum(1), masks)
        print(f"{name}: {accuracy[name][-1]:.3f}, {results[name]['online']['auc'][-1]}")
    updates = {
        at: of_updates(config, data, model, masks, at) for at in config.updates_after
    }

    def last(by_measure):
        return {k: v[..., -1] for k, v in by_measure.items() if k != "roc"}

    folder = common.results_folder("membership")
    summary = {
        "final model": {
            name: {"accuracy": accuracy.get(name, accuracy["overfitted"])[-1]}
            | {kind: last(values) for kind, values in row.items()}
            for name, row in results.items()
        },
        "models of all rounds": last(every_round),
        "updates": {
            f"after {at} rounds": {
                kind: {k: v for k, v in values.items() if k != "roc"}
                for kind, values in row.items()
            }
            for at, row in updates.items()
        },
        "epsilon": epsilons,
        "settings": dataclasses.asdict(config),
    }
    common.save_summary(folder, summary)
    kinds = ("threshold", "offline", "online")
    columns = [f"{kind}, {m}" for kind in kinds for m in ("auc", "0.1%", "1%")]
    common.save_history(
        folder,
        ("case", "round", "accuracy", *columns),
        [
            (name, r, accuracy.get(name, accuracy["overfitted"])[t])
            + tuple(row[kind][m][t] for kind in kinds for m in ("auc", "0.1%", "1%"))
            for name, row in results.items()
            for t, r in enumerate(rounds)
        ],
    )
    common.save_figure(folder, draw(config, results, epsilons, rounds), "membership")

    def cells(values):
        return f"{values['auc']:.3f}", f"{values['0.1%']:.2%}", f"{values['1%']:.2%}"

    common.print_table(
        folder,
        f"The last of {config.rounds} rounds: AUC, and TPR at an FPR of 0.1 % and 1 %",
        ("model", "accuracy", "threshold", "", "", "LiRA off", "", "", "on", "", ""),
        [
            (name, f"{row['accuracy']:.1%}")
            + sum((cells(row[kind]) for kind in kinds), ())
            for name, row in summary["final model"].items()
        ],
    )
    seen = [("models of all rounds", *cells(summary["models of all rounds"]))]
    for at, row in summary["updates"].items():
        for kind, values in row.items():
            seen.append((f"{kind} update, {at}", *cells(values)))
    columns = ("what is seen of the overfitted", "AUC", "TPR at 0.1 %", "at 1 %")
    common.print_table(folder, "More than the last model", columns, seen)


if __name__ == "__main__":
    main()
