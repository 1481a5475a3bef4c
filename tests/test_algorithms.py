"""Algorithms on heterogeneous quadratics, against float64 NumPy of their papers.

Client i minimises `1/2 (w - b_i)' A_i (w - b_i)`, ill-conditioned and its own; it has
n_i copies of that as its examples, so that a batch of any size has the same gradient
and only the number of steps differs between clients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfl
from jaxfl import local
from jaxfl.algorithms import fedopt

N, D, RATE = 6, 4, 0.05
rng = np.random.default_rng(0)
TURN = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(N)]
A = np.stack([q @ np.diag(np.geomspace(0.2, 10.0, D)) @ q.T for q in TURN])
B = rng.normal(size=(N, D))
OPTIMUM = np.linalg.solve(A.sum(0), np.einsum("nij,nj->i", A, B))
START = rng.normal(size=D)


def loss(w, batch, key):
    d = w - batch["y"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", d, batch["x"], d)


def population(sizes):
    ids = np.repeat(np.arange(N), sizes)
    return jaxfl.from_arrays(jnp.float32(A[ids]), jnp.float32(B[ids]), ids)


EQUAL = population([1] * N)
RAGGED = population([1, 2, 3, 4, 5, 6])


def run(algorithm, rounds, data=EQUAL, size=None, start=START):
    federation = jaxfl.federate(algorithm, jaxfl.mean())

    @jax.jit
    def whole(start):
        state = federation.init(start, data)
        return jaxfl.scan_rounds(
            *(federation, state, data),
            rounds=rounds,
            key=jax.random.key(0),
            cohort_size=size,
            weight=jnp.ones(N),
        )[0]

    return whole(jnp.float32(start))


def slope(i, w):
    return A[i] @ (w - B[i])


def value(i, w):
    return 0.5 * (w - B[i]) @ A[i] @ (w - B[i])


def descend(gradient, w, steps, rate=RATE):
    for _ in range(steps):
        w = w - rate * gradient(w)
    return w


def close(state, want, tolerance=2e-5):
    np.testing.assert_allclose(state.params, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------ against the papers


def test_fedprox():
    mu, w = 0.7, START
    for _ in range(3):
        w = np.mean(
            [
                descend(lambda x, i=i, w=w: slope(i, x) + mu * (x - w), w, 4)
                for i in range(N)
            ],
            axis=0,
        )
    close(run(jaxfl.fedprox(loss, optax.sgd(RATE), mu, steps=4), 3), w)


@pytest.mark.parametrize("exact", [True, False], ids=["option I", "option II"])
def test_scaffold(exact):
    x, c, own, k, eta_g = START, np.zeros(D), np.zeros((N, D)), 3, 0.8
    for _ in range(4):
        y = [
            descend(lambda w, g=c - own[i], i=i: slope(i, w) + g, x, k)
            for i in range(N)
        ]
        if exact:
            new = np.stack([slope(i, x) for i in range(N)])
        else:
            new = own - c + (x - np.stack(y)) / (k * RATE)
        x, c, own = x + eta_g * np.mean(y - x, axis=0), c + (new - own).mean(0), new
    algorithm = jaxfl.scaffold(loss, RATE, optax.sgd(eta_g), exact=exact, steps=k)
    state = run(algorithm, 4)
    close(state, x)
    np.testing.assert_allclose(state.clients.algorithm, own, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.server.algorithm.control, c, atol=1e-4)


def test_feddyn():
    theta, h, own, alpha = START, np.zeros(D), np.zeros((N, D)), 0.9
    for _ in range(3):
        each = np.stack(
            [
                descend(
                    lambda w, i=i, g=own[i], t=theta: slope(i, w) - g + alpha * (w - t),
                    *(theta, 5),
                )
                for i in range(N)
            ]
        )
        own = own - alpha * (each - theta)
        h = h - alpha / N * (each - theta).sum(0)
        theta = each.mean(0) - h / alpha
    close(run(jaxfl.feddyn(loss, optax.sgd(RATE), alpha, steps=5), 3), theta)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fednova(momentum):
    """Client i takes i + 1 steps; a_i has the closed form of section 4 of the paper."""
    x = START
    for _ in range(3):
        d, a = [], []
        for i in range(N):
            w, trace = x, 0.0
            for _ in range(i + 1):
                trace = momentum * trace + slope(i, w)
                w = w - RATE * trace
            rho, tau = momentum, i + 1
            a.append((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))
            d.append((x - w) / (RATE * a[-1]))
        x = x - np.mean(a) * RATE * np.mean(d, axis=0)
    optimizer = optax.sgd(RATE, momentum=momentum)
    close(run(jaxfl.fednova(loss, optimizer, batch_size=1), 3, RAGGED), x)


def test_fedexp():
    x, epsilon = START, 0.01
    for _ in range(4):
        delta = np.stack(
            [descend(functools.partial(slope, i), x, 3) - x for i in range(N)]
        )
        mean = delta.mean(0)
        eta = max(1, (delta**2).sum() / (2 * N * (mean @ mean + epsilon)))
        x = x + eta * mean
    assert eta > 1
    close(run(jaxfl.fedexp(loss, optax.sgd(RATE), epsilon, steps=3), 4), x)


@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_qfedavg(q):
    w, inverse = START, 1 / RATE
    for _ in range(3):
        deltas, h = 0.0, 0.0
        for i in range(N):
            update = inverse * (w - descend(functools.partial(slope, i), w, 2))
            f = value(i, w)
            deltas = deltas + f**q * update
            h += q * f ** (q - 1) * update @ update + inverse * f**q
        w = w - deltas / h
    close(run(jaxfl.qfedavg(loss, RATE, q, steps=2), 3), w)


@pytest.mark.parametrize("lite", [True, False])
def test_mime(lite):
    """With heavy-ball momentum, s <- beta s + grad, whose update is the trace."""
    x, s, c, beta = START, np.zeros(D), None, 0.9
    for _ in range(4):
        y = []
        for i in range(N):
            w = x
            for _ in range(3):
                g = slope(i, w)
                if not lite and c is not None:
                    g = g - slope(i, x) + c
                w = w - 0.01 * (beta * s + g)
            y.append(w)
        c = np.mean([slope(i, x) for i in range(N)], axis=0)
        x, s = np.mean(y, axis=0), beta * s + c
    algorithm = jaxfl.mime(loss, optax.sgd(0.01, momentum=beta), lite=lite, steps=3)
    close(run(algorithm, 4), x)


def test_agnostic():
    w, mixture, gamma = START, np.full(N, 1 / N), 0.05
    for _ in range(4):
        f = np.array([value(i, w) for i in range(N)])
        w = w - RATE * sum(mixture[i] * slope(i, w) for i in range(N))
        v = np.sort(mixture + gamma * f)[::-1]  # the projection of Wang et al. 2013
        excess = (np.cumsum(v) - 1) / np.arange(1, N + 1)
        mixture = np.maximum(mixture + gamma * f - excess[np.sum(v > excess) - 1], 0)
    assert (mixture == 0).any() and mixture.max() > 0.3
    state = run(jaxfl.agnostic(loss, optax.sgd(RATE), gamma, N, steps=1), 4)
    close(state, w)
    np.testing.assert_allclose(state.server.algorithm.mixture, mixture, atol=1e-4)


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam"])
def test_adaptive_servers(name):
    eta, tau, beta_1, beta_2 = 0.1, 0.02, 0.9, 0.99
    betas = (beta_1,) if name == "fedadagrad" else (beta_1, beta_2)
    transform = getattr(fedopt, name)(eta, tau, *betas)
    updates = rng.normal(size=(5, D))
    x, m, v = np.zeros(D), np.zeros(D), np.full(D, tau**2)
    got, state = jnp.zeros(D), transform.init(jnp.zeros(D))
    for delta in updates:  # the paper's points uphill where ours points down
        m = beta_1 * m - (1 - beta_1) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedyogi":
            v = v - (1 - beta_2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta_2 * v + (1 - beta_2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
        step, state = transform.update(jnp.float32(delta), state)
        got = optax.apply_updates(got, step)
    np.testing.assert_allclose(np.asarray(got), x, rtol=1e-5)


def test_recipes_over_fedavg():
    """FedAvgM, Reptile, and a server that averages its models."""
    beta, epsilon, decay = 0.7, 0.3, 0.6

    def update(w):
        after = [descend(lambda x, i=i: slope(i, x), w, 3) for i in range(N)]
        return w - np.mean(after, axis=0)

    m, v, reptile, x = START, np.zeros(D), START, START
    ema = START
    for _ in range(4):
        v = beta * v + update(m)
        m = m - v
        reptile = reptile - epsilon * update(reptile)
        x = x - update(x)
        ema = decay * ema + (1 - decay) * x
    work = (loss, optax.sgd(RATE))
    close(run(jaxfl.fedavg(*work, optax.sgd(1.0, momentum=beta), steps=3), 4), m)
    close(run(jaxfl.fedavg(*work, optax.sgd(epsilon), steps=3), 4), reptile)
    server = optax.chain(optax.sgd(1.0), jaxfl.ema_of_params(decay))
    state = run(jaxfl.fedavg(*work, server, steps=3), 4)
    close(state, x)
    mean = optax.tree.get(state.server.algorithm.optimizer, "ema")
    np.testing.assert_allclose(mean, ema, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------ where they end


def fixed_point(weights, steps):
    """Of averages after s_i steps: sum_i p_i (I - (I - eta A_i)^s_i) (w - b_i) = 0."""
    pull = [
        np.eye(D) - np.linalg.matrix_power(np.eye(D) - RATE * a, s)
        for a, s in zip(A, steps, strict=True)
    ]
    left = sum(p * m for p, m in zip(weights, pull, strict=True))
    right = sum(p * m @ b for p, m, b in zip(weights, pull, B, strict=True))
    return np.linalg.solve(left, right)


def test_fedavg_is_biased_as_much_as_its_fixed_point_says():
    want = fixed_point(np.ones(N), [10] * N)
    assert np.linalg.norm(want - OPTIMUM) > 0.15
    close(run(jaxfl.fedavg(loss, optax.sgd(RATE), steps=10), 300), want, 1e-4)


@pytest.mark.parametrize(
    "algorithm",
    [
        jaxfl.scaffold(loss, RATE, steps=10),
        jaxfl.scaffold(loss, RATE, exact=True, steps=10),
        jaxfl.feddyn(loss, optax.sgd(RATE), 1.0, steps=40),
    ],
    ids=["scaffold", "scaffold, exact", "feddyn"],
)
def test_reaches_the_optimum_though_half_take_part(algorithm):
    state = run(algorithm, 1500, size=N // 2)
    np.testing.assert_allclose(state.params, OPTIMUM, atol=2e-6)


def test_mime_reaches_the_optimum():
    state = run(jaxfl.mime(loss, optax.sgd(0.02), steps=10), 500)
    np.testing.assert_allclose(state.params, OPTIMUM, atol=2e-6)


def test_without_the_correction_they_end_elsewhere(monkeypatch):
    monkeypatch.setattr(local, "tilted", lambda gradient, direction: gradient)
    for algorithm in (
        jaxfl.scaffold(loss, RATE, steps=10),
        jaxfl.feddyn(loss, optax.sgd(RATE), 1.0, steps=40),
    ):
        params = np.asarray(run(algorithm, 500).params)
        assert not np.linalg.norm(params - OPTIMUM) < 0.1
    lite = run(jaxfl.mime(loss, optax.sgd(0.02), lite=True, steps=10), 500).params
    assert np.linalg.norm(np.asarray(lite) - OPTIMUM) > 0.05


def test_fednova_removes_the_bias_of_unequal_steps():
    """With small steps all that is left of fedavg's bias is how many each takes."""
    steps, rate = np.arange(1, N + 1), 0.002
    counted = np.linalg.solve(
        np.einsum("n,nij->ij", steps, A), np.einsum("n,nij,nj->i", steps, A, B)
    )
    assert np.linalg.norm(counted - OPTIMUM) > 0.15
    plain = run(jaxfl.fedavg(loss, optax.sgd(rate), batch_size=1), 4000, RAGGED).params
    nova = run(jaxfl.fednova(loss, optax.sgd(rate), batch_size=1), 4000, RAGGED).params
    assert np.linalg.norm(plain - counted) < 0.05
    assert np.linalg.norm(nova - OPTIMUM) < 0.05


