"""A cohort spread over devices gives what one device gives."""

import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfl


@pytest.fixture
def mesh():
    return jaxfl.client_mesh(jax.devices()[:4])


def assert_close(got, want, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want
    )


def gradients(mesh):
    """Each client's gradient with respect to what all of them share: `c - x_i`."""

    def client(shared, x):
        gradient = jax.grad(lambda c: 0.5 * jnp.sum((c - x) ** 2))(shared)
        return gradient, gradient

    xs = jnp.arange(16.0).reshape(8, 2)
    return jaxfl.map_clients(client, jnp.ones(2), xs, mesh=mesh), 1.0 - xs


def final_params(optimizer, mesh=None, clients=range(toy.N), chunk_size=None):
    """The model after two rounds of clients that train for several steps."""
    data = toy.data()
    algorithm = jaxfl.fedavg(toy.loss, optimizer, batch_size=2, epochs=2)
    federation = jaxfl.federate(
        algorithm, jaxfl.mean(), mesh=mesh, chunk_size=chunk_size
    )
    state, cohort = federation.init(toy.params(), data), toy.cohort(data, clients)
    for _ in range(2):
        state, _ = jax.jit(federation.round)(jax.random.key(0), state, cohort)
    return state.params


def test_a_clients_gradient_is_its_own(mesh):
    (summed, stacked), want = gradients(mesh)
    np.testing.assert_array_equal(stacked, want)
    np.testing.assert_array_equal(summed, want.sum(0))


@pytest.mark.parametrize("case", ["gradients", "training"])
def test_the_tests_here_see_gradients_summed_over_devices(mesh, monkeypatch, case):
    """Without `check_vma=False` in map_clients the results are wrong, or refused."""
    want = final_params(optax.sgd(0.1))
    shard_map = jax.shard_map
    monkeypatch.setattr(
        jax, "shard_map", lambda f, **kw: shard_map(f, **{**kw, "check_vma": True})
    )
    with pytest.raises((AssertionError, TypeError, ValueError)):
        if case == "gradients":
            (_, stacked), each = gradients(mesh)
            np.testing.assert_array_equal(stacked, each)
        else:
            assert_close(final_params(optax.sgd(0.1), mesh), want)


@pytest.mark.parametrize("clients", [range(toy.N), [6, 0, 3], [2]], ids=str)
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, 0.9), optax.adam(0.1)])
def test_training_over_devices(mesh, optimizer, clients):
    """Cohorts of 7, of 3 and of 1, none of which 4 devices divide."""
    want = final_params(optimizer, None, clients)
    assert_close(final_params(optimizer, mesh, clients), want)
    assert_close(final_params(optimizer, mesh, clients, chunk_size=1), want)
    assert abs(want["b"] - toy.params()["b"]) > 1e-3


def test_hyper_parameters_traced_from_outside(mesh):
    """A part closes over a traced rate; vmap, and grad, go through the mesh."""
    data = toy.data((2, 2, 2, 2, 2))

    def final(rate, mesh):
        algorithm = jaxfl.fedavg(
            toy.loss, optax.sgd(rate), optax.sgd(2 * rate), batch_size=1
        )
        channel = jaxfl.chain(jaxfl.clip(10 * rate), jaxfl.mean())
        federation = jaxfl.federate(algorithm, channel, mesh=mesh)
        state = federation.init(toy.params(), data)
        state, _ = jaxfl.scan_rounds(
            federation, state, data, rounds=2, key=jax.random.key(0), cohort_size=3
        )
        return jnp.sum(state.params["w"] ** 2)

    rates = jnp.array([0.05, 0.1, 0.2])

    def alike(transform):
        one, many = (
            jax.jit(transform(lambda rate, m=m: final(rate, m))) for m in (None, mesh)
        )
        return one, many

    one, many = alike(jax.vmap)
    assert len(set(one(rates).tolist())) == 3
    assert_close(many(rates), one(rates))
    one, many = alike(jax.grad)
    assert abs(one(0.1)) > 0.1
    assert_close(many(0.1), one(0.1))


