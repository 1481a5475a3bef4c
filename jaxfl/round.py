"""The round: an algorithm, a channel and an aggregator composed over a cohort."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxfl import tree
from jaxfl.aggregate import total
from jaxfl.channel import mechanisms
from jaxfl.core import (
    Aggregator,
    Algorithm,
    Channel,
    ClientState,
    Cohort,
    Data,
    Federation,
    Info,
    Params,
    ServerState,
    State,
    keep,
    server_context,
)
from jaxfl.data.federated import ClientData
from jaxfl.halves import blank_unless, client_half, round_context, same, server_half
from jaxfl.mesh import AXIS, NOBODY, by_coordinates, per_device, read_rows, write_rows

PyTree = Any


def map_clients(
    fn: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    shared: PyTree,
    xs: PyTree,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
    """Maps a function over clients; sums one part of what it gives, stacks the other.

    `sum_i fn(shared, x_i)[0]` and `[fn(shared, x_i)[1] for i in range(K)]`. This is
    all that `federate` asks of the machine. A round that fits no slot of `federate`
    can be written by hand on it, and is as fast.

    Memory grows with `chunk_size` times what one client needs, not with K: sums are
    streamed. Sums of 16-bit floats are kept in float32 until the end; flags are
    counted; integers wrap, as modular sums need them to.

    Args:
      fn: `(shared, x_i) -> (to_sum, to_stack)`, for one client.
      shared: pytree that every client sees, the same on every device.
      xs: pytree of `[K, ...]` arrays.
      chunk_size: clients vmapped at once, on each device; None for all, 1 for one
        after another. It must divide K / devices.
      mesh: devices to spread the clients over, see `client_mesh`.

    Returns:
      The sum, without the client axis, and the stack `[K, ...]`.

    Raises:
      ValueError: if the chunks or the devices do not divide K.

    >>> def client(shared, x):
    ...     return shared * x, x**2
    >>> summed, stacked = map_clients(client, 10.0, jnp.arange(4.0), chunk_size=2)
    >>> summed.item(), stacked.tolist()
    (60.0, [0.0, 1.0, 4.0, 9.0])
    """
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(xs)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError("xs must be arrays [K, ...] with one client axis K.")
    ((k,),) = lengths
    devices = 1 if mesh is None else mesh.shape[AXIS]
    if k % devices:
        raise ValueError(f"mesh: {devices} devices must divide the {k} clients of xs.")
    chunk = k // devices if chunk_size is None else chunk_size
    if chunk < 1 or (k // devices) % chunk:
        raise ValueError(
            f"chunk_size: {chunk} must divide the {k // devices} clients of a device."
        )

    one = jax.eval_shape(fn, shared, jax.tree.map(lambda a: a[0], xs))[0]
    if mesh is None:
        summed, stacked = _map_chunks(fn, shared, xs, chunk)
        return _settle(summed, one), stacked

    def on_device(shared, xs):
        summed, stacked = _map_chunks(fn, shared, xs, chunk)
        return jax.lax.psum(summed, AXIS), stacked

    spread = per_device(on_device, mesh, (P(), P(AXIS)), (P(), P(AXIS)))
    summed, stacked = spread(shared, xs)
    return _settle(summed, one), stacked


def _map_chunks(fn, shared, xs, chunk: int):
    """`map_clients` on one device: a scan over chunks, each a vmap over its clients.

    The sums are in the dtypes that they are accumulated in.
    """
    k = jax.tree.leaves(xs)[0].shape[0]

    def on_chunk(x):
        if chunk == 1:  # no vmap: a loop's own trip count, a conditional's own branch
            one = jax.tree.map(lambda a: a[0], x)
            summed, stacked = jax.tree.map(
                lambda a: jnp.asarray(a)[None], fn(shared, one)
            )
        else:
            summed, stacked = jax.vmap(fn, (None, 0))(shared, x)
        return jax.tree.map(
            lambda a: jnp.sum(a, 0, dtype=_accumulator(a.dtype)), summed
        ), stacked

    if chunk == k:
        return on_chunk(xs)

    def body(carry, x):
        summed, stacked = on_chunk(x)
        return jax.tree.map(jnp.add, carry, summed), stacked

    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), xs)
    first = jax.tree.map(lambda a: a[0], chunks)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(on_chunk, first)[0]
    )
    summed, stacked = jax.lax.scan(body, zero, chunks)
    return summed, jax.tree.map(lambda a: a.reshape(k, *a.shape[2:]), stacked)


def _settle(summed: PyTree, one: PyTree) -> PyTree:
    """Sums in the dtypes of what was summed; of flags, their number."""

    def leaf(x, to):
        return x if jnp.issubdtype(to.dtype, jnp.bool_) else x.astype(to.dtype)

    return jax.tree.map(leaf, summed, one)


def _accumulator(dtype):
    """Flags are counted, and sums of 16-bit floats would lose what is small."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.int32)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def federate(
    algorithm: Algorithm,
    channel: Channel,
    aggregator: Aggregator | None = None,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> Federation:
    """Composes the round function of a federation.

    One round, for a cohort S of K clients: broadcast the server's state; at every
    client of S train (`algorithm.client`) and encode (`channel.encode`, left to
    right); aggregate what was sent; decode (right to left); step
    (`algorithm.server`); give the aggregate back (`algorithm.receive`).

    What holds whatever the parts are:
      - All randomness of a client is `fold_in(round_key, population_id)`, so a run is
        the same for every chunk size, mesh and order of the cohort.
      - A client that is not alive is as one never asked, even if its data is NaN.
      - An update that is not finite is dropped and counted in `info.rejected`; its
        client's state stays as it was.
      - A round in which nothing is delivered, because nobody sent or because the
        aggregate overflowed, leaves the algorithm's state as it was (after an
        overflow the channel's and aggregator's too). Where the server adds noise, that
        nobody sent is private, and the server steps by the noise.

    Args:
      algorithm: what is computed.
      channel: what happens to messages; `chain` composes several.
      aggregator: how many messages become one; `total()`, their sum, by default.
      chunk_size: execution plan: clients vmapped at once on each device. None, all at
        once, suits accelerators; 1, one after another, suits CPU cores.
      mesh: execution plan: devices to spread the cohort over, see `client_mesh`.
        A cohort that does not fill the chunks or devices is padded inside.

    Returns:
      A `Federation(init, round)`.

    Raises:
      TypeError: if a part is not of its type.
      ValueError: if chunk_size is not positive, mesh has no axis "clients", or the
        channel has a `mean` and the aggregator makes no sum, or adds noise to what
        nothing bounds.

    >>> import optax
    >>> from jaxfl import fedavg, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> federation = federate(fedavg(loss, optax.sgd(1.0), batch_size=None), mean())
    >>> y = jnp.array([1.0, 2.0, 6.0])
    >>> data = from_arrays(y, y, [0, 0, 1])  # client 0 has two examples
    >>> state = federation.init(jnp.float32(0.0), data)
    >>> everyone = Cohort(jnp.arange(2), data, jnp.ones(2), jnp.array([True, True]))
    >>> state, info = federation.round(jax.random.key(0), state, everyone)
    >>> state.params.item()  # the mean of the clients' means, 1.5 and 6
    3.75
    """
    aggregator = total() if aggregator is None else aggregator
    for name, part, kind in (
        ("algorithm", algorithm, Algorithm),
        ("channel", channel, Channel),
        ("aggregator", aggregator, Aggregator),
    ):
        if not isinstance(part, kind):
            raise TypeError(f"{name} must be a jaxfl.{kind.__name__}, got {part!r}.")
    parts = algorithm, channel, aggregator
    summed = aggregator.makes_sum
    if channel.of_sums and not summed:
        raise ValueError(
            "channel: a layer of it makes sense of a sum only, as mean() and "
            "secure_sum() do, and the aggregator is not linear, nor does it make a "
            "sum; leave that layer out."
        )
    mechanisms(channel, summed)  # noise on what nothing bounds is refused here
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    if mesh is not None and AXIS not in mesh.axis_names:
        raise ValueError(
            f"mesh must have an axis {AXIS!r}, got {mesh.axis_names}: "
            "see jaxfl.client_mesh."
        )

    def init(params: Params, data: Data, clients: jax.Array | None = None) -> State:
        n = population_size(data)
        ids = jnp.arange(n) if clients is None else jnp.asarray(clients)
        server, own = algorithm.init(params)

        _, shape = message_shapes(algorithm, server, own, data)
        payload = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        channel_server, channel_own = channel.init(payload)
        if aggregator.personal and jax.tree.leaves(channel_server):
            raise ValueError(
                "channel: it keeps a state at the server, and the aggregator makes "
                "one aggregate for each client."
            )

        def stack(x):
            rows = jnp.broadcast_to(x, (len(ids), *x.shape))
            if tree.is_key(x):  # each client its own
                keys = rows.reshape(len(ids), -1)
                fold = jax.vmap(jax.random.fold_in, (0, None))
                rows = jax.vmap(fold)(keys, ids).reshape(rows.shape)
            return rows

        return State(
            round=jnp.int32(0),
            population=jnp.int32(n),
            server=jax.tree.map(
                _strong,
                ServerState(
                    server, channel_server, aggregator.init(channel.sends(payload))
                ),
            ),
            clients=jax.tree.map(
                stack, jax.tree.map(_strong, ClientState(own, channel_own))
            ),
        )

    def at_client(seen, x):
        """One client of the cohort, from its data to what becomes of its message."""
        ctx, broadcast, client_key, channel_server, examples = seen
        client, own, data, weight, alive, arrives, share, staleness = x
        ctx = ctx._replace(
            key=jax.random.fold_in(client_key, client),
            client=client,
            share=share,
            staleness=staleness,
        )
        letter, own = client_half(
            parts,
            ctx,
            broadcast,
            channel_server,
            own,
            _rejoin(examples, data),
            weight,
            alive,
        )
        left, payload = letter.sent, letter.payload
        sent = left if arrives is None else left & arrives
        payload = payload if arrives is None else tree.mask(sent, payload)

        to_sum = tree.mask(sent, letter.report), payload if aggregator.linear else ()
        to_stack = (
            () if aggregator.linear else payload,
            own,
            sent,
            letter.rejected,
            None if arrives is None else left & ~arrives,
            letter.bits,
            blank_unless(alive, letter.metrics),
            blank_unless(alive, letter.report),
        )
        return to_sum, to_stack

    def round(key: jax.Array, state: State, cohort: Cohort) -> tuple[State, Info]:
        k = _check_cohort(cohort)
        server = state.server
        roster = jnp.asarray(cohort.client, jnp.int32)
        ctx, broadcast, client_key = round_context(
            key, algorithm, state, roster, cohort.alive
        )
        unclocked = cohort._replace(time=None, ended=None, asked=None)
        padded = _pad(unclocked, chunk_size, mesh)
        padded, place = _longest_first(padded, chunk_size, mesh)
        place = slice(k) if place is None else place[:k]
        examples, rows = _separate(padded.data)
        own = read_rows(state.clients, _rows(padded), mesh)
        bits_down = jax.vmap(
            lambda own: algorithm.bits_down(ctx, server.algorithm, own),
            axis_size=padded.client.shape[0],
        )(own.algorithm)[place]

        (reports, summed), stacked = map_clients(
            at_client,
            (ctx, broadcast, client_key, server.channel, examples),
            (
                *(padded.client, own, rows, padded.weight, padded.alive),
                *(padded.arrives, padded.share, padded.staleness),
            ),
            chunk_size=_chunk(padded, chunk_size, mesh),
            mesh=mesh,
        )
        payloads, own, *stacked = stacked
        sent, rejected, lost, bits_up, metrics, each = jax.tree.map(
            lambda x: x[place], stacked
        )

        apply = aggregator.apply
        if mesh is not None and aggregator.coordinatewise:
            apply = by_coordinates(apply, mesh, place)
        else:
            payloads = jax.tree.map(lambda x: x[place], payloads)
        stepped, outcome, reply = server_half(
            parts,
            ctx,
            server,
            summed if aggregator.linear else payloads,
            sent,
            reports,
            apply=apply,
        )
        delivered = outcome.delivered

        def rows_of_padded(x):
            full = jnp.zeros((padded.alive.shape[0], *x.shape[1:]), x.dtype)
            return full.at[place].set(x)

        if aggregator.personal:
            reply = jax.tree.map(rows_of_padded, reply)
        given = jax.vmap(
            algorithm.receive, (None, 0 if aggregator.personal else None, 0, 0)
        )(broadcast, reply, own.algorithm, rows_of_padded(delivered))
        given = same(own.algorithm, given, "algorithm.receive")
        own = own._replace(
            algorithm=tree.where_rows(padded.alive, given, own.algorithm)
        )

        new = State(
            state.round + 1,
            state.population,
            stepped,
            write_rows(state.clients, _rows(padded), own, mesh),
        )
        given_back = 0 if algorithm.receive is keep else tree.num_bits(outcome.payload)
        bits_up, bits_back = aggregator.traffic(
            ctx, bits_up, delivered, jnp.float32(given_back)
        )
        asked = ctx.alive if cohort.asked is None else cohort.asked
        bits_down = jnp.where(asked, bits_down, 0.0) + bits_back
        info = Info(
            client=roster,
            alive=ctx.alive,
            sent=sent,
            delivered=delivered,
            rejected=rejected,
            bits_up=bits_up,
            bits_down=bits_down,
            metrics=metrics,
            reports=each,
            asked=cohort.asked,
            lost=lost,
            staleness=cohort.staleness,
            time=cohort.time,
            ended=cohort.ended,
        )
        return new, info

    return Federation(init, round, parts, chunk_size, mesh)


