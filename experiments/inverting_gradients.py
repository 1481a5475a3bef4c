"""What a server can see of its clients' pictures in the updates that they send.

Zhu, Liu and Han 2019, arXiv:1906.08935 (DLG); Zhao, Mopuri and Bilen 2020,
arXiv:2001.02610 (iDLG); Geiping et al. 2020, arXiv:2003.14053: the first round of
federated learning of the LeNet of DLG on MNIST. What the server sees of each client is
what a `tap` reports that stands where it does, behind the client's defence. All victims
and all starts are searched for as one program, and all of them are reported.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxfl
from experiments import common
from jaxfl import attack, compress, models, privacy, secure
from jaxfl.data import from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Gradient inversion, by attack and by defence."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    victims: int
    """Pictures that are looked for; by B to a client where its batch has B."""
    dlg_starts: int
    """Searches for each client by L-BFGS, of which the best counts; 0 for no DLG."""
    starts: int
    """Searches for each client by the signed Adam, likewise."""
    adam_steps: int
    """Of each of the latter."""
    batches: tuple[int, ...]
    """Pictures of a client, other than one."""
    noise_multipliers: tuple[float, ...]
    """z: every client adds normal noise of deviation z C to its clipped gradient."""
    kept: tuple[float, ...]
    """Fractions of the coordinates that are sent where only the largest are."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    clip_norm: float = 1.0
    """C; a gradient of the first round is about 25 long."""
    group: int = 10
    """Clients of a secure sum, of one picture each."""
    local_steps: int = 5
    """Of federated averaging, each on all pictures of the client; 0 leaves it out."""
    dlg_steps: int = 200
    """Of L-BFGS."""
    local_rate: float = 0.01
    """Their learning rate."""
    adam_rate: float = 0.1
    """Of the signed Adam."""
    variation: float = 1e-3
    """The weight of total variation beside the cosine distance."""
    seed: int = 0
    """Of the model, the starts and the noise."""


PRESETS = {
    "ci": Settings(
        "ci",
        victims=4,
        dlg_starts=0,
        starts=1,
        adam_steps=120,
        batches=(),
        noise_multipliers=(1e-4, 1.0),
        kept=(),
        group=2,
        local_steps=0,
    ),
    "full": Settings(
        "full",
        victims=64,
        dlg_starts=2,
        starts=1,
        adam_steps=300,
        batches=(4, 16),
        noise_multipliers=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1),
        kept=(0.1, 0.01),
    ),
}
CLASSES = 10


class LeNet(nn.Module):
    """The network of DLG: three convolutions 5x5 of 12 channels, sigmoids, one layer.

    All weights are uniform in ±0.5, and nothing in it has a kink.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -0.5, 0.5)

        initial: Any = {"kernel_init": uniform, "bias_init": uniform}
        for stride in 2, 2, 1:
            convolution = nn.Conv(
                *(12, (5, 5), stride, 2),
                conv_general_dilated=jaxfl.matmul_conv,
                **initial,
            )
            x = nn.sigmoid(convolution(x))
        return nn.Dense(CLASSES, **initial)(x.reshape(x.shape[0], -1))


class Found(NamedTuple):
    """What an attack made of clients' pictures.

    Attributes:
      original: `[V, B, H, W, 1]`.
      image: `[V, B, H, W, 1]`, matched to the originals.
      psnr: in dB, `[V, B]`.
      ssim: `[V, B]`.
      labels: the fraction of a client's labels that were found, `[V]`.
    """

    original: np.ndarray
    image: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    labels: np.ndarray


class Setting(NamedTuple):
    """What the server and its clients have in common: the model and the algorithm."""

    config: Settings
    model: models.Model
    params: Any
    algorithm: jaxfl.Algorithm
    steps: int  # of a client
    rate: float  # of each step


# ---------------------------------------------------------------- what the server sees


def a_round(setting: Setting, channel, x, y, groups):
    """A round of the federation with each group of clients `[G, K]` as the cohort."""
    data = from_arrays(
        x.reshape(-1, *x.shape[2:]),
        jax.nn.one_hot(y.ravel(), CLASSES),
        np.repeat(np.arange(len(x)), x.shape[1]),
    )
    data = jax.tree.map(jnp.asarray, data)
    federation = jaxfl.federate(setting.algorithm, channel)
    key = jax.random.key(setting.config.seed)

    @jax.jit
    @jax.vmap
    def one(clients):
        everyone = jnp.ones(clients.shape)
        cohort = jaxfl.Cohort(clients, data[clients], everyone, everyone > 0)
        return federation.round(key, federation.init(setting.params, data), cohort)

    return one(groups)


def of_each(setting: Setting, defence: jaxfl.Channel, x, y):
    """Every client's message as it comes to the server, `[V, ...]`."""
    channel = jaxfl.chain(defence, jaxfl.tap("seen"), jaxfl.mean())
    _, info = a_round(setting, channel, x, y, jnp.arange(len(x))[None])
    return jax.tree.map(lambda m: m[0], info.reports[-2]["seen"])


