"""Local training: which examples each step sees, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import local
from jaxfl.core import lone_context

STEPS = 24


def visits(key, data, width, **work):
    """The examples of every step, `[steps, B]`, -1 where a row was masked."""

    def note(log, batch, mask, key):
        t, rows = log
        seen = jnp.where(mask, batch["y"] + 1, 0.0)
        return jnp.float32(0), (
            jnp.float32(-1),
            -jnp.zeros_like(rows).at[t.astype(int)].set(seen),
        )

    log = jnp.float32(0), jnp.zeros((STEPS, width))
    trained = local.train(lone_context(key), note, optax.sgd(1.0), log, data, **work)
    steps, rows = trained.params
    return steps, rows.astype(int) - 1


def numbered(sizes=toy.SIZES):
    """Example number e holds e, and belongs to clients in turn of size `sizes`."""
    ids = np.repeat(np.arange(len(sizes)), sizes)
    numbers = np.arange(len(ids), dtype=np.float32)
    return jaxfl.from_arrays(numbers, numbers, ids, len(sizes))


def every_visit(data, width, key=0, **work):
    """`visits` of every client, under vmap and with a key of its own."""
    keys = jax.random.split(jax.random.key(key), data.num_clients)
    each = jax.jit(
        jax.vmap(
            lambda i, k: visits(k, data[i], width, **work),
        )
    )
    steps, rows = each(jnp.arange(data.num_clients), keys)
    return np.asarray(steps, int), np.asarray(rows)


def own_rows(data, i):
    return list(range(data.start[i], data.start[i] + data.size[i]))


# --- which examples ----------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_each_epoch_visits_each_example_once(batch, shuffle):
    data = numbered()
    width = min(batch, data.longest)  # of the arrays, however large the batch
    steps, rows = every_visit(data, width, batch_size=batch, epochs=3, shuffle=shuffle)
    for i, size in enumerate(toy.SIZES):
        per_pass = -(-size // batch)
        assert steps[i] == 3 * per_pass
        for epoch in np.split(rows[i, : 3 * per_pass], 3):
            seen = epoch[epoch >= 0].tolist()
            assert sorted(seen) == own_rows(data, i)
            assert shuffle or seen == own_rows(data, i)
            if size:  # only the last batch is partial
                assert (epoch.reshape(-1)[:size] >= 0).all()
        assert (rows[i, 3 * per_pass :] == -1).all()


def test_a_number_of_steps_takes_as_many_passes_as_it_needs():
    data = numbered()
    steps, rows = every_visit(data, 2, batch_size=2, steps=7)
    for i, size in enumerate(toy.SIZES):
        assert steps[i] == (7 if size else 0)
        if size:
            per_pass = -(-size // 2)
            for first in range(0, 7 - per_pass + 1, per_pass):
                seen = rows[i, first : first + per_pass].reshape(-1)
                assert sorted(seen[seen >= 0]) == own_rows(data, i)
            rest = rows[i, 7 // per_pass * per_pass : 7].reshape(-1)
            assert len(set(rest[rest >= 0])) == np.sum(rest >= 0)


def test_orders_differ_between_epochs_clients_and_rounds():
    data = numbered((12, 12))

    def client(ctx, broadcast, own, data):
        return (), (), visits(ctx.key, data, 4, batch_size=4, epochs=2)[1]

    algorithm = jaxfl.Algorithm(
        lambda params: ((), ()), client, lambda ctx, state, outcome: state
    )
    federation = jaxfl.federate(algorithm, jaxfl.identity())
    state = federation.init((), data)
    _, (info, _) = jaxfl.scan_rounds(
        federation, state, data, rounds=2, key=jax.random.key(0)
    )
    rows = np.asarray(info.metrics)[:, :, :6].reshape(2, 2, 2, 12)  # round client epoch
    orders = (rows - rows.min(-1, keepdims=True)).reshape(8, 12)
    assert len({tuple(o) for o in orders}) == 8


# --- masks -------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 5])
def test_what_is_not_the_clients_own_never_contributes(size):
    """Even if all other examples are NaN, and the last batch is mostly padding."""
    clean = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    ids = np.array([0, 0] + [1] * size + [2] * (7 - size))
    others = np.where(ids[:, None] == 1, clean, np.nan)
    start = toy.params()

    def train(x, ids, i):
        data = jaxfl.from_arrays(x, x[:, 0], ids, 3)
        return jax.jit(
            lambda key: local.train(
                lone_context(key),
                local.gradient(toy.loss),
                optax.sgd(0.1),
                start,
                data[i],
                batch_size=4,
                epochs=2,
            )
        )(jax.random.key(0))

    got, want = train(others, ids, 1), train(clean, ids, 1)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got.params))


def test_a_client_without_examples_takes_no_step():
    data = toy.data()
    trained = local.train(
        lone_context(jax.random.key(0)),
        local.gradient(toy.loss),
        optax.adam(0.1),
        toy.params(),
        data[4],
        probe=lambda params: params["b"],
    )
    jax.tree.map(np.testing.assert_array_equal, trained.params, toy.params())
    assert trained.metrics["steps"] == 0 and jnp.isnan(trained.metrics["loss"])
    assert trained.metrics["probe"].tolist() == [0.25] * 5


def test_loss_is_the_mean_over_steps():
    """With no learning, of batches of 2 and of 1, the mean of the batches' means."""
    data = toy.data()
    trained = local.train(
        lone_context(jax.random.key(0)),
        local.gradient(toy.loss),
        optax.sgd(0.0),
        toy.params(),
        data[0],
        batch_size=2,
        shuffle=False,
    )
    x, y, ids = toy.examples()
    each = toy.loss(toy.params(), {"x": x[ids == 0], "y": y[ids == 0]}, None)
    want = (each[:2].mean() + each[2]) / 2
    np.testing.assert_allclose(trained.metrics["loss"], want, rtol=1e-6)


