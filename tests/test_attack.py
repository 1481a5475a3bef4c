"""Liars: who lies and when, what they send, and what they have trained on."""

import dataclasses
from statistics import NormalDist
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import attack
from jaxfl.attack.among import membership

LIARS = [1, 5]


def run(channel, aggregator=None, rounds=1, data=None, algorithm=None):
    """Rounds of everyone with weights of one: each state and info."""
    data = toy.data() if data is None else data
    if algorithm is None:
        algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.5), batch_size=None)
    federation = jaxfl.federate(algorithm, channel, aggregator)
    state = federation.init(toy.params(), data)
    cohort = toy.cohort(data)._replace(weight=jnp.ones(toy.N).at[4].set(0.0))
    step, done = jax.jit(federation.round), []
    for _ in range(rounds):
        state, info = step(jax.random.key(3), state, cohort)
        done.append((state, info))
    return done


def wire(channel, **how):
    """What each client sent in each round, `[N, 4]` each, and the rounds."""
    done = run(jaxfl.chain(channel, jaxfl.tap("before"), jaxfl.tap("wire")), **how)
    return [matrix(info.reports[-1]["wire"]) for _, info in done], done


def matrix(payload):
    return np.concatenate(
        [np.reshape(x, (x.shape[0], -1)) for x in jax.tree.leaves(payload)], 1
    )


def honest_messages():
    return wire(jaxfl.identity())[0][0]


# ------------------------------------------------------------------------ who, and when


def test_only_liars_lie():
    honest = honest_messages()
    want = honest.copy()
    want[LIARS] *= -3
    got, _ = wire(attack.among(LIARS, attack.sign_flip(3.0)))
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_liars_are_ids_or_flags():
    flags = np.isin(np.arange(toy.N), LIARS)
    for clients in (LIARS, np.array(LIARS), jnp.array(LIARS), flags, jnp.array(flags)):
        np.testing.assert_array_equal(membership(clients)(jnp.arange(toy.N)), flags)
        assert not membership(clients)(jnp.int32(toy.N))  # a row of padding
    for nobody in ([], np.zeros(0, int), np.zeros(toy.N, bool)):
        assert not membership(nobody)(jnp.arange(toy.N)).any()


@pytest.mark.parametrize(
    "rounds", [range(1, 4, 2), jnp.array([0, 1, 0, 1], bool), lambda r: r % 2 == 1]
)
def test_they_lie_in_those_rounds_only(rounds):
    """And a state of theirs moves then only: it counts the rounds in which it lied."""
    count = jaxfl.Channel(
        lambda payload: ((), jnp.int32(0)),
        lambda ctx, message, server, n: (
            message._replace(payload=optax.tree.scale(0.0, message.payload)),
            n + 1,
            {"lied": jnp.int32(1)},
        ),
    )
    lies = attack.among(LIARS, count, rounds)
    still = jaxfl.fedavg(toy.loss, optax.sgd(0.5), optax.sgd(0.0), batch_size=None)
    sent, done = wire(lies, rounds=5, algorithm=still)
    for r, (_, info) in enumerate(done):
        time = r in (1, 3)
        assert (np.abs(sent[r][LIARS]).sum() == 0) == time
        np.testing.assert_array_equal(
            info.reports[0]["lied"], np.isin(np.arange(toy.N), LIARS) & time
        )
        assert np.abs(sent[r][[0, 2, 3, 6]]).min() > 0
    counts = np.where(np.isin(np.arange(toy.N), LIARS), 2, 0)
    np.testing.assert_array_equal(done[-1][0].clients.channel[0], counts)


def test_a_liar_may_keep_silent_and_others_are_billed_as_ever():
    silent = jaxfl.gate(lambda ctx, payload: jnp.array(False), keep=False)
    _, info = run(attack.among(LIARS, silent))[0]
    _, plain = run(jaxfl.identity())[0]
    liars = np.isin(np.arange(toy.N), LIARS)
    np.testing.assert_array_equal(info.sent, plain.sent & ~liars)
    np.testing.assert_array_equal(info.bits_up, np.where(liars, 1, plain.bits_up))


