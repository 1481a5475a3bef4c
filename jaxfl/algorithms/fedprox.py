"""FedProx."""

from typing import Unpack

import jax
import optax

from jaxfl import local
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.core import Algorithm


def fedprox(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    mu: float | jax.Array,
    server_optimizer: optax.GradientTransformation | None = None,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging whose clients are held near the model that came down.

    Client k minimises, from the broadcast `w^t`, inexactly and as far as it gets,

        h_k(w; w^t) = F_k(w) + mu/2 ||w - w^t||^2

    and the server averages. `mu = 0` is `fedavg`. It is one expression:
    `fedavg(loss, optax.chain(local.proximal(mu), client_optimizer))`.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      mu: weight of the proximal term, at least 0; may be traced.
      server_optimizer: plain averaging by default, as in the paper.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, as `fedavg`.

    Raises:
      ValueError: if mu is negative; as `fedavg`.

    >>> import jax.numpy as jnp
    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([4.0])
    >>> federation = federate(fedprox(loss, optax.sgd(0.5), 1.0, steps=100), mean())
    >>> state, _ = simulate(
    ...     federation, jnp.float32(0.0), from_arrays(y, y, client_ids=[0]), rounds=1,
    ...     key=jax.random.key(0), progress=False)
    >>> state.params.item()  # half-way, as mu is as large as the curvature
    2.0

    Reference: Li et al. 2020, arXiv:1812.06127, algorithm 2, with clients drawn
    uniformly and weighted by `mean()`, as the authors' experiments do.
    """
    optimizer = optax.chain(local.proximal(mu), client_optimizer)
    return fedavg(loss, optimizer, server_optimizer, **work)
