"""The same federation on Flower: every client a machine, and the server another.

A round is made of two halves (`jaxfl.halves`). `client_app` is a Flower `ClientApp`
that does the one on a node, `serve` does the other in a `ServerApp` and gives after
each round the state and the info that `federation.round` would have given: the same
cohorts, the same keys for each client, the same channel and aggregator. States of
clients stay on their nodes, in Flower's own state of a run.

What goes over the network are the arrays that the halves give, named and in their own
dtypes, by Flower's messages:

    down, "train"           the broadcast, the channel's state at the server, the keys
                            and the roster of the round
    up                      the payload as the channel encoded it (none if nothing is
                            sent), what the channel reports, the metrics
    down, "train.receive"   the aggregate, only where the algorithm has a `receive`

Three things are as in a simulation, and not as they should be where the server is not
trusted or the network is narrow. A client's keys come from the server, which could draw
what the client drew: noise against the server needs a `secret_of`. What is reported and
measured comes to the server from each client by itself. And arrays are sent as they
are: `info.bits_up` counts an encoding of them, such as of their nonzeros alone.

Flower is imported when it is first needed (`pip install 'jaxfl[flower]'`), and not by
`import jaxfl`.

Reference: Beutel et al. 2020, arXiv:2007.14390.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import tree
from jaxfl.channel import mechanisms
from jaxfl.core import (
    Aggregator,
    Algorithm,
    Channel,
    Context,
    Data,
    Federation,
    Info,
    Params,
    ServerState,
    State,
    as_sent,
    keep,
    newest,
)
from jaxfl.halves import (
    Letter,
    blank_unless,
    client_half,
    round_context,
    same,
    server_half,
)
from jaxfl.interop.records import flower_library, pack, unpack
from jaxfl.privacy.mechanism import Distributed, Local
from jaxfl.round import map_clients, message_shapes, population_size, select_clients
from jaxfl.sampling import Cyclic, Poisson, cohort_rows, draws_of_run, sample_cohort
from jaxfl.secure.fixed import Residues

PyTree = Any

OWN, STARTED_FROM = "jaxfl.own", "jaxfl.broadcast"  # in the state of a node


def partition_id(context: Any) -> int:
    """The population id of the client on a node: its `partition-id`.

    Flower's simulation sets it; a deployed node is started with
    `flower-supernode --node-config "partition-id=3"`.
    """
    if "partition-id" not in context.node_config:
        raise ValueError(
            'client_of: the node has no "partition-id" in its node_config, which has '
            f"{sorted(context.node_config)}; start it with one, or give client_of."
        )
    return int(context.node_config["partition-id"])


def client_app(
    federation: Federation,
    params: Params,
    data_of: Callable[[Any], Data],
    *,
    client_of: Callable[[Any], int] = partition_id,
    weight: float | None = None,
    secret_of: Callable[[Any], jax.Array] | None = None,
) -> Any:
    """A Flower `ClientApp` whose nodes are the clients of a federation.

    Args:
      federation: the server's, made by the same code.
      params: the initial model, as the server's: some clients' states begin with it.
      data_of: `context -> data` of this one client: a `ClientData` of one client, such
        as `data[jnp.array([i])]`, or arrays `[1, ...]`. It is called at every message,
        so let it remember what is slow to load. Minibatches are those of the
        prototype if the data have its sizes `shortest` and `longest`.
      client_of: `context -> ` the population id of this client, from 0 to N - 1.
      weight: of this client's messages; its number of examples by default, as in
        `sample_cohort`.
      secret_of: `context -> ` a random key that only this client knows, another one in
        every run. The client then draws from it alone, and a run is no longer the
        prototype's.

    Returns:
      A `flwr.clientapp.ClientApp`.

    Raises:
      ImportError: if Flower is not installed.
      ValueError: as `serve`; if the channel adds noise against the server and there is
        no `secret_of`, as the server could take it off again. When a message comes, if
        it is not what this federation sends, or data are not those of one client.
    """
    parts = algorithm, channel, aggregator = _deployable(federation)
    if secret_of is None and any(
        isinstance(mechanism, Local)
        for mechanism in mechanisms(channel, aggregator.makes_sum)
    ):
        raise ValueError(
            "secret_of: the channel adds noise against the server, which has the keys "
            "that it is drawn from; give a key that only the client knows."
        )
    flower = flower_library()
    init = functools.partial(_init, federation.init)
    app = flower.ClientApp()

    def begin(context) -> tuple[jax.Array, Data, State]:
        """Who this is, its data, and the shapes of all states."""
        client, data = jnp.array([client_of(context)], jnp.int32), data_of(context)
        if (found := population_size(data)) != 1:
            raise ValueError(f"data_of must give one client's data, got {found}'s.")
        return client, data, jax.eval_shape(init, params, data, client)

    @app.query()
    def who(message, context):
        return flower.reply(message, id=flower.ConfigRecord(_id(client_of(context))))

    @app.train()
    def train(message, context):
        client, data, shapes = begin(context)
        record, cohort = message.content, message.content["round"]
        k = cohort["['roster']"].shape[0] if "['roster']" in cohort else 0
        ordered = unpack(cohort, _order_like(k), "the round's order")
        if ordered["client"] != client[0]:
            raise ValueError(
                f"client_of: this node is client {client[0]}, and was asked as client "
                f"{ordered['client']}."
            )
        came = jax.eval_shape(algorithm.broadcast, shapes.server.algorithm)
        broadcast = unpack(record["broadcast"], came, "the broadcast")
        at_server = unpack(record["channel"], shapes.server.channel, "the channel")
        if OWN in context.state:
            one = jax.eval_shape(functools.partial(_row, i=0), shapes.clients)
            own = unpack(context.state[OWN], one, "the client's state")
        else:
            own = _row(init(params, data, client).clients, 0)

        ctx = Context(**ordered)
        if secret_of is not None:
            ctx = ctx._replace(key=jax.random.fold_in(secret_of(context), ctx.round))
        given = None if weight is None else jnp.array([weight])
        cohort = sample_cohort(ctx.key, data, weight=given)
        one = select_clients(cohort.data, jnp.int32(0))
        letter, own = _client_half(
            parts, ctx, broadcast, at_server, own, one, cohort.weight[0]
        )
        _refuse_residues(letter.payload)

        context.state[OWN] = pack(own)
        if algorithm.receive is not keep:
            context.state[STARTED_FROM] = record["broadcast"]
        sent = {"payload": pack(letter.payload)} if letter.sent else {}
        return flower.reply(message, letter=pack(letter._replace(payload=())), **sent)

    @app.train("receive")
    def receive(message, context):
        _, data, shapes = begin(context)
        own = jax.eval_shape(functools.partial(_row, i=0), shapes.clients)
        own_state = unpack(context.state[OWN], own, "the client's state")
        broadcast, payload = message_shapes(
            algorithm, shapes.server.algorithm, own.algorithm, data
        )
        came = {"payload": payload, "delivered": jax.ShapeDtypeStruct((), bool)}
        got = unpack(message.content["reply"], came, "the reply")
        broadcast = unpack(context.state[STARTED_FROM], broadcast, "the broadcast")
        new = _receive(
            algorithm.receive,
            broadcast,
            got["payload"],
            own_state.algorithm,
            got["delivered"],
        )
        new = same(own_state.algorithm, new, "algorithm.receive")
        context.state[OWN] = pack(own_state._replace(algorithm=new))
        return flower.reply(message)

    return app


# Of the module, and not of an app, which Flower's simulation sends to its processes:
# what `jit` makes cannot be sent.
_client_half = jax.jit(client_half, static_argnames="parts")


@functools.partial(jax.jit, static_argnums=0)
def _init(init, params, data, client):
    return init(params, data, client)


@functools.partial(jax.jit, static_argnums=0)
def _receive(receive, broadcast, payload, own, delivered):
    return receive(broadcast, payload, own, delivered)


def serve(
    grid: Any,
    federation: Federation,
    params: Params,
    like: Data,
    *,
    population: int,
    rounds: int,
    key: jax.Array,
    cohort_size: int | Poisson | Cyclic | None = None,
    min_clients: int = 1,
    timeout: float | None = None,
) -> Iterator[tuple[State, Info]]:
    """The server's half of a run, on the `Grid` of a Flower `ServerApp`.

    Rounds are those of `scan_rounds` and `simulate` with the same key, to what floats
    lose where a sum is made by another program. A client of the cohort whose node is
    not connected when the round begins is not alive; one that is asked and does not
    answer in time, or with an error, has not sent (`info.lost`). What is not finite is
    dropped, whatever its client says.

    Args:
      grid: Flower's, with nodes that run `client_app` of the same federation.
      federation: what is run. Its `chunk_size` and `mesh` are of no use here.
      params: the initial model.
      like: data of one client or more, such as `data_of` gives, for their shapes.
      population: N, how many clients there are, connected or not.
      rounds: R.
      key: of the run, of jax's default generator.
      cohort_size: as in `scan_rounds`; everyone if None.
      min_clients: a round begins when so many are connected.
      timeout: in seconds, of waiting for the answers of a round; None waits for all.

    Yields:
      After each round the state, whose `clients` are empty, as they are not here, and
      the info; its `bits_down` counts the broadcast whole.

    Raises:
      ImportError: if Flower is not installed.
      ValueError: if an argument is out of its range; if the federation is one that only
        a simulation can have: whose clients start from older broadcasts, or whose
        messages are hidden from a server that is in the same program (secure or
        homomorphic sums); if a node is of a client that is not in the population, or of
        one that another node is; if what arrives is not what a client of this
        federation sends.

    A whole app, here in one process; `flwr run` takes the two apps as they are:

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> federation = federate(fedavg(loss, optax.sgd(1.0)), mean())
    >>> def data_of(context):  # what this node has
    ...     y = jnp.array([[1.0, 3.0], [8.0]][context.node_config["partition-id"]])
    ...     return from_arrays(y, y, client_ids=[0] * len(y))
    >>> client = client_app(federation, jnp.float32(0), data_of)

    >>> from flwr.serverapp import ServerApp
    >>> from jaxfl.interop.loopback import Loopback
    >>> server = ServerApp()
    >>> @server.main()
    ... def main(grid, context):
    ...     for state, info in serve(
    ...         grid, federation, jnp.float32(0), from_arrays(*[jnp.zeros(1)] * 2, [0]),
    ...         population=2, rounds=1, key=jax.random.key(0), min_clients=2):
    ...         print(state.params, info.sent)

    >>> server(Loopback(client, [{"partition-id": i} for i in range(2)]), None)
    4.0 [ True  True]
    """
    parts = algorithm, _, aggregator = _deployable(federation)
    for name, value in (("population", population), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 1 <= min_clients <= population:
        raise ValueError(
            f"min_clients must be between 1 and {population}, got {min_clients}."
        )
    if not (cohort_size is None or isinstance(cohort_size, int | Poisson | Cyclic)):
        raise ValueError(
            "cohort_size must be a number, a Poisson or a Cyclic, got "
            f"{cohort_size!r}: a schedule of faults does not bind real nodes."
        )
    roster = jnp.arange(cohort_rows(cohort_size, population), dtype=jnp.int32)
    if key.dtype != jax.random.key(0).dtype:
        raise ValueError(f"key must be of jax's default generator, got {key.dtype}.")

    flower = flower_library()
    sample_key, run_key = jax.random.split(key)
    start = _init(federation.init, params, like, roster[:1])
    begin = jax.jit(functools.partial(round_context, run_key, algorithm))
    finish = jax.jit(functools.partial(_finish, parts))

    def letter_of_one(state, data):
        ctx, broadcast, _ = begin(state, roster, roster >= 0)
        own, one = _row(state.clients, 0), select_clients(data, jnp.int32(0))
        at_server, weight = state.server.channel, jnp.float32(1)
        return client_half(parts, ctx, broadcast, at_server, own, one, weight)[0]

    expected = jax.eval_shape(letter_of_one, start, like)
    _refuse_residues(expected.payload)
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected)

    def draw(round):
        if cohort_size is None or cohort_size == population:
            return roster  # as `scan_rounds` has everyone, in order
        return draws_of_run(sample_key, population, cohort_size)(round)

    def ask(state, number, nodes):
        """Has each client of a cohort that is connected do its half of a round."""
        clients = draw(state.round).tolist()
        alive = np.array([client in nodes for client in clients])
        ctx, broadcast, client_key = begin(
            state, jnp.array(clients, jnp.int32), jnp.array(alive)
        )
        same_for_all = {
            "broadcast": pack(broadcast),
            "channel": pack(state.server.channel),
        }
        row_of = {nodes[clients[row]]: row for row in np.flatnonzero(alive)}
        orders = [
            flower.message(
                same_for_all | {"round": pack(_order(ctx, client_key, clients[row]))},
                *(node, "train", number),
            )
            for node, row in row_of.items()
        ]
        letters, replied = [blank] * len(clients), np.zeros(len(clients), bool)
        for reply in _answers(grid, orders, timeout):
            row = row_of[reply.metadata.src_node_id]
            letters[row], replied[row] = _read(reply, expected, blank.payload), True
        rows = {node: row for node, row in row_of.items() if replied[row]}
        return ctx, jax.tree.map(lambda *x: np.stack(x), *letters), replied, rows

    def give_back(reply, delivered, number, rows):
        """Tells those who answered what has become of it all."""
        messages = []
        for node, row in rows.items():
            payload = _row(reply, row) if aggregator.personal else reply
            got = {"payload": payload, "delivered": delivered[row]}
            content = {"reply": pack(got)}
            messages.append(flower.message(content, node, "train.receive", number))
        for _ in _answers(grid, messages, timeout):
            pass  # that it was heard is all that a client says

    def run():
        nobody = jax.tree.map(lambda x: x[:0], start.clients)
        state = start._replace(population=jnp.int32(population), clients=nobody)
        known = {}
        for number in range(rounds):
            nodes = _wait(flower, grid, known, population, min_clients, timeout)
            ctx, letters, replied, rows = ask(state, number, nodes)
            server, info, reply = finish(ctx, state.server, letters, replied)
            state = state._replace(round=state.round + 1, server=server)
            if algorithm.receive is not keep:
                give_back(reply, info.delivered, number, rows)
            yield state, info

    return run()


def _read(reply: Any, expected: Letter, nothing: PyTree) -> Letter:
    """The letter in an answer; its payload is `nothing` if none was sent."""
    name = f"the message of node {reply.metadata.src_node_id}"
    if "letter" not in reply.content:
        raise ValueError(f"{name} is not of a client_app of this federation.")
    letter = unpack(reply.content["letter"], expected._replace(payload=()), name)
    if letter.sent:
        sent = reply.content["payload"] if "payload" in reply.content else {}
        nothing = unpack(sent, expected.payload, name)
    return letter._replace(payload=nothing)


def _finish(
    parts: tuple[Algorithm, Channel, Aggregator],
    ctx: Context,
    server: ServerState,
    letters: Letter,
    replied: jax.Array,
) -> tuple[ServerState, Info, PyTree]:
    """The server's half of a round, from the letters `[K, ...]` that arrived."""
    algorithm, _, aggregator = parts
    # What a client says of itself is not relied on.
    finite = jax.vmap(tree.is_finite)((letters.payload, letters.report))
    sent = letters.sent & replied & finite
    zeros = jax.tree.map(jnp.zeros_like, (letters.payload, letters.report))
    payloads, reports = tree.where_rows(sent, (letters.payload, letters.report), zeros)
    # With sums made as in a round.
    (reports, summed, _), _ = map_clients(
        lambda _, x: (x, ()), (), (reports, payloads if aggregator.linear else (), sent)
    )
    server, outcome, reply = server_half(
        parts, ctx, server, summed if aggregator.linear else payloads, sent, reports
    )
    given_back = 0 if algorithm.receive is keep else tree.num_bits(outcome.payload)
    up, back = aggregator.traffic(
        ctx, letters.bits, outcome.delivered, jnp.float32(given_back)
    )
    down = jnp.float32(tree.num_bits(ctx.broadcast))
    blank = jax.vmap(blank_unless)
    info = Info(
        client=ctx.roster,
        alive=ctx.alive,
        sent=sent,
        delivered=outcome.delivered,
        rejected=(letters.rejected | ~finite) & replied,
        bits_up=up,
        bits_down=jnp.where(ctx.alive, down, 0.0) + back,
        metrics=blank(replied, letters.metrics),
        reports=blank(replied, letters.report),
        lost=ctx.alive & ~replied,
    )
    return server, info, reply


