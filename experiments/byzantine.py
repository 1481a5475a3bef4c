"""Liars against robust rules: accuracy of every attack against every aggregator.

The MNIST setting of Karimireddy, He, Jaggi 2022, arXiv:2006.09365 (`exp3` of their
code): 20 honest workers and 5 liars, a batch of 32 from each worker in each round,
momentum at the honest workers, whose shares of the digits are dealt at random or sorted
by class; a liar has a share of its own, from all digits. Beside their five attacks
there are stronger ones, under which a plain mean is lost.
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import linen as nn

import jaxfl
from experiments import common
from jaxfl import attack, local, models
from jaxfl.data import from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """One gradient a worker and round, and plain descent at the server."""

    preset: Literal["ci", "full", "cnn"]
    """Where the other settings start from: a small run, the whole grid with a small
    network, or some of it with the paper's."""
    rounds: int
    rules: tuple[str, ...]
    """Aggregators, of `rules`."""
    attacks: tuple[str, ...]
    """Of `ATTACKS`."""
    partitions: tuple[str, ...] = ("IID", "non-IID")
    """How the digits of the honest workers are dealt."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    honest: int = 20
    liars: int = 5
    model: Literal["mlp", "cnn"] = "mlp"
    """One hidden layer, or the paper's network."""
    hidden: int = 16
    """Units of that layer."""
    momentum: float = 0.9
    """beta, of the honest workers."""
    learning_rate: float = 0.01
    """Of the server."""
    batch_size: int = 32
    """Examples of each worker in a round."""
    evaluations: int = 20
    """In a run; accuracies are means over the last quarter of them."""
    seeds: int = 1
    """Of initial weights, batches, and what liars and aggregators draw."""
    chunk_size: int | None = None
    """Workers at once; None for all."""


class Attack(NamedTuple):
    """What liars do: send what they make of their own, craft it together, or train on
    flipped labels; any of them."""

    sender: jaxfl.Channel = jaxfl.identity()
    craft: attack.Craft | None = None
    flips: bool = False


ATTACKS = {
    "none": Attack(),
    "bit flip": Attack(attack.sign_flip()),
    "label flip": Attack(flips=True),
    "mimic": Attack(craft=attack.mimic()),
    "IPM 0.1": Attack(craft=attack.ipm(0.1)),
    "ALIE": Attack(craft=attack.alie()),
    "min-max": Attack(craft=attack.min_max()),
    "IPM 10": Attack(craft=attack.ipm(10.0)),
    "bit flip x 100": Attack(attack.sign_flip(100.0)),
    "label flip x 100": Attack(attack.scale(100.0), flips=True),
    "noise": Attack(attack.noise(100.0)),
    "NaN": Attack(attack.nan()),
}


def rules(config: Settings) -> dict[str, jaxfl.Aggregator]:
    """The paper's settings of their parameters; and one radius that is not."""
    f, radius = config.liars, 10 / (1 - config.momentum)
    plain = {
        "mean": jaxfl.total(),
        "Krum": jaxfl.krum(f),
        "median": jaxfl.median(),
        "trimmed mean": jaxfl.trimmed_mean(f),
        "RFA": jaxfl.geometric_median(iterations=8),
        "CClip": jaxfl.centered_clip(radius, iterations=3),
        "CClip, tau = 10": jaxfl.centered_clip(10.0, iterations=3),
    }
    buckets = {
        f"{name}, s = 2": jaxfl.bucketing(2, plain[name])
        for name in ("Krum", "median", "RFA", "CClip")
    }
    return plain | buckets


# Test accuracies in % of the paper's network, non-IID, momentum 0.9: round 300 of one
# run (seed 0 in outputs/exp3 of epfml/byzantine-robust-noniid-optimizer, the authors').
PUBLISHED = {
    "Krum": (10.1, 1.2, 21.3, 9.8, 11.4),
    "median": (50.7, 60.7, 68.6, 36.6, 66.2),
    "RFA": (78.7, 93.1, 83.3, 40.4, 11.4),
    "CClip": (96.7, 96.5, 97.0, 96.6, 97.0),
    "Krum, s = 2": (47.8, 40.8, 57.6, 58.7, 70.4),
    "median, s = 2": (56.6, 62.3, 64.1, 60.5, 78.5),
    "RFA, s = 2": (94.9, 95.8, 95.8, 94.2, 96.8),
    "CClip, s = 2": (96.6, 96.7, 97.0, 96.7, 97.5),
}
PUBLISHED_ATTACKS = "bit flip", "label flip", "mimic", "IPM 0.1", "ALIE"

