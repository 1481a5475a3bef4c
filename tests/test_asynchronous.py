"""Asynchronous training: the events, the old models, and what is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import faults
from jaxfl.faults import Clock, Dropout


def clock(n=7, seed=0, rounds=None):
    shape = (n,) if rounds is None else (rounds, n)
    step = np.random.default_rng(seed).pareto(1.5, shape) + 1
    return Clock(np.full(n, 0.5), step, np.full(n, 2.0), np.full(n, 0.25))


def run(federation, schedule, weight=None, data=None):
    data = toy.data() if data is None else data
    return jaxfl.simulate(
        *(federation, toy.params(), data),
        rounds=schedule.rounds,
        cohort_size=schedule,
        key=jax.random.key(5),
        weight=weight,
        progress=False,
    )


# --- events ------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer, concurrency", [(1, 1), (1, 4), (3, 5), (5, 3), (7, 7)]
)
@pytest.mark.parametrize("rounds", [None, 3])
def test_events_are_those_of_a_naive_simulation(buffer, concurrency, rounds):
    """What the schedule says of who began when is checked instant by instant."""
    its = clock(rounds=rounds)
    schedule = faults.buffered(
        its, rounds=40, buffer=buffer, concurrency=concurrency, seed=0
    )
    client, tau = np.asarray(schedule.client), np.asarray(schedule.staleness)
    ended = np.concatenate([[0.0], schedule.ended])
    came = np.asarray(schedule.time, np.float64)
    assert all(len(set(row)) == buffer for row in client)
    assert (np.diff(came.ravel()) >= 0).all()  # in the order of arrival
    np.testing.assert_allclose(came[:, -1], ended[1:])
    turns = np.zeros(7, int)
    spans = []
    for r in range(40):
        for i, t, stale in zip(client[r], came[r], tau[r], strict=True):
            took = np.atleast_2d(its.turn)[turns[i] % (rounds or 1), i]
            turns[i] += 1
            began = t - took
            spans.append((i, began, t))
            version = r - stale  # the newest model when it began
            assert ended[version] <= began + 1e-3
            if stale:
                assert began < ended[version + 1] + 1e-3
    middle = ended[20] + 1e-3  # who is at work then, of those whose message has come
    at_work = {i for i, began, t in spans if began < middle < t}
    assert len(at_work) <= concurrency
    # Nobody has two turns at a time.
    for i in range(7):
        own = sorted((b, t) for j, b, t in spans if j == i)
        gaps = [
            later[0] - sooner[1] for sooner, later in zip(own, own[1:], strict=False)
        ]
        assert min(gaps, default=0) > -1e-3


def test_all_slots_are_always_at_work():
    """Equal turns: M clients finish in every turn, so a step takes K / M turns."""
    its = Clock(np.zeros(20), np.ones(20), np.ones(20), np.zeros(20))
    schedule = faults.buffered(its, rounds=30, buffer=4, concurrency=12, seed=0)
    assert schedule.ended[-1] == 30 * 4 / 12
    assert schedule.staleness.max() == 2  # two more buffers come at the same instant


def test_who_vanishes_is_replaced():
    its = Clock(np.zeros(20), np.ones(20), np.ones(20), np.zeros(20))
    schedule = faults.buffered(
        its, rounds=400, buffer=2, concurrency=4, dropout=Dropout(0.1, 0.1, 0.1), seed=0
    )
    turns = 4 * float(schedule.ended[-1])
    std = np.sqrt(0.7 * 0.3 / turns)
    assert abs(800 / turns - 0.7) < 4 * std < 0.07


@pytest.mark.parametrize(
    "word, how",
    [
        ("rounds", {"rounds": 0, "buffer": 1, "concurrency": 1}),
        ("buffer", {"rounds": 1, "buffer": 8, "concurrency": 1}),
        ("concurrency", {"rounds": 1, "buffer": 1, "concurrency": 0}),
    ],
)
def test_buffered_refuses(word, how):
    with pytest.raises(ValueError, match=word):
        faults.buffered(clock(), seed=0, **how)


# --- training ----------------------------------------------------------------


def fedbuff(versions, server_rate=1.0, **plan):
    algorithm = jaxfl.fedavg(
        toy.loss, optax.sgd(0.1), optax.sgd(server_rate), batch_size=None, epochs=2
    )
    channel = jaxfl.chain(faults.discount(faults.polynomial(0.5)), jaxfl.mean())
    return jaxfl.federate(jaxfl.asynchronous(algorithm, versions), channel, **plan)


def trained(w, x, steps=2, rate=0.1, pull=0.0):
    """Full-batch descent on toy.loss from the mean, float64, of one flat vector."""
    start = w
    for _ in range(steps):
        w = w - rate * (w - x + pull * (w - start)) if len(x) else w
    return w


def flat(params):
    return np.concatenate([np.asarray(params["w"]), [params["b"]]]).astype(np.float64)


def targets():
    x, y, ids = toy.examples()
    both = np.concatenate([x, y[:, None]], 1).astype(np.float64)
    return [both[ids == i].mean(0) if (ids == i).any() else [] for i in range(toy.N)]


def test_fedbuff_is_its_algorithm():
    schedule = faults.buffered(clock(), rounds=12, buffer=2, concurrency=4, seed=1)
    assert schedule.versions > 2
    state, history = run(fedbuff(schedule.versions, 0.7), schedule, np.ones(toy.N))
    models, x = [flat(toy.params())], targets()
    for t in range(12):
        deltas = []
        for i, tau in zip(schedule.client[t], schedule.staleness[t], strict=True):
            old = models[t - tau]
            deltas.append((old - trained(old, x[i])) / np.sqrt(1 + tau))
        models.append(models[t] - 0.7 * np.mean(deltas, 0))
    np.testing.assert_allclose(flat(state.params), models[-1], 1e-5, 1e-5)
    np.testing.assert_array_equal(history.clients.staleness, schedule.staleness)
    whole = 32 * 4  # bits of one model, not of all versions
    assert (history.clients.bits_down == whole).all()


def test_fedasync_is_its_algorithm():
    schedule = faults.buffered(clock(), rounds=12, buffer=1, concurrency=4, seed=1)
    algorithm = jaxfl.fedasync(
        *(toy.loss, optax.sgd(0.1), schedule.versions),
        mixing=0.6,
        rho=0.3,
        batch_size=None,
        epochs=2,
    )
    channel = jaxfl.chain(faults.discount(faults.hinge(0.5, 1.0)), jaxfl.mean())
    state, _ = run(jaxfl.federate(algorithm, channel), schedule, np.ones(toy.N))
    models, x = [flat(toy.params())], targets()
    for t in range(12):
        i, tau = int(schedule.client[t, 0]), int(schedule.staleness[t, 0])
        new = trained(models[t - tau], x[i], pull=0.3)
        alpha = 0.6 * (1 if tau <= 1 else 1 / (0.5 * (tau - 1) + 1))
        models.append((1 - alpha) * models[t] + alpha * new)
    np.testing.assert_allclose(flat(state.params), models[-1], 1e-5, 1e-5)


def test_without_delay_and_with_everyone_in_the_buffer_it_is_fedavg():
    n = toy.N
    alike = Clock(np.zeros(n), np.ones(n), np.ones(n), np.zeros(n))
    schedule = faults.buffered(alike, rounds=5, buffer=n, concurrency=n, seed=0)
    assert not schedule.staleness.any() and schedule.ended.tolist() == [1, 2, 3, 4, 5]
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2, epochs=2)
    channel = jaxfl.chain(faults.discount(faults.polynomial(0.5)), jaxfl.mean())
    asynchronous = jaxfl.federate(jaxfl.asynchronous(algorithm, 1), channel)
    synchronous = jaxfl.federate(algorithm, jaxfl.chain(jaxfl.identity(), channel))
    got, _ = run(asynchronous, schedule)
    want, _ = run(synchronous, schedule)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    everyone, _ = jaxfl.simulate(
        *(jaxfl.federate(algorithm, jaxfl.mean()), toy.params(), toy.data()),
        rounds=5,
        key=jax.random.key(5),
        progress=False,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
        *(got.params, everyone.params),
    )


@pytest.mark.parametrize("plan", [{"chunk_size": 1}, {"devices": 2}], ids=str)
def test_the_plan_does_not_matter(plan):
    schedule = faults.buffered(clock(), rounds=6, buffer=3, concurrency=4, seed=1)
    devices = plan.pop("devices", None)
    mesh = devices and jaxfl.client_mesh(jax.devices()[:devices])
    got = run(fedbuff(schedule.versions, mesh=mesh, **plan), schedule)
    want = run(fedbuff(schedule.versions), schedule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, want)


def test_a_round_in_which_nothing_comes_is_a_version_like_the_last():
    """The ring then holds fewer models than rounds, and each client finds its own."""
    schedule = faults.buffered(clock(), rounds=8, buffer=1, concurrency=4, seed=1)
    arrives = np.ones((8, 1), bool)
    arrives[2:6] = False
    schedule = schedule._replace(arrives=arrives)
    state, _ = run(fedbuff(schedule.versions), schedule, np.ones(toy.N))
    models, x = [flat(toy.params())], targets()
    for t in range(8):
        i, tau = int(schedule.client[t, 0]), int(schedule.staleness[t, 0])
        delta = (models[t - tau] - trained(models[t - tau], x[i])) / np.sqrt(1 + tau)
        models.append(models[t] - delta * arrives[t, 0])
    np.testing.assert_allclose(flat(state.params), models[-1], 1e-5, 1e-5)


def test_channels_see_the_version_that_the_client_had():
    """A threshold relative to the model takes the client's own, not the stack."""
    schedule = faults.buffered(clock(), rounds=6, buffer=2, concurrency=4, seed=1)
    seen = []

    def encode(ctx, message, server_state, client_state):
        seen.append(jax.tree.map(jnp.shape, ctx.broadcast))
        return message, client_state, {"model": ctx.broadcast["b"]}

    channel = jaxfl.chain(jaxfl.Channel(encode=encode), jaxfl.mean())
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=None)
    federation = jaxfl.federate(
        jaxfl.asynchronous(algorithm, schedule.versions), channel
    )
    _, history = run(federation, schedule)
    assert seen[0] == {"w": (3,), "b": ()}
    _, plain = run(jaxfl.federate(algorithm, channel), schedule)
    stale = np.asarray(schedule.staleness) > 0
    model = history.clients.reports[0]["model"]
    for r, k in np.argwhere(stale):
        first = r - schedule.staleness[r, k]
        fresh = [c for c in range(2) if not stale[first, c]]
        if fresh:  # who began in that round and was done in it had the same model
            assert model[r, k] == model[first, fresh[0]]
    assert not np.allclose(model, plain.clients.reports[0]["model"])


