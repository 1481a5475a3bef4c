"""What the maintenance game earned: by time, by threshold, and by prices."""

from typing import Any

import numpy as np

from experiments import common, maintenance_fleet

LABELS = {
    "corrective": "run to failure",
    "preventive": "fixed interval",
    "isolated": "each airline's own model",
    "federated": "federated model",
    "top_k": "federated, compressed",
    "dp": "federated, private",
    "pooled": "model of all data",
}
COLOURS = {
    "corrective": common.BLACK,
    "preventive": common.PINK,
    "isolated": common.ORANGE,
    "federated": common.GREEN,
    "top_k": common.SKY,
    "dp": common.RED,
    "pooled": common.BLUE,
}
SLOTS = 4


def per_hour(config, counts: np.ndarray) -> np.ndarray:
    """Dollars per engine-hour since the start, `[seeds, T, knobs]`, of such counts."""
    hours = config.every * np.arange(1, counts.shape[1] + 1)
    earned = maintenance_fleet.money(config.prices, counts)
    return earned / (SLOTS * config.nodes * hours)[:, None]


def by_prices(config, games, failure: Any, maintenance: Any) -> dict[str, np.ndarray]:
    """Dollars per engine-hour at the end under other prices, from the counts alone.

    Args:
      config: settings; what takes how long is as it was flown.
      games: see `games_of`.
      failure, maintenance: `[F]` and `[M]`, in dollars.

    Returns:
      `[seeds, F, M]` of every strategy, with the one of its intervals or thresholds
      that is best at each price.
    """
    hours, found = SLOTS * config.nodes * config.cycles, {}
    for name, game in games.items():
        last = np.asarray(game["counts"][:, -1, ..., None, None], float)
        flown, maintained, failed = np.moveaxis(last, 2, 0)
        earned = (
            config.prices.profit * flown
            - np.asarray(maintenance) * maintained
            - np.asarray(failure)[:, None] * failed
        ) / hours
        best = earned.mean(0).argmax(0)
        found[name] = np.take_along_axis(earned, best[None, None], 1)[:, 0]
    return found


def rivals(games) -> list[str]:
    """Strategies without a federated model, and that nobody has to be trusted for."""
    return [n for n in games if n in ("corrective", "preventive", "isolated")]


def draw(config, games):
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.8), layout="constrained"
    )
    times = config.every * np.arange(1, 1 + config.cycles // config.every)
    low = []
    for name, game in games.items():
        earned, colour = per_hour(config, game["counts"]), COLOURS[name]
        mean, std = earned[..., 0].mean(0), earned[..., 0].std(0)
        left.plot(times, mean, color=colour, label=LABELS[name])
        left.fill_between(
            *(times, mean - std, mean + std), color=colour, alpha=0.2, lw=0
        )
        low.append((mean - std)[len(times) // 5 :].min())
        last, stated = earned[:, -1].mean(0), np.array(config.knobs(name))
        order = np.argsort(stated)
        if name in ("corrective", "preventive"):
            middle.axhline(last.max(), color=colour, ls="--")
        else:
            middle.plot(stated[order], last[order], color=colour, marker="o")
    left.set(
        xlabel="time (cycles)",
        ylabel="earned since the start\n(dollars per engine-hour)",
        ylim=(min(0, *low) - 10, 1.1 * config.prices.profit),
        title=f"mean and deviation of {config.seeds} seeds",
    )
    figure.legend(loc="outside lower center", ncols=len(games), frameon=False)
    middle.set(
        xlabel="serviced when fewer cycles than that are foretold",
        ylabel="earned by the end\n(dollars per engine-hour)",
        title="other thresholds (dashed: run to failure, and\nthe best interval)",
    )

    failure, maintenance = np.geomspace(5e3, 5e5, 81), np.geomspace(1e3, 1e5, 81)
    earned = {
        name: each.mean(0)
        for name, each in by_prices(config, games, failure, maintenance).items()
    }
    names = [*rivals(games), *(n for n in ("federated",) if n in games)] or list(games)
    winner = np.argmax([earned[name] for name in names], 0)
    colours = ListedColormap([COLOURS[name] for name in names])
    right.pcolormesh(
        *(failure, maintenance, winner.T),
        cmap=colours,
        vmin=-0.5,
        vmax=len(names) - 0.5,
        alpha=0.35,
        linewidth=0,
        rasterized=True,
    )
    if "federated" in games and rivals(games):
        gain = earned["federated"] - np.max([earned[n] for n in rivals(games)], 0)
        lines = right.contour(
            *(failure, maintenance, gain.T), colors="black", linewidths=0.8
        )
        right.clabel(lines, fmt="%g", fontsize=7)
    right.plot(
        *(config.prices.failure, config.prices.maintenance),
        marker="*",
        ms=11,
        color="black",
        ls="",
    )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="price of a failure (dollars)",
        ylabel="price of servicing (dollars)",
        title="who earns most, each at its best (lines: dollars by\n"
        "which the federated leads; star: the stated prices)",
    )
    seen = [Patch(color=COLOURS[n], alpha=0.35, label=n) for n in names]
    right.legend(handles=seen, fontsize=8, loc="lower left")
    common.tidy(left, middle)
    return figure