def test_scenarios_are_a_vmap():
    """Sets of liars, when they lie, and how much: each run as it is alone."""

    def model(liars, epsilon, time):
        aggregator = attack.collude(
            jaxfl.median(), liars, attack.ipm(epsilon), rounds=time
        )
        channel = attack.among(liars, attack.sign_flip(epsilon), time)
        return run(channel, aggregator, rounds=2)[-1][0].params

    sets = jnp.array([[1, 5], [0, 2]])
    epsilon, time = jnp.array([0.5, 2.0]), jnp.array([[True, False], [True, True]])
    together = jax.jit(jax.vmap(model))(sets, epsilon, time)
    for i in range(2):
        alone = model(np.asarray(sets[i]), float(epsilon[i]), np.asarray(time[i]))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, 1e-5, 1e-6),
            together,
            alone,
        )


def test_who_and_when_are_checked():
    with pytest.raises(TypeError, match="clients must be ids"):
        attack.among([0.5], attack.sign_flip())
    with pytest.raises(TypeError, match="rounds must be None"):
        attack.among([1], attack.sign_flip(), rounds=[3, 4])
    with pytest.raises(ValueError, match="right of among"):
        attack.among([1], jaxfl.mean())
    vector = jaxfl.compress.rotation()  # of a message, in place of it
    with pytest.raises(TypeError, match="keep the shape"):
        attack.among([1], vector).init(toy.params())
    for part in (attack.sign_flip(), attack.noise(1.0), attack.scale(2.0)):
        with pytest.raises(TypeError, match="must be of floats"):
            part.init({"n": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="norm must be positive"):
        attack.scale(2.0, norm=0.0)


# ------------------------------------------------------------------ what one liar sends


def test_senders():
    honest = honest_messages()
    got, _ = wire(attack.among(LIARS, attack.scale(8.0, norm=4.0)))
    norms = np.linalg.norm(honest[LIARS], axis=1, keepdims=True)
    want = honest[LIARS] * np.minimum(8.0, 4.0 / norms)
    np.testing.assert_allclose(got[0][LIARS], want, rtol=1e-5)

    _, done = wire(attack.among(LIARS, attack.nan()), rounds=2)
    liars = np.isin(np.arange(toy.N), LIARS)
    for state, info in done:
        np.testing.assert_array_equal(info.rejected, liars)
        assert not info.sent[liars].any()
        assert jaxfl.tree.is_finite(state.params)


def test_noise_has_its_scale_and_each_liar_its_own():
    still = {"w": jnp.zeros(3), "b": jnp.zeros(2000)}

    def drawn(client, round):
        key = jax.random.fold_in(jax.random.key(round), client)
        message = jaxfl.Message(still, jnp.float32(1.0), jnp.float32(0.0))
        ctx = SimpleNamespace(key=key)
        return attack.noise(3.0).encode(ctx, message, (), ())[0].payload["b"]

    draws = np.stack([drawn(c, r) for c in range(2) for r in range(2)])
    # 2000 draws: the variance is within 5 standard deviations, each sqrt(2 / 2000)
    np.testing.assert_allclose(draws.var(1) / 9.0, 1.0, atol=5 * (2 / 2000) ** 0.5)
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / 2000**0.5


def test_model_replacement_replaces_the_model():
    """One liar with gamma = n / eta, the others at rest: its model is the next one."""
    n, eta = 4, 0.5
    y = jnp.array([0.0, 0.0, 0.0, 8.0])
    data = jaxfl.from_arrays(jnp.zeros((n, 3)), y, np.arange(n))
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(1.0), optax.sgd(eta), batch_size=None)
    channel = jaxfl.chain(attack.among([3], attack.scale(n / eta)), jaxfl.mean())
    federation = jaxfl.federate(algorithm, channel)
    start = {"w": jnp.zeros(3), "b": jnp.float32(0.0)}
    cohort = jaxfl.Cohort(jnp.arange(n), data, jnp.ones(n), jnp.ones(n, bool))
    state = federation.init(start, data)
    state, _ = jax.jit(federation.round)(jax.random.key(0), state, cohort)
    np.testing.assert_allclose(state.params["b"], 8.0)


