"""Faults: who is there, who is late, who is lost, and what time it is."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import faults
from jaxfl.faults import NOBODY, Clock, Dropout, Schedule

R, K = 4, 3


def federation(chunk=None, devices=None, channel=None, **work: Any):
    mesh = None if devices is None else jaxfl.client_mesh(jax.devices()[:devices])
    every: Any = {"epochs": 2}
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=1, **(work or every))
    memory = jaxfl.at_client(optax.trace(0.5))
    channel = jaxfl.chain(memory, channel or jaxfl.mean())
    return jaxfl.federate(algorithm, channel, chunk_size=chunk, mesh=mesh)


def eventful(seed=0) -> Schedule:
    """A schedule in which everything happens."""
    rng = np.random.default_rng(seed)
    client = np.array([rng.permutation(toy.N)[:K] for _ in range(R)], np.int32)
    client[1, 2] = NOBODY
    asked = rng.random((R, K)) < 0.9
    alive = asked & (rng.random((R, K)) < 0.8)
    return Schedule(
        client,
        asked,
        alive,
        arrives=alive & (rng.random((R, K)) < 0.7),
        share=rng.uniform(0.3, 1.0, (R, K)).astype(np.float32),
        staleness=np.zeros((R, K), np.int32),
        time=rng.random((R, K)).astype(np.float32),
        ended=np.arange(1, R + 1, dtype=np.float32),
    )


def simulate(schedule, fed=None, data=None, rounds=R, **options):
    return jaxfl.simulate(
        federation() if fed is None else fed,
        toy.params(),
        toy.data() if data is None else data,
        rounds=rounds,
        cohort_size=schedule,
        key=jax.random.key(3),
        progress=False,
        **options,
    )


def assert_same(got, want, close=0.0):
    def leaf(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), close, close)

    jax.tree.map(leaf, jaxfl.tree.without_keys(got), jaxfl.tree.without_keys(want))


@pytest.fixture(scope="module")
def plain():
    return simulate(eventful())


# --- a schedule is a run, however it is run ----------------------------------


@pytest.mark.parametrize("chunk, devices", [(2, None), (1, 3)], ids=str)
def test_the_plan_does_not_matter(chunk, devices, plain):
    assert_same(simulate(eventful(), federation(chunk, devices)), plain, 1e-5)


@pytest.mark.parametrize("states", [False, True])
def test_streamed_is_resident(states, plain):
    x, y, ids = toy.examples()
    data = jaxfl.on_host(jaxfl.from_arrays(x, y, ids, toy.N), states=states)
    state, history = simulate(eventful(), data=data)
    if states:
        state = state._replace(clients=state.clients[np.arange(toy.N)])
    assert_same((state, history), plain)


def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path):
    folder = {"checkpoint": tmp_path / "run", "every": 1}
    simulate(eventful(), rounds=2, **folder)
    assert_same(simulate(eventful(), **folder), simulate(eventful(), every=1))
    with pytest.raises(ValueError, match="cohort_size"):
        simulate(eventful(seed=1), **folder)


def test_stacked_schedules_are_one_program():
    fed, data = federation(), toy.data()
    state = fed.init(toy.params(), data)

    @jax.jit
    @jax.vmap
    def run(schedule):
        return jaxfl.scan_rounds(
            fed, state, data, rounds=R, key=jax.random.key(3), cohort_size=schedule
        )

    schedules = [eventful(seed) for seed in range(3)]
    got = run(jax.tree.map(lambda *x: jnp.stack(x), *schedules))
    for i, schedule in enumerate(schedules):
        want = simulate(schedule, fed)
        assert_same(jax.tree.map(lambda x, i=i: x[i], got[0]), want[0], 1e-5)
        assert_same(jax.tree.map(lambda x, i=i: x[i], got[1][0]), want[1].clients, 1e-5)


def test_two_schedules_of_one_shape_compile_once():
    from jaxfl.simulate import _segment

    fed = federation()
    simulate(eventful(0), fed)
    before = _segment._cache_size()  # pyright: ignore
    simulate(eventful(1), fed)
    assert _segment._cache_size() == before  # pyright: ignore


def test_a_schedule_without_events_is_the_cohort():
    client = np.tile(np.arange(toy.N, dtype=np.int32), (R, 1))
    got, want = simulate(Schedule(client)), simulate(None)
    assert_same(got, want, 1e-6)


# --- what happens to whom ----------------------------------------------------


def lost_and_dead(**fate):
    client = np.arange(toy.N, dtype=np.int32)[None]
    flags = {
        name: (np.arange(toy.N) != 3)[None] if name in fate else None
        for name in ("asked", "alive", "arrives")
    }
    return simulate(Schedule(client, **flags), rounds=1)


def test_who_dies_on_the_way_was_asked_and_stays_as_it_was():
    state, history = lost_and_dead(alive=1)
    absent, of_absent = simulate(
        Schedule(np.array([[i for i in range(toy.N) if i != 3]], np.int32)), rounds=1
    )
    assert_same(state, absent, 1e-6)
    info = history.clients
    assert not info.sent[0, 3] and info.bits_up[0, 3] == info.bits_down[0, 3] == 0
    client = np.arange(toy.N, dtype=np.int32)[None]
    alive = client != 3
    dead, history = simulate(
        Schedule(client, asked=np.ones_like(alive), alive=alive), rounds=1
    )
    assert_same(dead, state)
    assert history.clients.bits_down[0, 3] == history.clients.bits_down[0, 0] > 0
    assert history.clients.bits_up[0, 3] == 0


def test_who_is_lost_has_moved_on_and_paid():
    state, history = lost_and_dead(arrives=1)
    absent, _ = lost_and_dead(alive=1)
    everyone, whole = simulate(
        Schedule(np.arange(toy.N, dtype=np.int32)[None]), rounds=1
    )
    info = history.clients
    assert_same(state.server, absent.server)  # to the server it is as one absent
    assert_same(state.clients, everyone.clients)  # to itself it is not
    assert np.asarray(info.lost)[0].tolist() == [i == 3 for i in range(toy.N)]
    assert not info.sent[0, 3] and info.bits_up[0, 3] == whole.clients.bits_up[0, 3] > 0


def test_a_lost_message_drops_out_of_a_secure_sum():
    masks = jaxfl.secure.secure_sum(lambda n: jaxfl.secure.Graph(4, 2))
    channel = jaxfl.chain(jaxfl.mean(5.0), jaxfl.secure.fixed_point(8.0, 2**20), masks)
    schedule = Schedule(
        np.arange(toy.N, dtype=np.int32)[None],
        arrives=(np.arange(toy.N) != 3)[None],
    )
    state, history = simulate(schedule, federation(channel=channel), rounds=1)
    plain, _ = simulate(schedule, federation(channel=jaxfl.mean(5.0)), rounds=1)
    assert history.clients.delivered.any()
    assert_same(state.params, plain.params, 1e-4)


@pytest.mark.parametrize("sizes", [toy.SIZES, (4,) * toy.N], ids=["ragged", "alike"])
def test_a_share_of_the_work_is_its_first_steps(sizes):
    data = toy.data(sizes)
    client = np.arange(toy.N, dtype=np.int32)[None]
    half = Schedule(client, share=np.full(client.shape, 0.5, np.float32))
    got = simulate(half, federation(epochs=2, shuffle=False), data, rounds=1)
    want = simulate(None, federation(epochs=1, shuffle=False), data, rounds=1)
    assert_same(got[0], want[0], 1e-6)
    steps = jaxfl.local.num_steps(data, batch_size=1, epochs=2)
    assert (got[1].clients.metrics["steps"][0] == steps // 2).all()
    odd = Schedule(client, share=np.full(client.shape, 3 / 8, np.float32))
    for chunk in (1, 2):  # in which the order is by what is to do
        again = simulate(odd, federation(chunk, epochs=2), data, rounds=1)[1]
        assert (
            again.clients.metrics["steps"][0] == np.round(np.float32(3 / 8) * steps)
        ).all()


@pytest.mark.parametrize(
    "work", [{"epochs": 3}, {"epochs": 2, "batch_size": 3}, {"steps": 5}], ids=str
)
def test_num_steps_is_what_train_does(work):
    data = toy.data()
    work = {"batch_size": 2} | work
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), **work)
    _, history = simulate(None, jaxfl.federate(algorithm, jaxfl.mean()), rounds=1)
    steps = jaxfl.local.num_steps(data, **work)
    assert history.clients.metrics["steps"][0].tolist() == steps.tolist()


# --- what is wrong with a schedule -------------------------------------------


@pytest.mark.parametrize(
    "word, schedule",
    [
        ("once in a round", Schedule(np.zeros((R, 2), np.int32))),
        ("from 0 to 6", Schedule(np.full((R, 1), 7, np.int32))),
        ("from 0 to 6", Schedule(np.full((R, 1), -1, np.int32))),
        ("integers", Schedule(np.zeros((R, 1)))),
        (re.escape("[R, K]"), Schedule(np.zeros(R, np.int32))),
        ("schedule.alive", Schedule(np.zeros((R, 1), np.int32), alive=np.ones(R))),
        ("schedule.ended", Schedule(np.zeros((R, 1), np.int32), ended=np.ones(1))),
        ("share", Schedule(np.zeros((R, 1), np.int32), share=np.full((R, 1), 1.5))),
        ("stale", Schedule(np.zeros((R, 1), np.int32), staleness=-np.ones((R, 1)))),
        ("has 3 rounds", Schedule(np.zeros((3, 1), np.int32))),
    ],
)
def test_a_schedule_that_does_not_fit(word, schedule):
    with pytest.raises(ValueError, match=word):
        simulate(schedule)


def test_a_run_that_goes_on_past_its_schedule():
    fed, data = federation(), toy.data()
    state = fed.init(toy.params(), data)._replace(round=jnp.int32(2))
    with pytest.raises(ValueError, match="has 4 rounds, of the 5"):
        jaxfl.scan_rounds(
            *(fed, state, data),
            rounds=3,
            key=jax.random.key(0),
            cohort_size=eventful(),
        )


# --- who is available --------------------------------------------------------


def assert_rate(trace, rate, correlated=1.0):
    """Within 4 standard deviations, and not within 4 of a rate a fifth off."""
    std = np.sqrt(correlated * rate * (1 - rate) / trace.size)
    assert abs(trace.mean() - rate) < 4 * std
    assert abs(trace.mean() - 1.2 * rate) > 4 * std


def test_bernoulli():
    trace = faults.bernoulli(2000, 40, np.repeat([0.3, 0.7], 20), seed=0)
    assert_rate(trace[:, :20], 0.3)
    assert_rate(trace[:, 20:], 0.7)
    again = (trace[1:] & trace[:-1])[:, :20]
    assert_rate(again, 0.09, correlated=2)  # rounds are independent


def test_markov_is_stationary_and_stays():
    trace = faults.markov(3000, 100, leaves=0.1, returns=0.2, seed=0)
    first = faults.markov(1, 200_000, leaves=0.1, returns=0.2, seed=1)
    assert_rate(first, 2 / 3)
    assert_rate(trace, 2 / 3, correlated=(2 - 0.3) / 0.3)
    assert_rate((~trace[1:])[trace[:-1]], 0.1)
    assert_rate(trace[1:][~trace[:-1]], 0.2)


def test_diurnal_follows_its_day():
    zones = np.repeat([0.0, 0.5], 100)
    trace = faults.diurnal(
        2400, 200, period=24, mean=0.5, swing=0.3, zones=zones, seed=0
    )
    noon, night = trace[6::24], trace[18::24]
    assert_rate(noon[:, :100], 0.8)
    assert_rate(noon[:, 100:], 0.2)
    assert_rate(night[:, :100], 0.2)


def test_cohorts_are_of_those_available_and_uniform():
    available = np.ones((6000, 6), bool)
    available[:, 4] = False
    client = faults.cohorts(available, 2, seed=0)
    assert not (client == 4).any() and (client[:, 0] != client[:, 1]).all()
    assert_rate((client == 0).any(1), 2 / 5)
    few = np.zeros((3, 6), bool)
    few[:, 5] = True
    assert faults.cohorts(few, 2, seed=0).tolist() == [[5, NOBODY]] * 3
    with pytest.raises(ValueError, match="size"):
        faults.cohorts(few, 7, seed=0)


# --- policies, against a loop over clients -----------------------------------


def random_clock(n=9, rounds=5, seed=0):
    rng = np.random.default_rng(seed)
    return Clock(
        download=rng.exponential(1.0, n),
        step=rng.exponential(1.0, (rounds, n)),
        steps=rng.integers(0, 6, n).astype(float),
        upload=rng.exponential(1.0, n),
    )


def by_hand(client, clock, deadline=None, partial=False, keep=None):
    """Round by round and client by client: what arrives, its share, when, and ended."""
    now, rows = 0.0, []
    for r, ids in enumerate(client):
        came, share = {}, {}
        for i in ids:
            steps, step = int(clock.steps[i]), clock.step[r % len(clock.step), i]
            done, t = 0, clock.download[i]
            while done < steps and not (
                partial and t + step + clock.upload[i] > deadline
            ):
                done, t = done + 1, t + step
            t += clock.upload[i]
            share[i] = done / steps if steps else 1.0
            came[i] = t, not (partial and done == 0 and (steps or t > deadline))
        limit = np.inf if deadline is None else deadline
        in_time = sorted(t for t, able in came.values() if able and t <= limit)
        if keep is not None and len(in_time) >= keep:
            limit = in_time[keep - 1]
        arrives = [came[i][1] and came[i][0] <= limit for i in ids]
        rows.append((arrives, [share[i] for i in ids], [now + came[i][0] for i in ids]))
        now += min(limit, max(t for t, _ in came.values()))
        rows[-1] += (now,)
    return [np.array(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"deadline": 4.0},
        {"deadline": 4.0, "partial": True},
        {"keep": 3},
        {"keep": 3, "deadline": 3.0},
    ],
    ids=str,
)
def test_synchronous_policies(how):
    for seed in range(20):
        clock = random_clock(seed=seed)
        client = faults.cohorts(np.ones((5, 9), bool), 6, seed=seed)
        schedule = faults.synchronous(client, clock, **how)
        arrives, share, time, ended = by_hand(client, clock, **how)
        came = np.asarray(schedule.arrives)
        np.testing.assert_array_equal(came, arrives)
        np.testing.assert_allclose(schedule.share[came], share[came], rtol=1e-6)
        np.testing.assert_allclose(schedule.time[came], time[came], rtol=1e-5)
        np.testing.assert_allclose(schedule.ended, ended, rtol=1e-5)


def test_dropouts_happen_as_often_as_they_should():
    client = faults.cohorts(np.ones((3000, 10), bool), 8, seed=0)
    rates = np.where(np.arange(10) < 5, 0.2, 0.0)
    schedule = faults.synchronous(
        client, random_clock(10), dropout=Dropout(rates, 0.1, 0.3), seed=1
    )
    some = client < 5
    assert_rate(~schedule.asked[some], 0.2)
    assert schedule.asked[~some].all()
    assert_rate((schedule.asked & ~schedule.alive)[some], 0.1, correlated=0.9)
    assert_rate((schedule.alive & ~schedule.arrives), 0.3)
    with pytest.raises(ValueError, match="dropout"):
        faults.synchronous(client, random_clock(10), dropout=Dropout(0.5, 0.5))


def test_speeds_have_their_distributions():
    n = 100_000
    log = np.log(faults.log_normal(n, median=3.0, sigma=0.5, seed=0))
    assert abs(log.mean() - np.log(3.0)) < 4 * 0.5 / np.sqrt(n) < 0.01
    assert abs(log.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * n)
    slow = faults.pareto(n, least=2.0, tail=1.5, seed=0)
    assert_rate(slow > 8.0, 4.0**-1.5)


# --- corruption --------------------------------------------------------------


def test_corrupted_messages_are_told_and_those_not_finite_dropped():
    channel = jaxfl.chain(
        faults.corrupt(faults.becomes(jnp.nan), rate=0.3), jaxfl.mean()
    )
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), steps=1)
    state, history = simulate(
        None, jaxfl.federate(algorithm, channel), toy.data((2,) * 200), rounds=20
    )
    hit = history.clients.reports[0]["corrupted"] == 1
    np.testing.assert_array_equal(hit, history.clients.rejected)
    np.testing.assert_array_equal(~hit, history.clients.sent)
    std = np.sqrt(0.3 * 0.7 / hit.size)
    assert abs(hit.mean() - 0.3) < 4 * std < 0.04
    assert np.isfinite(state.params["w"]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_flipped_bits_are_one_in_so_many_numbers_and_anywhere(dtype):
    x = jnp.ones(40_000, dtype)
    word = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
    flipped = faults.flip_bits(0.25)(jax.random.key(0), x)
    assert flipped.dtype == dtype
    change = np.asarray(x.view(word) ^ flipped.view(word))
    assert_rate(change != 0, 0.25)
    width = 8 * x.dtype.itemsize
    counts = [(change == 2**b).sum() for b in range(width)]
    assert sum(counts) == (change != 0).sum()
    expected = sum(counts) / width
    assert np.abs(np.array(counts) - expected).max() < 5 * np.sqrt(expected)


def test_garbage_is_of_its_scale():
    got = faults.garbage(3.0)(
        jax.random.key(0), {"a": jnp.ones(20_000), "b": 1.0 * jnp.arange(4)}
    )
    assert abs(float(got["a"].std()) - 3.0) < 4 * 3.0 / np.sqrt(40_000)
    assert not np.allclose(got["a"][:4], got["b"])


# --- the history -------------------------------------------------------------


def test_time_to_a_target():
    schedule = eventful()
    _, history = simulate(
        schedule, evaluate=lambda state: {"round": state.round}, every=2
    )
    assert history.time.tolist() == [2.0, 4.0]
    bits = float(history.clients.bits_up.sum())
    assert history.reached("round", 3) == {"round": 4, "time": 4.0, "bits_up": bits}
    assert history.reached("round", 5) is None
    assert history.evaluation_table()["time"].tolist() == [2.0, 4.0]
    table = history.client_table()
    assert {"lost", "asked", "time"} <= set(table)
    _, without = simulate(None, evaluate=lambda state: {"round": state.round})
    with pytest.raises(ValueError, match="clock"):
        _ = without.time


def test_an_accountant_does_not_take_a_schedule():
    accounting = pytest.importorskip("jaxfl.accounting")
    channel = jaxfl.chain(jaxfl.clip(1.0), jaxfl.privacy.gaussian(1.0))
    with pytest.raises(ValueError, match="of a schedule nothing is known"):
        accounting.epsilon(
            channel, population=7, cohort=eventful(), rounds=4, delta=1e-5
        )
