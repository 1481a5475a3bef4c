"""Nodes that keep models of their own, and average them now and then."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

from jaxfl import local
from jaxfl.core import Algorithm, Params


class LocalModelsState(NamedTuple):
    """The server's state: the reference `r`, the last model that all had in common."""

    params: Params


def local_models(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Every node trains its own model, and takes over the average that it is given.

    Node i trains from its own `f_i`, whatever the others do, and with the reference r

        payload_i = r - f_i
        f_i <- r - payload            (where the aggregate was delivered)
        r   <- r - payload            (where it was delivered to every node alive)

    The aggregator says who averages with whom: `total()` and a channel with `mean()`
    are periodic averaging (with `steps=1`, continuous averaging), `dynamic_average`
    synchronises some when models have diverged, `mix` is decentralised averaging.

    Client sends: `r - f_i`. Bits down: those of the aggregate where it is delivered,
    and nothing for r, which a node has from the last full synchronisation. A node that
    was absent then is told r uncounted.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every node in every round, as in `fedavg`.
      **work: as in `fedavg`, see `local.Work`; a round is the time between two looks
        at the models.

    Returns:
      An algorithm whose client state is the node's model: node i's is row i of
      `state.clients.algorithm`. `state.params` is r.

    Raises:
      ValueError: if both epochs and steps are given, or a number is not positive.

    >>> import jax
    >>> from jaxfl import dynamic_average, federate, from_arrays, identity, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> def models(delta):
    ...     federation = federate(
    ...         local_models(loss, optax.sgd(1.0)), identity(), dynamic_average(delta))
    ...     state, _ = simulate(
    ...         federation, jnp.float32(0.0), from_arrays(y, y, client_ids=[0, 1]),
    ...         rounds=1, key=jax.random.key(0), progress=False)
    ...     return state.clients.algorithm.tolist()
    >>> models(0.0), models(100.0)
    ([2.0, 2.0], [1.0, 3.0])

    Reference: Kamp et al. 2018, arXiv:1807.03210; periodic averaging is that of
    McMahan et al. 2017, arXiv:1602.05629, with every client in every round.
    """
    local.check_work(**work)
    gradient = local.gradient(loss, statistics=True)

    def init(params):
        return LocalModelsState(params), params

    def client(ctx, reference, model, data):
        trained = local.train(ctx, gradient, client_optimizer, model, data, **work)
        payload = optax.tree.sub(reference, trained.params)
        return payload, trained.params, trained.metrics

    def server(ctx, state, outcome):
        common = jnp.all(outcome.delivered | ~ctx.alive)
        moved = optax.tree.sub(state.params, outcome.payload)
        return LocalModelsState(optax.tree.where(common, moved, state.params))

    def receive(reference, payload, model, delivered):
        return optax.tree.where(delivered, optax.tree.sub(reference, payload), model)

    def bits_down(ctx, server_state, client_state):
        return jnp.float32(0)

    return Algorithm(
        init, client, server, receive, lambda state: state.params, bits_down
    )
