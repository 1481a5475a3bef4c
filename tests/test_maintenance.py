"""The fleet against a slow loop in Python, and who knows what, and when."""

import base64
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import jaxfl
from experiments import (
    maintenance,
    maintenance_fleet,
    maintenance_models,
    maintenance_money,
)
from experiments.maintenance_fleet import Prices

needs_files = pytest.mark.skipif(
    not os.environ.get("JAXFL_DATA_DIR"),
    reason="JAXFL_DATA_DIR is not set: no original C-MAPSS files",
)


def flown(prices, life, sequence, watch, ticks, slots=None):
    """Slots after every tick, stacked."""
    slots = maintenance_fleet.start(*sequence.shape[:-1]) if slots is None else slots

    def step(slots, _):
        slots = maintenance_fleet.tick(
            prices, jnp.asarray(life), jnp.asarray(sequence), watch, slots
        )
        return slots, (slots, slots.condition)

    return jax.jit(lambda slots: jax.lax.scan(step, slots, length=ticks)[1])(slots)


def by_hand(prices, life, sequence, due, ticks):
    """One slot, a tick at a time: what it does, and its three counts, `[ticks]`."""
    turn = cycle = down = 0
    reason, counts, seen = "", [0, 0, 0], []
    for _ in range(ticks):
        if down:
            down -= 1
        else:
            engine = sequence[turn]
            cycle += 1
            counts[0] += 1
            event = None
            if cycle == life[engine]:
                event, stands = "failed", prices.failure_down
            elif due(engine, cycle):
                event, stands = "serviced", prices.maintenance_down
            if event:
                counts[1 if event == "serviced" else 2] += 1
                turn, cycle, down, reason = turn + 1, 0, stands, event
        seen.append((reason if down else "flying", *counts, cycle, turn))
    return seen


def in_words(condition):
    names = {
        maintenance_fleet.FLYING: "flying",
        maintenance_fleet.FORETOLD: "flying",
        maintenance_fleet.SERVICED: "serviced",
        maintenance_fleet.FAILED: "failed",
    }
    return [names[int(c)] for c in condition]


