"""APFL."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.algorithms.fedavg import FedAvgState
from jaxfl.core import Algorithm, Params


class Mixed(NamedTuple):
    """A client's state: its own model `v_i`, and how much that counts, `alpha_i`."""

    own: Params
    alpha: jax.Array

    def model(self, shared: Params) -> Params:
        """`alpha_i v_i + (1 - alpha_i) w`, what the client predicts with."""
        return jax.tree.map(
            lambda v, w: (self.alpha * v + (1 - self.alpha) * w).astype(w.dtype),
            *(self.own, shared),
        )


def apfl(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    alpha: float | jax.Array,
    alpha_rate: float | jax.Array = 0.0,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Each client mixes a model of its own with the federated one, as suits it.

    In each step client i moves its copy of the federated model, and its own model by
    the gradient of the mixture `u = alpha_i v_i + (1 - alpha_i) w_i`,

        w_i <- w_i - eta grad f_i(w_i; z)
        v_i <- v_i - eta alpha_i grad f_i(u; z)

    and before its first step in a round

        alpha_i <- alpha_i - rate <v_i - w, grad f_i(u)>, kept within [0, 1]

    The server averages the w_i.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: of both models, begun afresh in every round.
      alpha: where every alpha_i begins, between 0 and 1; may be traced.
      alpha_rate: by which alpha_i adapts; 0 keeps it.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is a `Mixed`, with the client's `model`.

    Raises:
      ValueError: if alpha is not between 0 and 1, or alpha_rate is negative; as
        `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 4.0])
    >>> state, _ = simulate(
    ...     federate(apfl(loss, optax.sgd(0.5), 0.5, steps=20), mean()),
    ...     jnp.float32(0.0), from_arrays(y, y, client_ids=[0, 1]), rounds=20,
    ...     key=jax.random.key(0), progress=False)
    >>> models = jax.vmap(Mixed.model, (0, None))(state.clients.algorithm, state.params)
    >>> state.params.item(), models.round(1).tolist()
    (2.0, [1.0, 3.0])

    Reference: Deng, Kamani and Mahdavi 2020, arXiv:2003.13461, algorithm 1 and
    equation 9, whose gradient is here of all the client's examples.
    """
    local.check_work(**work)
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    if isinstance(alpha_rate, int | float) and not alpha_rate >= 0:
        raise ValueError(f"alpha_rate must be at least 0, got {alpha_rate}.")
    gradient = local.gradient(loss)

    def init(params):
        return FedAvgState(params, ()), Mixed(params, jnp.float32(alpha))

    def client(ctx, w, own, data):
        train_key, alpha_key = jax.random.split(ctx.key)
        if not isinstance(alpha_rate, int | float) or alpha_rate > 0:
            _, slope = local.full_gradient(
                alpha_key, gradient, own.model(w), data, **work
            )
            slope = optax.tree.vdot(optax.tree.sub(own.own, w), slope)
            moved = jnp.clip(own.alpha - alpha_rate * slope, 0.0, 1.0)
            own = own._replace(alpha=moved.astype(jnp.float32))

        def both(models, batch, mask, key):
            shared, v = models
            value, at_shared = gradient(shared, batch, mask, key)
            mixed = own._replace(own=v).model(shared)
            _, at_mixed = gradient(mixed, batch, mask, key)
            return value, (at_shared, tree.scale(own.alpha, at_mixed))

        trained = local.train(
            ctx._replace(key=train_key),
            both,
            client_optimizer,
            (w, own.own),
            data,
            **work,
        )
        shared, v = trained.params
        return optax.tree.sub(w, shared), own._replace(own=v), trained.metrics

    def server(ctx, state, outcome):
        return state._replace(params=optax.tree.sub(state.params, outcome.payload))

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
