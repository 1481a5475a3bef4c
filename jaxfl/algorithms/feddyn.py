"""FedDyn."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.core import Algorithm, Params


class FedDynState(NamedTuple):
    """The server's state: the model `theta`, and `h`."""

    params: Params
    h: Params


def feddyn(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    alpha: float | jax.Array,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Dynamic regularisation: clients' optima are made to agree with the federation's.

    Client k minimises, from the broadcast `theta`, with its own `g_k`,

        L_k(w) - <g_k, w> + alpha/2 ||w - theta||^2     giving theta_k
        g_k <- g_k - alpha (theta_k - theta)            (the gradient at theta_k)

    and the server, with the clients P of m in all,

        h     <- h - alpha (1/m) sum_P (theta_k - theta)
        theta <- mean_P theta_k - h / alpha

    `mean()` as the channel makes the mean; it is the paper's where all clients weigh
    alike (`weight=jnp.ones(N)`).

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round. The paper's
        minimisation is exact; the nearer to it, the faster this converges.
      alpha: positive; may be traced.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is `g_k`.

    Raises:
      ValueError: if alpha is not positive; as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * batch["x"] * (w - batch["y"]) ** 2
    >>> data = from_arrays(jnp.array([1.0, 9.0]), jnp.array([0.0, 1.0]), [0, 1])
    >>> federation = federate(feddyn(loss, optax.sgd(0.1), 1.0, steps=20), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0.0), data, rounds=50, key=jax.random.key(0),
    ...     progress=False)
    >>> round(state.params.item(), 4)
    0.9

    Reference: Acar et al. 2021, arXiv:2111.04263, algorithm 1.
    """
    local.check_work(**work)
    if isinstance(alpha, int | float) and not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}.")
    gradient = local.gradient(loss)
    optimizer = optax.chain(local.proximal(alpha), client_optimizer)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return FedDynState(params, zeros), zeros

    def client(ctx, theta, own, data):
        dynamic = local.tilted(gradient, tree.scale(-1.0, own))
        trained = local.train(ctx, dynamic, optimizer, theta, data, **work)
        payload = optax.tree.sub(theta, trained.params)
        own = optax.tree.add(own, tree.scale(alpha, payload))
        return payload, own, trained.metrics

    def server(ctx, state, outcome):
        share = alpha * jnp.sum(outcome.sent) / ctx.population
        h = optax.tree.add(state.h, tree.scale(share, outcome.payload))
        average = optax.tree.sub(state.params, outcome.payload)
        return FedDynState(optax.tree.sub(average, tree.divide(h, alpha)), h)

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