def message_shapes(
    algorithm: Algorithm, server_state: PyTree, client_state: PyTree, data: Data
) -> tuple[PyTree, PyTree]:
    """The shapes of what goes down to one client, and of the payload it makes."""

    def messages(server_state, client_state, data):
        nobody = jnp.zeros(1, jnp.int32)
        n = jnp.int32(population_size(data))
        broadcast = algorithm.broadcast(server_state)
        ctx = server_context(
            jax.random.key(0), jnp.int32(0), nobody, nobody > 0, n, broadcast
        )
        ctx = ctx._replace(broadcast=algorithm.version(ctx, broadcast))
        shared, rows = _separate(data)
        one = _rejoin(shared, jax.tree.map(lambda x: x[0], rows))
        return ctx.broadcast, algorithm.client(ctx, broadcast, client_state, one)[0]

    return jax.eval_shape(messages, server_state, client_state, data)


def population_size(data: Data) -> int:
    """N (or K), the length of the client axis of a population's (cohort's) data."""
    leaves = jax.tree.leaves(_separate(data)[1])
    if not leaves or any(jnp.ndim(x) == 0 for x in leaves):
        raise ValueError("data must be a ClientData, or arrays with a client axis.")
    sizes = {x.shape[0] for x in leaves}
    if len(sizes) > 1:
        raise ValueError(f"data: its client axes differ in length: {sorted(sizes)}.")
    return sizes.pop()


