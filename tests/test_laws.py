"""The laws that every algorithm, channel and aggregator keeps, from one list.

A new part is one line in PARTS, and inherits every law below.
"""

import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from encoders import ENCODERS, layer_key
from jax.sharding import NamedSharding, PartitionSpec
from jax_privacy.matrix_factorization.banded import ColumnNormalizedBanded

import jaxfl
from jaxfl import (
    Aggregator,
    attack,
    chain,
    communicate,
    compress,
    core,
    homomorphic,
    mean,
    privacy,
    secure,
)
from jaxfl.channel import mechanisms


def counted_median():
    """A robust aggregator with a state, on the path that needs the whole stack."""
    median = jaxfl.median()

    def apply(ctx, payload, sent, state):
        payload, delivered, () = median.apply(ctx, payload, sent, ())
        return payload, delivered, state + jnp.sum(sent)

    return Aggregator(lambda payload: jnp.int32(0), apply)


def norm_above(threshold):
    return jaxfl.gate(
        lambda ctx, payload: optax.tree.norm(payload) > threshold, keep=False
    )


def noisy(h):
    """A channel with a random key in its client state."""
    return jaxfl.at_client(optax.add_noise(0.01 * h, 0.0, key=0))


def dithered():
    """A channel that draws from ctx.key at both ends."""

    def encode(ctx, message, server_state, client_state):
        draw = jax.random.normal(ctx.key)
        payload = jax.tree.map(
            lambda x: x + (0.01 * draw).astype(x.dtype), message.payload
        )
        return message._replace(payload=payload), client_state, {"draw": draw}

    def decode(ctx, payload, server_state, report):
        draw = jax.random.normal(ctx.key)
        return jax.tree.map(lambda x: x + (draw).astype(x.dtype), payload), server_state

    return jaxfl.Channel(lambda payload: ((), ()), encode, decode)


def fedavg(rate=0.1, epochs: int | None = 2, steps: int | None = None):
    client, server = optax.sgd(rate, momentum=0.5), optax.sgd(0.7)
    return jaxfl.fedavg(
        toy.loss, client, server, batch_size=2, epochs=epochs, steps=steps
    )


def descent(rate=0.1):
    """The lightest algorithm that trains, to put channels and aggregators round."""
    return jaxfl.fedavg(toy.loss, optax.sgd(rate), optax.sgd(0.7), batch_size=None)


def around(channel):
    return descent(), channel, jaxfl.total()


def distributed(h, noise):
    return chain(
        *(jaxfl.clip(h), compress.rotation(), mean(denominator=5.0)),
        noise(0.3, clients=5, dimension=4, bits=20),
    )


def private(h):
    loss = privacy.dp_sgd(
        toy.loss, clip_norm=h, noise_multiplier=0.3, denominator=2, microbatch_size=2
    )
    return jaxfl.fedavg(loss, optax.sgd(0.1), batch_size=3, steps=2, poisson=True)


def clustered(h):
    """Begun with two models, where the laws begin all parts with one."""
    algorithm = jaxfl.ifca(toy.loss, optax.sgd(0.1 * h), 2, batch_size=2)

    def init(params):
        return algorithm.init(jax.tree.map(lambda x: jnp.stack([x, x + 1]), params))

    return algorithm._replace(init=init)


RING = jaxfl.topology.ring(toy.N)
BANDED = ColumnNormalizedBanded.default(4, 2).inverse_as_streaming_matrix()
TREE = privacy.tree_aggregation(4, restart=3)


@functools.cache
def paillier_keys():
    """Whose sums are exact, and so the same whatever is drawn to encrypt."""
    return homomorphic.paillier(limit=100.0, bits=48, key_bits=256)


def masked(h):
    masks = secure.secure_sum(lambda n: secure.Graph(4, 2))
    return chain(mean(5.0 * h), secure.fixed_point(8.0, 2**20), masks)


