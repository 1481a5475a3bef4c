"""Mime and MimeLite."""

from typing import NamedTuple, Unpack

import jax
import optax

from jaxfl import local
from jaxfl.core import Algorithm, Params


class MimeState(NamedTuple):
    """The server's state: `x`, the statistics `s`, the mean gradient `c`."""

    params: Params
    optimizer: optax.OptState
    gradient: Params


def mime(
    loss: local.Loss,
    optimizer: optax.GradientTransformation,
    *,
    lite: bool = False,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Clients that step as the centralised optimiser would, whose statistics are fixed.

    Every local step of client i uses the server's statistics s (momentum, second
    moments), which do not change meanwhile, and a gradient without its own drift,

        y_i <- y_i - eta U(g_i(y_i; z) - g_i(x; z) + c, s)
        y_i <- y_i - eta U(g_i(y_i; z), s)                     (lite=True: MimeLite)

    on a batch z; the server then averages, and moves s by the mean of the clients' full
    gradients at x,

        x <- mean y_i,    s <- V(mean grad f_i(x), s)

    U and V are what an optax optimiser makes of a gradient, its update and its state.

    Client sends: `{"model": x - y_i, "gradient": grad f_i(x)}`, twice a model.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      optimizer: the base optimiser, with its learning rate:
        `optax.sgd(0.1, momentum=0.9)`, `optax.adam(1e-3)`.
      lite: whether to leave out the correction.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, as `fedavg`.

    Raises:
      ValueError: as `fedavg`.

    >>> import jax.numpy as jnp
    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * batch["x"] * (w - batch["y"]) ** 2
    >>> data = from_arrays(jnp.array([1.0, 9.0]), jnp.array([0.0, 1.0]), [0, 1])
    >>> federation = federate(mime(loss, optax.sgd(0.05), steps=5), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0.0), data, rounds=50, key=jax.random.key(0),
    ...     progress=False)
    >>> round(state.params.item(), 4)
    0.9

    Reference: Karimireddy et al. 2021, arXiv:2008.03606, algorithm 1. There c is the
    mean of this round's clients at this round's x, for which they would be asked twice;
    here it is that of the round before, and the first round is MimeLite's.
    """
    local.check_work(**work)
    gradient = local.gradient(loss)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return MimeState(params, optimizer.init(params), zeros), ()

    def client(ctx, broadcast, client_state, data):
        x, statistics, c = broadcast
        train_key, full_key = jax.random.split(ctx.key)

        def corrected(params, batch, mask, key):
            value, here = gradient(params, batch, mask, key)
            _, there = gradient(x, batch, mask, key)
            without_drift = optax.tree.add(optax.tree.sub(here, there), c)
            return value, optax.tree.where(ctx.round > 0, without_drift, here)

        fixed = optax.stateless(
            lambda updates, params: optimizer.update(updates, statistics, params)[0]
        )
        trained = local.train(
            ctx._replace(key=train_key),
            gradient if lite else corrected,
            fixed,
            x,
            data,
            **work,
        )
        _, full = local.full_gradient(full_key, gradient, x, data, **work)
        payload = {"model": optax.tree.sub(x, trained.params), "gradient": full}
        return payload, client_state, trained.metrics

    def server(ctx, state, outcome):
        mean_gradient = outcome.payload["gradient"]
        _, statistics = optimizer.update(mean_gradient, state.optimizer, state.params)
        moved = optax.tree.sub(state.params, outcome.payload["model"])
        return MimeState(moved, statistics, mean_gradient)

    return Algorithm(init, client, server, broadcast=tuple)