# ------------------------------------------------------------ what they reduce to


def test_at_their_neutral_setting_they_are_fedavg():
    plain = run(jaxfl.fedavg(loss, optax.sgd(RATE), steps=3), 3).params
    for algorithm in (
        jaxfl.fedprox(loss, optax.sgd(RATE), 0.0, steps=3),
        jaxfl.fednova(loss, optax.sgd(RATE), steps=3),
        jaxfl.fedexp(loss, optax.sgd(RATE), 1e9, steps=3),
        jaxfl.qfedavg(loss, RATE, 0.0, steps=3),
        jaxfl.agnostic(loss, optax.sgd(RATE), 0.0, N, steps=3),
        jaxfl.mime(loss, optax.sgd(RATE), lite=True, steps=3),
    ):
        np.testing.assert_allclose(run(algorithm, 3).params, plain, rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jaxfl.fedprox(loss, optax.sgd(0.1), -1.0), "mu must be at least 0"),
        (lambda: jaxfl.feddyn(loss, optax.sgd(0.1), 0.0), "alpha must be positive"),
        (lambda: jaxfl.fedexp(loss, optax.sgd(0.1), -1.0), "epsilon must be"),
        (lambda: jaxfl.qfedavg(loss, 0.1, -1.0), "q must be at least 0"),
        (lambda: jaxfl.agnostic(loss, optax.sgd(0.1), -1.0, 3), "mixture_rate must"),
        (lambda: jaxfl.agnostic(loss, optax.sgd(0.1), 1.0, 0), "clients must be"),
        (lambda: fedopt.fedadam(0.1, tau=0.0), "tau must be positive"),
        (lambda: fedopt.fedyogi(0.1, beta_2=1.0), r"beta_2 must be in \[0, 1\)"),
        (lambda: jaxfl.ema_of_params(1.0), r"decay must be in \[0, 1\)"),
        (lambda: jaxfl.scaffold(loss, 0.1, epochs=1, steps=1), "epochs or steps"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
