"""How good a model is: on the device, in batches; and the baselines it has to beat."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import local
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.algorithms.isolated import isolated
from jaxfl.channel import identity, mean
from jaxfl.core import Channel, Params, State, lone_context
from jaxfl.data.federated import ClientData, pool
from jaxfl.history import History
from jaxfl.models import Model
from jaxfl.round import federate, map_clients
from jaxfl.simulate import simulate

PyTree = Any
ExampleMetrics = Callable[[Params, PyTree], dict[str, jax.Array]]


def mean_metrics(
    metrics: ExampleMetrics,
    params: Params,
    examples: PyTree,
    *,
    batch_size: int = 1000,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Metrics averaged over all examples, in batches.

    Args:
      metrics: `(params, batch) -> {name: [B]}`, one number for each example.
      params: of one model.
      examples: pytree of `[E, ...]` arrays.
      batch_size: B, examples evaluated at once.
      mesh: devices to spread the batches over, see `client_mesh`.

    Returns:
      `{name: float32 []}`.

    Raises:
      ValueError: if there are no examples or batch_size is not positive.

    >>> def metrics(w, batch):
    ...     return {"error": (batch - w) ** 2}
    >>> {k: v.item() for k, v in mean_metrics(
    ...     metrics, jnp.float32(0), jnp.array([1.0, 2.0, 3.0]), batch_size=2).items()}
    {'error': 4.666666507720947}
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    if count == 0:
        raise ValueError("examples: there are none to evaluate on.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    batch_size = min(batch_size, count)
    devices = 1 if mesh is None else mesh.size
    batches = -(-count // (batch_size * devices)) * devices

    def on_batch(shared, start):
        params, examples = shared
        place = start + jnp.arange(batch_size)
        batch = jax.tree.map(lambda x: jnp.asarray(x)[place % count], examples)
        each = metrics(params, batch)
        real = place < count
        each = jax.tree.map(lambda m: jnp.where(real, m, 0).astype(jnp.float32), each)
        return jax.tree.map(jnp.sum, each), ()

    starts = jnp.arange(batches) * batch_size
    sums, _ = map_clients(on_batch, (params, examples), starts, chunk_size=1, mesh=mesh)
    return jax.tree.map(lambda s: s / count, sums)


def on_server(
    metrics: ExampleMetrics,
    examples: PyTree,
    *,
    batch_size: int = 1000,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[State], dict[str, jax.Array]]:
    """Evaluates the federated model: `simulate(..., evaluate=on_server(...))`.

    Args:
      metrics: `(params, batch) -> {name: [B]}`, for instance `model.metrics`.
      examples: held-out examples, a pytree of `[E, ...]` arrays.
      batch_size: examples evaluated at once.
      mesh: devices to spread the evaluation over, the federation's for instance.

    Returns:
      `state -> {name: float32 []}`.

    >>> from jaxfl import fedavg, federate, from_arrays
    >>> def loss(w, batch, key):
    ...     return (batch["y"] - w) ** 2
    >>> data = from_arrays(jnp.ones(2), jnp.ones(2), client_ids=[0, 1])
    >>> federation = federate(fedavg(loss, optax.sgd(1.0)), mean())
    >>> state = federation.init(jnp.float32(0), data)
    >>> heldout = {"y": jnp.array([1.0, 3.0])}
    >>> evaluate = on_server(lambda w, batch: {"loss": loss(w, batch, None)}, heldout)
    >>> evaluate(state)["loss"].item()
    5.0
    """

    def evaluate(examples, state):
        return mean_metrics(
            metrics, state.params, examples, batch_size=batch_size, mesh=mesh
        )

    # Examples as an argument, not a constant of the compiled program.
    return jax.tree_util.Partial(evaluate, examples)


def the_federated(params: Params, own: PyTree, data: ClientData, key) -> Params:
    """The model that a client uses if it uses the federated one."""
    del own, data, key
    return params


def fine_tuned(
    loss: local.Loss,
    optimizer: optax.GradientTransformation,
    **work: Unpack[local.Work],
) -> Callable:
    """The federated model after some training at each client: `on_clients(model=...)`.

    Args:
      loss: `(params, batch, key) -> [B]`.
      optimizer: any optax optimiser.
      **work: how much, see `local.Work`.

    Returns:
      `(params, own, data, key) -> params`, for one client.
    """
    local.check_work(**work)
    gradient = local.gradient(loss, statistics=True)

    def model(params, own, data, key):
        ctx = lone_context(key)
        return local.train(ctx, gradient, optimizer, params, data, **work).params

    return model


def on_clients(
    metrics: ExampleMetrics,
    heldout: ClientData,
    data: ClientData | None = None,
    *,
    model: Callable = the_federated,
    key: jax.Array | None = None,
    chunk_size: int | None = None,
) -> Callable[[State], dict[str, jax.Array]]:
    """Evaluates each client's model on its own held-out examples.

    How good it is for whom: the mean says nothing of who loses. `quantiles` makes a
    table of what it returns, over the clients.

    Args:
      metrics: `(params, batch) -> {name: [B]}`, for instance `model.metrics`.
      heldout: the clients' own, N of them.
      data: what they train on, if `model` does; N clients too.
      model: `(params, own, data, key) -> params`, what a client predicts with, of the
        federated model, its row of `state.clients.algorithm`, and its training data:
        the federated model, by default. `fine_tuned(...)`;
        `lambda params, own, data, key: own` for Ditto and nodes with models of their
        own; with `tree.with_named(params, own)` for `fedper`.
      key: for models that draw.
      chunk_size: clients evaluated at once; None for all.

    Returns:
      `state -> {name: float32 [N]}`, NaN for a client without held-out examples.

    Raises:
      ValueError: if data has another number of clients than heldout.

    >>> from jaxfl import fedavg, federate, from_arrays
    >>> def loss(w, batch, key):
    ...     return (batch["y"] - w) ** 2
    >>> y = jnp.array([0.0, 2.0, 2.0])
    >>> clients = from_arrays(y, y, client_ids=[0, 1, 1])
    >>> state = federate(fedavg(loss, optax.sgd(1.0)), mean()).init(
    ...     jnp.float32(0), clients)
    >>> def metrics(w, batch):
    ...     return {"loss": loss(w, batch, None)}
    >>> on_clients(metrics, clients)(state)["loss"].tolist()
    [0.0, 4.0]
    >>> tuned = fine_tuned(loss, optax.sgd(0.5))
    >>> on_clients(metrics, clients, clients, model=tuned)(state)["loss"].tolist()
    [0.0, 0.0]
    """
    data = heldout if data is None else data
    if data.num_clients != heldout.num_clients:
        raise ValueError(
            f"data has {data.num_clients} clients and heldout {heldout.num_clients}."
        )
    key = jax.random.key(0) if key is None else key
    n = heldout.num_clients

    def evaluate(heldout, data, key, state):
        def of_one(shared, x):
            params, heldout, data, key = shared
            i, own = x
            its = model(params, own, data[i], jax.random.fold_in(key, i))
            place = jnp.arange(max(1, heldout.longest))
            mask = place < heldout[i].size
            each = metrics(its, heldout[i].take(place))
            means = jax.tree.map(
                lambda m: jnp.sum(jnp.where(mask, m, 0)) / jnp.sum(mask), each
            )
            return (), jax.tree.map(jnp.float32, means)

        shared = state.params, heldout, data, key
        xs = jnp.arange(n), state.clients.algorithm
        return map_clients(of_one, shared, xs, chunk_size=chunk_size)[1]

    return jax.tree_util.Partial(evaluate, heldout, data, key)


def quantiles(
    values: Any, at: tuple[float, ...] = (0.1, 0.5, 0.9)
) -> dict[str, np.ndarray]:
    """Mean, quantiles and spread of a metric over the clients, the last axis.

    Args:
      values: `[..., N]`, NaN for clients that are left out.
      at: which quantiles.

    Returns:
      `{"mean", "std", "worst", "p10", "p50", "p90"}`, arrays `[...]`; `worst` is the
      least, and q-fair learning's measure of fairness is `std`, squared.

    >>> {k: v.item() for k, v in quantiles(np.arange(11.0), at=(0.1,)).items()}
    {'mean': 5.0, 'std': 3.1622776601683795, 'worst': 0.0, 'p10': 1.0}
    """
    values = np.asarray(values, np.float64)
    summary = {
        "mean": np.nanmean(values, -1),
        "std": np.nanstd(values, -1),
        "worst": np.nanmin(values, -1),
    }
    each = np.nanquantile(values, at, axis=-1)
    return summary | {f"p{100 * q:g}": x for q, x in zip(at, each, strict=True)}


class Comparison(NamedTuple):
    """The histories of the same model, data and budget in three regimes.

    In each, `history.clients.metrics["probe"]` holds, `[R, K, probes]`, what each
    node's own model scored on the held-out examples inside every round.

    Attributes:
      initial: `{name: float}`, what the model scores that all of them start from.
      federated: nodes that average; `history["accuracy"]` is the federated model.
      isolated: the same nodes, which never communicate.
      pooled: one node that holds everything, the benchmark without federation.
    """

    initial: dict[str, np.ndarray]
    federated: History
    isolated: History
    pooled: History


def compare(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    data: ClientData,
    heldout: PyTree,
    *,
    rounds: int,
    key: jax.Array,
    server_optimizer: optax.GradientTransformation | None = None,
    pooled_optimizer: optax.GradientTransformation | None = None,
    channel: Channel | None = None,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
    **work: Unpack[local.Work],
) -> Comparison:
    """Does it work? Federated, isolated and pooled training of one model on one budget.

    All three start from the same parameters, and in every round each passes over the
    same examples as often, or takes as many steps in all.

    Args:
      model: what is trained.
      client_optimizer: of every node, in all regimes.
      data: the population; all of it takes part in every round.
      heldout: examples that every model is evaluated on.
      rounds: R.
      key: of the whole comparison.
      server_optimizer: of the federation, see `fedavg`.
      pooled_optimizer: of the pooled benchmark, if another suits it better.
      channel: of the federation; `mean()` by default.
      chunk_size: see `federate`.
      mesh: see `federate`.
      progress: whether to show a progress bar.
      **work: what a node does in a round, see `local.Work`; `probes` is how often its
        model is evaluated in each round, 1 if not given.

    Returns:
      A `Comparison`.

    Raises:
      ValueError: as `simulate` and `local.train`; if a `probe` is given.
    """
    if "probe" in work:
        raise ValueError("probe: compare evaluates the nodes' models itself.")
    init_key, run_key = jax.random.split(key)
    params = model.init(init_key)
    heldout = jax.tree.map(jnp.asarray, heldout)

    def probe(params):
        return mean_metrics(model.metrics, params, heldout)

    work = local.Work(**{"probes": 1, **work, "probe": probe})
    pooled_optimizer = pooled_optimizer or client_optimizer
    federated = fedavg(model.loss, client_optimizer, server_optimizer, **work)
    alone = isolated(model.loss, client_optimizer, **work)
    if steps := work.get("steps"):  # the one node does the work of all
        work = local.Work(**work | {"steps": steps * data.num_clients})
    pooled = fedavg(model.loss, pooled_optimizer, **work)

    def run(algorithm, channel, data, mesh):
        federation = federate(algorithm, channel, chunk_size=chunk_size, mesh=mesh)
        evaluate = on_server(model.metrics, heldout, mesh=mesh)
        _, history = simulate(
            federation,
            params,
            data,
            rounds=rounds,
            key=run_key,
            evaluate=None if algorithm is alone else evaluate,
            progress=progress,
        )
        return history

    return Comparison(
        initial=jax.device_get(jax.jit(probe)(params)),
        federated=run(federated, channel or mean(), data, mesh),
        isolated=run(alone, identity(), data, mesh),
        pooled=run(pooled, mean(), pool(data), None),
    )
