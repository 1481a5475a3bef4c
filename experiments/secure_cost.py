"""What it costs that the server sees no message: seconds, bytes, and error of a sum.

The sum of all clients' updates in the clear; behind masks inside the compiled round,
and by the protocol that these stand for (Bonawitz et al. 2017, arXiv:1611.04482);
under CKKS (Cheon et al. 2017) and under Paillier (1999). Against the number of
parameters and the number of clients. Seconds are of the processor, for all parties
together, and none of a network. Keys of the homomorphic schemes are made once for many
rounds and not counted; those of the protocol are made in each round and are.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxfl
from experiments import common
from jaxfl import homomorphic, secure
from jaxfl.secure import protocol


@dataclasses.dataclass(frozen=True)
class Settings:
    """Updates are random, with a standard deviation of 0.01."""

    preset: Literal["ci", "full"]
    """Where the other settings start from: a small run, or the whole one."""
    parameters: tuple[int, ...]
    """Of the model, with as many clients as `clients_then` says."""
    clients: tuple[int, ...]
    """Of the round, with as many parameters as `parameters_then` says."""
    clients_then: int = 10
    parameters_then: int = 1000
    key_bits: int = 3072
    """Of Paillier's key."""
    paillier_numbers: int = 20_000
    """Paillier is left out where clients x parameters are more than this."""
    seed: int = 0


PRESETS = {
    "ci": Settings("ci", (100, 1000), (2, 4), 2, 100, 512),
    "full": Settings(
        "full", (100, 1000, 10_000, 100_000, 199_210), (2, 5, 10, 20, 50, 100)
    ),
}
STYLES = {  # method: colour, marker and line, dashed where it may lie on another
    "plain": (common.BLACK, "o-"),
    "masked, in jit": (common.GREEN, "^-"),
    "protocol": (common.BLUE, "v--"),
    "CKKS": (common.ORANGE, "s-"),
    "Paillier": (common.PINK, "D-"),
}
LIMIT = 0.25  # of one number, where a method needs to know it

# What a method makes of updates [K, d]: their sum, seconds, and bytes up for a client.
Method = Callable[[np.ndarray], tuple[Any, float, float]]