def select_clients(data: Data, client: jax.Array) -> Data:
    """The data of the clients with these ids, `[K]`."""
    shared, rows = _separate(data)
    return _rejoin(shared, jax.tree.map(lambda x: jnp.asarray(x)[client], rows))


def _is_client_data(x) -> bool:
    return isinstance(x, ClientData)


def _separate(data: Data) -> tuple[PyTree, PyTree]:
    """What all clients share (the examples), and what each has (its ranges)."""

    def shared(d):
        return (d.examples, d.index) if _is_client_data(d) else ()

    def rows(d):
        if _is_client_data(d):
            return dataclasses.replace(d, examples=None, index=None)
        return d

    return (
        jax.tree.map(shared, data, is_leaf=_is_client_data),
        jax.tree.map(rows, data, is_leaf=_is_client_data),
    )


def _rejoin(shared: PyTree, rows: PyTree) -> Data:
    """The inverse of `_separate`, for one client."""

    def join(d, s):
        if _is_client_data(d):
            return dataclasses.replace(d, examples=s[0], index=s[1])
        return d

    return jax.tree.map(join, rows, shared, is_leaf=_is_client_data)


def _check_cohort(cohort: Cohort) -> int:
    k = population_size(cohort.data)
    of_each = ("client", "weight", "alive", "row", "asked", "arrives", "share")
    for name in (*of_each, "staleness", "time"):
        value = getattr(cohort, name)
        shape = (k,) if value is None else jnp.shape(value)
        if shape != (k,):
            raise ValueError(
                f"cohort.{name} must have shape ({k},), one entry a client of "
                f"cohort.data, got {shape}."
            )
    return k


