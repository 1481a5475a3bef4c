"""The nouns of a federated round: three small types, and what passes between them.

An `Algorithm` says what is computed, a `Channel` what happens to a message on its
way, an `Aggregator` how many messages become one. Each is written for ONE client
and for the server; the client axis is the runtime's business (`jaxfl.round`).

Sign convention, everywhere: a payload is what the server had minus what the client
has, a pseudo-gradient, so that any optax optimiser at the server descends along it.

Axes are named `N`, the population; `K`, the cohort of one round.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfl import tree

PyTree = Any
Params = PyTree
Payload = PyTree
Data = PyTree
Metrics = PyTree


class Bound(NamedTuple):
    """What the message of one client does not exceed, whatever its data are.

    Attributes:
      l2: its Euclidean norm, over all leaves together.
      l1: the sum of its absolute values.
    """

    l2: float | jax.Array = math.inf
    l1: float | jax.Array = math.inf


def unbounded(bound: Bound) -> Bound:
    """Nothing is known of what comes out."""
    del bound
    return Bound()


def steady(bound: Bound) -> Bound:
    """Nothing is known of what comes out, but that it stays if what goes in does."""
    still = isinstance(bound.l2, int | float) and bound.l2 == 0
    return bound if still else Bound()


class Context(NamedTuple):
    """What every part may know about the round that it is in.

    Attributes:
      key: random key of this part alone: of one client, or of the server.
      shared_key: random key that all clients and the server have in common.
      round: int32 `[]`, rounds done so far.
      client: int32 `[]`, the population id of this client; -1 at the server.
      roster: int32 `[K]`, population ids of the cohort.
      alive: bool `[K]`, who of the roster takes part to the end.
      population: int32 `[]`, N.
      broadcast: what came down to every client of the cohort at the round's start.
      bound: to `Channel.encode`, of the message that comes in; to `Channel.decode`, of
        what one client has added to the aggregate; None where there is none.
      sent: bool `[K]`, whose message arrived; known to a channel's decode, else None.
      share: float32 `[]`, how much of its local work this client does, as `local.train`
        heeds; None for all of it.
      staleness: int32 `[]`, how many rounds ago the broadcast that this client starts
        from was the newest; None for 0.
    """

    key: jax.Array
    shared_key: jax.Array
    round: jax.Array
    client: jax.Array
    roster: jax.Array
    alive: jax.Array
    population: jax.Array
    broadcast: PyTree = ()
    bound: Bound | None = None
    sent: jax.Array | None = None
    share: jax.Array | None = None
    staleness: jax.Array | None = None


class Message(NamedTuple):
    """What one client sends, `bits + header` long.

    Attributes:
      payload: pytree of arrays, or of anything a channel made of it.
      weight: float32 `[]`, its share in a weighted mean; 0 means nothing was sent.
      bits: float32 `[]`, the length of the payload's encoding, which each codec that
        it passes sets anew; exact up to 2^24, and above that to one part in 2^24.
      header: float32 `[]`, the length of all that is sent beside the payload, such as
        its weight, or the flag of a gate.
    """

    payload: Payload
    weight: jax.Array
    bits: jax.Array
    header: jax.Array | float = 0.0


class Cohort(NamedTuple):
    """The clients of one round.

    Attributes:
      client: int32 `[K]`, population ids, each at most once; a row of padding has an
        id of N or more and is not alive.
      data: pytree of `[K, ...]` arrays, or a `ClientData` of K clients.
      weight: float32 `[K]`, the weight of each client's message.
      alive: bool `[K]`; a client that is not alive is as one never asked.
      row: int32 `[K]`, where in `state.clients` each client's state is; at its id if
        None. A row of padding has none, as with `client`.
      asked: bool `[K]`, who was sent the broadcast, though it may not be alive to make
        anything of it; those alive if None. This and what follows is as in a
        `faults.Schedule`.
      arrives: bool `[K]`, whose message reaches the server, if it sends one; all if
        None. Who sends does not know, and goes on as if it had arrived.
      share: float32 `[K]`, see `Context`.
      staleness: int32 `[K]`, see `Context`.
      time: float32 `[K]`, seconds from the start of the run to when each message comes.
      ended: float32 `[]`, to the end of the round.
    """

    client: jax.Array
    data: Data
    weight: jax.Array
    alive: jax.Array
    row: jax.Array | None = None
    asked: jax.Array | None = None
    arrives: jax.Array | None = None
    share: jax.Array | None = None
    staleness: jax.Array | None = None
    time: jax.Array | None = None
    ended: jax.Array | None = None


class Outcome(NamedTuple):
    """What the server has at the end of a round.

    Attributes:
      payload: the decoded aggregate.
      sent: bool `[K]`, whose message arrived.
      delivered: bool `[K]`, to whom the aggregate is given back.
    """

    payload: Payload
    sent: jax.Array
    delivered: jax.Array


def whole_state(server_state: PyTree) -> PyTree:
    """The default broadcast: clients receive all that the server holds."""
    return server_state


def keep(
    broadcast: PyTree, payload: Payload, client_state: PyTree, delivered: jax.Array
) -> PyTree:
    """The default receive: nothing of the aggregate is given back to the clients."""
    del broadcast, payload, delivered
    return client_state


def every_bit(ctx: Context, server_state: PyTree, client_state: PyTree) -> jax.Array:
    """The default length of a broadcast: it is sent whole, in its own dtypes."""
    del server_state, client_state
    return jnp.float32(tree.num_bits(ctx.broadcast))


def newest(ctx: Context, broadcast: PyTree) -> PyTree:
    """The default version: every client starts from what comes down now."""
    del ctx
    return broadcast


class Algorithm(NamedTuple):
    """What is computed, for one client and for the server.

    Attributes:
      init: `params -> (server_state, client_state)`; `client_state` is ONE client's.
        By convention a server state has a field `params`, the federated model.
      client: `(ctx, broadcast, client_state, data) -> (payload, client_state,
        metrics)`, with `data` one client's.
      server: `(ctx, server_state, outcome) -> server_state`; not called on to change
        anything in a round in which nothing is delivered.
      receive: `(broadcast, payload, client_state, delivered) -> client_state`, for
        algorithms whose clients keep a model of their own: what a client makes of the
        decoded aggregate, if it was `delivered` to it. Unless it is `keep`, those
        payloads are counted as sent down.
      broadcast: `server_state -> broadcast`, what travels down to each client.
      bits_down: `(ctx, server_state, client_state) -> float32 []`, how long the
        broadcast is to one client, before the round.
      version: `(ctx, broadcast) -> broadcast`, what one client has of it, which becomes
        its `ctx.broadcast`: where the server keeps older ones, as for `asynchronous`
        clients, that of `ctx.staleness` rounds ago.
    """

    init: Callable
    client: Callable
    server: Callable
    receive: Callable = keep
    broadcast: Callable = whole_state
    bits_down: Callable = every_bit
    version: Callable = newest


def no_state(payload: Payload) -> tuple[PyTree, PyTree]:
    """The default init of a channel: neither end remembers anything."""
    del payload
    return (), ()


def send_on(ctx, message, server_state, client_state):
    """The default encode: the message as it came, and nothing to report."""
    del ctx, server_state
    return message, client_state, ()


def pass_on(ctx, payload, server_state, report):
    """The default decode: the aggregate as it came."""
    del ctx, report
    return payload, server_state


def unchanged(x: Any) -> Any:
    """What comes out is shaped, or bounded, as what goes in."""
    return x


class Channel(NamedTuple):
    """What happens to a message on its way, and to the aggregate on its way back.

    Attributes:
      init: `payload -> (server_state, client_state)`, given zeros of its shape.
      encode: `(ctx, message, server_state, client_state) -> (message, client_state,
        report)`, at one client. Reports are finite numbers, summed over those who
        sent.
      decode: `(ctx, payload, server_state, report) -> (payload, server_state)`, once,
        at the server, with the summed report.
      layers: the channels this one is a chain of; None for a channel of its own.
      of_sums: True where decode makes sense of a sum of messages only, as that of
        `mean` does; such a channel takes an aggregator only that makes a sum.
      sends: `payload -> payload`, zeros shaped as what encode makes of such a payload;
        as the payload itself by default.
      bound: `Bound -> Bound`, of what encode makes of a message within a bound. That
        nothing is known, the default, is always true.
      sensitivity: `Bound -> Bound`, how far one client moves what decode returns, if
        it moves the payload that decode is given within a bound; of 0 only where decode
        heeds no report.
      mechanism: what an accountant must know of the noise that this channel adds, if it
        adds any: `(bound, sensitivity) -> Mechanism`, of the message that comes in and
        of the aggregate that noise is added to; a ValueError where it needs a bound and
        there is none. See `jaxfl.privacy`.
    """

    init: Callable = no_state
    encode: Callable = send_on
    decode: Callable = pass_on
    layers: "tuple[Channel, ...] | None" = None
    of_sums: bool = False
    sends: Callable = unchanged
    bound: Callable[[Bound], Bound] = unbounded
    sensitivity: Callable[[Bound], Bound] = unbounded
    mechanism: Callable[[Bound, Bound], Any] | None = None


def star(ctx: Context, bits: jax.Array, delivered: jax.Array, reply: jax.Array):
    """The default traffic: every message goes to the server, every reply comes back."""
    del ctx
    return bits, jnp.where(delivered, reply, 0.0)


def as_sent(payload: Payload, bits: jax.Array) -> jax.Array:
    """The default length of a message: that of the channel's encoding."""
    del payload
    return bits


