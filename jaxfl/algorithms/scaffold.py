"""SCAFFOLD."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.core import Algorithm, Params


class ScaffoldState(NamedTuple):
    """The server's state: the model `x`, the control variate `c`, the optimiser's."""

    params: Params
    control: Params
    optimizer: optax.OptState


def scaffold(
    loss: local.Loss,
    learning_rate: float | jax.Array,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    exact: bool = False,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging without client drift, by control variates.

    Client i has a control `c_i`, the server `c`, the mean over all clients. K steps

        y_i <- y_i - eta_l (g_i(y_i) - c_i + c)
        c_i+ = c_i - c + (x - y_i) / (K eta_l)          (option II)
        c_i+ = grad f_i(x), of all its examples         (option I: exact=True)

    and at the server, of the clients S out of N,

        x <- x - eta_g mean_S (x - y_i)
        c <- c - |S| / N mean_S (c_i - c_i+)

    `mean()` as the channel makes the means; they are the paper's where all clients
    weigh alike (`weight=jnp.ones(N)`).

    Client sends: `{"model": x - y_i, "control": c_i - c_i+}`, twice a model; as much
    comes down. Where a message is lost or withheld its client's control has moved on
    and the server's has not. `on("model", ...)` is a channel for the model alone.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      learning_rate: eta_l, of plain SGD; may be traced.
      server_optimizer: `optax.sgd(eta_g)`; plain averaging, eta_g = 1, by default.
      exact: option I, which takes a further pass over the client's data.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is `c_i`.

    Raises:
      ValueError: as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):  # curvatures 1 and 9: averages would be biased
    ...     return 0.5 * batch["x"] * (w - batch["y"]) ** 2
    >>> data = from_arrays(jnp.array([1.0, 9.0]), jnp.array([0.0, 1.0]), [0, 1])
    >>> federation = federate(scaffold(loss, 0.1, steps=5), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0.0), data, rounds=50, key=jax.random.key(0),
    ...     progress=False)
    >>> round(state.params.item(), 4)
    0.9

    Reference: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1.
    """
    local.check_work(**work)
    if server_optimizer is None:
        server_optimizer = optax.sgd(1.0)
    gradient = local.gradient(loss)
    optimizer = optax.sgd(learning_rate)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return ScaffoldState(params, zeros, server_optimizer.init(params)), zeros

    def client(ctx, broadcast, own, data):
        x, control = broadcast
        train_key, exact_key = jax.random.split(ctx.key)
        trained = local.train(
            ctx._replace(key=train_key),
            local.tilted(gradient, optax.tree.sub(control, own)),
            *(optimizer, x, data),
            **work,
        )
        update = optax.tree.sub(x, trained.params)
        if exact:
            new = local.full_gradient(exact_key, gradient, x, data, **work)[1]
        else:
            length = learning_rate * trained.metrics["steps"]
            slope = tree.divide(update, jnp.where(length > 0, length, 1.0))
            new = optax.tree.add(optax.tree.sub(own, control), slope)
        new = optax.tree.where(trained.metrics["steps"] > 0, new, own)
        payload = {"model": update, "control": optax.tree.sub(own, new)}
        return payload, new, trained.metrics

    def server(ctx, state, outcome):
        updates, optimizer = server_optimizer.update(
            outcome.payload["model"], state.optimizer, state.params
        )
        share = jnp.sum(outcome.sent) / ctx.population
        moved = tree.scale(share, outcome.payload["control"])
        return ScaffoldState(
            optax.apply_updates(state.params, updates),
            optax.tree.sub(state.control, moved),
            optimizer,
        )

    return Algorithm(
        init, client, server, broadcast=lambda state: (state.params, state.control)
    )