# ------------------------------------------------------------ what liars craft together


def rows_of(seed=0, good=7, d=30, spread=1.0):
    """Honest rows, then two liars' and one of somebody who sent nothing."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(2.0, spread, (good + 3, d)) * rng.uniform(0.5, 2, d)
    rows[-1] = 0
    honest = np.arange(good + 3) < good
    liars = np.isin(np.arange(good + 3), [good, good + 1])
    return rows.astype(np.float32), honest, liars


def craft(craft, rows, honest, liars, state=None, seed=0):
    ctx = SimpleNamespace(key=jax.random.key(seed), roster=jnp.arange(len(rows)))
    state = craft.init(jnp.zeros(rows.shape[1])) if state is None else state
    lie, state = craft.apply(
        ctx, jnp.asarray(rows), jnp.asarray(honest), jnp.asarray(liars), state
    )
    return np.asarray(lie), state


@pytest.mark.parametrize("good", [4, 7, 18])
def test_alie_is_the_papers(good):
    rows, honest, liars = rows_of(good=good)
    x = rows[honest].astype(np.float64)
    n, f = good + 2, 2
    supporters = n // 2 + 1 - f
    z = NormalDist().inv_cdf((n - f - supporters) / (n - f))
    got, _ = craft(attack.alie(), rows, honest, liars)
    np.testing.assert_allclose(got, x.mean(0) - z * x.std(0), rtol=1e-4, atol=1e-4)
    got, _ = craft(attack.alie(1.5), rows, honest, liars)
    np.testing.assert_allclose(got, x.mean(0) - 1.5 * x.std(0), rtol=1e-4, atol=1e-4)


def test_alie_of_a_majority_is_finite():
    rows, honest, liars = rows_of(good=1)
    assert np.isfinite(craft(attack.alie(), rows, honest, liars)[0]).all()


def test_ipm_is_the_papers_and_turns_the_mean():
    rows, honest, liars = rows_of()
    got, _ = craft(attack.ipm(0.3), rows, honest, liars)
    mean = rows[honest].astype(np.float64).mean(0)
    np.testing.assert_allclose(got, -0.3 * mean, rtol=1e-5)
    # a mean of all: (n - f (1 + epsilon)) / n of the honest one, with equal weights
    still = jaxfl.fedavg(toy.loss, optax.sgd(0.5), batch_size=None)
    lied_to = attack.collude(jaxfl.total(), LIARS, attack.ipm(4.0))
    state, _ = run(jaxfl.mean(), lied_to, algorithm=still)[0]
    good = honest_messages()[[0, 2, 3, 6]].astype(np.float64).mean(0)
    moved = optax.tree.sub(toy.params(), state.params)
    moved = np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)])
    np.testing.assert_allclose(moved, (6 - 2 * (1 + 4.0)) / 6 * good, 1e-4, 1e-5)


def by_halving(allowed, largest=10.0, tolerance=1e-5):
    """Algorithm 1 of Shejwalkar and Houmansadr."""
    gamma, step, found = largest, largest, 0.0
    while abs(found - gamma) > tolerance:
        if allowed(gamma):
            found, gamma = gamma, gamma + step / 2
        else:
            gamma -= step / 2
        step /= 2
    return found


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize(
    "direction",
    [
        lambda mean, std: -std,
        lambda mean, std: -mean / (mean**2).sum() ** 0.5,
        lambda mean, std: -(mean / abs(mean)),
    ],
    ids=["std", "unit", "sign"],
)
def test_min_max_and_min_sum_are_the_papers(direction, spread):
    rows, honest, liars = rows_of(seed=1, spread=spread)
    x = rows[honest].astype(np.float64)
    mean = x.mean(0)
    p = direction(mean, x.std(0))
    apart = ((x[:, None] - x) ** 2).sum(-1)

    def off(gamma):
        return ((mean + gamma * p - x) ** 2).sum(-1)

    for part, allowed in (
        (attack.min_max, lambda g: off(g).max() <= apart.max()),
        (attack.min_sum, lambda g: off(g).sum() <= apart.sum(1).max()),
    ):
        gamma = by_halving(allowed)
        assert gamma > 0.01
        got, _ = craft(part(direction), rows, honest, liars)
        np.testing.assert_allclose(got, mean + gamma * p, rtol=1e-3, atol=1e-3)


def mimicked(rounds, honest, warmup, drawn):
    """Oja's rule and the target, as the paper's authors wrote them; in float64."""
    mu = z = target = None
    for t, rows in enumerate(rounds):
        x = rows[honest].astype(np.float64)
        if t < warmup:
            mu = x.mean(0) if mu is None else t / (1 + t) * mu + x.mean(0) / (1 + t)
            before = drawn if z is None else z
            turned = sum((g - mu) @ before * (g - mu) for g in x)
            turned /= np.linalg.norm(turned)
            z = turned if z is None else t / (1 + t) * z + turned / (1 + t)
            z /= np.linalg.norm(z)
            target = int(np.argmax(x @ z))
        assert z is not None
        yield rows[target], z


@pytest.mark.parametrize("warmup", [1, 4])
def test_mimic_is_the_papers(warmup):
    rounds = [rows_of(seed=s, spread=3.0)[0] for s in range(6)]
    _, honest, liars = rows_of()
    drawn = np.asarray(jax.random.normal(jax.random.key(0), (30,)), np.float64)
    state, targets = None, []
    for rows, (want, z) in zip(
        rounds, mimicked(rounds, honest, warmup, drawn), strict=True
    ):
        got, state = craft(attack.mimic(warmup), rows, honest, liars, state)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(state.z, z, rtol=1e-3, atol=1e-4)
        targets.append(int(state.target))
    assert len(set(targets[warmup - 1 :])) == 1
    # when the target is away, the lie is still somebody's honest message
    away = honest & (np.arange(len(honest)) != targets[-1])
    got, later = craft(attack.mimic(warmup), rounds[0], away, liars, state)
    assert any((got == row).all() for row in rounds[0][away])
    assert later.target == targets[-1]


def test_oja_finds_where_clients_differ_most():
    """The direction of the largest eigenvalue of their covariance."""
    rng = np.random.default_rng(0)
    axis = rng.normal(size=30)
    axis /= np.linalg.norm(axis)
    place = np.linspace(-5, 5, 8)
    honest = np.arange(10) < 8
    state = None
    for _ in range(20):
        rows = rng.normal(0, 0.3, (10, 30))
        rows[:8] += place[:, None] * axis
        rows = rows.astype(np.float32)
        _, state = craft(attack.mimic(20), rows, honest, ~honest, state)
    assert state is not None
    assert abs(np.asarray(state.z) @ axis) > 0.99
    assert int(state.target) in (0, 7)  # one of the two at the ends


def seen_by(inner, seen):
    """An aggregator that also keeps the stack it was given, as its state."""

    def apply(ctx, payload, sent, state):
        payload_out, delivered, _ = inner.apply(ctx, payload, sent, ())
        return payload_out, delivered, payload

    def init(payload):
        return jax.tree.map(lambda x: jnp.zeros((toy.N, *x.shape), x.dtype), payload)

    return jaxfl.Aggregator(init, apply)


def test_the_stack_has_the_lies_in_the_liars_rows_and_nowhere_else():
    honest = honest_messages()
    spied = seen_by(jaxfl.median(), None)
    lied_to = attack.collude(spied, [1, 4, 5], attack.ipm(2.0), rounds=range(1))
    first, second = run(jaxfl.identity(), lied_to, rounds=2)
    got = matrix(first[0].server.aggregator[0])
    want = honest.copy()
    want[LIARS] = -2 * honest[[0, 2, 3, 6]].mean(0)
    want[4] = 0  # a liar that has sent nothing
    np.testing.assert_allclose(got, want, rtol=1e-5)
    plain, _ = wire(jaxfl.identity(), aggregator=lied_to, rounds=2)
    np.testing.assert_allclose(
        matrix(second[0].server.aggregator[0]), plain[1] * (np.arange(7) != 4)[:, None]
    )


def test_liars_alone_send_zeros():
    lied_to = attack.collude(jaxfl.median(), range(toy.N), attack.ipm(2.0))
    state, info = run(jaxfl.identity(), lied_to)[0]
    assert info.sent.sum() == 6
    jax.tree.map(np.testing.assert_array_equal, state.params, toy.params())


def test_crafts_are_checked():
    with pytest.raises(ValueError, match="warmup must be at least 1"):
        attack.mimic(0)
    with pytest.raises(ValueError, match="largest must be above tolerance"):
        attack.min_max(largest=1e-6)
    with pytest.raises(TypeError, match="collude: payload must be of floats"):
        lied_to = attack.collude(jaxfl.total(), [1], attack.ipm(1.0))
        lied_to.init({"n": jnp.zeros(2, jnp.int32)})
    assert attack.collude(jaxfl.total(), [1], attack.ipm(1.0)).makes_sum
    assert not attack.collude(jaxfl.median(), [1], attack.ipm(1.0)).makes_sum


# ------------------------------------------------------------------------ poisoned data


def digits():
    rng = np.random.default_rng(0)
    x = rng.integers(1, 255, (60, 4, 4, 1)).astype(np.uint8)
    return jaxfl.from_arrays(x, rng.integers(0, 10, 60), rng.permutation(60) % 5, 5)


def test_label_flip_touches_the_labels_of_these_clients():
    data = digits()
    flipped = attack.label_flip(data, [1, 3], 10)
    assert flipped.examples["x"] is data.examples["x"]
    assert flipped.index is data.index
    rows = jaxfl.data.client_rows(data)
    for i, r in enumerate(rows):
        y = data.examples["y"][r]
        want = 9 - y if i in (1, 3) else y
        np.testing.assert_array_equal(flipped.examples["y"][r], want)
    by_map = attack.label_flip(data, np.arange(5) == 2, {7: 1}).examples["y"]
    y = data.examples["y"]
    np.testing.assert_array_equal(
        np.flatnonzero(by_map != y), np.sort(rows[2][y[rows[2]] == 7])
    )
    assert (by_map[rows[2]] != 7).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_backdoor_marks_a_share_of_these_clients(share):
    data = digits()
    poisoned = attack.backdoor(data, [1, 3], attack.stamp(2), 0, share=share, seed=0)
    for i, r in enumerate(jaxfl.data.client_rows(data)):
        x, was = poisoned.examples["x"][r], data.examples["x"][r]
        marked = (x[:, -2:, -2:] == 255).all((1, 2, 3))
        np.testing.assert_array_equal(x[~marked], was[~marked])
        np.testing.assert_array_equal(x[:, :2], was[:, :2])
        np.testing.assert_array_equal(x[:, :, :2], was[:, :, :2])
        y = poisoned.examples["y"][r]
        np.testing.assert_array_equal(y, np.where(marked, 0, data.examples["y"][r]))
        assert marked.sum() == (np.ceil(share * len(r)) if i in (1, 3) else 0)
    assert (data.examples["x"] < 255).all()
    again = attack.backdoor(data, [1, 3], attack.stamp(2), 0, share=share, seed=0)
    np.testing.assert_array_equal(again.examples["x"], poisoned.examples["x"])


def test_poison_is_checked():
    data = digits()
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        attack.backdoor(data, [1], attack.stamp(), 0, share=2.0, seed=0)
    with pytest.raises(ValueError, match="clients must be below 5"):
        attack.label_flip(data, [5], 10)
    with pytest.raises(TypeError, match="clients must be ids"):
        attack.label_flip(data, [0.5], 10)
    everyone = dataclasses.replace(data, start=np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="shares an example"):
        attack.label_flip(everyone, [1], 10)


def test_a_model_learns_the_trigger_and_nothing_else_is_said_of_it():
    test = {"x": digits().examples["x"], "y": digits().examples["y"]}
    marked = attack.triggered(test, attack.stamp(2), 3)
    assert len(marked["y"]) == (test["y"] != 3).sum() and (marked["y"] == 3).all()
    assert (marked["x"][:, -2:, -2:] == 255).all()
