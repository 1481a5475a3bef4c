"""Whole runs: sampling, histories, checkpoints, interruptions."""

import concurrent.futures
import functools
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.checkpoint import digest
from jaxfl.sampling import Cyclic, draws_of_run
from jaxfl.simulate import _segment, scan_rounds

FEDERATION = jaxfl.federate(
    jaxfl.fedavg(toy.loss, optax.sgd(0.1, 0.5), optax.adam(0.05), batch_size=2),
    jaxfl.chain(jaxfl.at_client(optax.add_noise(0.1, 0.0, key=0)), jaxfl.mean()),
)


POISSON = jaxfl.Poisson(3, overflow=0.1)  # five rows, which may be too few


def evaluate(state):
    return {"b": state.params["b"], "w": state.params["w"]}


def run(rounds=6, federation=FEDERATION, seed=0, **options):
    """A run whose clients hold random keys, and whose server holds Adam's moments."""
    options = {"cohort_size": 3, "evaluate": evaluate, "progress": False} | options
    return jaxfl.simulate(
        federation,
        toy.params(),
        toy.data(),
        rounds=rounds,
        key=jax.random.key(seed),
        **options,
    )


def assert_same(got, want):
    def leaf(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(leaf, got, want)


def assert_same_run(got, want):
    assert_same(got[0], want[0])
    assert_same(got[1].clients, want[1].clients)
    assert_same(got[1].evaluations, want[1].evaluations)
    np.testing.assert_array_equal(got[1].round, want[1].round)


def start(code, **environment):
    """A process that runs this code, with the tests and the package to import."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- histories ---------------------------------------------------------------


@pytest.mark.parametrize(
    "every, at", [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_evaluations_are_made_every_so_many_rounds(every, at):
    state, history = run(5, every=every)
    assert history.round.tolist() == at
    assert history["b"].shape == (len(at),) and history["w"].shape == (len(at), 3)
    assert history.clients.client.shape == (5, 3)
    assert history.clients.metrics["loss"].shape == (5, 3)
    assert history["b"][-1] == state.params["b"] and state.round == 5
    fine = run(5)[1]
    np.testing.assert_array_equal(history["b"], fine["b"][np.array(at) - 1])


@pytest.mark.parametrize("every, size", [(2, 3), (3, 3), (7, 3), (3, POISSON)])
def test_segments_do_not_matter_to_the_bit(every, size):
    got, got_history = run(7, every=every, cohort_size=size)
    want, want_history = run(7, cohort_size=size)
    assert_same(got, want)
    assert_same(got_history.clients, want_history.clients)


@pytest.mark.parametrize("size", [3, POISSON])
def test_scan_rounds_is_simulate(size):
    start = FEDERATION.init(toy.params(), toy.data())
    state, (info, evaluations) = jax.jit(
        lambda state: scan_rounds(
            FEDERATION,
            state,
            toy.data(),
            rounds=6,
            key=jax.random.key(0),
            cohort_size=size,
            evaluate=evaluate,
            every=2,
        )
    )(start)
    want, history = run(6, every=2, cohort_size=size)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        (state.params, evaluations, info.metrics),
        (want.params, history.evaluations, history.clients.metrics),
    )
    assert_same(info.client, history.clients.client)


def test_the_seed_makes_the_run():
    assert_same_run(run(3, seed=1), run(3, seed=1))
    a, b = run(3, seed=1), run(3, seed=2)
    assert a[0].params["b"] != b[0].params["b"]
    assert (a[1].clients.client != b[1].clients.client).any()


def compiled():
    return _segment._cache_size()  # type: ignore[attr-defined]


def test_the_second_run_compiles_nothing():
    run(4, every=2)
    before = compiled()
    run(4, every=2)
    run(8, every=2, seed=5)
    assert compiled() == before > 0
    run(4, every=4)
    assert compiled() == before + 1


def counted_run():
    """For the subprocesses below: prints how many programs the cache had, and not."""
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    run(1)
    folder = "/jax/compilation_cache"
    print(*(events.count(f"{folder}/cache_{what}") for what in ("hits", "misses")))


def test_a_second_process_compiles_nothing(tmp_path):
    """Whatever the order of its sets: a program is a function of what it computes."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    counts = []
    for seed in "12":
        code = "import test_simulate as t; t.counted_run()"
        process = start(code, PYTHONHASHSEED=seed, **cache)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        counts.append([int(count) for count in out.split()])
    (_, compiled), (found, missed) = counts
    assert compiled > 0 and missed == 0 and found >= compiled


def host_owned(x):
    """Whether NumPy itself holds the memory, and not a buffer of the device."""
    while isinstance(x, np.ndarray) and x.base is not None:
        x = x.base
    return isinstance(x, np.ndarray)


def test_nothing_grows_but_the_history():
    live, programs = [], []

    def until(metrics):
        arrays = jax.live_arrays()
        live.append((len(arrays), sum(x.nbytes for x in arrays)))
        programs.append(compiled())
        assert host_owned(metrics["w"])
        return False

    run(200, until=until)
    assert live[9] == live[199] and programs[9] == programs[199]


def test_checkpoints_leave_no_arrays(tmp_path):
    run(1)
    gc.collect()
    before = len(jax.live_arrays())
    run(20, checkpoint=tmp_path, checkpoint_every=1)
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_the_users_arrays_stay():
    params, data = toy.params(), toy.data()
    for _ in range(2):
        jaxfl.simulate(
            FEDERATION, params, data, rounds=2, key=jax.random.key(0), progress=False
        )
    assert_same(params, toy.params())
    assert_same(data.examples, toy.data().examples)


def test_until():
    _, history = run(6)
    enough = history["b"][2]
    state, stopped = run(6, until=lambda metrics: metrics["b"] == enough)
    assert state.round == 3 and stopped.round.tolist() == [1, 2, 3]
    assert_same(stopped["b"], history["b"][:3])


@pytest.mark.parametrize("options", [{}, {"evaluate": None}, {"every": 4}], ids=str)
def test_the_progress_bar_changes_nothing(options, capsys):
    shown = run(6, progress=True, **options)
    assert "6/6" in capsys.readouterr().out
    assert_same_run(shown, run(6, **options))


# --- cohorts -----------------------------------------------------------------


def test_gradients_go_through_the_draw_of_few_of_many():
    y = jnp.linspace(0.0, 1.0, 20_000)
    data = jaxfl.from_arrays(y, y, np.arange(len(y)))

    def final(rate):
        algorithm = jaxfl.fedavg(lambda w, b, key: (w - b["y"]) ** 2, optax.sgd(rate))
        federation = jaxfl.federate(algorithm, jaxfl.mean())
        state = federation.init(jnp.float32(0), data)
        return scan_rounds(
            federation, state, data, rounds=2, key=jax.random.key(0), cohort_size=3
        )[0].params

    slope = jax.grad(final)(0.1)
    assert abs(slope) > 0.01
    np.testing.assert_allclose(slope, jax.jacfwd(final)(0.1), rtol=1e-6)


def test_cohorts_differ_between_rounds():
    clients = run(6)[1].clients.client
    assert len({tuple(sorted(c)) for c in clients.tolist()}) > 1
    assert all(len(set(c)) == 3 for c in clients.tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_cyclic_cohorts_keep_clients_apart(size):
    rounds = 30
    clients = run(rounds, cohort_size=Cyclic(size))[1].clients.client
    often = np.bincount(clients.ravel(), minlength=toy.N)
    assert often.max() - often.min() <= 1
    for client in range(toy.N):
        (at,) = np.nonzero((clients == client).any(1))
        assert np.diff(at).min() >= toy.N // size
    # One order, again and again.
    order = clients.ravel()[: toy.N]
    assert sorted(order) == list(range(toy.N)) and list(order) != sorted(order)
    np.testing.assert_array_equal(clients.ravel(), np.resize(order, clients.size))


def test_cyclic_cohorts_of_a_long_run():
    """Where t K is no int32."""
    n, size, t, key = 1_000_003, 9_999, 3_000_000, jax.random.key(0)
    order = np.asarray(draws_of_run(key, n, Cyclic(n))(0))
    got = jax.jit(draws_of_run(key, n, Cyclic(size)))(t)
    np.testing.assert_array_equal(got, order[(t * size + np.arange(size)) % n])


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, word, options",
    [
        (ValueError, "rounds", {"rounds": 0}),
        (ValueError, "rounds", {"rounds": 2.0}),
        (ValueError, "every", {"every": 0}),
        (ValueError, "cohort_size", {"cohort_size": 0}),
        (ValueError, "cohort_size", {"cohort_size": 8}),
        (ValueError, "expected", {"cohort_size": jaxfl.Poisson(7)}),
        (ValueError, "expected", {"cohort_size": jaxfl.Poisson(0)}),
        (ValueError, "overflow", {"cohort_size": jaxfl.Poisson(3, overflow=0.0)}),
        (ValueError, "cohort_size", {"cohort_size": Cyclic(8)}),
        (ValueError, "weight", {"weight": np.ones(3)}),
        (ValueError, "checkpoint_every", {"every": 2, "checkpoint_every": 3}),
        (ValueError, "checkpoint_every", {"checkpoint_every": 0}),
        (ValueError, "until", {"evaluate": None, "until": bool}),
        (ValueError, "weight", {"weight": -np.ones(toy.N)}),
        (ValueError, "weight", {"weight": np.full(toy.N, np.nan)}),
        (TypeError, "key", {"key": 0}),
        (TypeError, "key", {"key": jax.random.split(jax.random.key(0))}),
    ],
)
def test_arguments(error, word, options):
    options = {"rounds": 2, "key": jax.random.key(0), "progress": False} | options
    with pytest.raises(error, match=word):
        jaxfl.simulate(FEDERATION, toy.params(), toy.data(), **options)


@pytest.mark.parametrize("rounds, every", [(5, 2), (0, 1), (2, 0)])
def test_scan_rounds_arguments(rounds, every):
    data = toy.data()
    state = FEDERATION.init(toy.params(), data)
    with pytest.raises(ValueError, match="every must divide rounds"):
        scan_rounds(
            FEDERATION, state, data, rounds=rounds, every=every, key=jax.random.key(0)
        )


# --- checkpoints -------------------------------------------------------------


@pytest.mark.parametrize(
    "every, first, size", [(1, 4, 3), (2, 4, 3), (2, 3, 3), (2, 4, POISSON)]
)
def test_a_run_goes_on_to_the_bit(tmp_path, every, first, size):
    """Also where it first ended in the middle of a segment, but for the history."""
    this_run = functools.partial(run, every=every, cohort_size=size)
    this_run(first, checkpoint=tmp_path, checkpoint_every=every)
    got = this_run(8, checkpoint=tmp_path, checkpoint_every=2 * every)
    want = this_run(8)
    assert_same(got[0], want[0])
    assert_same(got[1].clients, want[1].clients)
    assert len(got[1].round) == len(got[1]["b"])
    for r, b in zip(got[1].round, got[1]["b"], strict=True):
        assert r % every or b == want[1]["b"][r // every - 1]
    if first % every == 0:
        assert_same_run(got, want)
    assert_same_run(this_run(8, checkpoint=tmp_path), got)  # nothing to do


class Killed(Exception):
    pass


def stop_after(round, how):
    """An `until` that ends the process, or the call, at a round."""
    seen = []

    def until(metrics):
        seen.append(metrics)
        if len(seen) == round:
            how()
        return False

    return until


def die():
    raise Killed


@pytest.mark.parametrize("spacing", [2, 4])
def test_a_run_that_died_between_checkpoints(tmp_path, spacing):
    """After round 5, saved at 2 and 4; then with other distances between them."""
    with pytest.raises(Killed):
        run(8, checkpoint=tmp_path, checkpoint_every=2, until=stop_after(5, die))
    wait_for_checkpoint(tmp_path, 4)
    with pytest.raises(Killed):
        until = stop_after(3, die)
        run(8, checkpoint=tmp_path, checkpoint_every=spacing, until=until)
    assert_same_run(run(8, checkpoint=tmp_path), run(8))


def test_what_a_killed_process_left_is_not_used(tmp_path):
    """It died after a piece of history, before the state that follows."""
    run(4, checkpoint=tmp_path, checkpoint_every=2)
    folder = tmp_path / "history"
    orphan = (folder / f"{4:09d}.npz").read_bytes()
    (folder / f"{6:09d}.npz").write_bytes(orphan)
    partial = folder / f"{7:09d}.partial", tmp_path / "state/7.orbax-checkpoint-tmp"
    partial[0].touch()
    partial[1].mkdir()
    run(8, checkpoint=tmp_path, checkpoint_every=4)
    assert not any(p.exists() for p in partial)
    assert_same_run(run(8, checkpoint=tmp_path), run(8))


@pytest.mark.parametrize(
    "word, options",
    [
        ("key", {"seed": 1}),
        ("cohort_size", {"cohort_size": 2}),
        ("cohort_size", {"cohort_size": POISSON}),
        ("cohort_size", {"cohort_size": Cyclic(3)}),
        ("weight", {"weight": np.arange(toy.N)}),
        ("every", {"every": 2}),
    ],
    ids=["key", "cohort_size", "Poisson", "Cyclic", "weight", "every"],
)
def test_another_run_is_not_gone_on_with(tmp_path, word, options):
    run(2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint: .*{word}"):
        run(4, checkpoint=tmp_path, **options)


def test_other_params_or_fewer_rounds_are_not_gone_on_with(tmp_path):
    run(2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="rounds: .* holds 2, more than 1"):
        run(1, checkpoint=tmp_path)
    other = jax.tree.map(lambda x: x + 1, toy.params())
    with pytest.raises(ValueError, match="checkpoint: .*params"):
        jaxfl.simulate(
            FEDERATION,
            other,
            toy.data(),
            rounds=4,
            key=jax.random.key(0),
            cohort_size=3,
            checkpoint=tmp_path,
        )


def test_a_run_goes_on_over_other_devices(tmp_path):
    """Its state comes back to the devices of the federation that goes on."""
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.adam(0.05), batch_size=2)
    channel = jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean())
    want = run(6, jaxfl.federate(algorithm, channel))
    for i, mesh in enumerate([None, jaxfl.client_mesh(), None], 1):
        federation = jaxfl.federate(algorithm, channel, mesh=mesh)
        got = run(2 * i, federation, checkpoint=tmp_path, checkpoint_every=1)
        devices = {x.sharding.num_devices for x in jax.tree.leaves(got[0])}
        assert devices == {1 if mesh is None else mesh.size}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        (got[0], got[1]["w"]),
        (want[0], want[1]["w"]),
    )


