"""FedNova."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.algorithms.fedavg import FedAvgState
from jaxfl.core import Algorithm


def fednova(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging in which who takes more steps does not count for more.

    After tau_i steps client i has moved by `x - x_i = eta sum_k a_ik g_ik`, where the
    weights `a_i` of its gradients are its optimiser's. What is averaged is the
    normalised gradient, and then made as long as the average of the moves,

        d_i  = (x - x_i) / (eta ||a_i||_1)
        x   <- x - tau_eff eta sum_i p_i d_i,    tau_eff = sum_i p_i ||a_i||_1

    so that the federation's fixed point is that of `sum_i p_i F_i`, whereas the plain
    average has that of `sum_i p_i ||a_i||_1 F_i`. `mean()` makes both sums.

    `eta ||a_i||_1` is how far the optimiser moves a number whose gradient is always 1,
    which is what is computed, so any optimiser will do whose updates are linear in the
    gradients: SGD, with momentum, with a schedule, with `local.proximal`. Of any other,
    Adam for instance, it is a heuristic.

    Client sends: `{"model": d_i, "length": eta ||a_i||_1}`, one number more than in
    `fedavg`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      server_optimizer: of `tau_eff eta sum_i p_i d_i` as a gradient; plain averaging by
        default. `optax.sgd(1.0, momentum=...)` is the paper's server momentum.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, as `fedavg`.

    Raises:
      ValueError: as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 0.0, 0.0, 0.0, 1.0])  # four steps against one
    >>> federation = federate(fednova(loss, optax.sgd(0.01), batch_size=1), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0.0), from_arrays(y, y, [0, 0, 0, 0, 1]),
    ...     rounds=1000, key=jax.random.key(0), weight=jnp.ones(2), progress=False)
    >>> round(state.params.item(), 1)  # of fedavg: 0.2
    0.5

    Reference: Wang et al. 2020, arXiv:2007.07481, algorithm 1 and equation 10.
    """
    local.check_work(**work)
    if server_optimizer is None:
        server_optimizer = optax.sgd(1.0)
    gradient = local.gradient(loss)

    def length(steps):
        one = jnp.float32(0.0)

        def step(_, carry):
            x, state = carry
            updates, state = client_optimizer.update(jnp.float32(1.0), state, x)
            return optax.apply_updates(x, updates), state

        return -jax.lax.fori_loop(0, steps, step, (one, client_optimizer.init(one)))[0]

    def init(params):
        return FedAvgState(params, server_optimizer.init(params)), ()

    def client(ctx, broadcast, client_state, data):
        trained = local.train(ctx, gradient, client_optimizer, broadcast, data, **work)
        moved = length(trained.metrics["steps"])
        normalised = tree.divide(
            optax.tree.sub(broadcast, trained.params), jnp.where(moved > 0, moved, 1.0)
        )
        payload = {"model": normalised, "length": moved}
        return payload, client_state, trained.metrics

    def server(ctx, state, outcome):
        update = tree.scale(outcome.payload["length"], outcome.payload["model"])
        updates, optimizer = server_optimizer.update(
            update, state.optimizer, state.params
        )
        return FedAvgState(optax.apply_updates(state.params, updates), optimizer)

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