class Aggregator(NamedTuple):
    """How many messages become one.

    Attributes:
      init: `payload -> state`.
      apply: `(ctx, payload, sent, state) -> (payload, delivered, state)`. `payload` is
        the sum over those who sent if `linear`, else the stack `[K, ...]`, zero where
        nothing was sent.
      linear: True where a sum is all that is needed: it streams over chunks of
        clients and over devices, and no `[K, ...]` stack is ever held.
      coordinatewise: True where every coordinate is treated alone and alike, with the
        same random draws if any, and `delivered` and the state depend on none: over
        several devices `payload` then has leaves `[K, n]`, a device's share of the
        coordinates, so that none holds the stack of whole messages.
      personal: True where each client gets an aggregate of its own: `payload` comes
        out as a stack `[K, ...]`. The server is given the mean of those delivered.
      traffic: `(ctx, bits, delivered, reply) -> (up, down)`, float32 `[K]` each: what
        each client has sent and got in bits, if its message is `bits` long, `[K]`,
        and what is given back to one client `reply`, `[]`.
      sums: True where the result is the sum of the stack, though it is not `linear`.
      bits: `(payload, bits) -> float32 []`, the length of one payload in the form that
        is aggregated, if the channel's encoding of it is `bits` long; as encrypted.
    """

    init: Callable
    apply: Callable
    linear: bool = False
    coordinatewise: bool = False
    personal: bool = False
    traffic: Callable = star
    sums: bool = False
    bits: Callable = as_sent

    @property
    def makes_sum(self) -> bool:
        """Whether the result is a sum of messages, however it is come by."""
        return self.linear or self.sums