@pytest.mark.parametrize("other", ["examples", "partition", "more"])
def test_other_data_are_not_gone_on_with(tmp_path, other):
    x, y, ids = toy.examples()

    def go_on(x, y, ids):
        data = jaxfl.from_arrays(x, y, ids)
        key = jax.random.key(0)
        options = {"progress": False, "checkpoint": tmp_path}
        jaxfl.simulate(FEDERATION, toy.params(), data, rounds=1, key=key, **options)

    go_on(x, y, ids)
    go_on(x.copy(), y, ids)
    if other == "examples":
        x = x + 1
    elif other == "partition":
        ids = ids[::-1]
    else:
        x, y = np.concatenate([x, x]), np.concatenate([y, y])
        ids = np.concatenate([ids, ids])
    with pytest.raises(ValueError, match="checkpoint: .*data"):
        go_on(x, y, ids)


def test_the_digest_of_much_data_reads_a_little(tmp_path):
    """A tenth of a GB, of which the file has nothing: it is sparse."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (100_000, 1000))
    read = []

    class Counted(np.memmap):
        def __getitem__(self, index):
            read.append(super().__getitem__(index).nbytes)
            return super().__getitem__(index)

    zeros = digest(x.view(Counted), most=2**20)
    assert 2**19 < sum(read) < 2**21
    x[0] = 1
    assert digest(x, most=2**20) != zeros


def test_another_federation_is_not_gone_on_with(tmp_path):
    run(2, checkpoint=tmp_path)
    other = jaxfl.federate(jaxfl.fedavg(toy.loss, optax.sgd(0.1)), jaxfl.mean())
    with pytest.raises(ValueError, match="checkpoint: .*another federation"):
        run(4, federation=other, checkpoint=tmp_path)


# --- interruptions -----------------------------------------------------------


def checkpoints(folder):
    names = [p.name for p in (Path(folder) / "state").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def wait_for_checkpoint(folder, step, process=None):
    end = time.monotonic() + 240
    while not [s for s in checkpoints(folder) if s >= step]:
        assert process is None or process.poll() is None, "it ended of itself"
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.02)


ROUNDS = 400


def killed_run(folder):
    """For the subprocess below, which saves all the time and never gets to the end."""
    run(ROUNDS, checkpoint=folder, checkpoint_every=1)


def test_kill_9_at_random_moments_and_resume(tmp_path):
    code = f"import conftest, test_simulate as t; t.killed_run({str(tmp_path)!r})"
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(3):
        process = start(code)
        try:
            wait_for_checkpoint(tmp_path, done + 1, process)
            time.sleep(rng.uniform(0, 0.2))
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = checkpoints(tmp_path)[-1]
    assert 3 <= done < ROUNDS
    resumed = run(ROUNDS, checkpoint=tmp_path, checkpoint_every=200)
    assert_same_run(resumed, run(ROUNDS))


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def handlers():
    """Both signals raise, so that none ends the tests; a run puts that back."""

    def handler(number, frame):
        raise Killed(signal.Signals(number).name)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {n: signal.signal(n, old) for n, old in before.items()}
    assert after == dict.fromkeys(before, handler)


@SIGNALS
def test_a_signal_keeps_what_was_done(tmp_path, handlers, number):
    with pytest.warns(UserWarning, match=f"after 3 of 8 rounds by {number.name}"):
        until = stop_after(3, lambda: signal.raise_signal(number))
        state, history = run(8, checkpoint=tmp_path, until=until)
    assert_same_run((state, history), run(3))
    assert_same_run(run(8, checkpoint=tmp_path), run(8))


def test_a_signal_in_the_last_segment_is_not_swallowed(handlers):
    with pytest.warns(UserWarning, match="after 3 of 3 rounds by SIGTERM"):
        got = run(3, until=stop_after(3, lambda: signal.raise_signal(signal.SIGTERM)))
    assert_same_run(got, run(3))


@SIGNALS
def test_a_second_signal_acts_as_it_would_have(handlers, number):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(number)

    with pytest.raises(Killed, match=number.name):
        run(8, until=stop_after(3, twice))


def test_ctrl_c_twice_interrupts_at_once():
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(8, until=stop_after(3, twice))
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_in_other_threads(handlers):
    before = signal.getsignal(signal.SIGTERM)

    def until(metrics):
        assert signal.getsignal(signal.SIGTERM) is before
        return False

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert_same_run(pool.submit(run, 3, until=until).result(), run(3))
