"""Ditto."""

from typing import Unpack

import jax
import optax

from jaxfl import local
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.core import Algorithm


def ditto(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    lam: float | jax.Array,
    server_optimizer: optax.GradientTransformation | None = None,
    personal_optimizer: optax.GradientTransformation | None = None,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging, and beside it a model of each client's own that is near it.

    The model w is that of `fedavg`. Client k also has its v_k, which it goes on to
    train, in a round in which it takes part, for

        h_k(v_k; w^t) = F_k(v_k) + lambda/2 ||v_k - w^t||^2

    `lambda = 0` is training alone, a large one the federated model.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: of the federated model, begun afresh in every round.
      lam: lambda, at least 0; may be traced.
      server_optimizer: see `fedavg`.
      personal_optimizer: of v_k, begun afresh in every round; `client_optimizer` by
        default.
      **work: what is done for each of the two, see `local.Work`.

    Returns:
      An algorithm whose client state is v_k: row k of `state.clients.algorithm`. Its
      metrics have `"personal"`, those of the training of v_k, beside those of `fedavg`.

    Raises:
      ValueError: if lam is negative; as `fedavg`.

    >>> import jax.numpy as jnp
    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 4.0])
    >>> state, _ = simulate(
    ...     federate(ditto(loss, optax.sgd(0.5), 1.0, steps=20), mean()),
    ...     jnp.float32(0.0), from_arrays(y, y, client_ids=[0, 1]), rounds=5,
    ...     key=jax.random.key(0), progress=False)
    >>> state.params.item(), state.clients.algorithm.tolist()  # half-way to the average
    (2.0, [1.0, 3.0])

    Reference: Li, Hu, Beirami and Smith 2021, arXiv:2012.04221, algorithm 1.
    """
    plain = fedavg(loss, client_optimizer, server_optimizer, **work)
    gradient = local.gradient(loss, statistics=True)
    if isinstance(lam, int | float) and not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}.")

    def init(params):
        return plain.init(params)[0], params

    def client(ctx, w, personal, data):
        own_key, shared_key = jax.random.split(ctx.key)
        payload, _, metrics = plain.client(ctx._replace(key=shared_key), w, (), data)
        near = optax.chain(
            local.proximal(lam, w), personal_optimizer or client_optimizer
        )
        own = local.train(
            ctx._replace(key=own_key), gradient, near, personal, data, **work
        )
        return payload, own.params, metrics | {"personal": own.metrics}

    return plain._replace(init=init, client=client)