# --- probes ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(9,) * 2, (9, 4)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("probes", [1, 3, 4, 12])
def test_probes_look_at_the_right_steps(sizes, probes):
    data = numbered(sizes)

    def count(params, batch, mask, key):
        return jnp.float32(0), jnp.float32(-1)

    trained = local.train(
        lone_context(jax.random.key(0)),
        count,
        optax.sgd(1.0),
        jnp.float32(0),
        data[0],
        batch_size=1,
        probe=lambda params: {"step": params},
        probes=probes,
    )
    want = [(j + 1) * 9 // probes for j in range(probes)]
    assert trained.metrics["probe"]["step"].tolist() == want
    assert trained.params == want[-1] == trained.metrics["steps"] == 9


def test_probing_changes_nothing():
    data = toy.data()

    def train(**probe):
        gradient = local.gradient(toy.loss)
        return local.train(
            lone_context(jax.random.key(0)),
            gradient,
            optax.sgd(0.1, 0.9),
            toy.params(),
            data[5],
            batch_size=2,
            **probe,
        )

    plain, probed = train(), train(probe=lambda params: params, probes=3)
    jax.tree.map(np.testing.assert_array_equal, plain.params, probed.params)
    last = jax.tree.map(lambda x: x[-1], probed.metrics["probe"])
    jax.tree.map(np.testing.assert_array_equal, last, plain.params)


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [jnp.mean, lambda x: x[:, None]])
def test_a_loss_gives_one_number_an_example(reduce):
    algorithm = jaxfl.fedavg(lambda *args: reduce(toy.loss(*args)), optax.sgd(0.1))
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    with pytest.raises(TypeError, match="one loss for each example"):
        federation.init(toy.params(), toy.data())


@pytest.mark.parametrize(
    "error, word, work",
    [
        (TypeError, "epoch'", {"epoch": 1}),
        (ValueError, "both", {"epochs": 1, "steps": 1}),
        (ValueError, "batch_size", {"batch_size": 0}),
        (ValueError, "epochs", {"epochs": 0}),
        (ValueError, "steps", {"steps": 0}),
        (ValueError, "probes", {"probes": 0}),
    ],
)
def test_check_work(error, word, work):
    with pytest.raises(error, match=word):
        local.check_work(**work)


def test_the_data_is_one_clients():
    ctx = lone_context(jax.random.key(0))
    args = ctx, local.gradient(toy.loss), optax.sgd(0.1), toy.params()
    for wrong in (toy.data(), jnp.ones(3)):
        with pytest.raises(TypeError, match="ClientData of one client"):
            local.train(*args, wrong)  # type: ignore[arg-type]


# --- derivatives -------------------------------------------------------------


def loss_after_training(sizes):
    data = toy.data(sizes)
    examples = {"x": data.examples["x"], "y": data.examples["y"]}

    def final(rate):
        algorithm = jaxfl.fedavg(
            toy.loss, optax.sgd(rate, 0.5), optax.sgd(rate * 4), batch_size=2, epochs=2
        )
        federation = jaxfl.federate(algorithm, jaxfl.mean())
        state = federation.init(toy.params(), data)
        state, _ = jaxfl.scan_rounds(
            federation, state, data, rounds=2, key=jax.random.key(0)
        )
        return jnp.mean(toy.loss(state.params, examples, None))

    return jax.jit(final)


def difference(f, x, by=1e-2):
    return (f(x + by) - f(x - by)) / (2 * by)


def test_reverse_mode_through_rounds_of_uniform_clients():
    final = loss_after_training((3, 3, 3))
    slope = jax.grad(final)(0.1)
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, difference(final, 0.1), rtol=2e-2)


def test_ragged_clients_have_forward_mode_only():
    final = loss_after_training((3, 1, 2))
    slope = jax.jvp(final, (0.1,), (1.0,))[1]
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, difference(final, 0.1), rtol=2e-2)
    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        jax.grad(final)(0.1)


@pytest.mark.parametrize("chosen", ["all", "none"])
def test_only_refuses_to_choose(chosen):
    optimizer = local.only(optax.sgd(1.0), lambda path: chosen == "all")
    with pytest.raises(ValueError, match=f"chosen chooses {chosen} of"):
        optimizer.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