def _order(ctx: Context, client_key: jax.Array, client: int) -> dict:
    """What a client is told of the round that it is in."""
    return {
        "key": jax.random.fold_in(client_key, client),
        "shared_key": ctx.shared_key,
        "round": ctx.round,
        "client": jnp.int32(client),
        "roster": ctx.roster,
        "alive": ctx.alive,
        "population": ctx.population,
    }


def _order_like(k: int) -> dict:
    def shapes():
        ids = jnp.zeros(k, jnp.int32)
        key, zero = jax.random.key(0), jnp.int32(0)
        ctx = Context(key, key, zero, zero, ids, ids > 0, zero)
        return _order(ctx, key, 0)

    return jax.eval_shape(shapes)


def _deployable(federation: Federation) -> tuple[Algorithm, Channel, Aggregator]:
    """The parts of a federation; raises if they make sense in a simulation only."""
    if not isinstance(federation, Federation):
        raise TypeError(f"federation must be a jaxfl.Federation, got {federation!r}.")
    algorithm, channel, aggregator = federation.parts
    if algorithm.version is not newest:
        raise ValueError(
            "federation: its algorithm lets clients start from older broadcasts, which "
            "a simulation plans; here a client has what it was sent."
        )
    if aggregator.bits is not as_sent:
        raise ValueError(
            "federation: its aggregator encrypts messages where they arrive, and here "
            "that is at the server; encrypt them at the clients, by jaxfl.homomorphic."
        )
    if any(
        isinstance(mechanism, Distributed)
        for mechanism in mechanisms(channel, aggregator.makes_sum)
    ):
        raise ValueError(
            "federation: its noise hides a sum of which the server here has every "
            "summand."
        )
    return federation.parts