class ServerState(NamedTuple):
    """The server's half of a `State`, one field a part."""

    algorithm: PyTree
    channel: PyTree
    aggregator: PyTree


class ClientState(NamedTuple):
    """The clients' half of a `State`, one field a part, each stacked `[N, ...]`."""

    algorithm: PyTree
    channel: PyTree


class State(NamedTuple):
    """All that continues from round to round; a checkpoint is exactly this.

    Attributes:
      round: int32 `[]`, rounds done.
      population: int32 `[]`, N.
      server: the server's states.
      clients: the clients' states, stacked `[N, ...]`; of those clients only to whom
        `Cohort.row` refers, where it is given.
    """

    round: jax.Array
    population: jax.Array
    server: ServerState
    clients: ClientState

    @property
    def params(self) -> Params:
        """The federated model."""
        return self.server.algorithm.params


class Info(NamedTuple):
    """All that is looked at after a round, and nothing that continues.

    Attributes:
      client: int32 `[K]`, who was asked.
      alive: bool `[K]`, who took part to the end.
      sent: bool `[K]`, whose message entered the aggregate.
      delivered: bool `[K]`, to whom the aggregate was given back.
      rejected: bool `[K]`, whose update, message or report was not finite and was
        dropped.
      bits_up: float32 `[K]`, the length of what each client sent.
      bits_down: float32 `[K]`, of what was sent to it: the broadcast, and what was
        given back.
      metrics: what the algorithm's clients measured, `[K, ...]`; NaN (integers: 0)
        for a client that was not alive.
      reports: what the channel reported of each message, `[K, ...]`; likewise.
      asked: bool `[K]`, who was sent the broadcast. This and what follows is None
        unless the cohort was one of a `faults.Schedule`.
      lost: bool `[K]`, whose message was sent and did not arrive, or not in time.
      staleness: int32 `[K]`, how many rounds old the broadcast was that each had.
      time: float32 `[K]`, seconds from the start of the run to when each message came.
      ended: float32 `[]`, to the end of the round.
    """

    client: jax.Array
    alive: jax.Array
    sent: jax.Array
    delivered: jax.Array
    rejected: jax.Array
    bits_up: jax.Array
    bits_down: jax.Array
    metrics: Metrics
    reports: PyTree
    asked: jax.Array | None = None
    lost: jax.Array | None = None
    staleness: jax.Array | None = None
    time: jax.Array | None = None
    ended: jax.Array | None = None


class Federation(NamedTuple):
    """The composed round function; pure, so jit, vmap, grad and scan it as you like.

    Attributes:
      init: `(params, data, clients=None) -> State`, with `data` the population's,
        `[N, ...]`; of these clients' states only, `[M, ...]`, if their ids are given.
      round: `(key, state, cohort) -> (state, info)`. `key` is the run's: each round
        derives its own from `state.round`.
      parts: the algorithm, the channel and the aggregator that it is composed of.
      chunk_size: clients vmapped at once on each device; None for all.
      mesh: the devices over which a cohort is spread, or None.
    """

    init: Callable[..., State]
    round: Callable[[jax.Array, State, Cohort], tuple[State, Info]]
    parts: tuple[Algorithm, Channel, Aggregator]
    chunk_size: int | None = None
    mesh: jax.sharding.Mesh | None = None


def server_context(
    key: jax.Array,
    round: jax.Array,
    roster: jax.Array,
    alive: jax.Array,
    population: jax.Array,
    broadcast: PyTree,
) -> Context:
    """The server's context of a round; all other contexts are replaced copies."""
    server_key, shared_key = jax.random.split(key)
    nobody = jnp.int32(-1)
    return Context(
        server_key, shared_key, round, nobody, roster, alive, population, broadcast
    )


def lone_context(key: jax.Array, client: int = 0) -> Context:
    """The context of a client that is alone, to try a part outside any round.

    >>> lone_context(jax.random.key(0), client=3).roster.tolist()
    [3]
    """
    one = jnp.array([client], jnp.int32)
    ctx = server_context(key, jnp.int32(0), one, one >= 0, jnp.int32(client + 1), ())
    return ctx._replace(key=key, client=one[0])
