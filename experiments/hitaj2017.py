"""The GAN attack: a client reconstructs digits that it has never held.

Hitaj, Ateniese and Perez-Cruz 2017, arXiv:1702.07464, on MNIST, as in their section 6:
two clients hold five classes each and train one classifier, which has one class more.
The adversary trains a generator against it and calls its samples by that class. Every
digit is a target in turn. A classifier that is trained apart on all digits rates the
last samples: of the attack, of one that only listens, of a control without the target
anywhere, under DP-SGD at the victim (privacy of records), and with clipped updates and
noise at the server (privacy of a client).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import linen as nn

import jaxfl
from experiments import common
from jaxfl import accounting, attack, models, privacy
from jaxfl.data import from_arrays, mnist

VICTIM, ADVERSARY, FAKE = 0, 1, 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """Federated minibatch gradients with Adam at the server, at whose every step the
    generator makes one too."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    rounds: int
    """Both clients take part in each."""
    examples: int
    """Of each client; as many as four classes have, drawn at random from its own."""
    targets: tuple[int, ...]
    """Classes to reconstruct: the victim has the five (0 to 4, or 5 to 9) it is of."""
    defended: tuple[int, ...]
    """Targets of the runs with privacy."""
    client_noise: tuple[float, ...]
    """Noise multipliers of the sum of clipped updates, at the server."""
    record_noise: tuple[float, ...]
    """Noise multipliers of DP-SGD at the victim."""
    judge_steps: int
    """Minibatches of 64 that the independent classifier is trained on."""
    width: int
    """Channels of the classifier's first layer, and of the generator's last."""
    samples: int = 100
    """Of each generator, that are rated."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    seeds: int = 2
    """Of examples, weights, batches and noise, in the attack; the others have one."""
    batch_size: int = 32
    """Examples of each client a round, and samples."""
    latent: int = 64
    """Dimension of the generator's input."""
    learning_rate: float = 1e-3
    """Of Adam, at the server and in the generator."""
    weight: float = 0.3
    """Of samples against the adversary's own examples."""
    clip_norm: float = 1.0
    """Of updates, and of gradients in DP-SGD."""


PRESETS = {
    "ci": Settings(
        "ci",
        rounds=8,
        examples=400,
        targets=(3, 8),
        defended=(3,),
        client_noise=(0.1,),
        record_noise=(),
        judge_steps=5,
        width=4,
        samples=16,
        seeds=1,
    ),
    "full": Settings(
        "full",
        rounds=240,
        examples=20_000,
        targets=tuple(range(10)),
        defended=(3, 8),
        client_noise=(0.01, 0.1, 1.0),
        record_noise=(1.0,),
        judge_steps=1200,
        width=16,
        data="files",
    ),
}


class Run(NamedTuple):
    """What came of one run.

    Attributes:
      accuracy: of the shared model.
      rated: the part of the last samples that are called the target.
      diversity: the mean distance of two of them, relative to that of real ones.
      distance: of a sample from the nearest real one, relative to that of real ones.
      samples: at eight rounds, `[E, S, 28, 28, 1]`.
    """

    accuracy: float
    rated: float
    diversity: float
    distance: float
    samples: np.ndarray


