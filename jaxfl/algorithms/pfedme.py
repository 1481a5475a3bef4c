"""pFedMe."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.core import Algorithm


def pfedme(
    loss: local.Loss,
    learning_rate: float | jax.Array,
    lam: float | jax.Array,
    personal_optimizer: optax.GradientTransformation,
    personal_steps: int = 5,
    beta: float | jax.Array = 1.0,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging of Moreau envelopes: each client's model may be a step away.

    It minimises the mean of `min_theta f_i(theta) + lambda/2 ||theta - w||^2`, whose
    gradient is `lambda (w - theta(w))`. In each of its local rounds client i

        theta ~ argmin f_i(theta; batch) + lambda/2 ||theta - w_i||^2   (K steps)
        w_i <- w_i - eta lambda (w_i - theta)

    and the server takes `w <- (1 - beta) w + beta mean w_i`. It is `fedavg` of the loss
    `envelope(...)`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      learning_rate: eta; may be traced.
      lam: lambda, positive; may be traced.
      personal_optimizer: of theta, begun afresh from w_i for every batch.
      personal_steps: K.
      beta: of the server; may be traced.
      **work: as in `fedavg`; a step is what the paper calls a local round.

    Returns:
      An algorithm, as `fedavg`. A client's own model is what the K steps make of the
      federated one: `personal(w) = w - envelope(...).gradient(w, ...)[1] / lambda`.

    Raises:
      ValueError: if lam is not positive, or personal_steps is not; as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> algorithm = pfedme(loss, 0.5, 1.0, optax.sgd(0.5), 20, steps=10)
    >>> state, _ = simulate(
    ...     federate(algorithm, mean()), jnp.float32(0.0), from_arrays(y, y, [0, 1]),
    ...     rounds=5, key=jax.random.key(0), progress=False)
    >>> round(state.params.item(), 3)
    2.0

    Reference: Dinh, Tran and Nguyen 2020, arXiv:2006.08848, algorithm 1.
    """
    wrapped = envelope(loss, lam, personal_optimizer, personal_steps)
    return fedavg(wrapped, optax.sgd(learning_rate), optax.sgd(beta), **work)


def envelope(
    loss: local.Loss,
    lam: float | jax.Array,
    optimizer: optax.GradientTransformation,
    steps: int = 5,
) -> local.Differentiated:
    """The Moreau envelope of a loss, by so many steps towards its minimiser.

    Its gradient is `lam (w - theta)`; its value the loss at w. See `pfedme`.
    """
    if isinstance(lam, int | float) and not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}.")
    if steps < 1:
        raise ValueError(f"personal_steps must be at least 1, got {steps}.")
    plain = local.gradient(loss)

    def gradient(params, batch, mask, key):
        near = optax.chain(local.proximal(lam, params), optimizer)

        def step(i, carry):
            theta, state, first = carry
            value, grads = plain(theta, batch, mask, key)
            updates, state = near.update(grads, state, theta)
            first = jnp.where(i == 0, value.astype(jnp.float32), first)
            return optax.apply_updates(theta, updates), state, first

        theta, _, value = jax.lax.fori_loop(
            0, steps, step, (params, near.init(params), jnp.float32(0))
        )
        return value, tree.scale(lam, optax.tree.sub(params, theta))

    return local.Differentiated(gradient)
