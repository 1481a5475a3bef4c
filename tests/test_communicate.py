"""When to send: every rule against float64 NumPy, over rounds, clients and absences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl import chain, communicate, mean

R, N, D = 12, 5, 3
RNG = np.random.default_rng(0)
UPDATES = RNG.normal(size=(R, N, D)).astype(np.float32) * RNG.choice(
    [0.3, 1.0, 2.0], (R, N, 1)
).astype(np.float32)
ALIVE = RNG.random((R, N)) < 0.8
START = np.array([1.0, -2.0, 0.5], np.float32)
RATE = 0.3


class Server(NamedTuple):
    params: dict


def tree(row):
    return {"w": row[:2], "b": row[2]}


def flat(x):
    return jnp.append(x["w"], x["b"])


def scripted():
    """Clients whose update in round t is the t-th row of their data."""

    def client(ctx, broadcast, client_state, data):
        return tree(data[ctx.round]), client_state, {}

    def server(ctx, state, outcome):
        return Server(optax.tree.add_scale(state.params, -RATE, outcome.payload))

    return jaxfl.Algorithm(
        lambda params: (Server(params), ()),
        client,
        server,
        broadcast=lambda state: state.params,
    )


def run(channel, updates=UPDATES, alive=ALIVE, weight=None):
    """Of every round: the model before it, what was sent and what it cost."""
    n = updates.shape[1]
    data = jnp.asarray(updates.swapaxes(0, 1))
    federation = jaxfl.federate(scripted(), chain(channel, jaxfl.tap("wire")))
    state = federation.init(tree(jnp.asarray(START)), data)
    weight = jnp.ones(n) if weight is None else jnp.asarray(weight)

    def step(state, alive):
        cohort = jaxfl.Cohort(jnp.arange(n), data, weight, alive)
        new, info = federation.round(jax.random.key(0), state, cohort)
        return new, (flat(state.params), info)

    state, (models, info) = jax.lax.scan(step, state, jnp.asarray(alive))
    *reports, wire = info.reports
    wire = np.concatenate([wire["wire"]["w"], wire["wire"]["b"][..., None]], -1)
    return np.asarray(models), info, reports[0], wire, state


def numpy_gate(opens, keep, updates=UPDATES, alive=ALIVE):
    """What each client sends, NaN where nothing, by `opens(t, update, w)`; the models.

    The server takes the mean of what was sent.
    """
    w = START.astype(np.float64)
    kept = np.zeros(updates.shape[1:])
    sent, models = np.full(updates.shape, np.nan), []
    for t, rows in enumerate(updates.astype(np.float64)):
        models.append(w)
        for i in np.flatnonzero(alive[t]):
            update = rows[i] + kept[i] * keep
            if opens(t, update, w):
                sent[t, i], kept[i] = update, 0.0
            else:
                kept[i] = update
        if not np.isnan(sent[t]).all():
            w = w - RATE * np.nanmean(sent[t], axis=0)
    return sent, np.array(models)


def check(got, want_sent, want_models, alive=ALIVE):
    """The same clients sent the same for the right number of bits."""
    models, info, report, wire, _ = got
    opened = ~np.isnan(want_sent).any(-1)
    assert opened.any() and not opened[alive].all()
    np.testing.assert_array_equal(np.asarray(report["open"]) & alive, opened)
    np.testing.assert_array_equal(info.sent, opened)
    np.testing.assert_allclose(wire[opened], want_sent[opened], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(models, want_models, rtol=1e-5, atol=1e-5)
    # 96 bits of numbers, 32 of a weight, and the flag
    np.testing.assert_array_equal(info.bits_up, alive * (1 + 128 * opened))


kept_or_dropped = pytest.mark.parametrize(
    "keep", [True, False], ids=["kept", "dropped"]
)
THRESHOLDS: dict[str, optax.ScalarOrSchedule] = {
    "constant": 1.5,
    "decaying": optax.exponential_decay(3.0, 1, 0.85),
}


@kept_or_dropped
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_norm_threshold(threshold: optax.ScalarOrSchedule, keep):
    at = [threshold(t) if callable(threshold) else threshold for t in range(R)]
    got = run(chain(communicate.norm_threshold(threshold, keep=keep), mean()))
    check(got, *numpy_gate(lambda t, x, w: np.linalg.norm(x) >= at[t], keep))
    norms = np.asarray(got[2]["norm"])[0, ALIVE[0]]
    want = np.linalg.norm(UPDATES[0], axis=-1)[ALIVE[0]]
    np.testing.assert_allclose(norms, want, rtol=1e-6)


@kept_or_dropped
def test_relative_threshold(keep):
    channel = communicate.relative_threshold(0.6, keep=keep, model=lambda b: b)
    want = numpy_gate(
        lambda t, x, w: np.linalg.norm(x) >= 0.6 * np.linalg.norm(w), keep
    )
    check(run(chain(channel, mean())), *want)


def test_a_threshold_at_its_border_sends():
    x = jnp.array([3.0, 4.0])
    message = jaxfl.Message(x, jnp.float32(1), jnp.float32(64))
    for threshold, sent in ((5.0, True), (5.001, False)):
        channel = communicate.norm_threshold(threshold, keep=False)
        _, _, report = channel.encode(None, message, (), ())
        assert report["open"] == sent


@kept_or_dropped
def test_target_rate_equals_numpy(keep):
    """tau exp(step (sent / alive - rate)), round by round."""
    tau, taus = 1.0, []

    def opens(t, x, w):
        return np.linalg.norm(x) >= taus[t]

    # the reference needs tau before it knows who sent: one round after another
    for t in range(R):
        taus.append(tau)
        sent, _ = numpy_gate(opens, keep, UPDATES[: t + 1], ALIVE)
        share = (~np.isnan(sent[t]).any(-1)).sum() / ALIVE[t].sum()
        tau *= np.exp(0.5 * (share - 0.4))
    channel = communicate.target_rate(0.4, initial=1.0, step=0.5, keep=keep)
    got = run(chain(channel, mean()))
    check(got, *numpy_gate(opens, keep))
    np.testing.assert_allclose(got[4].server.channel[0], tau, rtol=1e-5)
    reported = np.nanmax(np.asarray(got[2]["threshold"]), axis=1)
    np.testing.assert_allclose(reported, taus, rtol=1e-5)


def test_target_rate_is_met():
    """From a threshold that is far off, on updates that shrink tenfold."""
    rounds = 300
    updates = np.random.default_rng(1).normal(size=(rounds, 20, D))
    updates *= np.geomspace(1.0, 0.1, rounds)[:, None, None]
    channel = communicate.target_rate(0.3, initial=20.0, step=0.5, keep=False)
    everyone = np.ones((rounds, 20), bool)
    _, info, _, _, _ = run(chain(channel, mean()), updates.astype(np.float32), everyone)
    rate = np.asarray(info.sent)[100:].mean()
    assert abs(rate - 0.3) < 0.03, rate


def test_target_rate_waits_while_nobody_is_there():
    alive = np.zeros((R, N), bool)
    channel = communicate.target_rate(0.3, initial=2.0, step=1.0, keep=False)
    assert run(chain(channel, mean()), alive=alive)[4].server.channel[0] == 2.0


@kept_or_dropped
def test_cmfl(keep):
    """Signs that agree with the last mean that there was; all send at first."""
    last: list = [None]
    sent_in = {}

    def opens(t, x, w):
        if t not in sent_in:  # a new round: what the last one with messages moved
            if t and sent_in[t - 1] is not None:
                moved = sent_in[t - 1] - w
                last[0] = moved if np.abs(moved).max() > 0 else last[0]
            sent_in[t] = w
        if last[0] is None:
            return True
        return np.mean(np.sign(x) == np.sign(last[0])) >= 0.6

    want = numpy_gate(opens, keep)
    got = run(chain(communicate.cmfl(0.6, keep=keep), mean()))
    check(got, *want)
    assert np.asarray(got[1].sent)[0, ALIVE[0]].all()
    relevance = np.asarray(got[2]["relevance"])[ALIVE]
    assert {round(float(x), 3) for x in relevance} <= {0.0, 0.333, 0.667, 1.0}


def test_cmfl_remembers_the_last_update_that_there_was():
    """A round in which nobody sends would else be followed by no other."""
    up = np.full((1, 1, D), 1.0, np.float32)
    updates = np.concatenate([up, -up, up])
    _, info, _, _, _ = run(
        chain(communicate.cmfl(0.9, keep=False), mean()), updates, np.ones((3, 1), bool)
    )
    assert info.sent[:, 0].tolist() == [True, False, True]


def check_repeated(got, sent, used, models):
    """Rules that go on with what was sent last: everyone alive enters the sum."""
    found, info, report, wire, _ = got
    assert sent.any() and not sent[ALIVE].all()
    np.testing.assert_array_equal(np.asarray(report["open"]) & ALIVE, sent)
    np.testing.assert_array_equal(info.sent, ALIVE)
    np.testing.assert_allclose(wire[ALIVE], used[ALIVE], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, models, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(info.bits_up, ALIVE * (1 + 96 * sent))


def test_last_sent_threshold():
    w, last = START.astype(np.float64), N * [np.full(D, np.nan)]
    sent, used, models = np.zeros((R, N), bool), np.zeros((R, N, D)), []
    for t in range(R):
        models.append(w)
        for i in np.flatnonzero(ALIVE[t]):
            own = w - UPDATES[t, i]
            sent[t, i] = not np.linalg.norm(own - last[i]) <= 1.5  # nor NaN, at first
            last[i] = own if sent[t, i] else last[i]
            used[t, i] = w - last[i]
        w = w - RATE * used[t, ALIVE[t]].sum(0) / N
    channel = chain(communicate.last_sent_threshold(1.5), mean(denominator=N))
    check_repeated(run(channel), sent, used, models)


def test_lag():
    """Rule (15a) with D = 3, and updates that change little from round to round."""
    xi, alpha = np.array([0.5, 0.3, 0.2]), 0.3
    updates = np.cumsum(UPDATES * 0.3, axis=0, dtype=np.float32)
    w, last = START.astype(np.float64), N * [np.full(D, np.nan)]
    past = [w] * 4
    sent, used, models = np.zeros((R, N), bool), np.zeros((R, N, D)), []
    for t in range(R):
        models.append(w)
        past = [w, *past[:3]]
        steps = np.array([np.sum((past[d] - past[d + 1]) ** 2) for d in range(3)])
        bound = (xi * steps).sum() / (alpha * N) ** 2
        for i in np.flatnonzero(ALIVE[t]):
            fresh = updates[t, i].astype(np.float64)
            sent[t, i] = not np.sum((fresh - last[i]) ** 2) <= bound  # nor NaN
            last[i] = fresh if sent[t, i] else last[i]
            used[t, i] = last[i]
        w = w - RATE * used[t, ALIVE[t]].sum(0) / N
    channel = chain(communicate.lag(alpha, xi), mean(denominator=N))
    check_repeated(run(channel, updates), sent, used, models)


def test_lag_reaches_the_optimum_with_fewer_gradients():
    """Least squares whose workers differ in smoothness, as in the paper's figure 3."""
    rng, n = np.random.default_rng(3), 8
    x = rng.normal(size=(n, 10, 3)) * np.geomspace(0.1, 1.0, n)[:, None, None]
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.1 * rng.normal(size=(n, 10))
    data = jaxfl.from_arrays(
        np.float32(x.reshape(-1, 3)), np.float32(y.ravel()), np.repeat(np.arange(n), 10)
    )

    def loss(w, batch, key):
        return 0.5 * (batch["x"] @ w - batch["y"]) ** 2

    eta = 1.0
    descent = jaxfl.fedavg(loss, optax.sgd(1.0), optax.sgd(eta), batch_size=None)

    def gradients(channel):
        federation = jaxfl.federate(descent, chain(channel, mean(denominator=n)))
        state = federation.init(jnp.zeros(3), data)
        state, (info, _) = jaxfl.scan_rounds(
            federation, state, data, rounds=150, key=jax.random.key(0)
        )
        return state.params, info.reports[0]["open"].sum()

    w, sent = jax.jit(lambda: gradients(communicate.lag(eta / n)))()
    best = np.linalg.lstsq(x.reshape(-1, 3), y.ravel(), rcond=None)[0]
    np.testing.assert_allclose(w, best, atol=2e-3)
    assert sent < 0.5 * 150 * n, sent