@pytest.mark.parametrize("cohort_size", [None, 3, jaxfl.Poisson(3)])
def test_simulate_over_devices(mesh, cohort_size):
    def run(mesh):
        algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
        channel = jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean())
        return jaxfl.simulate(
            jaxfl.federate(algorithm, channel, mesh=mesh),
            toy.params(),
            toy.data(),
            rounds=3,
            every=2,
            cohort_size=cohort_size,
            key=jax.random.key(0),
            evaluate=lambda state: {"b": state.params["b"]},
            progress=False,
        )

    (state, history), (want, want_history) = run(mesh), run(None)
    assert_close(state, want)
    assert_close(history.clients, want_history.clients)
    assert_close(history["b"], want_history["b"])
    assert history.round.tolist() == [2, 3]


def test_sums_of_16_bits_are_settled_after_all_devices(mesh):
    x = jnp.array([256, 1, 1, 1], jnp.bfloat16)
    for m in (None, mesh):
        total, _ = jaxfl.map_clients(lambda _, v: (v, ()), (), x, mesh=m)
        assert total == 260, m  # 259 in bfloat16; 256 + 1 is 256


def test_evaluation_over_devices(mesh):
    x = jnp.arange(11.0)
    got, want = (
        jaxfl.evaluate.mean_metrics(
            lambda c, batch: {"square": (batch - c) ** 2}, 2.0, x, batch_size=3, mesh=m
        )
        for m in (mesh, None)
    )
    assert_close(got, want)
    assert_close(want, {"square": np.mean((np.arange(11.0) - 2) ** 2)})


# --- what travels, and what lies where ----------------------------------------

WIDE = 40_000


def wide_run(mesh=None, channel=None, aggregator=None, cohort_size=None):
    """A run of 16 clients whose models outweigh all else, and the program of a round.

    Client i moves towards i, so that the median is not the mean.
    """

    def client(ctx, broadcast, client_state, data):
        payload = jax.tree.map(lambda w: w - data**2, broadcast)
        return payload, client_state, {}

    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.sgd(0.5))
    federation = jaxfl.federate(
        algorithm._replace(client=client),
        channel or jaxfl.mean(),
        aggregator,
        mesh=mesh,
        chunk_size=1,
    )
    data, key = jnp.arange(16.0), jax.random.key(0)
    state, _ = jaxfl.simulate(
        federation,
        {"w": jnp.zeros(WIDE), "v": jnp.ones((3, WIDE))},
        data,
        rounds=2,
        cohort_size=cohort_size,
        key=key,
        progress=False,
    )

    def again(state):
        return jaxfl.scan_rounds(
            federation, state, data, rounds=1, key=key, cohort_size=cohort_size
        )

    return state, jax.jit(again, donate_argnums=0).lower(state).compile()


def traffic(program, least=WIDE // 4):
    """Each operation between devices, with the shapes of its large arrays."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    operations = re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", program.as_text())
    found = []
    for shapes, kind in operations:
        shapes = [
            tuple(map(int, dims.split(",")))
            for dims in re.findall(r"\[([\d,]+)\]", shapes)
        ]
        large = sorted({shape for shape in shapes if np.prod(shape) >= least})
        found += [(kind, *large)] if large else []
    return sorted(found)


def memory(program):
    """What a device needs in a round beside its states, in models of 4 x WIDE."""
    return program.memory_analysis().temp_size_in_bytes / (4 * 4 * WIDE)


own = jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean())


def test_a_round_is_one_sum_over_devices(mesh):
    state, program = wide_run(mesh)
    assert traffic(program) == [("all-reduce", (3, WIDE), (WIDE,))]
    assert memory(program) < 3
    assert_close(state, wide_run()[0])


@pytest.mark.parametrize("cohort_size", [None, 8])
def test_clients_states_stay_where_they_are(mesh, cohort_size):
    """No device ever holds more than its share of the states, or of the cohort's."""
    state, program = wide_run(mesh, own, cohort_size=cohort_size)
    for x in jax.tree.leaves(state.clients):
        assert {s.data.shape for s in x.addressable_shards} == {(4, *x.shape[1:])}
    share = (cohort_size or 16) // 4
    moved = [("collective-permute", (share, *w)) for w in [(3, WIDE), (WIDE,)]]
    one_sum = ("all-reduce", (3, WIDE), (WIDE,))
    assert traffic(program) == sorted([one_sum, *moved, *moved])  # there and back
    assert_close(state, wide_run(None, own, cohort_size=cohort_size)[0])


def test_a_median_never_holds_the_stack(mesh):
    def run(mesh, aggregator):
        return wide_run(mesh, jaxfl.identity(), aggregator)

    state, program = run(mesh, jaxfl.median())
    want, plain = run(mesh, jaxfl.median()._replace(coordinatewise=False))
    assert_close(state, want)
    assert_close(state, run(None, jaxfl.median())[0])
    gathered = [shapes for kind, *shapes in traffic(program) if kind == "all-gather"]
    assert gathered == [[(WIDE,)], [(3 * WIDE,)]]  # one model, not 16
    assert memory(program) < 12  # of 16 that a stack would be
    # Else all messages go to every device, if only some coordinates at a time.
    assert {shape for _, *shapes in traffic(plain) for shape in shapes} == {(16, 1024)}


def test_states_that_devices_do_not_divide_are_on_all(mesh, tmp_path):
    """And a checkpoint of either kind goes on as it lay."""
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    for sizes, rows in ((toy.SIZES, 7), ((*toy.SIZES, 1), 2)):

        def run(rounds, mesh=mesh, sizes=sizes, rows=rows):
            return jaxfl.simulate(
                jaxfl.federate(algorithm, own, mesh=mesh),
                toy.params(),
                toy.data(sizes),
                rounds=rounds,
                key=jax.random.key(0),
                progress=False,
                checkpoint=mesh and tmp_path / str(rows),
            )[0]

        run(1)
        state = run(2)
        for x in jax.tree.leaves(state.clients):
            assert x.addressable_shards[0].data.shape[0] == rows
        assert_close(state, run(2, None))


# --- a client larger than a device --------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        query, key, value = (nn.Dense(32, use_bias=False)(y) for _ in range(3))
        x += nn.Dense(32)(nn.softmax(query @ key.mT / 32**0.5) @ value)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(32)(nn.gelu(nn.Dense(128)(y))), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32)(tokens)
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return nn.Dense(16)(layers()(x, None)[0].mean(1))