def _refuse_residues(payload: PyTree) -> None:
    def is_residues(x):
        return isinstance(x, Residues)

    if any(map(is_residues, jax.tree.leaves(payload, is_leaf=is_residues))):
        raise ValueError(
            "federation: its channel is one of secure sums, whose masks are drawn from "
            "the key of the round, which the server here has; see "
            "jaxfl.secure.protocol for keys that it has not."
        )


def _wait(
    flower: SimpleNamespace,
    grid: Any,
    known: dict[int, int],
    population: int,
    min_clients: int,
    timeout: float | None,
) -> dict[int, int]:
    """The node of each client that is connected, once there are enough."""
    while True:
        connected = list(grid.get_node_ids())
        asked = [
            flower.message({}, node, "query", 0)
            for node in connected
            if node not in known
        ]
        for reply in _answers(grid, asked, timeout):
            client = int(reply.content["id"]["client"])
            node = reply.metadata.src_node_id
            if not 0 <= client < population:
                raise ValueError(
                    f"population: node {node} is client {client}, and there are "
                    f"{population} clients, from 0 on."
                )
            known[node] = client
        nodes = {}
        for node in connected:
            if node not in known:
                continue
            if (client := known[node]) in nodes:
                raise ValueError(
                    f"client_of: nodes {nodes[client]} and {node} are both client "
                    f"{client}."
                )
            nodes[client] = node
        if len(nodes) >= min_clients:
            return nodes
        time.sleep(1.0)


def _answers(grid: Any, messages: list, timeout: float | None) -> Iterator[Any]:
    """The answers that are no errors."""
    if not messages:
        return
    for reply in grid.send_and_receive(messages, timeout=timeout):
        if reply.has_error():
            node, reason = reply.metadata.src_node_id, reply.error.reason
            logging.getLogger(__name__).warning("node %s failed: %s", node, reason)
        else:
            yield reply


def _id(client: int) -> dict[str, int]:
    return {"client": int(client)}


def _row(stacked: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda x: x[i], stacked)