def test_gaia():
    def threshold(t):
        return 1.0 / np.sqrt(t + 1.0)

    w, waiting = START.astype(np.float64), np.zeros((N, D))
    used, models = np.zeros((R, N, D)), []
    for t in range(R):
        models.append(w)
        for i in np.flatnonzero(ALIVE[t]):
            waiting[i] += UPDATES[t, i]
            chosen = np.abs(waiting[i] / w) > threshold(t)
            used[t, i], waiting[i] = waiting[i] * chosen, waiting[i] * ~chosen
        w = w - RATE * used[t, ALIVE[t]].sum(0) / N
    channel = communicate.gaia(lambda t: 1.0 / jnp.sqrt(t + 1.0))
    models_, info, report, wire, state = run(chain(channel, mean(denominator=N)))
    count = (used != 0).sum(-1)
    assert {0, 1, 2, 3} <= set(count[ALIVE])
    np.testing.assert_allclose(wire[ALIVE], used[ALIVE], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(models_, models, rtol=1e-5, atol=1e-5)
    kept = jax.vmap(flat)(state.clients.channel[0])
    np.testing.assert_allclose(kept, waiting, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(report["significant"][ALIVE], count[ALIVE] / D)
    # of three parameters a bitmap of three bits is the shorter
    np.testing.assert_array_equal(info.bits_up, ALIVE * (1 + 3 + 32 * count))


@pytest.mark.parametrize("n, places", [(0, 32), (3, 62), (50, 532), (97, 1000)])
def test_gaia_names_few_parameters_by_their_places(n, places):
    """d = 1000, so ten bits a place; a bitmap from 97 places on. bf16 and f32 mixed."""
    payload = {"a": jnp.zeros(600, jnp.bfloat16), "b": jnp.zeros(400)}
    payload["b"] = payload["b"].at[:n].set(1.0)
    payload["a"] = payload["a"].at[: n // 2].set(1.0)
    channel = communicate.gaia(0.5, model=lambda b: jax.tree.map(jnp.ones_like, b))
    message = jaxfl.Message(payload, jnp.float32(1), jnp.float32(1))
    ctx = jaxfl.Context(*[None] * 7, broadcast=payload)  # type: ignore[arg-type]
    zeros = jax.tree.map(jnp.zeros_like, payload)
    sent, _, _ = channel.encode(ctx, message, (), zeros)
    both = min(1000, 32 + 10 * (n + n // 2))
    assert sent.bits == 1 + both + 32 * n + 16 * (n // 2)
    if n < 50:
        assert both == 32 + 10 * (n + n // 2)


CHANNELS = {
    "norm_threshold": lambda h: communicate.norm_threshold(h, keep=True),
    "relative_threshold": lambda h: communicate.relative_threshold(0.5 * h, keep=True),
    "target_rate": lambda h: communicate.target_rate(
        0.4 * h, initial=h, step=0.5 * h, keep=False
    ),
    "cmfl": lambda h: communicate.cmfl(0.5 * h, keep=False),
    "last_sent_threshold": lambda h: communicate.last_sent_threshold(h),
    "lag": lambda h: communicate.lag(0.1 * h, jnp.array([0.5, 0.5])),
    "gaia": lambda h: communicate.gaia(h),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_thresholds_vmap(name):
    """A sweep in one run is the runs one after another, and the threshold matters."""

    def result(h):
        federation = jaxfl.federate(scripted(), chain(CHANNELS[name](h), mean()))
        data = jnp.asarray(UPDATES.swapaxes(0, 1))
        state = federation.init(tree(jnp.asarray(START)), data)
        state, (info, _) = jaxfl.scan_rounds(
            federation, state, data, rounds=R, key=jax.random.key(0)
        )
        return flat(state.params), info.bits_up

    h = jnp.array([0.3, 0.9, 1.5])
    together = jax.jit(jax.vmap(result))(h)
    for i in range(3):
        for got, want in zip(together, result(h[i]), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
    assert len({float(x.sum()) for x in together[1]}) > 1


@pytest.mark.parametrize("name", CHANNELS)
def test_a_client_without_weight_sends_a_flag_at_most(name):
    weight = np.ones(N, np.float32)
    weight[2] = 0.0
    everyone = np.ones((R, N), bool)
    channel = chain(CHANNELS[name](0.3), mean())
    models, info, _, _, _ = run(channel, alive=everyone, weight=weight)
    assert (info.bits_up[:, 2] <= 1).all() and not info.sent[:, 2].any()
    others = [0, 1, 3, 4]
    if name not in ("target_rate", "lag"):  # which count the clients
        want, _, _, _, _ = run(channel, UPDATES[:, others], everyone[:, others])
        np.testing.assert_allclose(models, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: communicate.norm_threshold(-1.0, keep=True), "threshold .*-1.0"),
        (lambda: communicate.relative_threshold(-2, keep=True), "threshold .*-2"),
        (lambda: communicate.last_sent_threshold(float("nan")), "threshold .*nan"),
        (lambda: communicate.gaia(-0.1), "threshold .*-0.1"),
        (lambda: communicate.cmfl(1.1, keep=True), "threshold .*1.1"),
        (lambda: communicate.lag(0.0), "rate .*0.0"),
        (lambda: communicate.lag(0.1, []), "xi"),
        (
            lambda: communicate.target_rate(1.5, initial=1.0, step=1.0, keep=True),
            "rate .*1.5",
        ),
        (
            lambda: communicate.target_rate(0.5, initial=0.0, step=1.0, keep=True),
            "initial .*0.0",
        ),
        (
            lambda: communicate.target_rate(0.5, initial=1.0, step=-1.0, keep=True),
            "step .*-1.0",
        ),
    ],
)
def test_impossible_rules(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", CHANNELS)
def test_payloads_are_floats(name):
    with pytest.raises(TypeError, match=f"{name}: payload must be of floats"):
        CHANNELS[name](0.5).init(jnp.zeros(2, jnp.int32))
