"""q-FedAvg."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.core import Algorithm, Params


class QFedAvgState(NamedTuple):
    """The server's state: the model."""

    params: Params


def qfedavg(
    loss: local.Loss,
    learning_rate: float | jax.Array,
    q: float | jax.Array,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Averages so that the clients with large losses count for more: q-fairness.

    It minimises `sum_k p_k / (q + 1) F_k^{q+1}`. Client k, which SGD with the step
    `1 / L` takes from the broadcast `w` to `w_k`, sends

        Delta_k = F_k(w)^q L (w - w_k)
        h_k     = q F_k(w)^{q-1} ||L (w - w_k)||^2 + L F_k(w)^q

    and the server steps to `w - sum_k Delta_k / sum_k h_k`. `q = 0` is the average of
    the clients that took part, each counting alike; the larger q, the more uniform the
    losses. The sums are by `mean()`, which makes no difference to their ratio where all
    clients weigh alike (`weight=jnp.ones(N)`), as they do in the paper, whose sampling
    is by size.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example, not negative.
      learning_rate: 1 / L, of plain SGD.
      q: at least 0; may be traced.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm, whose metrics have beside those of `local.train` `"before"`, F_k(w).

    Raises:
      ValueError: if q is negative; as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 0.0, 3.0])  # two clients against one
    >>> def model(q):
    ...     federation = federate(qfedavg(loss, 0.1, q), mean())
    ...     state, _ = simulate(
    ...         federation, jnp.float32(1.0), from_arrays(y, y, range(3)), rounds=300,
    ...         key=jax.random.key(0), progress=False)
    ...     return round(state.params.item(), 2)
    >>> model(0.0), model(5.0)
    (1.0, 1.45)

    Reference: Li, Sanjabi, Beirami and Smith 2020, arXiv:1905.10497, algorithm 2; with
    1e-10 added to each loss, as the authors' code does, against 0 to a negative power.
    """
    local.check_work(**work)
    if isinstance(q, int | float) and not q >= 0:
        raise ValueError(f"q must be at least 0, got {q}.")
    gradient = local.gradient(loss)
    optimizer = optax.sgd(learning_rate)

    def init(params):
        return QFedAvgState(params), ()

    def client(ctx, broadcast, client_state, data):
        train_key, before_key = jax.random.split(ctx.key)
        trained = local.train(
            ctx._replace(key=train_key), gradient, optimizer, broadcast, data, **work
        )
        before, _ = local.full_gradient(before_key, gradient, broadcast, data, **work)
        scaled = tree.divide(optax.tree.sub(broadcast, trained.params), learning_rate)
        base = before + 1e-10
        curvature = q * base ** (q - 1) * tree.norm(scaled, squared=True)
        payload = {
            "model": tree.scale(base**q, scaled),
            "h": (curvature + base**q / learning_rate).astype(jnp.float32),
        }
        return payload, client_state, trained.metrics | {"before": before}

    def server(ctx, state, outcome):
        h = outcome.payload["h"]
        step = tree.divide(outcome.payload["model"], jnp.where(h > 0, h, 1.0))
        return QFedAvgState(optax.tree.sub(state.params, step))

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
