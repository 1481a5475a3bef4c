"""Federated averaging as one would write it by hand, to time jaxfl against.

Plain jax, flax and optax: convolutions by `lax.conv`, pooling by `reduce_window`, no
code of jaxfl. Each is `(params, x [K, n, 28, 28, 1], y [K, n], key) -> params`, one
round of K clients that each pass once over their n examples in batches of B.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class Network(nn.Module):
    """The networks of McMahan et al. 2017, and logistic regression."""

    kind: str
    reshape_pool: bool = False

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255
        if self.kind == "cnn":
            for features in (32, 64):
                x = nn.relu(nn.Conv(features, (5, 5))(x))
                if self.reshape_pool:
                    b, h, w, c = x.shape
                    x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
                else:
                    x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in {"cnn": (512,), "2nn": (200, 200), "logistic": ()}[self.kind]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def loss_of(network):
    def loss(params, x, y):
        logits = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def client_of(network, optimizer, batch):
    """One client's epoch, its steps scanned."""
    gradient = jax.grad(loss_of(network))

    def client(params, x, y, key):
        order = jax.random.permutation(key, len(y)).reshape(-1, batch)

        def step(carry, rows):
            params, state = carry
            updates, state = optimizer.update(gradient(params, x[rows], y[rows]), state)
            return (optax.apply_updates(params, updates), state), ()

        return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]

    return client


def loop_over_steps(network, optimizer, batch):
    """(a) Python loops over clients and steps, one jitted step: as FedJAX executes."""
    gradient = jax.grad(loss_of(network))

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(gradient(params, x, y), state)
        return optax.apply_updates(params, updates), state

    add = jax.jit(lambda total, x: jax.tree.map(jnp.add, total, x))
    divide = jax.jit(lambda total, k: jax.tree.map(lambda x: x / k, total))

    def round_of(params, x, y, key):
        total = jax.tree.map(jnp.zeros_like, params)
        shuffler = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        for i in range(len(x)):
            local, state = params, optimizer.init(params)
            for rows in shuffler.permutation(len(y[i])).reshape(-1, batch):
                local, state = step(local, state, x[i, rows], y[i, rows])
            total = add(total, local)
        return divide(total, len(x))

    return round_of


def loop_over_clients(network, optimizer, batch):
    """(b) A Python loop over clients, the steps of each scanned in one jit."""
    client = jax.jit(client_of(network, optimizer, batch))
    add = jax.jit(lambda total, x: jax.tree.map(jnp.add, total, x))
    divide = jax.jit(lambda total, k: jax.tree.map(lambda x: x / k, total))

    def round_of(params, x, y, key):
        total = jax.tree.map(jnp.zeros_like, params)
        for i in range(len(x)):
            total = add(total, client(params, x[i], y[i], jax.random.fold_in(key, i)))
        return divide(total, len(x))

    return round_of


def vmapped(network, optimizer, batch):
    """(c) A plain vmap of (b)'s client."""
    client = client_of(network, optimizer, batch)

    @jax.jit
    def round_of(params, x, y, key):
        keys = jax.random.split(key, len(x))
        each = jax.vmap(client, (None, 0, 0, 0))(params, x, y, keys)
        return jax.tree.map(lambda p: p.mean(0), each)

    return round_of


def centralised(network, optimizer, batch):
    """(d) SGD on all the examples together, in one scan: no federation at all."""
    client = client_of(network, optimizer, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(params, x, y, key):
        return client(params, x.reshape(-1, *x.shape[2:]), y.reshape(-1), key)

    return epoch
