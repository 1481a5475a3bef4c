"""Nodes that never communicate: the baseline that federation has to beat."""

from typing import NamedTuple, Unpack

import optax

from jaxfl import local
from jaxfl.core import Algorithm, Params


class IsolatedState(NamedTuple):
    """The server's state: the parameters that every node began with."""

    params: Params


def isolated(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Each node trains a model of its own, as often as in `fedavg`, and sends nothing.

    Its payload is empty: with `identity()` as the channel no bit is sent. Node k's
    model is row k of `state.clients.algorithm`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh in every round, as in `fedavg`.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is the node's model.

    Raises:
      ValueError: if both epochs and steps are given, or a number is not positive.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxfl import federate, from_arrays, identity, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> federation = federate(isolated(loss, optax.sgd(1.0)), identity())
    >>> state, history = simulate(
    ...     federation, jnp.float32(0.0), from_arrays(y, y, client_ids=[0, 1]),
    ...     rounds=1, key=jax.random.key(0), progress=False)
    >>> state.clients.algorithm.tolist(), history.bits()["up"].tolist()
    ([1.0, 3.0], [0.0])
    """
    local.check_work(**work)
    gradient = local.gradient(loss, statistics=True)

    def init(params):
        return IsolatedState(params), params

    def client(ctx, broadcast, model, data):
        trained = local.train(ctx, gradient, client_optimizer, model, data, **work)
        return (), trained.params, trained.metrics

    def server(ctx, state, outcome):
        return state

    # Nothing comes down either: a node has its model from the start.
    return Algorithm(init, client, server, broadcast=lambda state: ())
