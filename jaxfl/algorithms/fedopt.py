"""Server optimisers: FedAdagrad, FedYogi and FedAdam as in their paper, and an EMA."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdaptiveState(NamedTuple):
    """The first and the second moment, `m_t` and `v_t`."""

    m: optax.Updates
    v: optax.Updates


def fedadagrad(
    learning_rate: float, tau: float = 1e-3, beta_1: float = 0.0
) -> optax.GradientTransformation:
    """FedAdagrad's server: `v_t = v_{t-1} + Delta_t^2`.

    All three step by `x_{t+1} = x_t - eta m_t / (sqrt(v_t) + tau)` with
    `m_t = beta_1 m_{t-1} + (1 - beta_1) Delta_t` and `v_{-1} = tau^2`, where Delta is
    the averaged update, by jaxfl's sign convention. They are those of optax but for
    where `v` begins, and that no bias is corrected: in the first rounds, of which a
    federated run has few, that is a factor of up to `1 / (1 - beta_1)`.

    Args:
      learning_rate: eta; may be traced.
      tau: the degree of adaptivity, positive; the smaller, the more adaptive.
      beta_1: of the first moment, from 0 to less than 1.

    Returns:
      An optax optimiser: `fedavg(loss, optax.sgd(0.1), fedadagrad(0.1))`.

    Raises:
      ValueError: if tau is not positive or a beta not in [0, 1).

    >>> server = fedadagrad(1.0, tau=1.0)
    >>> server.update(jnp.array(2.0), server.init(jnp.array(0.0)))[0].round(4).item()
    -0.618

    Reference: Reddi et al. 2021, arXiv:2003.00295, algorithm 2.
    """
    return _adaptive(learning_rate, tau, beta_1, lambda v, square: v + square)


def fedyogi(
    learning_rate: float, tau: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.99
) -> optax.GradientTransformation:
    """FedYogi's: `v_t = v_{t-1} - (1 - beta_2) Delta_t^2 sign(v_{t-1} - Delta_t^2)`.

    Otherwise as `fedadagrad`.
    """
    _require_share("beta_2", beta_2)

    def second(v, square):
        return v - (1 - beta_2) * square * jnp.sign(v - square)

    return _adaptive(learning_rate, tau, beta_1, second)


def fedadam(
    learning_rate: float, tau: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.99
) -> optax.GradientTransformation:
    """FedAdam's: `v_t = beta_2 v_{t-1} + (1 - beta_2) Delta_t^2`.

    Otherwise as `fedadagrad`.
    """
    _require_share("beta_2", beta_2)

    def second(v, square):
        return beta_2 * v + (1 - beta_2) * square

    return _adaptive(learning_rate, tau, beta_1, second)


class EmaOfParamsState(NamedTuple):
    """The average of the models so far."""

    ema: optax.Params


def ema_of_params(decay: float | jax.Array) -> optax.GradientTransformation:
    """Averages the models that an optimiser goes through, and changes nothing.

    As the last of a chain it sees `x_{t+1} = x_t + updates` and keeps, from
    `ema_0 = x_0`,

        ema_{t+1} = decay ema_t + (1 - decay) x_{t+1}

    Training goes on from x; `optax.tree.get(state.server.algorithm.optimizer, "ema")`
    is the average, to be evaluated, in float32 at least. (`optax.ema` averages the
    updates instead: that is momentum.) Running statistics of a `local.Normalised` lag
    behind by a round, as the optimiser is not shown where they go.

    Args:
      decay: from 0 to less than 1; may be traced.

    Returns:
      A part of an optimiser: `fedavg(loss, optax.sgd(0.1),
      optax.chain(optax.sgd(1.0), ema_of_params(0.9)))`.

    Raises:
      ValueError: if decay is not in [0, 1).

    >>> server = optax.chain(optax.sgd(1.0), ema_of_params(0.5))
    >>> x = jnp.array(4.0)
    >>> updates, state = server.update(jnp.array(4.0), server.init(x), x)
    >>> optax.apply_updates(x, updates).item(), optax.tree.get(state, "ema").item()
    (0.0, 2.0)

    Reference: Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30(4),
    with weights that decay.
    """
    _require_share("decay", decay)

    def init(params):
        return EmaOfParamsState(
            jax.tree.map(
                lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params
            )
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: ema_of_params must be given the model.")
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(
            lambda m, x: (decay * m + (1 - decay) * x).astype(m.dtype), state.ema, new
        )
        return updates, EmaOfParamsState(ema)

    return optax.GradientTransformation(init, update)


def _adaptive(
    learning_rate: float, tau: float, beta_1: float, second: Callable
) -> optax.GradientTransformation:
    if isinstance(tau, int | float) and not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}.")
    _require_share("beta_1", beta_1)

    def init(params):
        v = jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)
        return AdaptiveState(optax.tree.zeros_like(params), v)

    def update(updates, state, params=None):
        del params

        def first(m, g):
            return (beta_1 * m + (1 - beta_1) * g).astype(m.dtype)

        m = jax.tree.map(first, state.m, updates)
        v = jax.tree.map(lambda v, g: second(v, g**2).astype(v.dtype), state.v, updates)
        steps = jax.tree.map(
            lambda m, v: (-learning_rate * m / (jnp.sqrt(v) + tau)).astype(m.dtype),
            *(m, v),
        )
        return steps, AdaptiveState(m, v)

    return optax.GradientTransformation(init, update)


def _require_share(name: str, beta: float | jax.Array) -> None:
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"{name} must be in [0, 1), got {beta}.")