def _chunk(cohort: Cohort, chunk_size: int | None, mesh: Mesh | None) -> int:
    """Clients vmapped at once on a device: never more than it is given."""
    devices = 1 if mesh is None else mesh.shape[AXIS]
    per_device = -(-cohort.client.shape[0] // devices)
    return per_device if chunk_size is None else min(chunk_size, per_device)


def _pad(cohort: Cohort, chunk_size: int | None, mesh: Mesh | None) -> Cohort:
    """Fills the last chunk of every device with clients that are nobody."""
    devices = 1 if mesh is None else mesh.shape[AXIS]
    multiple = devices * _chunk(cohort, chunk_size, mesh)
    k = cohort.client.shape[0]
    extra = -k % multiple
    cohort = cohort._replace(client=jnp.asarray(cohort.client, jnp.int32))
    if extra == 0:
        return cohort
    real = jnp.arange(k + extra) < k
    cohort = _take(cohort, jnp.minimum(jnp.arange(k + extra), k - 1))
    return cohort._replace(
        client=jnp.where(real, cohort.client, NOBODY),
        alive=cohort.alive & real,
        row=None if cohort.row is None else jnp.where(real, cohort.row, NOBODY),
    )


def _rows(cohort: Cohort) -> jax.Array:
    """Where in `state.clients` the clients' states are."""
    return cohort.client if cohort.row is None else cohort.row


def _take(cohort: Cohort, rows: jax.Array) -> Cohort:
    """These rows of the cohort; the examples stay where they are."""
    data = select_clients(cohort.data, rows)
    rest = jax.tree.map(lambda x: jnp.asarray(x)[rows], cohort._replace(data=()))
    return rest._replace(data=data)


def _longest_first(
    cohort: Cohort, chunk_size: int | None, mesh: Mesh | None
) -> tuple[Cohort, jax.Array | None]:
    """Puts ragged clients of like sizes into one chunk, and as much on every device.

    A chunk's loop ends with its longest client. Who is not alive has nothing to do, and
    who does a share of its work has that share to do.

    Returns:
      The cohort in its new order, and for each old place the new one, `[K]`; the same
      cohort and None where the clients are alike or no order would matter.
    """
    devices = 1 if mesh is None else mesh.shape[AXIS]
    chunk = _chunk(cohort, chunk_size, mesh)
    data, k = cohort.data, cohort.client.shape[0]
    if not isinstance(data, ClientData) or (
        data.static_size is not None and cohort.share is None
    ):
        return cohort, None
    work = size = jnp.where(cohort.alive, data.size, 0)
    cohort = cohort._replace(data=dataclasses.replace(data, size=size))
    if cohort.share is not None:
        work = size * cohort.share
    if k == chunk or chunk == devices == 1:
        return cohort, None
    ranked = jnp.argsort(-work, stable=True)
    order = ranked[execution_order(work[ranked], chunk, devices)]
    return _take(cohort, order), jnp.argsort(order)


def execution_order(work: jax.Array, chunk: int, devices: int) -> jax.Array:
    """Which client is done where: row by row the chunks of one device after another.

    Neighbours share a chunk, which lasts as long as its longest. The longest chunk that
    is left goes to the device that has the least to do and room for it.

    Args:
      work: of each client, `[K]`, the most first.
      chunk: clients in a chunk; chunks and devices divide K.
      devices: how many.

    Returns:
      int32 `[K]`, an order of the clients.

    >>> execution_order(jnp.array([9, 2, 1, 1]), 1, 2).tolist()  # 9 + 1 and 2 + 1
    [0, 3, 1, 2]

    Reference: Graham 1969, Bounds on Multiprocessing Timing Anomalies (longest
    processing time first), with as many chunks on every device.
    """
    order = jnp.arange(work.shape[0])
    if devices == 1:
        return order
    longest = work.reshape(-1, chunk)[:, 0]
    room = longest.shape[0] // devices

    def deal(carry, length):
        load, given = carry
        load_or_full = jnp.where(given < room, load, jnp.inf)
        device = jnp.argmin(load_or_full)
        place = device * room + given[device]
        return (load.at[device].add(length), given.at[device].add(1)), place

    nothing = jnp.zeros(devices), jnp.zeros(devices, int)
    _, place = jax.lax.scan(deal, nothing, longest)
    return order.reshape(-1, chunk)[jnp.argsort(place)].ravel()


def _strong(x) -> jax.Array:
    """An array of its own dtype: a Python scalar's would give way to any other."""
    x = jnp.asarray(x)
    weak = getattr(x, "weak_type", False)  # which a random key has not
    return jax.lax.convert_element_type(x, x.dtype) if weak else x