class Shared(nn.Module):
    """The federated model, and so the discriminator."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.width, 2 * self.width:
            layer = nn.Conv(
                features,
                (5, 5),
                strides=2,
                conv_general_dilated=jaxfl.matmul_conv,
            )
            x = nn.leaky_relu(layer(x), 0.2)
        return nn.Dense(FAKE + 1)(x.reshape(x.shape[0], -1))


def rows_of_two(config, train, target, seed, held=True) -> np.ndarray:
    """The victim's rows, from the half of the classes with the target, and then the
    adversary's, from the other half; `[2 examples]`.

    Args:
      held: whether the victim has the target, or nobody.
    """
    y, rng = train["y"], np.random.default_rng((seed, target))
    same_half = (y < 5) == (target < 5)
    victims, adversarys = (
        rng.choice(np.flatnonzero(own), config.examples, replace=False)
        for own in (same_half & (held | (y != target)), ~same_half)
    )
    assert target not in y[adversarys] and (target in y[victims]) == held
    return np.concatenate([victims, adversarys]).astype(np.int32)


def generator_of(config):
    """`key -> parameters`, and `(parameters, key, count) -> images`."""
    net = attack.dcgan(config.width)

    def init(key):
        return net.init(key, jnp.zeros((2, config.latent)))["params"]

    def generate(params, key, count=config.batch_size) -> Any:
        z = jax.random.normal(key, (count, config.latent))
        return net.apply({"params": params}, z)

    return init, generate


def attacked(config, model, private=None):
    """Two runs at a time, one on each device: `(train, test, values) -> ...`.

    Args:
      private: from the noise multiplier, the victim's loss; None for noise at the
        server.
    """
    init, generate = generator_of(config)
    every = max(config.rounds // 8, 1)

    def algorithm_of(loss, **work):
        return jaxfl.fedavg(
            loss,
            optax.sgd(1.0),  # the payload is the gradient
            optax.adam(config.learning_rate, b1=0.5),
            batch_size=config.batch_size,
            steps=1,
            **work,
        )

    def one_run(shared, value):
        train, test = shared
        size = jnp.full(2, config.examples, jnp.int32)
        data = jaxfl.ClientData(
            *(train, value["rows"], jnp.array([0, config.examples]), size),
            *(config.examples, config.examples),
        )
        honest, at_server = algorithm_of(model.loss), value["z"]
        if private:
            honest = algorithm_of(private(value["z"]), poisson=True)
            at_server = 0.0
        model_key, generator_key, run_key, sample_key = jax.random.split(
            jax.random.fold_in(jax.random.key(value["seed"]), value["target"]), 4
        )
        algorithm = attack.gan(
            *(honest, algorithm_of, model.loss, generate, init(generator_key)),
            optax.adam(config.learning_rate, b1=0.5),
            adversary=ADVERSARY,
            target=value["target"],
            fake=FAKE,
            weight=value["weight"],
        )
        channel = noised(value["clip_norm"], at_server)
        federation = jaxfl.federate(algorithm, channel, chunk_size=1)

        def look(state):
            own = state.clients.algorithm.generator
            own = jax.tree.map(lambda x: x[ADVERSARY], own)
            return {"samples": generate(own, sample_key, config.samples)}

        state, (_, seen) = jaxfl.scan_rounds(
            *(federation, federation.init(model.init(model_key), data), data),
            rounds=config.rounds,
            key=run_key,
            evaluate=look,
            every=every,
        )
        accuracy = jaxfl.on_server(model.metrics, test)(state)["accuracy"]
        return (), (accuracy, seen["samples"])

    def pair(train, test, values):
        mesh = jaxfl.client_mesh(jax.devices()[: len(values["z"])])
        return jaxfl.map_clients(
            one_run, (train, test), values, chunk_size=1, mesh=mesh
        )[1]

    return jax.jit(pair)


def noised(clip_norm, z):
    """Client-level differential privacy, of both together."""
    return jaxfl.chain(
        jaxfl.clip(clip_norm), jaxfl.mean(denominator=2), privacy.gaussian(z)
    )


def epsilon(config, arm, z) -> float:
    """Of one example of the victim's, or of all of a client's, at delta = 1e-5."""
    if z == 0:
        return np.inf
    if arm == "clients private":
        channel = noised(config.clip_norm, z)
        return accounting.epsilon(
            channel,
            population=2,
            cohort=2,
            rounds=config.rounds,
            delta=1e-5,
            accountant=accounting.RdpAccountant,  # tighter ones need memory
        )
    return privacy.example_epsilon(
        z,
        examples=config.examples,
        rounds=config.rounds,
        delta=1e-5,
        batch_size=config.batch_size,
        steps=1,
        poisson=True,
    )


def judge_of(config, train, test):
    """An independent classifier, `images -> classes`, and its accuracy."""
    model = models.from_linen(models.cnn(), train["x"][:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, config.judge_steps))
    algorithm = jaxfl.fedavg(
        model.loss, optimizer, batch_size=64, steps=config.judge_steps
    )
    everything = np.zeros(len(train["y"]), int)
    state, history = jaxfl.simulate(
        jaxfl.federate(algorithm, jaxfl.mean(), chunk_size=1),
        model.init(jax.random.key(0)),
        from_arrays(train["x"], train["y"], everything),
        rounds=1,
        key=jax.random.key(0),
        evaluate=jaxfl.on_server(model.metrics, test),
        progress=False,
    )
    classes = jax.jit(lambda x: jnp.argmax(model.apply(state.params, x), -1))
    return classes, history["accuracy"][-1].item()


def spread(images) -> float:
    """The mean distance of two of the images."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    distance = np.linalg.norm(x[:, None] - x, axis=-1)
    return distance.sum() / (len(x) * (len(x) - 1))


