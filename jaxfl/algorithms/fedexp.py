"""FedExP."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.core import Algorithm, Params


class FedExpState(NamedTuple):
    """The server's state: the model."""

    params: Params


def fedexp(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    epsilon: float = 1e-3,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging with a server step as long as the clients disagree.

    With the updates `Delta_i` of M clients and their mean,

        eta_g = max(1, sum_i ||Delta_i||^2 / (2 M (||mean Delta||^2 + epsilon)))
        w    <- w - eta_g mean Delta

    which is the extrapolation of projections onto convex sets: updates that are
    orthogonal want a step M / 2 times the mean. `mean()` as the channel makes both
    means; they are the paper's where all clients weigh alike.

    Client sends: `{"model": Delta_i, "squared_norm": ||Delta_i||^2}`, one number more
    than in `fedavg`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      epsilon: at least 0; how small a mean is not extrapolated.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, as `fedavg`.

    Raises:
      ValueError: if epsilon is negative; as `fedavg`.

    >>> import jax
    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):  # client i minds coordinate i only
    ...     return 0.5 * jnp.sum(batch["x"] * (w - 1.0) ** 2, -1)
    >>> data = from_arrays(jnp.eye(8), jnp.zeros(8), range(8))
    >>> federation = federate(fedexp(loss, optax.sgd(1.0), epsilon=0.0), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.zeros(8), data, rounds=1, key=jax.random.key(0),
    ...     progress=False)
    >>> state.params[0].item()  # 8 / 2 times the mean; the mean alone is 1 / 8
    0.5

    Reference: Jhunjhunwala et al. 2023, arXiv:2301.09604, algorithm 1.
    """
    local.check_work(**work)
    if isinstance(epsilon, int | float) and not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    gradient = local.gradient(loss)

    def init(params):
        return FedExpState(params), ()

    def client(ctx, broadcast, client_state, data):
        trained = local.train(ctx, gradient, client_optimizer, broadcast, data, **work)
        update = optax.tree.sub(broadcast, trained.params)
        payload = {"model": update, "squared_norm": tree.norm(update, squared=True)}
        return payload, client_state, trained.metrics

    def server(ctx, state, outcome):
        update = outcome.payload["model"]
        below = 2 * (tree.norm(update, squared=True) + epsilon)
        ratio = outcome.payload["squared_norm"] / jnp.where(below > 0, below, 1.0)
        step = tree.scale(jnp.maximum(1.0, ratio), update)
        return FedExpState(optax.tree.sub(state.params, step))

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
