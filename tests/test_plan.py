"""Execution plans: what is chosen, and what a dry run says a round will cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import models, plan
from jaxfl.round import execution_order


def network(module, examples=20, clients=6):
    """A federation of equal clients with images, and its model and data."""
    x = np.zeros((clients * examples, 28, 28, 1), np.uint8)
    model = models.from_linen(module, x[:1])
    y = np.zeros(len(x), np.int32)
    data = jaxfl.from_arrays(x, y, np.repeat(np.arange(clients), examples))
    algorithm = jaxfl.fedavg(model.loss, optax.sgd(0.1), batch_size=10)
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    return federation, jax.eval_shape(model.init, jax.random.key(0)), data


# --- flops --------------------------------------------------------------------


def test_flops_of_matrix_products_are_counted_through_loops():
    def program(a, b, kernel):
        def turn(a, _):
            return jax.vmap(lambda row: row @ b)(a), ()

        a, _ = jax.lax.scan(turn, a, length=7)
        image = a.reshape(1, 4, 5, 5)
        return jax.lax.conv(image, kernel, (1, 1), "SAME")

    shapes = (20, 5), (5, 5), (3, 4, 3, 3)
    closed = jax.make_jaxpr(program)(*map(jnp.zeros, shapes))
    product, conv = 2 * 20 * 5 * 5, 2 * (3 * 5 * 5) * (4 * 3 * 3)
    assert plan._flops(closed) == 7 * product + conv
    assert plan._flops(closed, loops=False) == product + conv


def test_flops_of_a_round_are_those_of_its_steps():
    """Logistic regression: forward and the weights' gradient, of every example."""
    federation, params, data = network(models.logistic_regression())
    flops = jaxfl.dry_run(federation, params, data, cohort_size=3).flops
    products = 3 * 20 * 2 * (2 * 784 * 10)
    assert products < flops < 1.3 * products  # updates and the softmax


def test_flops_of_ragged_clients_are_those_of_their_mean_size():
    federation, params, data = network(models.logistic_regression())
    ids = np.repeat(np.arange(6), [5, 5, 5, 5, 30, 70])
    ragged = jaxfl.from_arrays(data.examples["x"], data.examples["y"], ids)
    assert jaxfl.dry_run(federation, params, ragged).flops == pytest.approx(
        jaxfl.dry_run(federation, params, data).flops, rel=1e-6
    )


# --- what is chosen -----------------------------------------------------------


@pytest.mark.parametrize(
    "module, chunk",
    [(models.logistic_regression(), 10), (models.two_nn(), 1), (models.cnn(), 1)],
    ids=["logistic", "2nn", "cnn"],
)
def test_the_plan_on_a_cpu_goes_by_the_work_of_a_step(module, chunk, capsys):
    federation, params, data = network(module)
    tuned = jaxfl.tune(federation, params, data, cohort_size=3)
    assert tuned.chunk_size == chunk
    assert tuned.mesh == jaxfl.client_mesh(jax.devices()[:3])  # one for each client
    assert f"chunk_size={chunk} on 3 device(s)" in capsys.readouterr().out
    assert tuned.parts == federation.parts


def test_a_tuned_federation_gives_the_same():
    data = toy.data()
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    federation = jaxfl.federate(algorithm, jaxfl.mean())
    tuned = jaxfl.tune(federation, toy.params(), data, verbose=False)
    assert (tuned.chunk_size, tuned.mesh) == (10, jaxfl.client_mesh())
    (got, _), (want, _) = (
        f.round(jax.random.key(0), f.init(toy.params(), data), toy.cohort(data))
        for f in (tuned, federation)
    )
    np.testing.assert_allclose(got.params["w"], want.params["w"], rtol=1e-5)