def of_groups(setting: Setting, x, y):
    """The mean of every group behind secure aggregation, and the masked messages."""
    scale = 2.0**20
    channel = jaxfl.chain(
        jaxfl.mean(),
        secure.fixed_point(limit=32.0, scale=scale),
        secure.secure_sum(),
        jaxfl.tap("wire"),
    )
    clients = jnp.arange(len(x)).reshape(-1, setting.config.group)
    state, info = a_round(setting, channel, x, y, clients)
    mean = jax.tree.map(lambda old, new: old - new, setting.params, state.params)
    wire = info.reports[-1]["wire"].values
    as_number = jax.tree.map(
        lambda m: m.reshape(-1, *m.shape[2:]).astype(jnp.int32) / scale, wire
    )
    return mean, as_number


# --------------------------------------------------------------------- what it does


def guess_labels(setting: Setting, seen, batch: int):
    """The labels of every client, in order, `[V, B]`."""
    bias = seen["Dense_0"]["bias"] / (setting.rate * setting.steps)
    if batch == 1:
        return jax.vmap(attack.infer_label)(bias)[:, None]
    shape = (100, 28, 28, 1)
    anything = jax.random.uniform(jax.random.key(setting.config.seed), shape)
    predicted = jax.nn.softmax(setting.model.apply(setting.params, anything)).mean(0)

    def one(bias):
        counts = attack.label_counts(bias, batch, predicted)
        return jnp.repeat(jnp.arange(CLASSES), counts, total_repeat_length=batch)

    return jax.vmap(one)(bias)


def dlg(setting: Setting, seen, labels, key, shape):
    """One search for images and labels, with L-BFGS; labels are not heeded."""
    again, (x_key, y_key) = setting_replay(setting), jax.random.split(key)
    start = {
        "x": jax.random.normal(x_key, shape),
        "y": jax.random.normal(y_key, (shape[0], CLASSES)),
    }

    def sent(c):
        return again({"x": c["x"], "y": jax.nn.softmax(c["y"])})

    found = attack.invert(
        *(seen, sent, start, optax.lbfgs()), steps=setting.config.dlg_steps
    )
    return found._replace(candidate=(found.candidate["x"], found.candidate["y"]))


def cosine(setting: Setting, seen, labels, key, shape, *, sparse=False):
    """One search along directions, of smooth images in [0, 1], with the signed Adam.

    Args:
      sparse: to compare with what was sent only, where the rest was left out.
    """
    again, config = setting_replay(setting), setting.config
    y = jax.nn.one_hot(labels, CLASSES)

    def sent(x):
        payload = again({"x": x, "y": y})
        if not sparse:
            return payload
        return jax.tree.map(lambda p, s: jnp.where(s == 0, 0, p), payload, seen)

    found = attack.invert(
        *(seen, sent, jax.random.normal(key, shape)),
        attack.signed_adam(config.adam_rate, config.adam_steps),
        steps=config.adam_steps,
        distance=attack.cosine_distance,
        prior=lambda x: config.variation * attack.total_variation(x),
        project=lambda x: jnp.clip(x, 0, 1),
    )
    return found._replace(candidate=(found.candidate, y))


def setting_replay(setting: Setting):
    return attack.replay(setting.algorithm, setting.params)


