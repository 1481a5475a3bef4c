"""Every algorithm through every kind of channel and aggregator, for two rounds.

A cross is run operation by operation, and what it has in common with others is compiled
once and used again: as a program of its own each would take seconds to compile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_laws import ALGORITHMS, PARTS

import jaxfl
from jaxfl import chain, compress, mean, privacy, secure

# One whose broadcast is compressed, and one whose clients' models are not the server's.
NAMES = [*ALGORITHMS, "downlink", "local_models"]
NO_MODEL_AT_THE_SERVER = {"isolated", "local_models"}
ABSENT = 3

every_algorithm = pytest.mark.parametrize("name", NAMES, scope="module")


def shared(part, *fields):
    """The same part, of which these functions are compiled once for all algorithms.

    None of them looks at what differs between those: the broadcast and the bound.
    """

    def compiled(function):
        function = jax.jit(function)

        def call(ctx, *args):
            return function(ctx._replace(broadcast=(), bound=None), *args)

        return call

    return part._replace(**{f: compiled(getattr(part, f)) for f in fields})


TOTAL, MEDIAN = jaxfl.total(), shared(jaxfl.median(), "apply")
TOP_K = shared(compress.error_feedback(compress.top_k(0.5)), "encode")
MASKS = shared(secure.secure_sum(lambda n: secure.Graph(4, 2)), "encode", "decode")
SECURE = chain(secure.fixed_point(8.0, 2**20), MASKS)
GAUSSIAN = chain(mean(denominator=5.0), privacy.gaussian(0.3))
CLIP = jaxfl.clip(1.0)

# cross: the codec, where it stands -> (channel, aggregator)
CROSSES = {
    "identity, total": lambda top_k: (mean(), TOTAL),
    "identity, median": lambda top_k: (jaxfl.identity(), MEDIAN),
    "top_k, total": lambda top_k: (chain(top_k, mean()), TOTAL),
    "top_k, median": lambda top_k: (top_k, MEDIAN),
    "gaussian, total": lambda top_k: (chain(CLIP, GAUSSIAN), TOTAL),
    "secure_sum, total": lambda top_k: (chain(mean(5.0), SECURE), TOTAL),
}
REFUSED = {
    "gaussian, median": (chain(CLIP, privacy.gaussian(0.3)), "bound"),
    "secure_sum, median": (SECURE, "secure_sum"),
}


@functools.lru_cache(maxsize=1)
def algorithm(name):
    part = PARTS[name](1.0)[0]
    return part._replace(client=jax.jit(part.client), server=jax.jit(part.server))


def finite(tree):
    leaves = jax.tree.leaves(jaxfl.tree.without_keys(tree))
    return all(np.isfinite(np.asarray(x)).all() for x in leaves)


def row(tree, client):
    return jax.tree.map(lambda x: np.asarray(x[client]), jaxfl.tree.without_keys(tree))


@every_algorithm
@pytest.mark.parametrize("cross", CROSSES)
def test_two_rounds(name, cross):
    x, y, ids = toy.examples()
    x[ids == ABSENT], y[ids == ABSENT] = np.nan, np.nan
    data = jaxfl.from_arrays(jnp.asarray(x), jnp.asarray(y), ids, toy.N)
    alive = np.arange(toy.N) != ABSENT
    cohort, key = toy.cohort(data, range(toy.N), alive), jax.random.key(7)
    # One of fednova's five numbers is a length, without which the server stays.
    top_k = jaxfl.on("model", TOP_K) if name == "fednova" else TOP_K
    federation = jaxfl.federate(algorithm(name), *CROSSES[cross](top_k))

    start = state = federation.init(toy.params(), data)
    for _ in range(2):
        state, info = federation.round(key, state, cohort)
        assert finite(state)
        seen = info._replace(metrics=info.metrics["loss"])
        assert finite(jax.tree.map(lambda x, sent=info.sent: x[sent], seen))
        assert not info.rejected.any() and info.sent.any()
        assert not info.sent[ABSENT] and info.bits_up[ABSENT] == 0

    jax.tree.map(
        np.testing.assert_array_equal,
        row(state.clients, ABSENT),
        row(start.clients, ABSENT),
    )
    moved = optax.tree.norm(optax.tree.sub(state.params, start.params)) > 0
    assert moved == (name not in NO_MODEL_AT_THE_SERVER)

    # What comes out goes in again: a third round would be no new program.
    aval = functools.partial(jax.tree.map, jax.typeof)
    again = jax.eval_shape(lambda state: federation.round(key, state, cohort)[0], start)
    assert aval(again) == aval(start) == aval(state)


@every_algorithm
@pytest.mark.parametrize("cross", REFUSED)
def test_what_cannot_be_is_refused_before_it_is_traced(name, cross):
    channel, word = REFUSED[cross]
    with pytest.raises(ValueError, match=word):
        jaxfl.federate(algorithm(name), channel, MEDIAN)