def test_a_hand_made_fleet():
    # Engines of 5 and 2 flights, one of which is flown at a time; 1 and 2 cycles down.
    prices = Prices(maintenance_down=1, failure_down=2)
    life, sequence = np.array([5, 2]), np.array([[0, 1, 0, 0, 0, 0, 0, 0]])
    watch = maintenance_fleet.after_flights(3)
    slots, condition = flown(prices, life, sequence, watch, 11)
    # 3 flights and serviced, 1 down; 2 and failed, 2 down; 3 and serviced.
    assert slots.flown[:, 0].tolist() == [1, 2, 3, 3, 4, 5, 5, 5, 6, 7, 8]
    assert slots.maintained[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2]
    assert slots.failed[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert condition[:, 0].tolist() == [0, 0, 2, 0, 0, 3, 3, 0, 0, 0, 2]
    # Run to failure: 5 flights, and 2 down.
    never = maintenance_fleet.after_flights(maintenance_models.NEVER)
    slots, condition = flown(prices, life, sequence, never, 9)
    assert slots.flown[:, 0].tolist() == [1, 2, 3, 4, 5, 5, 5, 6, 7]
    assert slots.failed[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert not slots.maintained.any()
    # An engine that is due on its last flight has failed.
    slots, _ = flown(prices, life, sequence, maintenance_fleet.after_flights(5), 5)
    assert (slots.maintained[-1, 0], slots.failed[-1, 0]) == (0, 1)


def test_foretold_and_money():
    prices = Prices(maintenance_down=1, failure_down=2)
    life = np.array([10])
    sequence = np.zeros((1, 20), int)

    def left(engine, cycle):
        return jnp.asarray(life)[engine] - cycle

    watch = maintenance_fleet.when_foretold(left, 2)
    slots, condition = flown(prices, life, sequence, watch, 11)
    # Serviced with 1 left, below 2; within 3 x 2, from 5 left on, it is foretold.
    assert condition[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] + [0] * 2
    assert slots.flown[-1, 0] == 10 and slots.maintained[-1, 0] == 1
    counts = np.array([[10, 1, 0], [0, 0, 2]])
    assert maintenance_fleet.money(prices, counts).tolist() == [-7_500, -120_000]
    # Before it is ready, as the other one does.
    late = maintenance_fleet.once(
        jnp.array([[True], [False]]), watch, maintenance_fleet.after_flights(4)
    )
    slots, _ = flown(
        prices, life, np.zeros((2, 1, 20), int), late, 11, maintenance_fleet.start(2, 1)
    )
    assert slots.maintained[-1, :, 0].tolist() == [1, 2]


@pytest.mark.parametrize("strategy", ["corrective", "preventive", "predictive"])
def test_the_fleet_is_that_of_a_slow_loop(strategy):
    prices = Prices(maintenance_down=3, failure_down=7)
    rng = np.random.default_rng(0)
    life = rng.integers(20, 60, 12)
    errors = (rng.normal(0, 8, (12, 1)) + rng.normal(0, 2, (12, 60))).astype("f4")
    ticks, shape = 300, (3, 4)
    length = maintenance_fleet.longest_sequence(prices, ticks)
    sequence = np.asarray(
        maintenance_fleet.sequences(jax.random.key(1), jnp.arange(12), shape, length)
    )

    def left(engine, cycle, of=np):
        return of.asarray(life)[engine] - cycle + of.asarray(errors)[engine, cycle]

    due = {
        "corrective": lambda engine, cycle: False,
        "preventive": lambda engine, cycle: cycle >= 35,
        "predictive": lambda engine, cycle: left(engine, cycle) < 8,
    }[strategy]
    watch = {
        "corrective": maintenance_fleet.after_flights(maintenance_models.NEVER),
        "preventive": maintenance_fleet.after_flights(35),
        "predictive": maintenance_fleet.when_foretold(
            functools.partial(left, of=jnp), 8
        ),
    }[strategy]
    slots, condition = flown(prices, life, sequence, watch, ticks)
    for place in np.ndindex(*shape):
        expected = by_hand(prices, life, sequence[place], due, ticks)
        words, *numbers = zip(*expected, strict=True)
        assert in_words(condition[(slice(None), *place)]) == list(words)
        found = slots.flown, slots.maintained, slots.failed, slots.cycle, slots.turn
        for a, b in zip(found, numbers, strict=True):
            np.testing.assert_array_equal(a[(slice(None), *place)], b)
    if strategy == "predictive":
        assert slots.failed[-1].sum() > 0 and slots.maintained[-1].sum() > 0


def test_strategies_are_given_the_same_engines_and_seeds_others():
    draw = functools.partial(maintenance_fleet.sequences, engines=jnp.array([3, 5, 8]))
    one = draw(jax.random.key(0), shape=(2, 4), length=50)
    assert set(np.unique(one)) == {3, 5, 8} and one.shape == (2, 4, 50)
    assert (one != draw(jax.random.key(1), shape=(2, 4), length=50)).mean() > 0.5
    # No slot runs out of engines, whatever becomes of them: all due at once.
    prices = Prices(maintenance_down=1, failure_down=5)
    length = maintenance_fleet.longest_sequence(prices, 21)
    slots, _ = flown(
        *(prices, np.array([9]), np.zeros((1, length), int)),
        *(maintenance_fleet.after_flights(1), 21),
    )
    assert slots.turn.max() == 11 and slots.turn[-2].max() < length


@pytest.fixture(scope="module")
def setting():
    return dataclasses.replace(maintenance.PRESETS["ci"], stride=1)


@needs_files
def test_rows_are_known_when_their_engine_has_failed(setting):
    engines = maintenance_models.engines_of(setting)
    life = np.asarray(engines.life)
    assert life.sum() == len(engines.row) and len(life) == setting.engines
    last = np.asarray(engines.first) + life - 1
    assert not np.asarray(engines.row)[last, -1].any()
    assert (
        np.asarray(engines.row)[np.asarray(engines.first), -1].tolist()
        == (life - 1).tolist()
    )
    examples = {"row": engines.row, "left": engines.row[:, -1]}
    of_row = np.repeat(np.arange(len(life)), life)
    played = []
    for seed in range(5):
        airlines, pooled = (
            maintenance_models.airlines_of(setting, engines, examples, seed, together)
            for together in (False, True)
        )
        played.extend(airlines.played)
        assert len(airlines.rows) == 4 and len(pooled.rows) == 1
        for rows in jaxfl.data.client_rows(airlines.rows):
            # The first engine fails when it has flown its life; the others stand still
            # for one failure each before.
            when = np.unique(airlines.known[rows])
            first = [rows[airlines.known[rows] == t][0] for t in when]
            own = life[of_row[first]]
            stood = setting.prices.failure_down * np.arange(4)
            np.testing.assert_array_equal(when, np.cumsum(own) + stood)
        for cycle in (0, 150, 400, 1000, 5000):
            now = airlines.at(cycle)
            total = 0
            for client in range(4):
                rows = np.asarray(now.index)[
                    int(now.start[client]) : int(now.start[client] + now.size[client])
                ]
                whole = np.unique(of_row[rows])
                assert life[whole].sum() == len(rows)  # all of an engine, or nothing
                assert not set(whole) & set(airlines.played)
                # One after another, and after each failure the slot stands still.
                stood = setting.prices.failure_down * max(0, len(whole) - 1)
                assert len(rows) + stood <= cycle or not len(rows)
                if cycle == 5000:
                    assert len(whole) == 4
                total += len(rows)
            assert pooled.at(cycle).size.tolist() == [total]
            both = np.asarray(pooled.at(cycle).index)[:total]
            assert (np.asarray(airlines.known)[both] <= cycle).all()
    assert sorted(played) == list(range(setting.engines))


@needs_files
def test_a_game_is_what_its_page_is_told(setting):
    setting = dataclasses.replace(
        setting,
        cycles=400,
        strategies=("preventive", "federated", "pooled"),
        channels=("none", "top_k"),
        warm_up=0,
    )
    games = maintenance.games_of(setting)
    assert list(games) == ["preventive", "federated", "top_k", "pooled"]
    sent = games["federated"]["megabytes"], games["top_k"]["megabytes"]
    assert (0 < sent[1]).all() and (sent[1] < sent[0]).all()
    # Pooling sends rows, of 14 sensors and the life left, once their engine has failed.
    engines = maintenance_models.engines_of(setting)
    examples = {"left": engines.row[:, -1]}
    for seed in range(2):
        airlines = maintenance_models.airlines_of(
            setting, engines, examples, seed, together=False
        )
        rows = airlines.at(399).size.sum()
        assert rows > 0
        np.testing.assert_allclose(
            games["pooled"]["megabytes"][seed], rows * 15 * 4 / 1e6, rtol=1e-6
        )
    game = maintenance.game_of(setting, games, seed=1)
    assert game["nodes"] * game["slots"] == 16 and len(game["times"]) == 40
    assert game["prices"]["interval"] == 193 and game["times"][-1] == 400
    for each in game["strategies"]:
        counts = games[each["name"]]["counts"]
        assert counts.shape == (2, 40, 2, 3)
        np.testing.assert_array_equal(counts[1, :, 0, 2], each["failed"])
        state, age = (
            np.frombuffer(base64.b64decode(each[k]), np.uint8).reshape(40, 16)
            for k in ("state", "age")
        )
        # Whoever stood was removed; all flew at first, and grew older together.
        assert (age[0] == 5).all() and (state[0] < 2).all()
        stood = each["maintained"][-1] + each["failed"][-1]
        assert bool(stood) == bool((state >= 2).any())
        # Money from the counts, by another way: its first ten cycles are all profit.
        earned = maintenance_money.per_hour(setting, counts)[..., 0]
        if each["name"] == "preventive":
            np.testing.assert_allclose(earned[:, 0], 250)
        middle = np.add(each["band"]["low"], each["band"]["high"]) / 2
        np.testing.assert_allclose(middle, earned.mean(0))
    prices = setting.prices
    found = maintenance_money.by_prices(
        setting, games, [1.0, prices.failure], [prices.maintenance]
    )
    for name, at in found.items():
        last = maintenance_money.per_hour(setting, games[name]["counts"])[:, -1]
        np.testing.assert_allclose(at[:, 1, 0], last[:, last.mean(0).argmax()])
        assert (at[:, 0] >= at[:, 1]).all()


@pytest.mark.parametrize("name", ["pooled", "top_k", "corrective", "federated"])
def test_one_strategy_alone_is_drawn(setting, name):
    setting = dataclasses.replace(setting, cycles=100)
    shape = 1, 10, len(setting.knobs(name)), 3
    counts = np.random.default_rng(0).integers(0, 50, shape).cumsum(1)
    figure = maintenance_money.draw(setting, {name: {"counts": counts}})
    legend = figure.axes[-1].get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == [name]
    plt.close(figure)


@needs_files
def test_an_airline_asks_its_own_model_about_its_own_windows(setting):
    engines = maintenance_models.engines_of(setting)
    examples = {
        "row": engines.row,
        "window": engines.window,
        "left": engines.row[:, -1],
    }
    airlines = maintenance_models.airlines_of(setting, engines, examples, 0, False)
    model = maintenance_models.network_of(setting, engines)
    moments = jaxfl.moments(airlines.rows, "row")
    teller = maintenance_models.foreteller_of(setting, model, engines, moments)
    federation = maintenance_models.federation_of(
        setting,
        "isolated",
        maintenance_models.channel_of(setting, "none"),
        teller.loss,
    )
    watcher = maintenance_models.learner(
        setting,
        federation,
        teller,
        engines,
        airlines,
        jnp.float32(60),
        jax.random.key(0),
    )
    each = jax.vmap(model.init)(jax.random.split(jax.random.key(2), 4))
    state = watcher.state._replace(
        clients=watcher.state.clients._replace(algorithm=each)
    )
    engine = np.random.default_rng(0).integers(0, setting.engines, (2, 4, 4))
    flown = np.asarray(engines.life)[engine] // 2
    flown[0, 0, 0] = 2  # a window that begins before the engine did
    due, soon = watcher.watch(state, jnp.int32(10**6))(
        jnp.asarray(engine), jnp.asarray(flown)
    )

    # In float64: sensors of the airlines' engines have mean 0 and deviation 1.
    row = np.asarray(engines.row, np.float64)[:, :-1]
    trained = row[np.concatenate(jaxfl.data.client_rows(airlines.rows))]
    scaled = (row - trained.mean(0)) / trained.std(0)
    kernel, bias = (
        np.asarray(x, np.float64)
        for x in (each["Dense_0"]["kernel"], each["Dense_0"]["bias"])
    )
    for place in np.ndindex(2, 4, 4):
        first = int(engines.first[engine[place]])
        last = first + int(flown[place]) - 1
        window = np.maximum(np.arange(last + 1 - setting.window, last + 1), first)
        node = place[1]
        left = 125 * (scaled[window].ravel() @ kernel[node][:, 0] + bias[node, 0])
        if abs(left - 60) > 0.01 and abs(left - 180) > 0.01:
            assert (due[place], soon[place]) == (left < 60, left < 180)
    assert 0 < due.mean() < 1
    # Nobody knows anything at first: as by preventive maintenance.
    due, _ = watcher.watch(state, jnp.int32(0))(jnp.asarray(engine), jnp.asarray(flown))
    assert (due == (flown >= 193)).all()
