"""Dynamic averaging against NumPy, and the two schemes it has at its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl.core import server_context


def context(seed, roster, sent):
    key = jax.random.key(seed)
    ids = jnp.asarray(roster, jnp.int32)
    return server_context(
        key, jnp.int32(0), ids, jnp.asarray(sent), jnp.int32(len(roster)), ()
    )


def numpy_dynamic(distance, sent, order, delta):
    """Who is in B, by the paper's words, and the average over B; `order`: who joins."""
    present = set(np.flatnonzero(sent))
    members = {i for i in present if np.sum(distance[i] ** 2) > delta}
    waiting = [i for i in order if i in present - members]
    while members and len(members) < len(present):
        if np.sum(np.mean([distance[i] for i in members], axis=0) ** 2) <= delta:
            break
        more = 2 * len(members)
        if len(members) + more > len(present) / 2:
            members = set(present)
        else:
            members |= {waiting.pop(0) for _ in range(more)}
    average = np.mean([distance[i] for i in members], axis=0) if members else 0.0
    return np.isin(np.arange(len(sent)), list(members)), average


@pytest.mark.parametrize("k", [1, 2, 5, 24])
def test_equals_numpy(k):
    """Many populations, of which some nodes are away, at thresholds of all kinds."""
    rng = np.random.default_rng(k)
    aggregator = jaxfl.dynamic_average
    sizes = set()

    @jax.jit
    def average(seed, roster, distance, sent, delta):
        payload = {"w": distance[:, :2], "b": distance[:, 2]}
        ctx = context(0, roster, sent)._replace(key=jax.random.key(seed))
        payload, delivered, () = aggregator(delta).apply(ctx, payload, sent, ())
        draw = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(ctx.key, i)))
        return jnp.append(payload["w"], payload["b"]), delivered, draw(ctx.roster)

    for seed in range(60):
        roster = rng.permutation(50)[:k].astype(np.int32)
        distance = rng.normal(size=(k, 3)) * rng.choice([0.3, 1.0, 2.0], (k, 1))
        distance = distance.astype(np.float32)
        sent = rng.random(k) < 0.8
        delta = np.float32(rng.choice([0.0, 1.0, 3.0, 8.0, 50.0]))
        masked = np.where(sent[:, None], distance, 0)
        payload, delivered, draw = average(seed, roster, masked, sent, delta)
        members, want = numpy_dynamic(
            distance.astype(np.float64), sent, np.argsort(draw), delta
        )
        np.testing.assert_array_equal(delivered, members)
        np.testing.assert_allclose(payload, want + np.zeros(3), rtol=1e-5, atol=1e-6)
        sizes.add((int(delivered.sum()), int(sent.sum())))
    if k == 24:  # none, some of them after a balancing, and all
        assert any(size == 0 for size, _ in sizes)
        assert any(0 < size < all_ / 2 for size, all_ in sizes)
        assert any(size == all_ for size, all_ in sizes)


def test_every_order_of_joining_is_as_likely():
    """One violator of nine is balanced by two others: each is one in a quarter."""
    distance = jnp.zeros(9).at[4].set(1.5)
    sent = jnp.ones(9, bool)

    def members(seed):
        ctx = context(0, range(9), sent)._replace(key=jax.random.key(seed))
        return jaxfl.dynamic_average(1.0).apply(ctx, distance, sent, ())[1]

    joined = jax.vmap(members)(jnp.arange(4000))
    assert (joined.sum(1) == 3).all() and joined[:, 4].all()
    share = np.delete(joined.mean(0), 4)
    # 5 standard deviations of a share of 4000 draws
    np.testing.assert_allclose(share, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))


ALGORITHM = jaxfl.local_models(toy.loss, optax.sgd(0.1, momentum=0.5), batch_size=2)


def run(aggregator, channel=None, cohort_size=None, rounds=6, params=None):
    data = toy.data()
    federation = jaxfl.federate(ALGORITHM, channel or jaxfl.identity(), aggregator)
    state = federation.init(toy.params() if params is None else params, data)
    state, (info, _) = jaxfl.scan_rounds(
        federation,
        state,
        data,
        rounds=rounds,
        key=jax.random.key(3),
        cohort_size=cohort_size,
        weight=jnp.ones(toy.N),
    )
    return state, info


@pytest.mark.parametrize("cohort_size", [None, 5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_delta_0_is_periodic_averaging_to_the_bit(dtype, cohort_size):
    params = toy.params(dtype)

    @jax.jit
    def both(delta):
        return (
            run(jaxfl.dynamic_average(delta), None, cohort_size, params=params)[0],
            run(jaxfl.total(), jaxfl.mean(), cohort_size, params=params)[0],
        )

    dynamic, periodic = both(0.0)
    assert (dynamic.params["w"] != params["w"]).all()
    for read in (lambda state: state.params, lambda state: state.clients.algorithm):
        jax.tree.map(np.testing.assert_array_equal, read(dynamic), read(periodic))


def test_thresholds_in_one_run_and_a_message_for_each_model():
    """delta = 0, two between, infinity, as one vmap; 2 |B| messages of 128 bits."""
    deltas = jnp.array([0.0, 1.0, 4.0, jnp.inf])
    _, info = jax.jit(jax.vmap(lambda d: run(jaxfl.dynamic_average(d))))(deltas)
    members = info.delivered.sum((1, 2))
    np.testing.assert_array_equal(
        info.bits_up.sum((1, 2)) + info.bits_down.sum((1, 2)), 2 * 128 * members
    )
    np.testing.assert_array_equal(info.bits_up, 128.0 * info.delivered)
    assert members[0] == 6 * toy.N and members[3] == 0
    assert members[0] > members[1] > members[2] > 0
    alone = run(jaxfl.dynamic_average(4.0))[1]
    np.testing.assert_array_equal(info.delivered[2], alone.delivered)


def test_only_members_move_and_the_reference_waits():
    """Two violators that balance each other: the third keeps its model, r stays."""
    y = jnp.array([4.0, -2.0, 0.5])
    data = jaxfl.from_arrays(y, y, [0, 1, 2])
    federation = jaxfl.federate(
        jaxfl.local_models(
            lambda w, batch, key: 0.5 * (w - batch["y"]) ** 2, optax.sgd(1.0)
        ),
        jaxfl.identity(),
        jaxfl.dynamic_average(2.0),
    )
    state = federation.init(jnp.float32(0.0), data)
    everyone = jaxfl.Cohort(jnp.arange(3), data, jnp.ones(3), jnp.ones(3, bool))
    state, info = federation.round(jax.random.key(0), state, everyone)
    assert info.delivered.tolist() == [True, True, False]
    assert state.clients.algorithm.tolist() == [1.0, 1.0, 0.5]
    assert state.params.item() == 0.0
    assert info.bits_up.tolist() == info.bits_down.tolist() == [32.0, 32.0, 0.0]


@pytest.mark.parametrize("wrong", [-1, -0.5, float("nan")])
def test_delta_is_not_negative(wrong):
    with pytest.raises(ValueError, match=f"delta .*{wrong}"):
        jaxfl.dynamic_average(wrong)


def test_payloads_are_floats():
    with pytest.raises(TypeError, match="dynamic_average: payload must be of floats"):
        jaxfl.dynamic_average(1.0).init(jnp.zeros(2, jnp.int32))