def searcher(setting: Setting, method: Callable, batch: int, starts: int):
    """`(seen, x, y) -> Found`: all starts and victims at once, compiled once."""

    @jax.jit
    def search(seen, labels):
        keys = jax.random.key(setting.config.seed + 1)
        keys = jax.random.split(keys, starts)

        def one_victim(seen, labels):
            shape = (batch, 28, 28, 1)
            one_start = functools.partial(method, setting, seen, labels, shape=shape)
            return attack.best(jax.vmap(lambda key: one_start(key=key))(keys))

        image, y = jax.vmap(one_victim)(seen, labels).candidate
        return jnp.clip(image, 0, 1), jnp.argmax(y, -1)

    def run(seen, x, y):
        image, label = jax.device_get(search(seen, guess_labels(setting, seen, batch)))
        order = np.stack([attack.match(*pair) for pair in zip(image, x, strict=True)])
        image = np.take_along_axis(image, order[..., None, None, None], 1)

        def counts(labels):
            return np.stack([np.bincount(row, minlength=CLASSES) for row in labels])

        right = np.minimum(counts(label), counts(y)).sum(1) / batch
        psnr, ssim = (
            np.asarray(of(jnp.asarray(image), x)) for of in (attack.psnr, attack.ssim)
        )
        return Found(np.asarray(x), image, psnr, ssim, right)

    return run


# ------------------------------------------------------------------------ what is shown


def summary_of(found: Found) -> dict[str, Any]:
    def quantiles(values):
        return dict(
            zip(
                ("worst", "q10", "median", "q90", "best"),
                np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).tolist(),
                strict=True,
            )
        )

    return {
        "psnr": quantiles(found.psnr),
        "ssim": quantiles(found.ssim),
        "labels": found.labels.mean(),
        "above 20 dB": np.mean(found.psnr > 20),
    }


