"""A population on the host: the run that it is with all on the device, to the bit."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest
import toy
from test_simulate import (
    Killed,
    assert_same,
    assert_same_run,
    checkpoints,
    die,
    evaluate,
    stop_after,
    wait_for_checkpoint,
)

import jaxfl
from jaxfl.data import group
from jaxfl.simulate import _streamed_segment
from jaxfl.stream import HostStates, gather

# Clients hold random keys and a momentum, the server holds Adam's moments.
CHANNEL = jaxfl.chain(
    jaxfl.at_client(optax.chain(optax.add_noise(0.1, 0.0, key=0), optax.trace(0.5))),
    jaxfl.mean(),
)
ALGORITHM = jaxfl.fedavg(toy.loss, optax.sgd(0.1, 0.5), optax.adam(0.05), batch_size=2)
FEDERATION = jaxfl.federate(ALGORITHM, CHANNEL)


def population(seed=0):
    x, y, ids = toy.examples(seed)
    return jaxfl.from_arrays(x, y, ids, toy.N)


def run(data, rounds=7, federation=FEDERATION, **options):
    defaults = {"cohort_size": 3, "every": 2, "evaluate": evaluate, "progress": False}
    state, history = jaxfl.simulate(
        federation,
        toy.params(),
        data,
        rounds=rounds,
        key=jax.random.key(0),
        **(defaults | options),
    )
    if isinstance(state.clients, HostStates):
        everyone = state.clients[np.arange(len(state.clients))]
        state = state._replace(clients=everyone)
    return state, history


# --- the same run ------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, states, cohort_size",
    [
        ("whole", False, 3),
        ("whole", "folder", 3),
        ("whole", True, None),
        ("one by one", True, 3),
        ("mesh", False, None),
        ("mesh", True, 3),
        ("whole", False, jaxfl.Poisson(3)),
        ("mesh", True, jaxfl.Poisson(2, overflow=0.2)),
    ],
)
def test_a_streamed_run_is_the_resident_run(tmp_path, plan, states, cohort_size):
    """Ragged clients, one of them without examples; the last segment is shorter."""
    options = {
        "whole": {},
        "one by one": {"chunk_size": 1},
        "mesh": {"mesh": jaxfl.client_mesh(jax.devices()[:4]), "chunk_size": 2},
    }[plan]
    federation = jaxfl.federate(ALGORITHM, CHANNEL, **options)
    states = tmp_path / "states" if states == "folder" else states
    data = jaxfl.on_host(population(), states=states)
    got = run(data, federation=federation, cohort_size=cohort_size)
    want = run(population(), federation=federation, cohort_size=cohort_size)
    assert_same_run(got, want)
    assert np.ptp(np.asarray(want[0].clients.channel[0][1].trace["b"])) > 0.01


@pytest.mark.parametrize("states", [False, True])
def test_clients_that_keep_models_of_their_own(states):
    federation = jaxfl.federate(
        jaxfl.isolated(toy.loss, optax.sgd(0.1), batch_size=2), jaxfl.mean()
    )
    options = {"federation": federation, "evaluate": None}
    got = run(jaxfl.on_host(population(), states=states), **options)
    assert_same_run(got, run(population(), **options))


def test_weights_and_until():
    options = {
        "weight": np.arange(toy.N),  # int64
        "until": lambda metrics: len(seen.append(metrics) or seen) == 2,
    }
    seen = []
    got = run(jaxfl.on_host(population(), states=True), **options)
    seen = []
    want = run(population(), **options)
    assert_same_run(got, want)
    assert got[0].round == 4


@pytest.mark.parametrize("size", [5, jaxfl.Poisson(1.5)])
def test_large_populations_and_types_that_a_device_has_not(size):
    """Of 20,000 clients few are drawn in another way; float64 is made float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    index = rng.integers(0, 500, 40_000)  # clients share examples
    start = 2 * np.arange(20_000, dtype=np.int32)
    two = np.full(20_000, 2, np.int32)
    examples = {"x": x, "y": rng.integers(0, 9, 500)}
    data = jaxfl.ClientData(examples, index, start, two, 2, 2)
    got = run(jaxfl.on_host(data, states=True), cohort_size=size)
    assert_same_run(got, run(data, cohort_size=size))


