"""Per-FedAvg."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.core import Algorithm


def per_fedavg(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    alpha: float | jax.Array,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    first_order: bool = False,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging of a model that is good one gradient step away: MAML.

    It minimises the mean of `F_i(w) = f_i(w - alpha grad f_i(w))`. It is `fedavg` of
    the loss `one_step_away(...)`; a client's own model is then what one step with alpha
    makes of the federated one, see `evaluate.fine_tuned`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      alpha: the step of adaptation; may be traced.
      server_optimizer: see `fedavg`.
      first_order: whether to leave out the second derivatives, as in FO-MAML.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, as `fedavg`.

    Raises:
      TypeError: if loss has a gradient of its own, unless first_order.
      ValueError: as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):  # curvatures 1 and 2
    ...     return 0.5 * batch["x"] * (w - batch["y"]) ** 2
    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0])
    >>> algorithm = per_fedavg(loss, optax.sgd(0.1), 0.5)
    >>> state, _ = simulate(
    ...     federate(algorithm, mean()), jnp.float32(1.0), from_arrays(x, y, [0, 1]),
    ...     rounds=300, key=jax.random.key(0), progress=False)
    >>> abs(round(state.params.item(), 3))  # one step fits client 1 from anywhere
    0.0

    Reference: Fallah, Mokhtari and Ozdaglar 2020, arXiv:2002.07948, algorithm 1, with
    the Hessian's product exact; the batches D and D' are the halves of one batch (the
    same where that has one example), and D'' is D.
    """
    wrapped = one_step_away(loss, alpha, first_order=first_order)
    return fedavg(wrapped, client_optimizer, server_optimizer, **work)


def one_step_away(
    loss: local.Loss, alpha: float | jax.Array, *, first_order: bool = False
) -> local.Differentiated:
    """The loss after one gradient step, and its gradient, see `per_fedavg`."""
    if isinstance(loss, local.Differentiated) and not first_order:
        raise TypeError("loss: the gradient that it comes with is not differentiated.")
    plain = local.gradient(loss)

    def halves(mask):
        rank = jnp.cumsum(mask)
        inner = mask & (rank % 2 == 1)
        return inner, jnp.where(rank[-1] > 1, mask & ~inner, mask)

    def gradient(params, batch, mask, key):
        inner, outer = halves(mask)

        def adapted(params):
            _, grads = plain(params, batch, inner, key)
            return optax.tree.sub(params, tree.scale(alpha, grads))

        if first_order:
            return plain(adapted(params), batch, outer, key)
        there, pullback = jax.vjp(adapted, params)
        value, grads = plain(there, batch, outer, key)
        return value, pullback(grads)[0]

    return local.Differentiated(gradient)
