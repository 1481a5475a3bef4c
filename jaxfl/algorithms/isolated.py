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
    """
    local.check_work(**work)
    gradient = local.gradient(loss)

    def init(params):
        return IsolatedState(params), params

    def client(ctx, broadcast, model, data):
        trained = local.train(ctx.key, gradient, client_optimizer, model, data, **work)
        return (), trained.params, trained.metrics

    def server(ctx, state, outcome):
        return state

    # Nothing comes down either: a node has its model from the start.
    return Algorithm(init, client, server, broadcast=lambda state: ())
