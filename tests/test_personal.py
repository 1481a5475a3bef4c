"""Algorithms with models of the clients' own, against float64 NumPy of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import (
    EQUAL,
    RATE,
    START,
    A,
    B,
    D,
    N,
    close,
    descend,
    loss,
    run,
    slope,
)

import jaxfl
from jaxfl import evaluate, local, tree
from jaxfl.algorithms.perfedavg import one_step_away

HALF = np.arange(D) < D // 2


def test_ditto():
    w, own, lam = START, np.tile(START, (N, 1)), 0.7
    for _ in range(3):
        own = np.stack(
            [
                descend(lambda v, i=i, w=w: slope(i, v) + lam * (v - w), own[i], 4)
                for i in range(N)
            ]
        )
        w = np.mean(
            [descend(lambda x, i=i: slope(i, x), w, 4) for i in range(N)], axis=0
        )
    state = run(jaxfl.ditto(loss, optax.sgd(RATE), lam, steps=4), 3)
    close(state, w)
    np.testing.assert_allclose(state.clients.algorithm, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_apfl(rate):
    w, own, alpha = START, np.tile(START, (N, 1)), np.full(N, 0.4)
    for _ in range(3):
        after = []
        for i in range(N):
            u = alpha[i] * own[i] + (1 - alpha[i]) * w
            alpha[i] = np.clip(alpha[i] - rate * (own[i] - w) @ slope(i, u), 0, 1)
            x, v = w, own[i]
            for _ in range(4):
                u = alpha[i] * v + (1 - alpha[i]) * x
                x, v = x - RATE * slope(i, x), v - RATE * alpha[i] * slope(i, u)
            after.append(x)
            own[i] = v
        w = np.mean(after, axis=0)
    state = run(jaxfl.apfl(loss, optax.sgd(RATE), 0.4, rate, steps=4), 3)
    close(state, w)
    np.testing.assert_allclose(state.clients.algorithm.own, own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.clients.algorithm.alpha, alpha, rtol=1e-4)
    assert rate == 0 or np.ptp(alpha) > 0.1


def test_pfedme():
    w, lam, beta = START, 2.0, 0.7
    for _ in range(3):
        after = []
        for i in range(N):
            x = w
            for _ in range(3):
                theta = descend(lambda t, i=i, x=x: slope(i, t) + lam * (t - x), x, 5)
                x = x - 0.1 * lam * (x - theta)
            after.append(x)
        w = (1 - beta) * w + beta * np.mean(after, axis=0)
    algorithm = jaxfl.pfedme(loss, 0.1, lam, optax.sgd(RATE), 5, beta, steps=3)
    close(run(algorithm, 3), w)


@pytest.mark.parametrize("first_order", [True, False])
def test_per_fedavg(first_order):
    w, alpha = START, 0.08
    for _ in range(3):
        after = []
        for i in range(N):
            x = w
            for _ in range(3):
                step = slope(i, x - alpha * slope(i, x))
                if not first_order:
                    step = (np.eye(D) - alpha * A[i]) @ step
                x = x - RATE * step
            after.append(x)
        w = np.mean(after, axis=0)
    algorithm = jaxfl.per_fedavg(
        loss, optax.sgd(RATE), alpha, first_order=first_order, steps=3
    )
    close(run(algorithm, 3), w)


def test_per_fedavg_takes_its_two_gradients_of_two_halves(key):
    def product(w, batch, key):
        return w * batch

    wrapped = one_step_away(product, 1.0)
    batch, mask = jnp.array([1.0, 2.0, 5.0, 7.0, 100.0]), jnp.arange(5) < 4
    value, _ = wrapped.gradient(jnp.float32(0.0), batch, mask, key)
    assert value == -(1 + 5) / 2 * (2 + 7) / 2
    value, _ = wrapped.gradient(jnp.float32(0.0), batch, jnp.arange(5) < 1, key)
    assert value == -1.0


def split_loss(params, batch, key):
    return loss(jnp.concatenate([params["body"], params["head"]]), batch, key)


SPLIT = {"body": START[: D // 2], "head": START[D // 2 :]}


def run_split(algorithm, rounds=3):
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    start = jax.tree.map(jnp.float32, SPLIT)
    return jaxfl.simulate(
        *(federation, start, EQUAL),
        rounds=rounds,
        key=jax.random.key(0),
        progress=False,
    )


@pytest.mark.parametrize("head_steps", [0, 2], ids=["FedPer", "FedRep"])
def test_fedper(head_steps):
    body, head = START[HALF], np.tile(START[~HALF], (N, 1))
    for _ in range(3):
        bodies = []
        for i in range(N):
            x = np.concatenate([body, head[i]])
            for _ in range(head_steps):
                x = x - RATE * np.where(HALF, 0, slope(i, x))
            for _ in range(4):
                moves = slope(i, x)
                x = x - RATE * (np.where(HALF, moves, 0) if head_steps else moves)
            bodies.append(x[HALF])
            head[i] = x[~HALF]
        body = np.mean(bodies, axis=0)
    algorithm = jaxfl.fedper(
        *(split_loss, optax.sgd(RATE), lambda path: path == "head"),
        head_steps=head_steps,
        steps=4,
    )
    state, history = run_split(algorithm)
    np.testing.assert_allclose(state.params["body"], body, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.params["head"], np.float32(START[~HALF]))
    got = state.clients.algorithm["head"]
    np.testing.assert_allclose(got, head, rtol=1e-4, atol=1e-5)
    # Only the body is sent, and comes down.
    assert (history.bits()["down"] == N * 32 * D // 2).all()
    assert (history.bits()["up"] == N * (32 * D // 2 + 32)).all()
    one = jax.tree.map(lambda x: x[2], state.clients.algorithm)
    model = tree.with_named(state.params, one)
    assert set(model) == {"body", "head"}


def test_fedbabu():
    """The head moves nowhere before the end, and then all of it or the head alone."""
    moves, body = np.where(HALF, 1, 0), START
    for _ in range(3):
        body = np.mean(
            [descend(lambda x, i=i: moves * slope(i, x), body, 4) for i in range(N)],
            axis=0,
        )
    optimizer = optax.sgd(RATE)
    algorithm = jaxfl.fedavg(
        split_loss, local.only(optimizer, lambda path: path == "body"), steps=4
    )
    state, _ = run_split(algorithm)
    got = np.concatenate([state.params["body"], state.params["head"]])
    np.testing.assert_allclose(got, body, rtol=1e-4, atol=1e-5)
    head = local.only(optimizer, lambda path: path == "head")
    for tuned, part in ((head, 1 - moves), (optimizer, 1)):
        model = evaluate.fine_tuned(split_loss, tuned, steps=2)
        its = model(state.params, (), EQUAL[1], jax.random.key(0))
        got = np.concatenate([its["body"], its["head"]])
        want = descend(lambda x, m=part: m * slope(1, x), body, 2)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen, what", [(True, "all"), (False, "none")])
def test_fedper_needs_two_parts(chosen, what):
    algorithm = jaxfl.fedper(split_loss, optax.sgd(RATE), lambda path: chosen)
    with pytest.raises(ValueError, match=f"private chooses {what} of"):
        run_split(algorithm)


def test_ifca():
    models = np.stack([B[0], B[3], START + 20])
    start = models.copy()
    for _ in range(3):
        values = np.array(
            [[0.5 * (m - B[i]) @ A[i] @ (m - B[i]) for m in models] for i in range(N)]
        )
        chosen = values.argmin(1)
        after = [
            descend(lambda x, i=i: slope(i, x), models[chosen[i]], 3) for i in range(N)
        ]
        models = np.stack(
            [
                np.mean([a for a, c in zip(after, chosen, strict=True) if c == j], 0)
                if (chosen == j).any()
                else models[j]
                for j in range(3)
            ]
        )
    assert set(chosen) == {0, 1}
    state = run(jaxfl.ifca(loss, optax.sgd(RATE), 3, steps=3), 3, start=start)
    close(state, models)
    np.testing.assert_array_equal(state.clients.algorithm, chosen)


def test_ifca_needs_a_stack():
    with pytest.raises(ValueError, match="params must be 3 models, stacked"):
        run(jaxfl.ifca(loss, optax.sgd(RATE), 3), 1)


# ------------------------------------------------------------ how good, and for whom


def metrics(w, batch):
    return {"loss": loss(w, batch, None)}


def test_each_client_is_evaluated_on_its_own():
    federation = jaxfl.federate(jaxfl.ditto(loss, optax.sgd(RATE), 1.0), jaxfl.mean())
    state = federation.init(jnp.float32(START), EQUAL)
    own = np.random.default_rng(0).normal(size=(N, D))
    state = state._replace(clients=state.clients._replace(algorithm=jnp.float32(own)))

    def value(i, w):
        return 0.5 * (w - B[i]) @ A[i] @ (w - B[i])

    def personal(params, own, data, key):
        return own

    for chunk in (None, 2):
        of = evaluate.on_clients(metrics, EQUAL, chunk_size=chunk)
        want = [value(i, START) for i in range(N)]
        np.testing.assert_allclose(of(state)["loss"], want, rtol=1e-4)
        of = evaluate.on_clients(metrics, EQUAL, model=personal, chunk_size=chunk)
        want = [value(i, own[i]) for i in range(N)]
        np.testing.assert_allclose(of(state)["loss"], want, rtol=1e-4)
    tuned = evaluate.fine_tuned(loss, optax.sgd(RATE), steps=7)
    of = evaluate.on_clients(metrics, EQUAL, EQUAL, model=tuned)
    want = [value(i, descend(lambda x, i=i: slope(i, x), START, 7)) for i in range(N)]
    np.testing.assert_allclose(of(state)["loss"], want, rtol=1e-4)


def test_a_client_with_nothing_held_out_is_left_out():
    y = jnp.array([1.0, 3.0])
    heldout = jaxfl.from_arrays(y, y, client_ids=[0, 0], num_clients=2)
    algorithm = jaxfl.fedavg(lambda w, batch, key: w * batch["y"], optax.sgd(1.0))
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    state = federation.init(jnp.float32(0.0), heldout)
    of = evaluate.on_clients(lambda w, batch: {"y": batch["y"]}, heldout)
    values = of(state)["y"]
    assert values[0] == 2 and np.isnan(values[1])
    assert evaluate.quantiles(values)["mean"] == 2
    with pytest.raises(ValueError, match="data has 6 clients and heldout 2"):
        evaluate.on_clients(metrics, heldout, EQUAL)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jaxfl.ditto(loss, optax.sgd(0.1), -1.0), "lam must be at least 0"),
        (lambda: jaxfl.apfl(loss, optax.sgd(0.1), 1.5), "alpha must be between"),
        (lambda: jaxfl.apfl(loss, optax.sgd(0.1), 0.5, -1.0), "alpha_rate must be"),
        (lambda: jaxfl.pfedme(loss, 0.1, 0.0, optax.sgd(0.1)), "lam must be positive"),
        (lambda: jaxfl.pfedme(loss, 0.1, 1.0, optax.sgd(0.1), 0), "personal_steps"),
        (lambda: jaxfl.ifca(loss, optax.sgd(0.1), 0), "clusters must be"),
        (
            lambda: jaxfl.fedper(loss, optax.sgd(0.1), bool, head_steps=-1),
            "head_steps must be",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