@pytest.mark.parametrize("longest", [3, 40])
def test_few_sizes_of_cohorts_are_compiled_for(longest):
    """Where clients are alike, one: segments differ in how many were drawn twice."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(200), rng.integers(1 if longest > 3 else 2, longest, 200))
    data = group({"x": rng.normal(size=(len(ids), 3)), "y": np.zeros(len(ids))}, ids)
    before = _streamed_segment._cache_size()  # type: ignore[attr-defined]
    _, history = run(jaxfl.on_host(data), rounds=20, cohort_size=40)
    after = _streamed_segment._cache_size()  # type: ignore[attr-defined]
    drawn = {len(set(c)) for c in history.clients.client.reshape(10, 80).tolist()}
    assert len(drawn) > 3
    assert 1 <= after - before <= (1 if longest == 3 else 4)


def test_the_second_run_compiles_nothing():
    run(jaxfl.on_host(population(), states=True))
    before = _streamed_segment._cache_size()  # type: ignore[attr-defined]
    run(jaxfl.on_host(population(), states=True))
    assert _streamed_segment._cache_size() == before  # type: ignore[attr-defined]


# --- what is read, and what is held ------------------------------------------


class Source:
    """All that the examples of a population have to have; and a log of the reads."""

    def __init__(self, array, fail_at=None):
        self.array, self.fail_at, self.reads = array, fail_at, []
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, rows):
        assert np.all(np.diff(rows) > 0)
        self.reads.append(rows)
        if len(self.reads) == self.fail_at:
            raise OSError("the disk is gone")
        return self.array[rows]


def sources(clients=1000, fail_at=None):
    ids = np.repeat(np.arange(clients), np.arange(clients) % 3 + 1)
    x = np.random.default_rng(0).normal(size=(len(ids), 3)).astype(np.float32)
    examples = {"x": Source(x, fail_at), "y": Source(x[:, 0])}
    return group(examples, ids), group({"x": x, "y": x[:, 0]}, ids)


def test_one_read_a_segment_of_the_clients_drawn():
    streamed, plain = sources()
    state, history = run(jaxfl.on_host(streamed), every=2)
    assert_same_run((state, history), run(plain, every=2))
    reads = streamed.examples["x"].reads
    assert len(reads) == 4
    held = [
        plain.index[s : s + n] for s, n in zip(plain.start, plain.size, strict=True)
    ]
    for rows, first in zip(reads, range(0, 7, 2), strict=True):
        drawn = history.clients.client[first : first + 2].ravel()
        want = np.concatenate([held[i] for i in drawn])
        np.testing.assert_array_equal(rows, np.unique(want))


def test_the_device_has_no_other_examples():
    streamed, _ = sources()
    mine, sizes = {id(x) for x in jax.live_arrays()}, []

    def look(metrics):
        arrays = [x for x in jax.live_arrays() if id(x) not in mine]
        sizes.append(max(x.size for x in arrays))
        return False

    run(jaxfl.on_host(streamed, states=True), until=look)
    assert len(sizes) == 4
    assert max(sizes) <= 3 * 2 * 3 * 3  # a segment's; the population has 6,000 numbers


def test_states_that_were_never_written_take_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    states = HostStates(lambda ids: jnp.ones((len(ids), 1000)), 50_000)  # 200 MB
    ids = np.arange(0, 50_000, 5000)
    states[ids] = states[ids] + 1
    assert process.memory_info().rss - before < 100e6
    np.testing.assert_array_equal(states[np.array([5000, 1])][:, 0], [2, 1])


@pytest.mark.parametrize("ids", [[[3, 1], [4, 1]], [[4, 4]], [[0], [6]]], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_gather(ids, shared):
    data = population()
    if shared:
        index = np.random.default_rng(0).integers(0, 5, len(data.index))
        data = jaxfl.ClientData(data.examples, index, data.start, data.size, 0, 5)
    got = gather(data, np.array(ids))
    assert got.start.shape == got.size.shape == np.shape(ids)
    assert (got.shortest, got.longest) == (data.shortest, data.longest)
    for place, client in np.ndenumerate(ids):
        at = jnp.arange(data.size[client])
        assert got.size[place] == len(at)
        assert_same(got[place].take(at), data[client].take(at))


# --- threads -----------------------------------------------------------------


@pytest.fixture
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not [t for t in left if t.name.startswith("ThreadPoolExecutor")]


@pytest.mark.usefixtures("no_thread_is_left")
def test_what_the_thread_raises_is_raised(tmp_path):
    streamed, plain = sources(fail_at=4)
    options = {"checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(OSError, match="the disk is gone"):
        run(jaxfl.on_host(streamed, states=True), **options)
    got = run(jaxfl.on_host(streamed, states=True), **options)
    assert_same_run(got, run(plain))


@pytest.mark.usefixtures("no_thread_is_left")
def test_ctrl_c_keeps_what_was_done():
    data = jaxfl.on_host(population(), states=True)
    with pytest.warns(UserWarning, match="interrupted after 4 of 8 rounds"):
        got = run(
            data, 8, until=stop_after(2, lambda: signal.raise_signal(signal.SIGINT))
        )
    assert_same_run(got, run(population(), 4))

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(data, 8, until=stop_after(2, twice))


# --- checkpoints -------------------------------------------------------------


@pytest.mark.parametrize("states", [False, True, "folder"])
def test_a_run_that_died_between_checkpoints(tmp_path, states):
    folder, states = tmp_path / "run", tmp_path if states == "folder" else states
    data = jaxfl.on_host(population(), states=states)
    options = {"checkpoint": folder, "checkpoint_every": 2, "every": 1}
    with pytest.raises(Killed):
        run(data, until=stop_after(5, die), **options)
    with pytest.raises(Killed):
        run(data, until=stop_after(2, die), **options)
    got = run(data, checkpoint=folder, every=1)
    assert_same_run(got, run(population(), every=1))
    assert_same_run(run(data, checkpoint=folder, every=1), got)  # nothing to do


def test_states_whose_round_was_never_saved_are_not_used(tmp_path):
    """The process died after writing states, before the round they are of."""
    data = jaxfl.on_host(population(), states=True)
    run(data, 4, checkpoint=tmp_path / "other", cohort_size=None)
    orphan = (tmp_path / "other" / "clients" / f"{4:09d}.npz").read_bytes()
    for died_at, rounds in (2, 4), (6, 8):
        folder = tmp_path / "run" / "clients"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{died_at:09d}.npz").write_bytes(orphan)
        run(data, rounds, checkpoint=tmp_path / "run", checkpoint_every=4)
    got = run(data, 10, checkpoint=tmp_path / "run")
    assert_same_run(got, run(population(), 10))


def test_where_the_examples_are_does_not_matter_to_a_checkpoint(tmp_path):
    run(population(), 2, checkpoint=tmp_path)
    run(jaxfl.on_host(population()), 4, checkpoint=tmp_path)
    assert_same_run(run(population(), 7, checkpoint=tmp_path), run(population(), 7))


def test_where_the_states_are_does(tmp_path):
    run(population(), 2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint: .*another federation"):
        run(jaxfl.on_host(population(), states=True), 4, checkpoint=tmp_path)


def test_states_of_16_bits_are_restored():
    rows = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2)}
    states = HostStates(lambda ids: jax.tree.map(lambda x: x[ids], rows), 3)
    states[np.array([1])] = {"w": jnp.full((1, 2), 7, jnp.bfloat16)}
    copy = HostStates(lambda ids: jax.tree.map(lambda x: x[ids], rows), 3)
    copy.restore(*states.unsaved())
    assert copy[np.arange(3)]["w"].dtype == jnp.bfloat16
    assert copy[np.arange(3)]["w"].tolist() == [[0, 1], [7, 7], [4, 5]]
    assert not len(copy.unsaved()[0]) and not len(states.unsaved()[0])


ROUNDS = 60


def slow_run(folder, states):
    """For the subprocess below: it would take much longer than until its death."""
    import time

    data = jaxfl.on_host(population(), states=states)
    pause = lambda metrics: time.sleep(0.15)  # noqa: E731
    run(data, ROUNDS, checkpoint=folder, checkpoint_every=2, until=pause)


def test_kill_9_and_resume(tmp_path):
    here, folder, states = Path(__file__).parent, tmp_path / "run", tmp_path / "states"
    arguments = f"{str(folder)!r}, {str(states)!r}"
    code = f"import conftest, test_stream as t; t.slow_run({arguments})"
    paths = os.pathsep.join([str(here), str(here.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        wait_for_checkpoint(folder, 6, process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 6 <= checkpoints(folder)[-1] < ROUNDS
    data = jaxfl.on_host(population(), states=states)
    resumed = run(data, ROUNDS, checkpoint=folder, checkpoint_every=100)
    assert_same_run(resumed, run(population(), ROUNDS))


# --- rows --------------------------------------------------------------------


def test_states_are_found_by_row():
    """The same round on some clients' states; a row of padding writes nothing."""
    data = population()
    key, ids, pad = jax.random.key(0), jnp.array([5, 2, 0]), jnp.iinfo(jnp.int32).max
    whole = FEDERATION.init(toy.params(), data)
    some = FEDERATION.init(toy.params(), data, ids)
    assert_same(some.clients, jax.tree.map(lambda x: x[ids], whole.clients))
    cohort = toy.cohort(data, [0, 5, 6], alive=[True, True, False])
    one_round = jax.jit(FEDERATION.round)
    want, want_info = one_round(key, whole, cohort)
    cohort = cohort._replace(row=jnp.array([2, 0, pad]))
    got, info = one_round(key, some, cohort)
    assert_same(info, want_info)
    assert_same(got.server, want.server)
    assert_same(got.clients, jax.tree.map(lambda x: x[ids], want.clients))


def test_rows_have_the_shape_of_the_cohort():
    cohort = toy.cohort(population())._replace(row=jnp.zeros(2, jnp.int32))
    state = FEDERATION.init(toy.params(), population())
    with pytest.raises(ValueError, match="cohort.row"):
        FEDERATION.round(jax.random.key(0), state, cohort)


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, word, data",
    [
        (TypeError, "ClientData", np.zeros((7, 3))),
        (TypeError, "NumPy", toy.data()),
        (TypeError, "NumPy", dataclasses.replace(population(), examples="x.npy")),
        (ValueError, "several clients", population()[0]),
        (ValueError, "one partition", jaxfl.data.stack([population()] * 2)),
    ],
    ids=["array", "device", "file", "one", "stack"],
)
def test_arguments(error, word, data):
    with pytest.raises(error, match=word):
        jaxfl.on_host(data)


def test_sizes_are_checked_before_anything_is_read():
    streamed, _ = sources()
    with pytest.raises(ValueError, match="cohort_size"):
        run(jaxfl.on_host(streamed), cohort_size=1001)
    assert not streamed.examples["x"].reads