class Accelerator:
    """Stands for a device whose memory is limited."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit}


def test_an_accelerator_takes_all_clients_if_they_fit(monkeypatch):
    federation, params, data = network(models.two_nn(), clients=32)

    def largest(limit, data=data, k=32):
        monkeypatch.setattr(jax, "devices", lambda: [Accelerator(limit)])
        return plan._largest_chunk(federation, params, data, k, None)[0]

    assert largest(2**40) is None
    chunk = largest(2**24)  # 16 MiB, and a client's model is 0.8
    assert chunk is not None and 1 <= chunk < 32
    some = jaxfl.federate(*federation.parts, chunk_size=chunk)
    assert plan._peak_bytes(some, params, data, 32) <= 0.9 * 2**24
    assert plan._peak_bytes(federation, params, data, 32) > 0.9 * 2**24


def test_ragged_clients_do_not_wait_for_the_longest(monkeypatch):
    federation, params, data = network(models.logistic_regression(), clients=32)
    sizes = np.array([20] * 28 + [200] * 4, np.int32)
    data = dataclasses.replace(data, size=sizes, shortest=20, longest=200)
    monkeypatch.setattr(jax, "devices", lambda: [Accelerator(2**40)])
    chunk, reason = plan._largest_chunk(federation, params, data, 32, None)
    assert chunk == plan.FEWEST and "useful" in reason


def test_a_population_on_the_host_has_a_plan_too():
    federation, params, data = network(models.two_nn())
    tuned = jaxfl.tune(federation, params, jaxfl.on_host(data), verbose=False)
    assert tuned.chunk_size == 1
    cost = jaxfl.dry_run(federation, params, jaxfl.on_host(data))
    assert cost == jaxfl.dry_run(federation, params, data)


def test_cohort_sizes_are_checked():
    federation, params, data = network(models.logistic_regression())
    for function in (jaxfl.tune, jaxfl.dry_run):
        with pytest.raises(ValueError, match="cohort_size must be between 1 and 6"):
            function(federation, params, data, cohort_size=7)


# --- memory -------------------------------------------------------------------


def test_memory_grows_with_the_chunk_and_not_with_the_cohort():
    federation, params, data = network(models.two_nn(), clients=64)

    def peak(chunk, k):
        some = jaxfl.federate(*federation.parts, chunk_size=chunk)
        return jaxfl.dry_run(some, params, data, cohort_size=k).peak_bytes

    model = 4 * 199_210
    assert peak(8, 64) > peak(1, 64) + 6 * model
    assert peak(1, 64) < peak(1, 16) + 2 * model


# --- utilisation ----------------------------------------------------------------


def test_utilisation():
    work = np.array([4, 1, 3, 2])
    assert plan.utilisation(work, 1) == 1
    assert plan.utilisation(work, 2) == 10 / (2 * 4 + 2 * 2)
    assert plan.utilisation(work, 1, devices=2) == 1  # 4 + 1 and 3 + 2
    assert plan.utilisation(work, None, devices=2) == 10 / (2 * 2 * 4)
    assert plan.utilisation(np.array([5, 5, 5]), 2) == 15 / 20  # one of nobody
    assert plan.utilisation(np.zeros(3)) == 1


def test_utilisation_of_writers_and_of_a_log_normal():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=1000)) * 100
    steps = np.ceil(sizes / 10)
    assert plan.utilisation(steps, 1, devices=2) > 0.99
    assert plan.utilisation(steps, 10) > 0.9
    assert plan.utilisation(steps, 10, devices=2) > 0.9
    assert plan.utilisation(steps) < 0.2


@pytest.mark.parametrize("k, chunk, devices", [(24, 2, 3), (12, 4, 1), (8, 1, 4)])
def test_the_execution_order_is_a_permutation_of_like_chunks(k, chunk, devices):
    work = jnp.sort(jax.random.uniform(jax.random.key(0), (k,)))[::-1]
    order = np.asarray(execution_order(work, chunk, devices))
    assert sorted(order.tolist()) == list(range(k))
    chunks = order.reshape(-1, chunk)
    assert (np.diff(chunks, axis=1) == 1).all()  # neighbours in size


def executed_steps(chunk, devices, sizes=(9, 1, 5, 1, 8, 1, 6, 2), alive=None):
    """The local steps that a round really makes, by counting them."""
    counts = np.zeros(len(sizes), int)

    def count(client):
        counts[int(client)] += 1

    def loss(params, batch, key):
        jax.debug.callback(count, batch["x"][0])
        return (params - batch["y"]) ** 2

    ids = np.repeat(np.arange(len(sizes)), sizes)
    data = jaxfl.from_arrays(ids, np.ones(len(ids), np.float32), ids)
    mesh = None if devices == 1 else jaxfl.client_mesh(jax.devices()[:devices])
    federation = jaxfl.federate(
        jaxfl.fedavg(loss, optax.sgd(0.1), batch_size=1),
        jaxfl.mean(),
        chunk_size=chunk,
        mesh=mesh,
    )
    state = federation.init(jnp.float32(0), data)
    cohort = toy.cohort(data, range(len(sizes)), alive)
    jax.block_until_ready(jax.jit(federation.round)(jax.random.key(0), state, cohort))
    jax.effects_barrier()
    return counts.sum(), np.array(sizes)


@pytest.mark.parametrize("chunk, devices", [(1, 1), (2, 1), (4, 1), (8, 1)])
def test_a_round_executes_the_steps_that_utilisation_says(chunk, devices):
    executed, sizes = executed_steps(chunk, devices)
    useful = plan.utilisation(sizes, chunk, devices)
    assert executed == round(sizes.sum() / useful)


def test_who_is_absent_takes_no_steps():
    alive = np.array([False] + [True] * 7)  # without the client of 9 examples
    executed, sizes = executed_steps(2, 1, alive=alive)
    assert executed == round(sizes[1:].sum() / plan.utilisation(sizes[1:], 2))
