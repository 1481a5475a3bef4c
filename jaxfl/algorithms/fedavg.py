"""Federated averaging."""

from typing import NamedTuple, Unpack

import optax

from jaxfl import local
from jaxfl.core import Algorithm, Params


class FedAvgState(NamedTuple):
    """The server's state: `w_t`, and the server optimiser's own."""

    params: Params
    optimizer: optax.OptState


def fedavg(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging, with any client and any server optimiser.

    For each client k of the cohort, from the broadcast `w_t`, E epochs of batches b:

        w <- w - eta grad l(w; b)            (ClientUpdate; any optax optimiser)
        payload_k = w_t - w

    and at the server, with the weighted mean of the payloads as if it were a gradient,

        w_{t+1} = w_t - sum_k (n_k / n) payload_k = sum_k (n_k / n) w^k_{t+1}

    or the step of any other server optimiser. `mean()` as the channel makes the mean.
    FedSGD is `fedavg(loss, optax.sgd(1.0), optax.sgd(eta), batch_size=None, epochs=1)`:
    one step on all of a client's data makes the payload its gradient.

    Others are too, but for their names:

    - FedAvgM (Hsu et al. 2019, arXiv:1909.06335, section 4):
      `fedavg(loss, optax.sgd(eta), optax.sgd(1.0, momentum=beta))`;
    - Reptile (Nichol et al. 2018, arXiv:1803.02999, algorithm 2), with tasks for
      clients: `fedavg(loss, optax.sgd(alpha), optax.sgd(epsilon), steps=k)`;
    - FedBABU (Oh et al. 2022, arXiv:2106.06042), whose head nobody trains before
      the end: `fedavg(loss, local.only(optax.sgd(eta), is_body))`, and
      `evaluate.fine_tuned(loss, optax.sgd(eta))` to see how good it is then;
    - a server that evaluates the mean of its models, see `ema_of_params`.

    The running statistics of a model with batch normalisation (`local.Normalised`) are
    averaged as its parameters are; the server's optimiser is for the latter only.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      server_optimizer: its state lives at the server; `optax.sgd(1.0)`, plain
        averaging, by default.
      **work: `batch_size` (32), `epochs` (1) or `steps`, `shuffle`, `probe`: how a
        client works in a round, see `local.Work`.

    Returns:
      An algorithm; its metrics are those of `local.train`, its payload the update.

    Raises:
      ValueError: if both epochs and steps are given, or a number is not positive.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return (batch["x"] * w - batch["y"]) ** 2
    >>> x = jnp.arange(1.0, 9.0)
    >>> data = from_arrays(x, 3.0 * x, client_ids=[0, 0, 0, 1, 1, 2, 2, 2])
    >>> federation = federate(fedavg(loss, optax.sgd(0.01), batch_size=2), mean())
    >>> state, history = simulate(
    ...     federation, jnp.float32(0.0), data, rounds=30,
    ...     key=jax.random.key(0), progress=False)
    >>> round(state.params.item(), 3)
    3.0

    Reference: McMahan et al. 2017, arXiv:1602.05629, algorithm 1; the server optimiser
    is that of Reddi et al. 2021, arXiv:2003.00295, algorithm 1.
    """
    local.check_work(**work)
    if server_optimizer is None:
        server_optimizer = optax.sgd(1.0)
    server_optimizer = local.beside_statistics(server_optimizer)
    gradient = local.gradient(loss, statistics=True)

    def init(params):
        return FedAvgState(params, server_optimizer.init(params)), ()

    def client(ctx, broadcast, client_state, data):
        trained = local.train(ctx, gradient, client_optimizer, broadcast, data, **work)
        payload = optax.tree.sub(broadcast, trained.params)
        return payload, client_state, trained.metrics

    def server(ctx, state, outcome):
        updates, optimizer = server_optimizer.update(
            outcome.payload, state.optimizer, state.params
        )
        return FedAvgState(optax.apply_updates(state.params, updates), optimizer)

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