def test_a_client_over_two_devices(monkeypatch):
    rng = np.random.default_rng(0)
    tokens, y = (rng.integers(0, 16, n).astype(np.int32) for n in ((24, 8), 24))
    data = jaxfl.from_arrays(tokens, y, np.repeat(np.arange(4), 6))
    model = jaxfl.models.from_linen(Transformer(), tokens[:1])
    params, key = model.init(jax.random.key(0)), jax.random.key(1)

    def federation(mesh=None):
        algorithm = jaxfl.fedavg(
            model.loss, optax.sgd(0.1), optax.sgd(1.0, 0.5), batch_size=None
        )
        return jaxfl.federate(algorithm, own, mesh=mesh, chunk_size=1)

    mesh = jaxfl.client_mesh(jax.devices()[:4], model=2)

    def split(x):
        spec = P(*[None] * (x.ndim - 1), "model") if x.ndim > 1 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    def run(federation, params):
        return jaxfl.simulate(
            federation, params, data, rounds=2, every=2, key=key, progress=False
        )[0]

    module, programs = importlib.import_module("jaxfl.simulate"), []
    segment = module._segment

    def remember(*args, **kwargs):
        programs.append(segment.lower(*args, **kwargs))
        return segment(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_segment", remember)
        state = run(federation(mesh), jax.tree.map(split, params))
    assert_close(state, run(federation(), params), atol=1e-5)

    def largest(tree):
        return sum(
            max(s.data.size for s in x.addressable_shards)
            for x in jax.tree.leaves(tree)
        )

    whole = sum(x.size for x in jax.tree.leaves(params))
    for model_like in (state.params, state.server.algorithm.optimizer):
        assert largest(model_like) < 0.52 * whole
    assert largest(state.clients) < 0.52 * 4 * whole / 2  # and over two by clients

    program = programs[0].compile()  # found in the cache
    kernels = {x.shape for x in jax.tree.leaves(params) if x.size > 500}
    gathered = {
        shape
        for kind, *shapes in traffic(program, least=1)
        if kind == "all-gather"
        for shape in shapes
    }
    assert gathered and not kernels & gathered  # of activations alone


def test_client_mesh_names_what_is_wrong():
    for model in (0, 3):
        with pytest.raises(ValueError, match="model must divide the 4 devices"):
            jaxfl.client_mesh(jax.devices()[:4], model=model)
    with pytest.raises(ValueError, match="mesh must have an axis 'clients'"):
        jaxfl.federate(
            jaxfl.fedavg(toy.loss, optax.sgd(0.1)),
            jaxfl.mean(),
            mesh=jax.make_mesh((2,), ("model",)),
        )
