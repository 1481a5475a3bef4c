"""A small federation whose every number can be checked by hand."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

import jaxfl

SIZES = (3, 1, 4, 2, 0, 5, 2)  # ragged, and client 4 has nothing
N = len(SIZES)


def loss(params, batch, key):
    """A quadratic round each example: 1/2 |w - x|^2 + 1/2 (b - y)^2."""
    w = 0.5 * jnp.sum((params["w"] - batch["x"]) ** 2, -1)
    return w + 0.5 * (params["b"] - batch["y"]) ** 2


def params(dtype=jnp.float32):
    return {"w": jnp.array([0.5, -0.5, 1.0], dtype), "b": jnp.array(0.25, dtype)}


def examples(seed=0):
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(N), SIZES)
    x = rng.normal(size=(len(ids), 3)) + ids[:, None]
    return x.astype(np.float32), rng.normal(size=len(ids)).astype(np.float32), ids


def data(sizes=SIZES, seed=0):
    x, y, ids = examples(seed)
    if sizes != SIZES:
        ids = np.repeat(np.arange(len(sizes)), sizes)
        x, y = np.resize(x, (len(ids), 3)), np.resize(y, len(ids))
    return jaxfl.from_arrays(jnp.asarray(x), jnp.asarray(y), ids, len(sizes))


def cohort(data, clients: Iterable[int] = range(N), alive=None):
    """A cohort of these clients, weighted by their numbers of examples."""
    clients = jnp.asarray(list(clients), jnp.int32)
    size = jnp.asarray(data.size)[clients]
    alive = jnp.ones(len(clients), bool) if alive is None else jnp.asarray(alive)
    return jaxfl.Cohort(clients, data[clients], size.astype(jnp.float32), alive)