def nearest(images, real) -> float:
    """The mean distance of an image to the real one that is nearest to it."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (images, real))
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0).min(1)).mean()


def draw(config, real, runs, rows):
    """Samples of every target by round, and how they were rated.

    Args:
      real: `{target: images}`.
      runs: `{(arm, z, target, seed): Run}`.
      rows: `{label: (arm, z, which of E)}` of the picture.
    """
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 5), layout="constrained", width_ratios=(10, 5, 3)
    )
    blank, each = np.zeros((28, 28)), 2
    picture = [np.hstack([i[..., 0] for t in config.targets for i in real[t][:each]])]
    for arm, z, place in rows.values():
        row = []
        for t in config.targets:
            run = runs.get((arm, z, t, 0))
            row += (
                [blank] * each if run is None else [*run.samples[place, :each, ..., 0]]
            )
        picture.append(np.hstack(row))
    left.imshow(np.vstack(picture), cmap="gray_r", vmin=0, vmax=1)
    for i in range(1, len(config.targets)):
        left.axvline(28 * each * i - 0.5, color=common.BLACK, lw=0.5)
    left.axhline(27.5, color=common.BLACK, lw=0.5)
    left.set_xticks(28 * each * (np.arange(len(config.targets)) + 0.5), config.targets)
    left.set_yticks(28 * (np.arange(len(picture)) + 0.5), ["real", *rows])
    left.tick_params(length=0)
    left.set(xlabel="target, which the adversary has never held")
    left.spines[:].set_visible(False)

    arms = list(dict.fromkeys((arm, z) for arm, z, *_ in runs))
    for i, name in enumerate(arms):
        some = [run for key, run in runs.items() if key[:2] == name]
        height = i + (np.linspace(-0.2, 0.2, len(some)) if len(some) > 1 else 0)
        for axes, values, colour, marker, label in (
            (
                middle,
                [100 * r.accuracy for r in some],
                common.ORANGE,
                "s",
                "test accuracy",
            ),
            (
                middle,
                [100 * r.rated for r in some],
                common.BLUE,
                "o",
                "called the target",
            ),
            (right, [r.distance for r in some], common.BLUE, "o", None),
        ):
            axes.scatter(
                *(values, height, 18),
                color=colour,
                marker=marker,
                alpha=0.6,
                label=None if i else label,
            )
    labels = [f"{a}, z = {z:g}" if "private" in a else a for a, z in arms]
    middle.set_yticks(range(len(arms)), labels)
    right.set_yticks(range(len(arms)), [])
    for place in 20, 80:
        middle.axvline(place, color=common.BLACK, ls=":", lw=1)
    right.axvline(1, color=common.BLACK, ls=":", lw=1)
    middle.set(xlabel="%, a point for each target and seed", xlim=(-3, 103))
    right.set(xlabel="distance from real ones")
    for axes in middle, right:
        axes.set_ylim(len(arms) - 0.5, -0.5)
    common.tidy(middle, right)
    figure.legend(
        *middle.get_legend_handles_labels(),
        loc="outside upper right",
        ncol=2,
        frameon=False,
    )
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    jaxfl.cores_as_devices()
    train, test = mnist(config.data)
    on_device, device_test = jax.tree.map(jnp.asarray, (train, test))
    judge, judge_accuracy = judge_of(config, train, device_test)
    model = models.from_linen(
        Shared(config.width), train["x"][:1], preprocess=models.standardize(0.5, 0.5)
    )

    def dp_sgd(z):
        return privacy.dp_sgd(
            model.loss,
            clip_norm=config.clip_norm,
            noise_multiplier=z,
            denominator=config.batch_size,
            microbatch_size=2 * config.batch_size,
        )

    plain, at_victim = attacked(config, model), attacked(config, model, dp_sgd)
    once, unclipped = range(1), 1e9
    # arm: its program, clip norm, noise multipliers, targets and seeds
    arms = {
        "attack": (plain, unclipped, [0.0], config.targets, range(config.seeds)),
        "only listens": (plain, unclipped, [0.0], config.defended, once),
        "nobody has it": (plain, unclipped, [0.0], config.targets, once),
        "records private": (
            *(at_victim, unclipped, config.record_noise, config.defended, once),
        ),
        "clients private": (
            *(plain, config.clip_norm, config.client_noise, config.defended, once),
        ),
    }
    todo = [
        [(arm, z, t, seed) for z in noises for t in targets for seed in seeds]
        for arm, (_, _, noises, targets, seeds) in arms.items()
    ]
    at_once = jax.device_count()
    todo = [
        some[i : i + at_once] for some in todo for i in range(0, len(some), at_once)
    ]
    runs, rows = {}, []
    real = {t: test["x"][test["y"] == t] / 255 for t in config.targets}
    for some in rich.progress.track(todo, "attacks"):
        program, clip_norm, *_ = arms[some[0][0]]
        values = [
            {
                "rows": rows_of_two(config, train, t, seed, arm != "nobody has it"),
                "weight": 0.0 if arm == "only listens" else config.weight,
                "clip_norm": clip_norm,
                "z": z,
                "target": t,
                "seed": seed,
            }
            for arm, z, t, seed in (some * at_once)[:at_once]  # the same program
        ]
        values = jax.tree.map(lambda *x: jnp.stack(x), *values)
        results = jax.device_get(program(on_device, device_test, values))
        for (arm, z, target, seed), accuracy, samples in zip(
            some, *results, strict=False
        ):
            rated = [np.mean(judge(x) == target) for x in samples]
            some_real, others = np.split(real[target], [config.samples])
            runs[arm, z, target, seed] = run = Run(
                accuracy,
                rated[-1],
                diversity=spread(samples[-1]) / spread(some_real),
                distance=nearest(samples[-1], others) / nearest(some_real, others),
                samples=samples,
            )
            rows.append((arm, z, target, seed, *run[:4], *rated))

    summary, table = {}, []
    for name in dict.fromkeys(key[:2] for key in runs):
        some = [run[:4] for key, run in runs.items() if key[:2] == name]
        accuracy, rated, diversity, distance = np.array(some).T
        spent = epsilon(config, *name)
        summary[f"{name[0]}, z = {name[1]:g}"] = {
            "called the target": rated.mean(),
            "least": rated.min(),
            "most": rated.max(),
            "diversity": diversity.mean(),
            "distance": distance.mean(),
            "accuracy": accuracy.mean(),
            "runs": len(some),
            "epsilon": str(spent),  # JSON has no infinity
        }
        least, mean, most = 100 * rated.min(), 100 * rated.mean(), 100 * rated.max()
        table.append(
            (
                *(*name, f"{spent:.3g}", f"{mean:.0f} ({least:.0f} to {most:.0f})"),
                *(f"{distance.mean():.2f}", f"{diversity.mean():.2f}"),
                *(f"{100 * accuracy.mean():.1f}", len(some)),
            )
        )

    folder = common.results_folder("hitaj2017")
    looks = len(rows[0]) - 8
    common.save_summary(
        folder,
        {
            "judge": judge_accuracy,
            "arms": summary,
            "settings": dataclasses.asdict(config),
        },
    )
    every = max(config.rounds // 8, 1)
    columns = "arm", "z", "target", "seed", *Run._fields[:4]
    at_rounds = [f"called the target, round {every * (i + 1)}" for i in range(looks)]
    common.save_history(folder, (*columns, *at_rounds), rows)
    shown = sorted({looks // 8, looks // 4, looks // 2, looks} - {0})
    picture = {f"round {every * i}": ("attack", 0.0, i - 1) for i in shown}
    picture["nobody has it"] = ("nobody has it", 0.0, -1)
    picture["only listens"] = ("only listens", 0.0, -1)
    for what, arm, noises in (
        ("records", "records private", config.record_noise),
        ("clients", "clients private", config.client_noise),
    ):
        for z in noises:
            picture[f"{what}, z = {z:g}"] = arm, z, -1
    common.save_figure(folder, draw(config, real, runs, picture), "hitaj2017")
    common.print_table(
        folder,
        f"MNIST ({config.data}): last samples that a classifier of "
        f"{100 * judge_accuracy:.1f} % test accuracy calls the target, in %",
        ("run", "z", "epsilon", "called", "distance", "diversity", "accuracy", "runs"),
        table,
    )


if __name__ == "__main__":
    main()