def draw(config, results: dict[str, Found], noise: dict[float, Found], shown):
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 1.05 * len(shown) + 0.9), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = halves
    grid = left.subplots(len(shown), 6, squeeze=False)
    for row, name in zip(grid, shown, strict=True):
        found = results[name]
        flat = found.psnr.ravel()
        order = np.argsort(flat)
        for i, place in enumerate((-1, len(order) // 2, 0)):
            at = order[place]
            for axes, pictures in zip(
                row[2 * i : 2 * i + 2], (found.original, found.image), strict=True
            ):
                picture = pictures.reshape(-1, 28, 28)[at]
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
            row[2 * i + 1].set_xlabel(f"{flat[at]:.0f} dB", fontsize=8, labelpad=1)
        row[0].set_ylabel(
            name, fontsize=8, rotation=0, ha="right", va="center", labelpad=6
        )
    for i, which in enumerate(("best found", "median", "worst")):
        grid[0, 2 * i].set_title("original", fontsize=8)
        grid[0, 2 * i + 1].set_title(which, fontsize=8)

    axes = right.subplots()
    z = np.array(list(noise))
    values = np.stack([found.psnr.ravel() for found in noise.values()])
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
    axes.fill_between(
        z, low, high, color=common.BLUE, alpha=0.2, lw=0, label="10 % to 90 %"
    )
    axes.plot(z, middle, color=common.BLUE, marker="o", label="median")
    plain = np.median(results["clipped"].psnr)
    axes.axhline(plain, color=common.BLACK, ls="--", label="clipped, no noise")
    axes.axhline(20, color=common.RED, ls=":", label="20 dB")
    axes.set(
        xscale="log",
        xlabel="noise multiplier z, of each client",
        ylabel="PSNR of the reconstruction (dB)",
        ylim=(0, None),
    )
    axes.legend(frameon=False, fontsize=8)
    common.tidy(axes)
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    digits, _ = mnist(config.data)
    groups = -(-config.victims // config.group)
    first = slice(groups * config.group)  # at least the victims
    pictures = jnp.asarray(digits["x"][first]) / 255.0
    labels = digits["y"][first]

    model = models.from_linen(LeNet(), pictures[:1], loss=optax.softmax_cross_entropy)
    params = model.init(jax.random.key(config.seed))
    sgd = jaxfl.fedavg(model.loss, optax.sgd(1.0), batch_size=None)
    plain = Setting(config, model, params, sgd, steps=1, rate=1.0)
    averaging = jaxfl.fedavg(
        *(model.loss, optax.sgd(config.local_rate)),
        batch_size=None,
        epochs=max(config.local_steps, 1),
    )
    local = plain._replace(
        algorithm=averaging, steps=config.local_steps, rate=config.local_rate
    )

    def clients(batch):
        n = config.victims // batch
        return (
            pictures[: n * batch].reshape(n, batch, *pictures.shape[1:]),
            labels[: n * batch].reshape(n, batch),
        )

    results: dict[str, Found] = {}

    def attacked(name, search, seen, x, y):
        results[name] = search(seen, x, y)
        row = summary_of(results[name])
        print(f"{name:34} {row['psnr']['median']:5.1f} dB", flush=True)

    def by_cosine(setting, batch):
        return searcher(setting, cosine, batch, config.starts)

    one, nothing = clients(1), jaxfl.identity()
    seen, search = of_each(plain, nothing, *one), by_cosine(plain, 1)
    if config.dlg_starts:
        attacked("DLG", searcher(plain, dlg, 1, config.dlg_starts), seen, *one)
    attacked("cosine", search, seen, *one)

    def noised(z):
        local_noise = privacy.local_gaussian(z)
        channel = jaxfl.chain(jaxfl.clip(config.clip_norm), local_noise)
        return of_each(plain, channel, *one)

    multipliers = 0.0, *config.noise_multipliers
    stacked = jax.vmap(noised)(jnp.array(multipliers))
    for i, z in enumerate(multipliers):
        seen = jax.tree.map(operator.itemgetter(i), stacked)
        attacked(f"noise {z:g}" if z else "clipped", search, seen, *one)

    sparse = functools.partial(cosine, sparse=True)
    of_some = searcher(plain, sparse, 1, config.starts)
    for fraction in config.kept:
        seen = of_each(plain, compress.top_k(fraction), *one)
        attacked(f"largest {100 * fraction:g} %", of_some, seen, *one)

    for batch in config.batches:
        some = clients(batch)
        seen = of_each(plain, nothing, *some)
        attacked(f"batch of {batch}", by_cosine(plain, batch), seen, *some)
    for batch in (1, *config.batches[:1]) if config.local_steps else ():
        some, name = clients(batch), f"{config.local_steps} local steps"
        name += f", batch of {batch}" if batch > 1 else ""
        seen = of_each(local, nothing, *some)
        attacked(name, by_cosine(local, batch), seen, *some)

    everyone = pictures[:, None], labels[:, None]
    mean, masked = of_groups(plain, *everyone)
    masked = jax.tree.map(lambda m: m[: config.victims], masked)
    attacked("one message, masked", search, masked, *one)
    together = [a.reshape(groups, config.group, *a.shape[2:]) for a in everyone]
    name = f"secure sum of {config.group}"
    attacked(name, by_cosine(plain, config.group), mean, *together)

    noise = {z: results[f"noise {z:g}"] for z in config.noise_multipliers}
    rows = {name: summary_of(found) for name, found in results.items()}
    folder = common.results_folder("inverting_gradients")
    summary = {"attacks": rows, "settings": dataclasses.asdict(config)}
    common.save_summary(folder, summary)
    common.save_history(
        folder,
        ("attack", "picture", "psnr", "ssim"),
        [
            (name, i, *each)
            for name, found in results.items()
            for i, each in enumerate(
                zip(found.psnr.ravel(), found.ssim.ravel(), strict=True)
            )
        ],
    )
    shown = [name for name in results if not name.startswith("noise")]
    common.save_figure(
        folder, draw(config, results, noise, shown), "inverting_gradients"
    )

    def cell(quantiles, digits):
        low, middle, high = (quantiles[q] for q in ("q10", "median", "q90"))
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    common.print_table(
        folder,
        f"MNIST ({config.data}), {config.victims} victims: median (10 to 90 %)",
        ("what the server sees", "PSNR, dB", "SSIM", "above 20 dB", "labels"),
        [
            (
                *(name, cell(row["psnr"], 1), cell(row["ssim"], 2)),
                *(f"{100 * row[of]:.0f} %" for of in ("above 20 dB", "labels")),
            )
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