def test_asynchronous_refuses():
    nodes = jaxfl.local_models(toy.loss, optax.sgd(0.1))
    plain = jaxfl.fedavg(toy.loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match="given back"):
        jaxfl.asynchronous(nodes, 2)
    with pytest.raises(ValueError, match="versions must be"):
        jaxfl.asynchronous(plain, 0)
    with pytest.raises(ValueError, match="of its own"):
        jaxfl.asynchronous(jaxfl.asynchronous(plain, 2), 2)
    with pytest.raises(ValueError, match="several versions"):
        jaxfl.downlink(jaxfl.asynchronous(plain, 2), jaxfl.identity())
    with pytest.raises(TypeError, match="algorithm"):
        jaxfl.asynchronous(toy.loss, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rho"):
        algorithm = jaxfl.fedasync(toy.loss, optax.sgd(0.1), 2, rho=-1.0)
        jaxfl.federate(algorithm, jaxfl.mean()).init(toy.params(), toy.data())


def test_buffers_take_less_time_than_waiting_under_heavy_tails():
    its = clock(100)
    client = faults.cohorts(np.ones((50, 100), bool), 10, seed=0)
    waits = faults.synchronous(client, its)
    asynchronous = faults.buffered(its, rounds=50, buffer=10, concurrency=10, seed=0)
    assert asynchronous.ended[-1] < 0.5 * waits.ended[-1]
