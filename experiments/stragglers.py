"""Time to accuracy: what a server does about clients that are slow.

Federated averaging on MNIST whose clients differ in speed by a heavy tail (Pareto). The
server waits for all it has asked; or until a deadline, dropping what is late or taking
what is done by then (Li et al. 2020, arXiv:1812.06127); or asks 130 % and keeps the
first 100 % (Bonawitz et al. 2019, arXiv:1902.01046); or does not wait: FedBuff (Nguyen
et al. 2022, arXiv:2106.06639) steps at every ten messages, FedAsync (Xie et al. 2019,
arXiv:1903.03934) at every one. As many clients train at a time in all. And a federation
in which a third vanishes, some send NaN, and a tenth is ten times slower.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfl
from experiments import common
from jaxfl import faults, models
from jaxfl.data import dirichlet, from_arrays, mnist


@dataclasses.dataclass(frozen=True)
class Settings:
    """Synchronous and asynchronous training on one virtual clock."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    clients: int
    """N; each has one digit more than others (Dirichlet)."""
    concurrency: int
    """Clients that train at a time."""
    rounds: int
    """Of the synchronous policies; the others do as many turns of clients."""
    target: float
    """Test accuracy."""
    data: Literal["embedded", "files", "tfds"] = "embedded"
    """The subset in the package, the original files in $JAXFL_DATA_DIR, or TFDS."""
    buffer: int = 10
    """FedBuff's K."""
    tail: float = 1.2
    """Of the seconds a step takes: P(> x) = x^-tail; the less, the heavier."""
    alpha: float = 1.0
    """Of the Dirichlet distribution of digits."""
    server_rate: float = 0.5
    """FedBuff's, of the mean of its buffer."""
    mixing: float = 0.1
    """FedAsync's alpha."""
    learning_rate: float = 0.1
    """Of the clients, in batches of ten, one pass a turn."""
    seeds: int = 3
    """Of speeds, cohorts, initial weights and batches."""


PRESETS = {
    "ci": Settings("ci", clients=60, concurrency=20, rounds=8, target=0.7, seeds=1),
    "full": Settings(
        "full", clients=1000, concurrency=100, rounds=60, target=0.88, data="files"
    ),
}
COLOURS = {
    "wait for all": common.BLACK,
    "deadline": common.ORANGE,
    "deadline, partial work": common.RED,
    "over-selection": common.PINK,
    "FedBuff": common.BLUE,
    "FedAsync": common.GREEN,
}
WORK: jaxfl.local.Work = {"batch_size": 10, "epochs": 1}


def schedules(config, data, bits, seed):
    """Of every policy, on the same clock."""
    n, k, rounds = config.clients, config.concurrency, config.rounds
    clock = faults.clock(
        data,
        step=faults.pareto(n, least=1.0, tail=config.tail, seed=seed),
        bits_down=bits,
        bits_up=bits,
        downlink=faults.log_normal(n, median=20e6, sigma=1.0, seed=seed + 1),
        uplink=faults.log_normal(n, median=5e6, sigma=1.0, seed=seed + 2),
        latency=0.1,
        **WORK,
    )
    always = np.ones((rounds, n), bool)
    client = faults.cohorts(always, k, seed=seed)
    deadline = float(np.quantile(clock.turn, 0.8))
    asked = faults.cohorts(always, round(1.3 * k), seed=seed)
    turns = {"concurrency": k, "seed": seed}
    made = {
        "wait for all": faults.synchronous(client, clock),
        "deadline": faults.synchronous(client, clock, deadline=deadline),
        "deadline, partial work": faults.synchronous(
            client, clock, deadline=deadline, partial=True
        ),
        "over-selection": faults.synchronous(asked, clock, keep=k),
        "FedBuff": faults.buffered(
            clock, rounds=rounds * k // config.buffer, buffer=config.buffer, **turns
        ),
        "FedAsync": faults.buffered(clock, rounds=rounds * k, buffer=1, **turns),
    }
    return made, clock


def federation_of(config, name, model, versions, channel=None):
    stale = faults.discount(faults.polynomial(0.5))
    sgd = optax.sgd(config.learning_rate)
    algorithm = jaxfl.fedavg(model.loss, sgd, **WORK)
    if name == "FedAsync":
        algorithm = jaxfl.fedasync(
            *(model.loss, sgd, versions), mixing=config.mixing, **WORK
        )
    elif name == "FedBuff":
        averaging = jaxfl.fedavg(model.loss, sgd, optax.sgd(config.server_rate), **WORK)
        algorithm = jaxfl.asynchronous(averaging, versions)
    else:
        stale = jaxfl.identity()
    channel = jaxfl.chain(channel or jaxfl.identity(), stale, jaxfl.mean())
    return jaxfl.federate(algorithm, channel, chunk_size=10)


