"""The maintenance game as one HTML file that needs no network.

`maintenance_page.html` beside this file is the page without a game; `write` puts one
into it. Money is not stored: it is linear in what was flown, maintained and failed, so
the page works it out at the prices that its reader asks for.
"""

import base64
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common

TEMPLATE = Path(__file__).with_suffix(".html")
COUNTS = ("flown", "maintained", "failed")
FRAMES = ("state", "age")


def write(path: str | os.PathLike, game: Mapping[str, Any]) -> None:
    """Writes the page of a game, all of it or none.

    The money an hour of a strategy at time t is
    (profit flown(t) - maintenance maintained(t) - failure failed(t)) / (nodes slots t).

    Args:
      path: of the HTML file, whose folder exists.
      game: of one seed, with
        `title`;
        `nodes` and `slots`, an airline's;
        `times` `[T]`, in cycles (hours), rising, of which the frames are;
        `prices`: `profit` a cycle flown, `maintenance` and `failure` in dollars,
        `maintenance_down` and `failure_down` in cycles, the `interval` of preventive
        maintenance in cycles, the `threshold` of predictive maintenance in cycles;
        `strategies`, a list of dicts with `name`, `label`,
        `flown`, `maintained` and `failed` `[T]`, the fleet's up to then,
        `band`, whose `low` and `high` `[T]` are in dollars an hour at those prices,
        `state` and `age`, in base64 `[T, nodes * slots]` uint8:
        0 flying, 1 flying and foretold to fail soon, 2 in maintenance, 3 down after
        a failure; and half the cycles the engine has flown.

    Raises:
      ValueError: if what a strategy has does not fit `times`, `nodes` and `slots`, or
        is not finite.
    """
    times, seats = len(game["times"]), game["nodes"] * game["slots"]
    if not times or np.any(np.diff(game["times"]) <= 0):
        raise ValueError(f"times must rise, got {game['times']}.")
    strategies = [_packed(s, times, seats) for s in game["strategies"]]
    data = json.dumps(
        dict(game) | {"strategies": strategies},
        allow_nan=False,
        default=lambda array: array.tolist(),
        separators=(",", ":"),
    )
    # In a script element only `<` could end or nest it.
    data = data.replace("<", "\\u003c")
    page = TEMPLATE.read_text("utf-8").replace("__GAME__", data, 1)
    common.write_text(Path(path), page)


def _packed(strategy, times, seats):
    """Checked; its frames as what changed since the one before, deflated."""
    name = strategy["name"]
    series = {key: strategy[key] for key in COUNTS}
    series |= {f"band.{key}": strategy["band"][key] for key in ("low", "high")}
    for key, values in series.items():
        if np.shape(values) != (times,):
            raise ValueError(
                f"{key} of {name!r} must be [{times}], as times is, "
                f"got {np.shape(values)}."
            )
    packed = {}
    for key in FRAMES:
        frames = np.frombuffer(base64.b64decode(strategy[key]), np.uint8)
        if frames.size != times * seats:
            raise ValueError(
                f"{key} of {name!r} must be [{times}, {seats}], "
                f"got {frames.size} bytes."
            )
        # An engine in the air ages alike from frame to frame, so little is left.
        changes = np.diff(frames.reshape(times, seats), axis=0, prepend=np.uint8(0))
        packed[key] = base64.b64encode(zlib.compress(changes.tobytes(), 9)).decode()
    return dict(strategy) | packed