_GRID = ("mean", "Krum", "median", "trimmed mean", "RFA", "CClip", "CClip, tau = 10")
_BUCKETS = ("Krum, s = 2", "median, s = 2", "RFA, s = 2", "CClip, s = 2")
PRESETS = {
    "ci": Settings(
        "ci",
        rounds=20,
        rules=("mean", "median"),
        attacks=("none", "IPM 10", "bit flip x 100"),
        evaluations=2,
        learning_rate=0.05,
    ),
    "full": Settings(
        "full",
        rounds=300,
        rules=_GRID + _BUCKETS,
        attacks=tuple(ATTACKS),
        data="files",
    ),
    "cnn": Settings(
        "cnn",
        rounds=150,
        rules=("Krum", "CClip"),
        attacks=("mimic",),
        partitions=("non-IID",),
        data="files",
        model="cnn",
        evaluations=5,
        chunk_size=5,
    ),
}


class CNN(nn.Module):
    """The paper's: two 3 x 3 convolutions, pooling, two dense layers, dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in 32, 64:
            convolution = nn.Conv(
                *(features, (3, 3)),
                padding="VALID",
                conv_general_dilated=jaxfl.matmul_conv,
            )
            x = nn.relu(convolution(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


def workers(config: Settings, train, partition: str) -> jaxfl.ClientData:
    """The honest workers' shares, and as many digits for each liar from among all."""
    rng = np.random.default_rng(0)
    share = len(train["y"]) // config.honest
    order = rng.permutation(len(train["y"]))
    drawn = rng.permutation(len(order))[: config.liars * share]
    if partition == "non-IID":
        order = np.argsort(train["y"], kind="stable")
    rows = np.concatenate([order[: config.honest * share], drawn])
    ids = np.repeat(np.arange(config.honest + config.liars), share)
    return from_arrays(train["x"][rows], train["y"][rows], ids)


def any_sender(senders, which) -> jaxfl.Channel:
    """One of several that remember nothing, by its number."""

    def encode(ctx, message, server_state, client_state):
        each = [lambda s=s: s.encode(ctx, message, (), ()) for s in senders]
        return jax.lax.switch(which, each)

    return jaxfl.Channel(encode=encode)


def any_craft(crafts, which) -> attack.Craft:
    """One of several by its number; where there is none the liars are not to craft."""

    def apply(ctx, rows, honest, liars, states):
        def craft(i):
            if crafts[i] is None:
                return rows[0], states
            lie, new = crafts[i].apply(ctx, rows, honest, liars, states[i])
            return lie, (*states[:i], new, *states[i + 1 :])

        return jax.lax.switch(which, [lambda i=i: craft(i) for i in range(len(crafts))])

    return attack.Craft(
        apply, lambda zeros: tuple(c.init(zeros) if c else () for c in crafts)
    )


def federation_of(config, model, rule: str, which: jax.Array) -> jaxfl.Federation:
    """Under one of the attacks by its number, so that one program does for all."""
    gradient = local.gradient(model.loss)
    honest = np.arange(config.honest)
    liars = config.honest + np.arange(config.liars)
    lies = [ATTACKS[name] for name in config.attacks]

    def one_batch(ctx, params, state, data):
        """Drawn with replacement: nobody's whole share is shuffled for 32 digits."""
        draw_key, loss_key = jax.random.split(ctx.key)
        place = jax.random.randint(draw_key, (config.batch_size,), 0, data.size)
        loss, grads = gradient(params, data.take(place), place >= 0, loss_key)
        return grads, state, {"loss": loss}

    descent = jaxfl.fedavg(
        model.loss, optax.sgd(1.0), optax.sgd(config.learning_rate)
    )._replace(client=one_batch)
    aggregator = rules(config)[rule]
    channel = jaxfl.chain(
        attack.among(honest, jaxfl.at_client(optax.trace(config.momentum))),
        attack.among(liars, any_sender([lie.sender for lie in lies], which)),
        jaxfl.mean() if aggregator.makes_sum else jaxfl.identity(),
    )
    crafted = jnp.array([lie.craft is not None for lie in lies])
    aggregator = attack.collude(
        *(aggregator, liars, any_craft([lie.craft for lie in lies], which)),
        rounds=lambda round: crafted[which],
    )
    return jaxfl.federate(descent, channel, aggregator, chunk_size=config.chunk_size)


def runs_of(config, model, rule: str):
    """`(which, data, test) -> accuracies [seeds, evaluations]`, compiled once."""

    def one(seed, which, data, test):
        federation = federation_of(config, model, rule, which)
        key = jax.random.fold_in(jax.random.key(0), seed)
        _, (_, seen) = jaxfl.scan_rounds(
            *(federation, federation.init(model.init(key), data), data),
            rounds=config.rounds,
            key=key,
            weight=jnp.ones(config.honest + config.liars),
            evaluate=jaxfl.on_server(model.metrics, test),
            every=config.rounds // config.evaluations,
        )
        return seen["accuracy"]

    over_seeds = jax.jit(jax.vmap(one, (0, None, None, None)))
    return lambda *given: over_seeds(jnp.arange(config.seeds), *given)