def run(config, federation, model, schedule, data, evaluate, seed):
    key = jax.random.key(seed)
    return jaxfl.simulate(
        *(federation, model.init(key), data),
        rounds=schedule.rounds,
        cohort_size=schedule,
        key=key,
        weight=np.ones(config.clients),
        evaluate=evaluate,
        every=max(1, schedule.rounds // config.rounds),
        progress=False,
    )[1]


def hostile(config, clock, rounds, seed):
    """30 % vanish in each turn, a tenth is ten times slower, 5 % send NaN."""
    rng = np.random.default_rng(seed)
    slow = rng.permutation(config.clients) < config.clients // 10
    even = clock._replace(step=np.where(slow, 10.0, 1.0))
    client = faults.cohorts(
        np.ones((rounds, config.clients), bool), config.concurrency, seed=seed
    )
    clean = faults.synchronous(client, even._replace(step=np.ones(config.clients)))
    vanish = faults.Dropout(before=0.1, during=0.1, after=0.1)
    bad = faults.synchronous(
        client,
        even,
        deadline=2 * float(np.median(even.turn)),
        dropout=vanish,
        seed=seed,
    )
    return clean, bad


def draw(config, histories):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, runs in histories.items():
        for i, history in enumerate(runs):
            axes.plot(
                *(history.time / 60, 100 * history["accuracy"]),
                color=COLOURS[name],
                lw=1.6 if i == 0 else 0.7,
                label=name if i == 0 else None,
            )
    axes.axhline(100 * config.target, color="0.4", lw=0.8, ls=":", label="target")
    axes.set(
        xlabel="virtual time (minutes)",
        ylabel="test accuracy (%)",
        xscale="log",
        title=f"MNIST, logistic regression, {config.clients} clients of heavy-tailed "
        f"speeds, {config.concurrency} at a time",
    )
    common.tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    train, test = mnist(config.data)
    test = jax.tree.map(jnp.asarray, test)
    model = models.from_linen(models.logistic_regression(), train["x"][:1])
    bits = float(jaxfl.tree.num_bits(model.init(jax.random.key(0))))
    histories = {name: [] for name in COLOURS}
    clean, bad, fates = [], [], []
    ids = dirichlet(train["y"], num_clients=config.clients, alpha=config.alpha, seed=0)
    data = from_arrays(train["x"], train["y"], ids, config.clients)
    evaluate = jax.tree_util.Partial(jaxfl.on_server(model.metrics, test))
    made, clocks = zip(
        *(schedules(config, data, bits, seed) for seed in range(config.seeds)),
        strict=True,
    )
    waiting = federation_of(config, "", model, 1)
    broken = faults.corrupt(faults.becomes(jnp.nan), rate=0.05)
    hit = federation_of(config, "", model, 1, broken)
    for name in COLOURS:
        federation = waiting
        if name.startswith("Fed"):
            versions = max(each[name].versions for each in made)
            federation = federation_of(config, name, model, versions)
        for seed, each in enumerate(made):
            history = run(config, federation, model, each[name], data, evaluate, seed)
            histories[name].append(history)
    for seed, clock in enumerate(clocks):
        calm, storm = hostile(config, clock, config.rounds, seed)
        clean.append(run(config, waiting, model, calm, data, evaluate, seed))
        bad.append(run(config, hit, model, storm, data, evaluate, seed))
        info = bad[-1].clients
        fates.append(
            {
                "asked": info.asked.mean(),
                "alive": info.alive.mean(),
                "lost": info.lost.mean(),
                "rejected": info.rejected.mean(),
                "sent": info.sent.mean(),
            }
        )

    folder = common.results_folder("stragglers")
    reached = {
        name: [history.reached("accuracy", config.target) for history in runs]
        for name, runs in histories.items()
    }

    def average(name, what):
        values = [when and when[what] for when in reached[name]]
        return None if None in values else float(np.mean(values))

    minutes = {
        name: None if (t := average(name, "time")) is None else t / 60
        for name in COLOURS
    }
    wait = minutes["wait for all"]
    speedup = {
        name: None if wait is None or t is None else wait / t
        for name, t in minutes.items()
    }
    accuracy = {
        name: float(np.mean([history["accuracy"][-1] for history in runs]))
        for name, runs in histories.items()
    }
    ends = [float(np.mean([h["accuracy"][-1] for h in runs])) for runs in (clean, bad)]
    fate = {name: float(np.mean([f[name] for f in fates])) for name in fates[0]}
    summary = {
        "minutes": minutes,
        "speedup": speedup,
        "accuracy": accuracy,
        "clean": ends[0],
        "hostile": ends[1],
        "fates": fate,
        "settings": dataclasses.asdict(config),
    }
    common.save_summary(folder, summary)
    rows = [
        (name, seed, r, t, a)
        for name, runs in histories.items()
        for seed, h in enumerate(runs)
        for r, t, a in zip(h.round, h.time, h["accuracy"], strict=True)
    ]
    columns = ("policy", "seed", "round", "seconds", "accuracy")
    common.save_history(folder, columns, rows)
    common.save_figure(folder, draw(config, histories), "stragglers")

    def shown(x, form):
        return "not reached" if x is None else form.format(x)

    common.print_table(
        folder,
        f"MNIST ({config.data}): virtual time to {100 * config.target:g} %; FedBuff's "
        "paper: 3.3 times faster than waiting",
        ("policy", "rounds", "minutes", "times faster", "accuracy at the end (%)"),
        [
            (
                name,
                shown(average(name, "round"), "{:.0f}"),
                shown(minutes[name], "{:.1f}"),
                shown(speedup[name], "{:.1f}"),
                f"{100 * accuracy[name]:.1f}",
            )
            for name in COLOURS
        ],
    )
    common.print_table(
        folder,
        "30 % vanish, 5 % send NaN, 10 % are ten times slower",
        ("", "accuracy at the end (%)", *fate),
        [
            ("clean", f"{100 * ends[0]:.2f}", *[""] * len(fate)),
            ("hostile", f"{100 * ends[1]:.2f}", *(f"{v:.3f}" for v in fate.values())),
        ],
    )


if __name__ == "__main__":
    main()
