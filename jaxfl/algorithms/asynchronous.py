"""Any algorithm made asynchronous: clients that train from older models."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfl.core import Algorithm, Params, PyTree, keep, newest


class Versions(NamedTuple):
    """The last broadcasts, what comes down being one of them.

    Attributes:
      broadcast: stacked `[V, ...]`.
      since: int32 `[V]`, from which round on each was the newest.
    """

    broadcast: Any
    since: jax.Array


class AsynchronousState(NamedTuple):
    """The server's state: the inner algorithm's, and what it has broadcast before."""

    algorithm: PyTree
    versions: Versions

    @property
    def params(self) -> Params:
        """The newest model."""
        return self.algorithm.params


def asynchronous(algorithm: Algorithm, versions: int) -> Algorithm:
    """Each client trains from the broadcast of as many rounds ago as it is stale.

    Asynchronous training is a synchronous round over those whose messages have come, of
    whom each began at a time of its own. In round t client i, with staleness tau_i,

        payload_i = w_{t - tau_i} - (what it makes of w_{t - tau_i})

    and the server steps from w_t as ever. All of a buffer train at once, vmapped. A
    client's own state is that of when its message comes, which is that of when it
    began: it has one turn at a time.

    Memory: the server keeps `versions` broadcasts.

    Args:
      algorithm: any whose clients keep no model that is given back to them.
      versions: `schedule.versions`, the largest staleness and one. An older client
        has the oldest that there is.

    Returns:
      An algorithm; its server's state is an `AsynchronousState`.

    Raises:
      TypeError: if algorithm is none.
      ValueError: if versions is not positive, or the algorithm has a `receive`, or
        versions of its own.

    FedBuff: of two clients that train at a time, one a step, the second is slow.

    >>> import optax
    >>> from jaxfl import chain, faults, fedavg, federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0])
    >>> data = from_arrays(y, y, client_ids=[0, 1])
    >>> clock = faults.clock(data, step=jnp.array([1.0, 3.5]))
    >>> schedule = faults.buffered(clock, rounds=9, buffer=1, concurrency=2, seed=0)
    >>> algorithm = asynchronous(fedavg(loss, optax.sgd(0.5)), schedule.versions)
    >>> channel = chain(faults.discount(faults.polynomial(0.5)), mean())
    >>> state, history = simulate(
    ...     federate(algorithm, channel), jnp.float32(0), data, rounds=9,
    ...     cohort_size=schedule, key=jax.random.key(0), progress=False)
    >>> history.clients.staleness.ravel().tolist()
    [0, 0, 0, 3, 1, 0, 0, 3, 1]

    Reference: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1 (FedBuff), with a
    channel `faults.discount` and equal weights.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"algorithm must be a jaxfl.Algorithm, got {algorithm!r}.")
    if not versions >= 1:
        raise ValueError(f"versions must be at least 1, got {versions}.")
    if algorithm.receive is not keep:
        raise ValueError("algorithm: its clients keep what they are given back.")
    if algorithm.version is not newest:
        raise ValueError("algorithm: it has versions of its own.")

    def init(params):
        server, client = algorithm.init(params)
        broadcast = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (versions, *jnp.shape(x))),
            algorithm.broadcast(server),
        )
        since = -jnp.arange(versions, dtype=jnp.int32)
        return AsynchronousState(server, Versions(broadcast, since)), client

    def version(ctx, broadcast):
        tau = 0 if ctx.staleness is None else ctx.staleness
        there = broadcast.since <= ctx.round - tau
        age = jnp.where(there, ctx.round - broadcast.since, jnp.iinfo(jnp.int32).max)
        place = jnp.argmin(age)
        return jax.tree.map(lambda x: x[place], broadcast.broadcast)

    def client(ctx, broadcast, client_state, data):
        return algorithm.client(ctx, ctx.broadcast, client_state, data)

    def server(ctx, state, outcome):
        stepped = algorithm.server(ctx, state.algorithm, outcome)
        old, since = state.versions
        oldest = jnp.argmin(since)
        kept = jax.tree.map(
            lambda x, new: x.at[oldest].set(new), old, algorithm.broadcast(stepped)
        )
        since = since.at[oldest].set(ctx.round + 1)
        return AsynchronousState(stepped, Versions(kept, since))

    def bits_down(ctx, server_state, client_state):
        return algorithm.bits_down(ctx, server_state.algorithm, client_state)

    return Algorithm(
        *(init, client, server),
        broadcast=lambda state: state.versions,
        bits_down=bits_down,
        version=version,
    )
