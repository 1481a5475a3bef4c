"""IFCA: clustered federated learning."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local
from jaxfl.core import Algorithm, Params


class ClusterState(NamedTuple):
    """The server's state: k models, stacked `[k, ...]`."""

    params: Params


def ifca(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    clusters: int,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Several federated models, of which each client trains the one that suits it best.

    Client i of the cohort, to whom all k models come down,

        j_i = argmin_j F_i(theta_j),    trains theta_{j_i}

    and each model becomes the weighted mean of what its clients made of it; one that
    nobody chose stays. It begins with k different models: give
    `jax.vmap(model.init)(keys)` as the parameters.

    Client sends: `{"model": [k, ...], "chosen": [k]}`, zero but for its own model.
    Bits: of all k; a real client would send one model and its number.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: begun afresh by every client in every round.
      clusters: k.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is `j_i`, int32 `[]`, -1 before its first round.

    Raises:
      ValueError: when initialised, unless the parameters are stacked `[k, ...]`; if
        clusters is not positive; as `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([0.0, 1.0, 9.0])
    >>> state, _ = simulate(
    ...     federate(ifca(loss, optax.sgd(0.5), 2, steps=10), mean()),
    ...     jnp.array([-1.0, 6.0]), from_arrays(y, y, range(3)), rounds=5,
    ...     key=jax.random.key(0), progress=False)
    >>> state.params.round(1).tolist(), state.clients.algorithm.tolist()
    ([0.5, 9.0], [0, 0, 1])

    Reference: Ghosh, Chung, Yin and Ramchandran 2020, arXiv:2006.04088, algorithm 1
    (option II, model averaging); HypCluster of Mansour et al. 2020, arXiv:2002.10619.
    """
    local.check_work(**work)
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}.")
    gradient = local.gradient(loss, statistics=True)

    def init(params):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
        if any(shape[:1] != (clusters,) for shape in shapes):
            raise ValueError(
                f"params must be {clusters} models, stacked [{clusters}, ...]; they "
                f"have the shapes {shapes}."
            )
        return ClusterState(params), jnp.int32(-1)

    def client(ctx, models, chosen, data):
        train_key, choose_key = jax.random.split(ctx.key)

        def value(model):
            return local.full_gradient(choose_key, gradient, model, data, **work)[0]

        chosen = jnp.argmin(jax.lax.map(value, models)).astype(jnp.int32)
        model = jax.tree.map(lambda x: x[chosen], models)
        trained = local.train(
            ctx._replace(key=train_key), gradient, client_optimizer, model, data, **work
        )
        update = optax.tree.sub(model, trained.params)
        payload = {
            "model": jax.tree.map(
                lambda x, u: jnp.zeros_like(x).at[chosen].set(u), models, update
            ),
            "chosen": jnp.zeros(clusters).at[chosen].set(1.0),
        }
        return payload, chosen, trained.metrics

    def server(ctx, state, outcome):
        share = outcome.payload["chosen"]

        def step(x, update):
            below = jnp.where(share > 0, share, 1.0).reshape(-1, *[1] * (x.ndim - 1))
            return (x - update / below).astype(x.dtype)

        return ClusterState(jax.tree.map(step, state.params, outcome.payload["model"]))

    return Algorithm(init, client, server, broadcast=lambda state: state.params)
