"""Asynchronous federated optimization."""

from typing import Unpack

import optax

from jaxfl import local
from jaxfl.algorithms.asynchronous import asynchronous
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.core import Algorithm


def fedasync(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    versions: int,
    *,
    mixing: float = 0.6,
    rho: float = 0.0,
    **work: Unpack[local.Work],
) -> Algorithm:
    """FedAsync: the server mixes in one model at a time, as it comes.

    A client that began at version `x_{t - tau}` minimises

        f(x; z) + rho / 2 ||x - x_{t - tau}||^2

    and of its `x_new` the server makes `x_{t+1} = (1 - alpha_t) x_t + alpha_t x_new`,
    with `alpha_t = alpha s(tau)`. As the payload is `x_t - x_new` that is a step of
    `optax.sgd(alpha)`, and `faults.discount` the function s.

    Client sends: its model, which is here written as what the server has more.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      versions: `schedule.versions`, of a schedule `faults.buffered(..., buffer=1)`.
      mixing: alpha.
      rho: of the proximal term.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm; its server's state is an `AsynchronousState`.

    Raises:
      ValueError: as `asynchronous`; if rho is negative.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxfl import chain, faults, federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> data = from_arrays(y, y, client_ids=[0, 1])
    >>> clock = faults.clock(data, step=jnp.array([1.0, 3.5]))
    >>> schedule = faults.buffered(clock, rounds=4, buffer=1, concurrency=2, seed=0)
    >>> federation = federate(
    ...     fedasync(loss, optax.sgd(1.0), schedule.versions, mixing=0.5),
    ...     chain(faults.discount(faults.hinge(0.5, 1.0)), mean()))
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0), data, rounds=4, cohort_size=schedule,
    ...     key=jax.random.key(0), progress=False)
    >>> state.params.item()  # 0, 1/2, 3/4, 7/8; then 3 comes, 3 rounds stale
    1.40625

    Reference: Xie, Koyejo, Gupta 2019, arXiv:1903.03934, algorithm 1.
    """
    local.check_work(**work)
    if isinstance(rho, int | float) and not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho}.")
    plain = local.gradient(loss)
    optimizer = optax.chain(local.proximal(rho), client_optimizer)
    averaging = fedavg(loss, client_optimizer, optax.sgd(mixing), **work)

    def client(ctx, broadcast, client_state, data):
        trained = local.train(ctx, plain, optimizer, ctx.broadcast, data, **work)
        newest = ring.version(ctx._replace(staleness=None), broadcast)
        payload = optax.tree.sub(newest, trained.params)
        return payload, client_state, trained.metrics

    ring = asynchronous(averaging, versions)
    return ring._replace(client=client)