def draw(config, accuracy):
    """Cells with their numbers; a line where the paper's attacks end."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(Normalize(0, 100), "cividis")
    rows, columns = len(config.rules), len(config.attacks)
    figure, all_axes = plt.subplots(
        len(accuracy),
        1,
        figsize=(1.8 + 0.72 * columns, len(accuracy) * (1.0 + 0.33 * rows)),
        layout="constrained",
        squeeze=False,
    )
    for axes, (partition, grid) in zip(all_axes[:, 0], accuracy.items(), strict=True):
        axes.imshow(100 * grid, cmap=shades.cmap, norm=shades.norm, aspect="auto")
        for i, j in np.ndindex(grid.shape):
            dark = grid[i, j] < 0.55
            axes.text(
                *(j, i, f"{100 * grid[i, j]:.1f}"),
                color="white" if dark else "black",
                ha="center",
                va="center",
                fontsize=8,
            )
        names = [name.replace(" x ", "\nx ") for name in config.attacks]
        axes.set_xticks(range(columns), names, fontsize=8)
        axes.set_yticks(range(rows), config.rules, fontsize=8)
        axes.set_title(partition, fontsize=10, loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1)
        axes.tick_params(which="minor", length=0)
    all_axes[-1, 0].set_xlabel(
        f"attack of {config.liars} of {config.honest + config.liars} workers"
    )
    figure.colorbar(shades, ax=all_axes[:, 0], label="test accuracy (%)", pad=0.01)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    common.check_known(
        (config.rules, rules(config)),
        (config.attacks, ATTACKS),
        (config.partitions, ("IID", "non-IID")),
    )
    train, test = mnist(config.data)
    module = CNN() if config.model == "cnn" else models.mlp((config.hidden,))
    model = models.from_linen(module, train["x"][:1])
    clean = [workers(config, train, p) for p in config.partitions]
    liars = config.honest + np.arange(config.liars)
    flipped = [attack.label_flip(data, liars, 10) for data in clean]
    clean, flipped, test = jax.tree.map(jnp.asarray, (clean, flipped, test))

    shape = len(config.rules), len(config.attacks)
    runs = np.zeros((len(clean), *shape, config.seeds, config.evaluations))
    for i in rich.progress.track(range(shape[0]), "rules"):
        of_attack = runs_of(config, model, config.rules[i])
        for j, p in np.ndindex(shape[1], len(clean)):
            data = (flipped if ATTACKS[config.attacks[j]].flips else clean)[p]
            runs[p, i, j] = of_attack(jnp.int32(j), data, test)
    last = runs[..., -max(config.evaluations // 4, 1) :].mean((-1, -2))
    accuracy = dict(zip(config.partitions, last, strict=True))

    folder = common.results_folder("byzantine")
    summary = {
        partition: {
            rule: dict(zip(config.attacks, row, strict=True))
            for rule, row in zip(config.rules, grid, strict=True)
        }
        for partition, grid in accuracy.items()
    }
    summary["settings"] = dataclasses.asdict(config)
    common.save_summary(folder, summary)
    rounds = config.rounds // config.evaluations * np.arange(1, config.evaluations + 1)
    common.save_history(
        folder,
        ("partition", "rule", "attack", "seed", "round", "accuracy"),
        [
            (
                *(config.partitions[p], config.rules[i], config.attacks[j]),
                *(seed, rounds[e], runs[p, i, j, seed, e]),
            )
            for p, i, j, seed, e in np.ndindex(*runs.shape)
        ],
    )
    common.save_figure(folder, draw(config, accuracy), "byzantine")
    report(folder, config, accuracy)


def report(folder: Path, config: Settings, accuracy: dict[str, np.ndarray]) -> None:
    def theirs(rule, name):
        if rule not in PUBLISHED or name not in PUBLISHED_ATTACKS:
            return ""
        return f" ({PUBLISHED[rule][PUBLISHED_ATTACKS.index(name)]:.1f})"

    for partition, grid in accuracy.items():
        beside = partition == "non-IID" and config.momentum == 0.9
        common.print_table(
            folder,
            f"MNIST ({config.data}), {partition}, {config.model}, beta = "
            f"{config.momentum:g}, round {config.rounds}: test accuracy in %"
            + (" (published: CNN, round 300)" if beside else ""),
            ("rule", *config.attacks),
            [
                (
                    rule,
                    *(
                        f"{100 * value:.1f}{theirs(rule, name) if beside else ''}"
                        for name, value in zip(config.attacks, row, strict=True)
                    ),
                )
                for rule, row in zip(config.rules, grid, strict=True)
            ],
        )


if __name__ == "__main__":
    main()
