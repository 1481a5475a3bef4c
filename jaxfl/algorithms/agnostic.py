"""Agnostic federated learning."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.core import Algorithm, Params


class AgnosticState(NamedTuple):
    """The server's state: the model `w`, and the mixture `lambda`, `[N]`."""

    params: Params
    mixture: jax.Array


def agnostic(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    mixture_rate: float | jax.Array,
    clients: int,
    **work: Unpack[local.Work],
) -> Algorithm:
    """A model for the worst mixture of the clients: a game between `w` and `lambda`.

    It looks for `min_w max_{lambda in simplex} sum_k lambda_k F_k(w)`. In a round with
    the clients S out of N

        w      <- w - N / |S| sum_S lambda_k (w - w_k)
        lambda <- the nearest point of the simplex to
                  lambda + gamma N / |S| (F_k(w) for k in S, else 0)

    With one full-batch step and everyone, that is the paper's step by exact gradients.
    All messages must weigh alike: `weight=jnp.ones(N)` with `mean()`.

    Client sends: `{"model": N lambda_k (w - w_k), "losses": [N]}`, with its own loss at
    its own place and zeros elsewhere, so that a sum brings all of them to the server.
    Bits: of all N numbers, though one would do.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      mixture_rate: gamma, at least 0; 0 leaves the mixture uniform.
      clients: N.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, whose server state has the `mixture`.

    Raises:
      ValueError: if mixture_rate is negative or clients not positive; as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 0.0, 3.0])
    >>> algorithm = agnostic(loss, optax.sgd(0.05), 0.02, clients=3)
    >>> state, _ = simulate(
    ...     federate(algorithm, mean()), jnp.float32(0.0), from_arrays(y, y, range(3)),
    ...     rounds=1000, key=jax.random.key(0), progress=False)
    >>> round(state.params.item(), 2)  # as far from 0 as from 3
    1.5

    Reference: Mohri, Sivek and Suresh 2019, arXiv:1902.00146, algorithm 1, with the
    last iterate in place of the average of all, and clients drawn uniformly.
    """
    local.check_work(**work)
    if isinstance(mixture_rate, int | float) and not mixture_rate >= 0:
        raise ValueError(f"mixture_rate must be at least 0, got {mixture_rate}.")
    if clients < 1:
        raise ValueError(f"clients must be positive, got {clients}.")
    gradient = local.gradient(loss)

    def init(params):
        return AgnosticState(params, jnp.full(clients, 1 / clients)), ()

    def client(ctx, broadcast, client_state, data):
        params, mixture = broadcast
        train_key, loss_key = jax.random.split(ctx.key)
        trained = local.train(
            ctx._replace(key=train_key),
            gradient,
            client_optimizer,
            params,
            data,
            **work,
        )
        before, _ = local.full_gradient(loss_key, gradient, params, data, **work)
        weight = clients * mixture.at[ctx.client].get(mode="fill", fill_value=0.0)
        payload = {
            "model": tree.scale(weight, optax.tree.sub(params, trained.params)),
            "losses": jnp.where(jnp.arange(clients) == ctx.client, before, 0.0),
        }
        return payload, client_state, trained.metrics

    def server(ctx, state, outcome):
        # The mean of one loss each is 1 / |S| of it; N times that is unbiased.
        ascent = clients * mixture_rate * outcome.payload["losses"]
        return AgnosticState(
            optax.tree.sub(state.params, outcome.payload["model"]),
            optax.projections.projection_simplex(state.mixture + ascent),
        )

    return Algorithm(init, client, server, broadcast=tuple)