def reconstructed(h):
    """Client 5 learns what class 2 is like; samples are the generator itself."""

    def train(loss):
        return jaxfl.fedavg(loss, optax.sgd(0.1 * h), batch_size=2)

    return attack.gan(
        *(train(toy.loss), train, toy.loss, lambda g, key: g[None], jnp.ones(3)),
        *(optax.adam(0.1 * h),),
        adversary=5,
        target=2,
        fake=3,
        steps=2,
    )


def nodes(h=1.0):
    return jaxfl.local_models(toy.loss, optax.sgd(0.1 * h), batch_size=2)


# name: hyper-parameter -> (algorithm, channel, aggregator)
ALGORITHMS = {
    "fedavg": lambda h: (fedavg(0.1 * h), mean(), jaxfl.total()),
    "fedavg, steps": lambda h: (
        fedavg(0.1 * h, epochs=None, steps=3),
        mean(),
        jaxfl.total(),
    ),
    "fedavg, Adam twice": lambda h: (
        jaxfl.fedavg(toy.loss, optax.adam(0.1 * h), optax.adam(0.05), batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "isolated": lambda h: (
        jaxfl.isolated(toy.loss, optax.sgd(0.1 * h), batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "fedprox": lambda h: (
        jaxfl.fedprox(toy.loss, optax.sgd(0.1), 0.3 * h, jaxfl.fedadam(0.1)),
        mean(),
        jaxfl.total(),
    ),
    "scaffold": lambda h: (
        jaxfl.scaffold(toy.loss, 0.1 * h, optax.sgd(0.7), batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "feddyn": lambda h: (
        jaxfl.feddyn(toy.loss, optax.sgd(0.1), 0.5 * h, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "fednova": lambda h: (
        jaxfl.fednova(toy.loss, optax.sgd(0.1 * h, 0.5), batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "mime": lambda h: (
        jaxfl.mime(toy.loss, optax.adam(0.1 * h), batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "fedexp": lambda h: (
        jaxfl.fedexp(toy.loss, optax.sgd(0.1), 0.1 * h, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "qfedavg": lambda h: (
        jaxfl.qfedavg(toy.loss, 0.1, 1.5 * h, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "agnostic": lambda h: (
        jaxfl.agnostic(toy.loss, optax.sgd(0.1), 0.1 * h, toy.N, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "ditto": lambda h: (
        jaxfl.ditto(toy.loss, optax.sgd(0.1), 0.5 * h, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "apfl": lambda h: (
        jaxfl.apfl(toy.loss, optax.sgd(0.1), 0.5 * h, 0.1, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "pfedme": lambda h: (
        jaxfl.pfedme(toy.loss, 0.1, h, optax.sgd(0.1), 2, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "per_fedavg": lambda h: (
        jaxfl.per_fedavg(toy.loss, optax.sgd(0.1), 0.2 * h, batch_size=2),
        mean(),
        jaxfl.total(),
    ),
    "fedper": lambda h: (
        jaxfl.fedper(
            *(toy.loss, optax.sgd(0.1 * h), lambda path: path == "b"), head_steps=1
        ),
        mean(),
        jaxfl.total(),
    ),
    "ifca": lambda h: (clustered(h), mean(), jaxfl.total()),
    "gan": lambda h: (reconstructed(h), mean(), jaxfl.total()),
    "asynchronous": lambda h: (
        jaxfl.asynchronous(fedavg(0.1 * h), 2),
        chain(jaxfl.faults.corrupt(jaxfl.faults.garbage(h), 0.3), mean()),
        jaxfl.total(),
    ),
}
PARTS = ALGORITHMS | {
    # channels
    "identity": lambda h: (descent(0.1 * h), jaxfl.identity(), jaxfl.total()),
    "mean": lambda h: (descent(0.1 * h), mean(), jaxfl.total()),
    "fixed mean": lambda h: around(mean(5.0 * h)),
    "clip": lambda h: around(chain(jaxfl.clip(h), mean())),
    "gate": lambda h: around(chain(norm_above(0.2 * h), mean())),
    "tap": lambda h: around(chain(jaxfl.tap("raw"), mean(5.0 * h), jaxfl.tap("end"))),
    "on": lambda h: around(chain(jaxfl.on("w", jaxfl.clip(h)), mean())),
    "on, gated": lambda h: around(chain(jaxfl.on("w", norm_above(0.2 * h)), mean())),
    "at_client": lambda h: around(chain(jaxfl.at_client(optax.trace(0.9 * h)), mean())),
    "at_client, keys": lambda h: around(chain(noisy(h), mean())),
    "at_server": lambda h: around(chain(jaxfl.at_server(optax.ema(0.5 * h)), mean())),
    "random": lambda h: (descent(0.1 * h), chain(dithered(), mean()), jaxfl.total()),
    # privacy
    "clip, l1": lambda h: around(chain(jaxfl.clip(h, ord=1), mean())),
    "clip_layers": lambda h: around(chain(privacy.clip_layers(h), mean())),
    "gaussian": lambda h: around(
        chain(jaxfl.clip(h), mean(denominator=5.0), privacy.gaussian(0.3 * h))
    ),
    "gaussian of the mean": lambda h: around(
        chain(jaxfl.clip(h), privacy.gaussian(0.3), mean(denominator=5.0 * h))
    ),
    "laplace": lambda h: around(
        chain(jaxfl.clip(h, ord=1), mean(denominator=5.0), privacy.laplace(0.3 * h))
    ),
    "local_gaussian": lambda h: around(
        chain(jaxfl.clip(h), privacy.local_gaussian(0.3 * h), mean())
    ),
    "local_laplace": lambda h: around(
        chain(jaxfl.clip(h, ord=1), privacy.local_laplace(0.3 * h), mean())
    ),
    "adaptive_clip": lambda h: around(
        chain(
            privacy.adaptive_clip(0.5, initial=0.3 * h, clients=5.0),
            mean(denominator=5.0),
            privacy.gaussian(0.3),
        )
    ),
    "zero_out": lambda h: around(chain(privacy.zero_out(2.0 * h), mean())),
    "adaptive_zero_out": lambda h: around(
        chain(privacy.adaptive_zero_out(0.5, 0.5 * h, increment=0.1), mean())
    ),
    "randomised_response": lambda h: around(
        chain(jaxfl.clip(1.0), privacy.randomised_response(6.0 * h))
    ),
    "randomised_response of some": lambda h: around(
        chain(
            jaxfl.clip(1.0),
            privacy.randomised_response(6.0 * h, coordinates=3, levels=4),
        )
    ),
    "skellam": lambda h: around(distributed(h, privacy.skellam)),
    "discrete_gaussian": lambda h: around(distributed(h, privacy.discrete_gaussian)),
    "skellam in secret": lambda h: around(
        chain(distributed(h, privacy.skellam), secure.secure_sum())
    ),
    "dp_sgd": lambda h: (private(h), mean(), jaxfl.total()),
    "correlated_gaussian": lambda h: around(
        chain(
            jaxfl.clip(h),
            mean(denominator=5.0),
            privacy.correlated_gaussian(0.3 * h, BANDED, rounds=4, min_separation=2),
        )
    ),
    "tree_aggregation": lambda h: around(
        chain(
            jaxfl.clip(h),
            privacy.correlated_gaussian(0.3, TREE, rounds=4, min_separation=1),
            mean(denominator=5.0 * h),
        )
    ),
    # codecs
    "top_k": lambda h: around(compress.top_k(0.5 * h)),
    "top_k of qsgd": lambda h: around(compress.top_k(0.5, compress.qsgd(7))),
    "random_k": lambda h: around(compress.random_k(0.5 * h)),
    "random_k of bfloat16": lambda h: around(
        compress.random_k(0.5, compress.cast(jnp.bfloat16))
    ),
    "cast": lambda h: around(compress.cast(jnp.bfloat16)),
    "uniform": lambda h: around(compress.uniform(3)),
    "qsgd": lambda h: around(compress.qsgd(4 * h)),
    "terngrad": lambda h: around(compress.terngrad(1.5 * h)),
    "scaled_sign": lambda h: around(compress.scaled_sign()),
    "sign_majority": lambda h: around(compress.sign_majority()),
    "rotation": lambda h: around(compress.rotation()),
    "rotation, uniform": lambda h: around(
        chain(compress.rotation(), compress.uniform(3))
    ),
    "eden": lambda h: around(compress.eden(3)),
    "drive": lambda h: around(compress.drive()),
    "fetchsgd": lambda h: around(compress.fetchsgd(3, 3, 0.5 * h, 0.9 * h)),
    "error_feedback": lambda h: around(
        compress.error_feedback(compress.top_k(0.5, compress.terngrad(2.5 * h)))
    ),
    "error_feedback, leafwise": lambda h: around(
        compress.error_feedback(compress.leafwise(compress.scaled_sign()))
    ),
    "differences": lambda h: around(compress.differences(compress.top_k(0.5 * h))),
    "leafwise": lambda h: around(compress.leafwise(compress.qsgd(7))),
    "on, arrays": lambda h: around(
        jaxfl.on(lambda path: path == "w", compress.leafwise(compress.qsgd(7)))
    ),
    "entropy": lambda h: around(chain(compress.qsgd(4), compress.entropy())),
    # secure aggregation
    "fixed_point": lambda h: around(
        chain(mean(5.0 * h), secure.fixed_point(8.0, 2**19, bits=27, stochastic=True))
    ),
    "secure_sum": lambda h: around(masked(h)),
    # when to send
    "norm_threshold": lambda h: around(
        chain(communicate.norm_threshold(0.5 * h, keep=True), mean())
    ),
    "relative_threshold": lambda h: around(
        chain(communicate.relative_threshold(0.3 * h, keep=False), mean())
    ),
    "target_rate": lambda h: around(
        chain(communicate.target_rate(0.5, initial=0.5 * h, step=h, keep=True), mean())
    ),
    "cmfl": lambda h: around(chain(communicate.cmfl(0.6 * h, keep=False), mean())),
    "last_sent_threshold": lambda h: around(
        chain(communicate.last_sent_threshold(0.5 * h), mean(5.0))
    ),
    "lag": lambda h: around(chain(communicate.lag(0.1 * h), mean(5.0))),
    "gaia": lambda h: around(communicate.gaia(0.5 * h)),
    "downlink": lambda h: (
        jaxfl.downlink(descent(0.1 * h), jaxfl.clip(0.3 * h)),
        mean(),
        jaxfl.total(),
    ),
    # aggregators
    "total": lambda h: (descent(0.1 * h), jaxfl.clip(h), jaxfl.total()),
    "median": lambda h: (descent(0.1 * h), jaxfl.clip(h), jaxfl.median()),
    "trimmed_mean": lambda h: (
        *(descent(0.1 * h), jaxfl.clip(h)),
        jaxfl.trimmed_mean(1),
    ),
    "multi_krum": lambda h: (descent(0.1 * h), jaxfl.clip(h), jaxfl.multi_krum(1)),
    "bulyan": lambda h: (descent(0.1 * h), jaxfl.clip(h), jaxfl.bulyan(0)),
    "geometric_median": lambda h: (
        *(descent(0.1 * h), jaxfl.identity()),
        jaxfl.geometric_median(nu=1e-3 * h),
    ),
    "centered_clip": lambda h: (
        *(descent(), jaxfl.identity()),
        jaxfl.centered_clip(0.5 * h, iterations=2),
    ),
    "bucketing": lambda h: (
        *(descent(0.1 * h), jaxfl.clip(h)),
        jaxfl.bucketing(2, jaxfl.median()),
    ),
    "counted median": lambda h: (descent(0.1 * h), jaxfl.clip(h), counted_median()),
    # liars
    "among": lambda h: around(
        chain(
            attack.among([1, 5], chain(attack.noise(h), noisy(h)), rounds=range(1)),
            mean(),
        )
    ),
    "collude, of a sum": lambda h: (
        descent(0.1 * h),
        mean(),
        attack.collude(jaxfl.total(), [1, 5], attack.min_max()),
    ),
    "collude, with a memory": lambda h: (
        descent(0.1 * h),
        jaxfl.identity(),
        attack.collude(jaxfl.median(), [1, 5], attack.mimic(2)),
    ),
    # nodes with models of their own
    "local_models": lambda h: (nodes(h), mean(), jaxfl.total()),
    "dynamic_average": lambda h: (
        nodes(),
        jaxfl.identity(),
        jaxfl.dynamic_average(2.0 * h),
    ),
    "mix": lambda h: (nodes(h), jaxfl.identity(), jaxfl.mix(RING)),
}
if find_spec("phe"):
    PARTS["homomorphic.total"] = lambda h: (
        descent(0.1 * h),
        chain(jaxfl.clip(h), mean()),
        homomorphic.total(paillier_keys()),
    )

PLANS = {
    "one after another": (1, None),
    "chunks of 2": (2, None),
    "chunks of 3": (3, None),
    "4 devices": (None, 4),
    "3 devices, chunks of 1": (1, 3),
    "2 devices, chunks of 2": (2, 2),
}

# All laws of a part in a row, which is what the scope is for: its programs are compiled
# once, and let go with it, as the system gives a process only so many mappings.
every_part = pytest.mark.parametrize("name", PARTS, scope="module")
# Where a law is about what runs a part and not about the part.
some_parts = pytest.mark.parametrize(
    "name", ["fedavg", "clip", "at_client, keys", "random", "median"], scope="module"
)


def build(name, h=1.0, plan=(None, None)):
    chunk, devices = plan
    mesh = None if devices is None else jaxfl.client_mesh(jax.devices()[:devices])
    return jaxfl.federate(*PARTS[name](h), chunk_size=chunk, mesh=mesh)


# The same object again, which need not be traced and compiled again.
of_this_part = functools.lru_cache(maxsize=1)
built = of_this_part(build)


@of_this_part
def begun(federation):
    return federation.init(toy.params(), toy.data())


def run(federation, cohort=None, rounds=2, **how):
    """Some rounds with the same cohort; the last state and info."""
    return each_round(federation, cohort, rounds, **how)[-1]


def each_round(federation, cohort, rounds, params=None, data=None, jit=True, seed=7):
    """Some rounds with the same cohort; every state and info."""
    as_usual = params is None and data is None
    params = toy.params() if params is None else params
    data = toy.data() if data is None else data
    cohort = toy.cohort(data) if cohort is None else cohort
    state = begun(federation) if as_usual else federation.init(params, data)
    if federation.mesh is not None:  # where it would be compiled again for round 2
        state = jax.device_put(state, NamedSharding(federation.mesh, PartitionSpec()))
    round_fn = jax.jit(federation.round) if jit else federation.round
    done = []
    for _ in range(rounds):
        state, info = round_fn(jax.random.key(seed), state, cohort)
        done.append((state, info))
    return done


@of_this_part
def plain_rounds(name):
    """What a part gives with the whole cohort at once on one device, in two rounds."""
    return each_round(built(name), None, 2)


def plainly(name):
    return plain_rounds(name)[-1]


@of_this_part
def without(name, absent):
    """What it gives when one client is not in the cohort."""
    others = [i for i in range(toy.N) if i != absent]
    return run(built(name), toy.cohort(toy.data(), others))


def bare(tree):
    """Random keys as integers, to compare."""
    return jax.tree.map(np.asarray, jaxfl.tree.without_keys(tree))


def assert_close(got, want, rtol=1e-5, atol=1e-5):
    got, want = bare(got), bare(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float64), b.astype(np.float64), rtol, atol
        ),
        got,
        want,
    )


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, bare(got), bare(want))


def moved(state):
    return float(optax.tree.norm(optax.tree.sub(state.params, toy.params())))


# --- 1. identity and associativity ------------------------------------------


def layers(channel):
    return (channel,) if channel.layers is None else channel.layers


@every_part
def test_chains_are_their_layers_however_they_are_nested(name):
    _, channel, _ = PARTS[name](1.0)
    a, b = dithered(), jaxfl.clip(3.0)
    assert layers(chain(jaxfl.identity(), chain(channel), jaxfl.identity())) == layers(
        channel
    )
    flat = layers(chain(a, b, channel))
    assert layers(chain(a, chain(b, channel))) == flat
    assert layers(chain(chain(a, b), channel)) == flat


@some_parts
def test_identity_changes_nothing(name):
    algorithm, channel, aggregator = PARTS[name](1.0)
    same = chain(jaxfl.identity(), chain(channel), jaxfl.identity())
    assert_same(run(jaxfl.federate(algorithm, same, aggregator)), plainly(name))


@some_parts
def test_chain_is_associative(name):
    algorithm, channel, aggregator = PARTS[name](1.0)
    a, b, c = dithered(), jaxfl.clip(3.0), channel
    want = run(jaxfl.federate(algorithm, chain(a, b, c), aggregator))
    for nested in (chain(a, chain(b, c)), chain(chain(a, b), c)):
        assert_same(run(jaxfl.federate(algorithm, nested, aggregator)), want)


# --- 2. the execution plan and the order of the cohort do not matter --------


@some_parts
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_plan_does_not_matter(name, plan):
    assert_close(run(build(name, plan=plan)), plainly(name))


@every_part
def test_plan_does_not_matter_to_any_part(name):
    """In chunks, on devices, with rows of padding."""
    assert_close(run(build(name, plan=(2, 2))), plainly(name))


def client_state(name):
    data = toy.data()
    federation = built(name)  # not inside, where its constants would be traced
    state = jax.eval_shape(lambda: federation.init(toy.params(), data))
    return jax.tree.leaves(state.clients)


@pytest.mark.parametrize(
    "name",
    ["isolated", "at_client, keys", "scaffold", "error_feedback", "mix"],
    scope="module",
)
def test_spread_states_do_not_matter(name):
    """Clients' states are spread over devices that divide N, as none do above."""
    assert client_state(name)
    data = toy.data((*toy.SIZES, 1))
    cohort = toy.cohort(data, [5, 0, 7, 6, 2])
    want = run(built(name), cohort, data=data)
    assert_close(run(build(name, plan=(1, 4)), cohort, data=data), want)


@every_part
def test_order_does_not_matter(name):
    order = np.array([5, 0, 6, 2, 3, 1, 4])
    data = toy.data()
    want_state, want_info = plainly(name)
    state, info = run(built(name), toy.cohort(data, order))
    assert_close(state, want_state)
    assert_close(info, jax.tree.map(lambda x: x[order], want_info))


# --- 3. an absent client is as one never asked ------------------------------


@every_part
def test_absent_is_never_asked(name):
    absent_is_never_asked(name, built(name))


@some_parts
def test_absent_is_never_asked_on_a_mesh(name):
    absent_is_never_asked(name, build(name, plan=(2, 2)))


def absent_is_never_asked(name, federation):
    absent = 3
    x, y, ids = toy.examples()
    x[ids == absent], y[ids == absent] = np.nan, np.nan
    data = jaxfl.from_arrays(jnp.asarray(x), jnp.asarray(y), ids, toy.N)
    alive = np.arange(toy.N) != absent
    cohort = toy.cohort(data, range(toy.N), alive)
    state, info = run(federation, cohort, data=data)

    want_state, want_info = without(name, absent)
    assert_close(state, want_state)
    assert_close(jax.tree.map(lambda v: v[alive], info), want_info)
    assert not info.sent[absent] and info.bits_up[absent] == 0


# --- 4. what goes in comes out ----------------------------------------------


@every_part
def test_state_keeps_its_shape_and_nothing_recompiles(name):
    federation, data = build(name), toy.data()  # nobody else's compilations counted
    state = federation.init(toy.params(), data)
    round_fn = jax.jit(federation.round)
    for _ in range(3):
        new, _ = round_fn(jax.random.key(0), state, toy.cohort(data))
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        state = new
    assert round_fn._cache_size() == 1  # pyright: ignore


# --- 5. transforms ----------------------------------------------------------


@every_part
def test_jit_does_not_matter(name):
    got = run(built(name), rounds=1, jit=False)
    assert_close(got, plain_rounds(name)[0])


@every_part
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_dtypes_are_kept(name, dtype):
    state, info = run(built(name), params=toy.params(dtype), rounds=1)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.params))


@every_part
def test_vmap_over_seeds_and_hyper_parameters(name):
    @jax.jit
    @jax.vmap
    def whole_runs(h, seed):
        federation = build(name, h)
        done = each_round(federation, None, 2, toy.params(), seed=seed, jit=False)
        return looked_at(done)

    def looked_at(done):  # without reports, which may count signs of next to nothing
        return [
            (jaxfl.tree.without_keys(state), info._replace(reports=()))
            for state, info in done
        ]

    h, seeds = jnp.array([0.5, 1.0, 1.0]), jnp.array([7, 7, 8])
    together = whole_runs(h, seeds)
    plain = looked_at(plain_rounds(name))
    assert_close(jax.tree.map(lambda x: x[1], together), plain)
    # Each run is its own, whatever runs beside it.
    other = whole_runs(h[::-1], seeds[::-1])
    assert_same(jax.tree.map(lambda x: x[::-1], other), together)


# --- 6. randomness belongs to the client, not to its place ------------------


@pytest.mark.parametrize("plan", [(None, None), *PLANS.values()], ids=str)
def test_draws_are_the_clients_own_to_the_bit(plan):
    """The draws of each client, from every plan, order, and company."""

    def draws(clients, plan):
        data = toy.data()
        chunk, devices = plan
        mesh = None if devices is None else jaxfl.client_mesh(jax.devices()[:devices])

        def client(ctx, broadcast, client_state, data):
            return jnp.zeros(()), (), {"draw": jax.random.bits(ctx.key)}

        algorithm = jaxfl.Algorithm(
            lambda params: ((), ()), client, lambda ctx, server, outcome: server
        )
        federation = jaxfl.federate(algorithm, dithered(), chunk_size=chunk, mesh=mesh)
        _, info = run(federation, toy.cohort(data, clients))
        return {
            c: (int(info.metrics["draw"][i]), float(info.reports["draw"][i]))
            for i, c in enumerate(clients)
        }

    want = draws(range(toy.N), (None, None))
    assert len(set(want.values())) == toy.N
    assert draws(range(toy.N), plan) == want
    for company in ([6, 2, 0], [2, 5]):
        got = draws(company, plan)
        assert got == {c: want[c] for c in company}


def test_a_run_depends_on_its_seed():
    assert_same(run(build("fedavg"), seed=1), run(build("fedavg"), seed=1))
    a, b = run(build("fedavg"), seed=1)[0], run(build("fedavg"), seed=2)[0]
    assert moved(a) != moved(b)


# --- 7. bits are the length of a real encoding ------------------------------


def encode(payload) -> bytes:
    """The reference encoding of a plain payload: its numbers, in their dtypes."""
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(payload))


def decode(encoded: bytes, like):
    leaves, place = [], 0
    for x in jax.tree.leaves(like):
        size = x.size * x.dtype.itemsize
        flat = np.frombuffer(encoded[place : place + size], x.dtype)
        leaves.append(flat.reshape(x.shape))
        place += size
    return jax.tree.structure(like).unflatten(leaves)


@every_part
def test_bits_are_the_length_of_the_encoding(name):
    """The payload's own; 4 bytes if a weight goes with it; one bit for each gate."""
    algorithm, channel, aggregator = PARTS[name](1.0)
    channel = chain(channel, jaxfl.tap("wire"))
    aggregator = aggregator._replace(  # who sends what, in which form, is tested there
        traffic=core.star, bits=core.as_sent
    )
    _, info = run(jaxfl.federate(algorithm, channel, aggregator), rounds=1)
    reports = info.reports if isinstance(info.reports, tuple) else (info.reports,)
    for i in range(toy.N):
        if name in ENCODERS and info.sent[i]:
            payload = jax.tree.map(lambda x, i=i: np.asarray(x[i]), reports[-1]["wire"])
            bits = ENCODERS[name].encode(payload, layer_key(jax.random.key(7), 0, i))
            assert_close(ENCODERS[name].decode(bits, payload), payload, 1e-6, 1e-6)
            assert info.bits_up[i] == len(bits), i
            continue
        report = {
            name: jax.tree.map(lambda x, i=i: np.asarray(x[i]), value)
            for layer in reports
            if isinstance(layer, dict)
            for name, value in layer.items()
        }
        payload, flags = report["wire"], "open" in report
        flags |= bool(info.sent[i]) and "below" in report  # adaptive_clip's
        if name == "on, gated" and not report["open"]:
            payload = {"b": payload["b"]}
        encoded = encode(payload) if info.sent[i] else b""
        if info.sent[i]:
            assert_same(decode(encoded, payload), payload)
        if info.sent[i] and "weight" in report:
            encoded += report["weight"].tobytes()
        assert info.bits_up[i] == 8 * len(encoded) + flags, i


@every_part
def test_bits_down_are_the_broadcast(name):
    algorithm = PARTS[name](1.0)[0]
    if algorithm.bits_down is not core.every_bit or algorithm.receive is not core.keep:
        return  # it says itself what goes down; its own test has the formula
    state, info = plain_rounds(name)[0]
    broadcast = algorithm.broadcast(state.server.algorithm)
    assert (info.bits_down == 8 * len(encode(broadcast))).all()


# --- bounds hold ------------------------------------------------------------


def bounded(name):
    """Whether a float is sent that has a bound; whole numbers may be masked."""
    channel = PARTS[name](1.0)[1]
    sent = jax.tree.leaves(channel.sends(toy.params()))
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in sent):
        return False
    return any(np.isfinite(b) for b in channel.bound(core.Bound(2.0, 3.0)))


@pytest.mark.parametrize("name", [p for p in PARTS if bounded(p)], scope="module")
@pytest.mark.parametrize(
    "comes", [core.Bound(2.0, 3.0), core.Bound()], ids=["bounded", "any"]
)
def test_no_message_exceeds_its_bound(name, comes):
    """Of messages on the edge of what may come, and of huge ones."""
    channel = PARTS[name](1.0)[1]
    bound = channel.bound(comes)
    rng = np.random.default_rng(0)
    ctx = core.server_context(
        *(jax.random.key(0), jnp.int32(0), jnp.arange(4), jnp.ones(4, bool)),
        *(jnp.int32(4), toy.params()),
    )._replace(bound=comes)
    server_state, client_state = channel.init(toy.params())
    for _ in range(5):
        payload = jax.tree.map(lambda x: rng.normal(size=x.shape), toy.params())
        x = np.concatenate([v.ravel() for v in jax.tree.leaves(payload)])
        norms = np.linalg.norm(x), np.abs(x).sum()
        limits = [min(b, 1e6) for b in comes]
        factor = min(b / norm for b, norm in zip(limits, norms, strict=True))
        payload = jax.tree.map(lambda x, f=factor: jnp.float32(f * x), payload)
        message = jaxfl.Message(payload, jnp.float32(1.0), jnp.float32(0.0))
        message, _, _ = channel.encode(ctx, message, server_state, client_state)
        leaves = jax.tree.leaves(message.payload)
        x = np.concatenate([np.ravel(v) for v in leaves]).astype(np.float64)
        assert np.linalg.norm(x) <= bound.l2 * (1 + 1e-5)
        assert np.abs(x).sum() <= bound.l1 * (1 + 1e-5)


# --- nobody sends -----------------------------------------------------------


def adds_noise(name):
    """At the server, where that nobody sends is private."""
    _, channel, aggregator = PARTS[name](1.0)
    found = mechanisms(channel, aggregator.makes_sum)
    at_clients = privacy.Local | privacy.Distributed
    return any(not isinstance(mechanism, at_clients) for mechanism in found)


@every_part
def test_a_round_without_messages_changes_no_model(name):
    data = toy.data()
    nobody = toy.cohort(data, range(toy.N), np.zeros(toy.N, bool))
    federation = built(name)
    state = federation.init(toy.params(), data)
    new, info = jax.jit(federation.round)(jax.random.key(0), state, nobody)
    if adds_noise(name):
        assert moved(new) > 0
    else:
        assert_same(new.server.algorithm, state.server.algorithm)
    assert_same(new.clients, state.clients)
    assert not info.sent.any() and not info.bits_up.any() and not info.bits_down.any()