def fastest(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the least processor time of some runs in half a second."""
    seconds: list[float] = []
    while not seconds or (sum(seconds) < 0.5 and len(seconds) < 10):
        start = time.process_time()
        result = jax.block_until_ready(run())
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def in_round(
    channel: jaxfl.Channel, aggregator: jaxfl.Aggregator | None = None
) -> Method:
    """By a compiled round of a federation whose clients only send."""
    send = jaxfl.Algorithm(
        init=lambda zeros: (zeros, ()),
        client=lambda ctx, broadcast, own, update: (update, own, {}),
        server=lambda ctx, state, outcome: outcome.payload,
        broadcast=lambda state: (),
    )
    federation = jaxfl.federate(send, channel, aggregator)

    def measure(updates):
        everyone, data = jnp.arange(len(updates)), jnp.asarray(updates)
        state = federation.init(jnp.zeros(updates.shape[1]), data)
        cohort = jaxfl.Cohort(everyone, data, jnp.ones(len(updates)), everyone >= 0)
        given = jax.random.key(0), state, cohort
        compiled = jax.jit(federation.round).lower(*given).compile()
        (state, info), seconds = fastest(lambda: compiled(*given))
        return state.server.algorithm, seconds, float(info.bits_up.mean() / 8)

    return measure


def scale_for(clients: int) -> float:
    """The finest steps with which a sum of that many fits in 32 bits."""
    return 2.0 ** (30 - (clients - 1).bit_length()) / LIMIT


def by_protocol(updates: np.ndarray) -> tuple[Any, float, float]:
    """By the parties of the protocol, each with keys of its own."""
    n = len(updates)
    steps = np.trunc(updates * scale_for(n)).astype(np.int32).view(np.uint32)
    inputs = dict(enumerate(steps))
    run, seconds = fastest(lambda: protocol.aggregate(inputs, secure.complete(n)))
    total = run.total.astype(np.int32) / scale_for(n)
    return total, seconds, float(np.mean(list(run.up.values())))


def methods(config: Settings) -> dict[str, Method]:
    most = max(*config.clients, config.clients_then)
    ckks = homomorphic.ckks(summands=most)
    paillier = homomorphic.paillier(
        limit=LIMIT, summands=most, key_bits=config.key_bits
    )

    def masked(updates):
        fixed = secure.fixed_point(LIMIT, scale_for(len(updates)))
        return in_round(jaxfl.chain(fixed, secure.secure_sum()))(updates)

    return {
        "plain": in_round(jaxfl.identity()),
        "masked, in jit": masked,
        "protocol": by_protocol,
        "CKKS": in_round(jaxfl.identity(), homomorphic.total(ckks)),
        "Paillier": in_round(jaxfl.identity(), homomorphic.total(paillier)),
    }


def measure(config: Settings) -> list[dict]:
    """A row for each method, number of clients and number of parameters."""
    rng = np.random.default_rng(config.seed)
    sizes = {(config.clients_then, d) for d in config.parameters}
    sizes |= {(k, config.parameters_then) for k in config.clients}
    rows = []
    for name, method in methods(config).items():
        for k, d in sorted(sizes):
            if name == "Paillier" and k * d > config.paillier_numbers:
                continue
            updates = (0.01 * rng.normal(size=(k, d))).astype(np.float32)
            total, seconds, sent = method(updates)
            want = updates.sum(0, dtype=np.float64)
            error = np.linalg.norm(np.asarray(total, float) - want) / np.linalg.norm(
                want
            )
            rows.append(
                {
                    "method": name,
                    "clients": k,
                    "parameters": d,
                    "seconds": seconds,
                    "bytes_up": sent,
                    "error": float(error),
                }
            )
    return rows


def draw(config: Settings, rows: list[dict]):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, 3, figsize=(11, 6.2), layout="constrained", sharex="row", sharey="col"
    )
    fixed = (
        ("parameters", "clients", config.clients_then),
        ("clients", "parameters", config.parameters_then),
    )
    columns = {
        "seconds": "processor seconds, all parties",
        "bytes_up": "bytes up, each client",
        "error": "relative error of the sum",
    }
    for line, (along, other, value) in zip(panels, fixed, strict=True):
        for axes, (column, title) in zip(line, columns.items(), strict=True):
            for name, (colour, style) in STYLES.items():
                at = {
                    row[along]: row[column]
                    for row in rows
                    if row["method"] == name and row[other] == value
                }
                x = sorted(at)
                axes.loglog(
                    *(x, [at[i] for i in x], style),
                    color=colour,
                    label=name,
                    markersize=4,
                )
            axes.set(xlabel=f"{along} ({value:,} {other})", ylabel=title)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("A sum that the server cannot see into, and what it costs")
    return figure


def main() -> None:
    config = common.settings(PRESETS, __doc__)
    rows = measure(config)
    folder = common.results_folder("secure_cost")
    common.save_summary(folder, {"runs": rows, "settings": dataclasses.asdict(config)})
    common.save_history(folder, list(rows[0]), [(*row.values(),) for row in rows])
    common.save_figure(folder, draw(config, rows), "secure_cost")
    common.print_table(
        folder,
        "What a sum costs",
        (
            "method",
            "clients",
            "parameters",
            "CPU s",
            "bytes up",
            "x float32",
            "error",
        ),
        [
            (
                row["method"],
                row["clients"],
                f"{row['parameters']:,}",
                f"{row['seconds']:.3g}",
                f"{row['bytes_up']:,.0f}",
                f"{row['bytes_up'] / (4 * row['parameters']):.2f}",
                f"{row['error']:.1e}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
