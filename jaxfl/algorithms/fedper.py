"""FedPer, FedRep, FedBN: models of which a part stays at home."""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local, tree
from jaxfl.algorithms.fedavg import FedAvgState
from jaxfl.core import Algorithm, Params


def fedper(
    loss: local.Loss,
    client_optimizer: optax.GradientTransformation,
    private: Callable[[str], bool],
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    head_steps: int = 0,
    **work: Unpack[local.Work],
) -> Algorithm:
    """Federated averaging of a part of the model; the rest is each client's own.

    `private` says of a parameter's path, such as "params/Dense_2/kernel", whether it
    stays at home:

    - FedPer: the last layers, trained together with the rest;
    - FedRep: the same, trained by themselves for `head_steps` before each round's other
      steps, in which they do not move;
    - FedBN: the normalisation layers, `lambda path: "BatchNorm" in path`, with their
      scales, biases and running statistics. To keep at home the statistics alone,
      `lambda path: path.startswith("statistics")`.

    FedBABU, which moves the head of nobody until the end, is a `fedavg`.

    Client sends: the shared part of its update only, as a dictionary by path. No more
    comes down.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      client_optimizer: of both parts, begun afresh in every round.
      private: `path -> bool`.
      server_optimizer: of the shared part, see `fedavg`.
      head_steps: FedRep's steps of the private part alone; 0 trains both together.
      **work: as in `fedavg`, see `local.Work`.

    Returns:
      An algorithm whose client state is its private parameters, by path, as
      `tree.with_named(state.params, own)` puts them into the model. Those of
      `state.params` are where every client began.

    Raises:
      ValueError: when initialised, if all parameters are private or none; if head_steps
        is negative; if running statistics are shared and server_optimizer is given; as
        `fedavg`.

    >>> from jaxfl import federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w["body"] + w["head"] - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> algorithm = fedper(loss, optax.sgd(0.25), lambda path: path == "head")
    >>> start = {"body": jnp.float32(0), "head": jnp.float32(0)}
    >>> state, _ = simulate(
    ...     federate(algorithm, mean()), start,
    ...     from_arrays(y, y, client_ids=[0, 1]), rounds=30, key=jax.random.key(0),
    ...     progress=False)
    >>> own = state.clients.algorithm["head"]
    >>> (state.params["body"] + own).round(2).tolist(), own.round(1).tolist()
    ([1.0, 3.0], [0.0, 2.0])

    Reference: Arivazhagan et al. 2019, arXiv:1912.00818, algorithms 1 and 2; Collins et
    al. 2021, arXiv:2102.07078, algorithm 1; Li et al. 2021, arXiv:2102.07623.
    """
    local.check_work(**work)
    if head_steps < 0:
        raise ValueError(f"head_steps must be at least 0, got {head_steps}.")
    averages = server_optimizer is None
    if server_optimizer is None:
        server_optimizer = optax.sgd(1.0)
    gradient = local.gradient(loss, statistics=True)

    def part(params: Params, own: bool) -> dict:
        return {p: x for p, x in tree.named(params).items() if private(p) == own}

    def only(own: bool) -> optax.GradientTransformation:
        return local.only(client_optimizer, lambda path: private(path) == own)

    def init(params):
        shared, own = part(params, False), part(params, True)
        if not shared or not own:
            chosen = "none" if shared else "all"
            raise ValueError(f"private chooses {chosen} of {[*tree.named(params)]}.")
        running = [p for p in shared if p.split("/")[0] == "statistics"]
        if running and isinstance(params, local.Normalised) and not averages:
            raise ValueError(
                f"server_optimizer: {running} are running statistics, which can be "
                "averaged only; let private choose them, or leave the optimiser out."
            )
        return FedAvgState(params, server_optimizer.init(shared)), own

    def client(ctx, params, own, data):
        head_key, key = jax.random.split(ctx.key)
        model, optimizer = tree.with_named(params, own), client_optimizer
        if head_steps:
            model = local.train(
                *(ctx._replace(key=head_key), gradient, only(True), model, data),
                batch_size=work.get("batch_size", 32),
                steps=head_steps,
                shuffle=work.get("shuffle", True),
            ).params
            optimizer = only(False)
        trained = local.train(
            ctx._replace(key=key), gradient, optimizer, model, data, **work
        )
        payload = optax.tree.sub(part(params, False), part(trained.params, False))
        return payload, part(trained.params, True), trained.metrics

    def server(ctx, state, outcome):
        shared = part(state.params, False)
        updates, optimizer = server_optimizer.update(
            outcome.payload, state.optimizer, shared
        )
        moved = optax.tree.cast_like(optax.tree.add(shared, updates), shared)
        return FedAvgState(tree.with_named(state.params, moved), optimizer)

    def bits_down(ctx, server_state, client_state):
        return jnp.float32(tree.num_bits(part(ctx.broadcast, False)))

    return Algorithm(
        *(init, client, server),
        broadcast=lambda state: state.params,
        bits_down=bits_down,
    )
