"""When to send: channels that withhold a message until it is worth its bits.

A threshold is a number, a traced array, or a function of the round, such as an optax
schedule. What is not sent is kept for later or dropped, an explicit `keep`, except
where the paper says what becomes of it. `report["open"]` says who sent.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.channel import gate_by, with_kept
from jaxfl.core import Channel, Context, Message, Params, Payload, PyTree

Model = Callable[[PyTree], Params]


def itself(broadcast: PyTree) -> Params:
    """The default model: the broadcast is one, as in `fedavg`."""
    return broadcast


def norm_threshold(threshold: optax.ScalarOrSchedule, *, keep: bool) -> Channel:
    """Sends an update only if it is large.

    `||x||_2 >= threshold`, the norm over all leaves together; with `keep`, of the sum
    of all updates since the client last sent.

    Client sends: a flag, and the update if it is set. Server sees: who sent, and what.
    Bits: 1, and those of what is sent.

    Args:
      threshold: at least 0, or a function of the round.
      keep: whether a withheld update is added to the client's next one or dropped.

    Returns:
      A channel; it reports `{"norm", "open"}`.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if threshold is negative.

    >>> small = Message(jnp.array([0.75]), jnp.float32(5.0), jnp.float32(32.0))
    >>> channel = norm_threshold(1.0, keep=True)
    >>> _, kept = channel.init(small.payload * 0)
    >>> for _ in range(2):
    ...     message, kept, report = channel.encode(None, small, (), kept)
    ...     print(report["norm"].item(), report["open"].item(), message.bits.item())
    0.75 False 0.0
    1.5 True 32.0
    """
    _at_least_zero("threshold", threshold)

    def decide(ctx, payload, server_state):
        norm = tree.norm(payload)
        return norm >= _now(threshold, ctx), {"norm": norm}

    return gate_by(decide, keep=keep, init=tree.of_floats("norm_threshold"))


def relative_threshold(
    threshold: optax.ScalarOrSchedule, *, keep: bool, model: Model = itself
) -> Channel:
    """Sends an update only if it is large beside the model.

    `||x||_2 >= threshold ||w||_2`, with w the model that the client was given.

    Client sends: a flag, and the update if it is set. Server sees: who sent, and what.
    Bits: 1, and those of what is sent.

    Args:
      threshold: at least 0, or a function of the round.
      keep: whether a withheld update is added to the client's next one or dropped.
      model: `broadcast -> w`; the broadcast itself by default.

    Returns:
      A channel; it reports `{"norm", "open"}`, the norm as a multiple of `||w||`.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if threshold is negative.

    >>> from types import SimpleNamespace as Round
    >>> update = Message(jnp.array([0.5]), jnp.float32(1.0), jnp.float32(32.0))
    >>> channel = relative_threshold(0.1, keep=False)
    >>> for w in (4.0, 8.0):
    ...     _, _, report = channel.encode(
    ...         Round(broadcast=jnp.array([w])), update, (), ())
    ...     print(report["norm"].item(), report["open"].item())
    0.125 True
    0.0625 False
    """
    _at_least_zero("threshold", threshold)

    def decide(ctx, payload, server_state):
        norm, size = tree.norm(payload), tree.norm(model(ctx.broadcast))
        relative = norm / jnp.where(size > 0, size, 1.0)
        return norm >= _now(threshold, ctx) * size, {"norm": relative}

    return gate_by(decide, keep=keep, init=tree.of_floats("relative_threshold"))


def target_rate(rate: float, *, initial: float, step: float, keep: bool) -> Channel:
    """A norm threshold that follows a share of clients that should send.

    Client i of the cohort S sends if `||x_i||_2 >= tau`, and then the server sets

        tau <- tau exp(step (|sent| / |S| - rate))

    which in a steady state makes `rate` of those asked send. The exponential keeps tau
    positive and moves it by as much upwards as downwards on its own scale.

    Client sends: a flag, and the update if it is set. Server sees: who sent, and what.
    Bits: 1, and those of what is sent; tau on its way down is not counted.

    Args:
      rate: the share that should send, in [0, 1]; may be traced.
      initial: the first tau, positive; may be traced.
      step: how fast tau follows, positive; may be traced.
      keep: whether a withheld update is added to the client's next one or dropped.

    Returns:
      A channel whose server state is tau; it reports `{"norm", "threshold", "open"}`.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if rate is not in [0, 1], or initial or step is not positive.

    >>> from types import SimpleNamespace as Round
    >>> channel = target_rate(0.5, initial=2.0, step=1.0, keep=False)
    >>> tau, _ = channel.init(jnp.zeros(1))
    >>> ctx = Round(alive=jnp.ones(4, bool))
    >>> _, tau = channel.decode(ctx, jnp.zeros(1), tau, {"open": 0})  # nobody sent
    >>> tau.item()  # 2 exp(-1/2)
    1.213
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}.")
    for name, value in (("initial", initial), ("step", step)):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")

    def init(payload):
        return jnp.asarray(initial, jnp.float32)

    def decide(ctx, payload, tau):
        norm = tree.norm(payload)
        return norm >= tau, {"norm": norm, "threshold": tau}

    def decode(ctx, payload, tau, report):
        asked = jnp.sum(ctx.alive)
        surplus = report["open"] / jnp.maximum(asked, 1) - rate
        return payload, jnp.where(asked > 0, tau * jnp.exp(step * surplus), tau)

    return gate_by(
        decide, keep=keep, init=tree.of_floats("target_rate", init), decode=decode
    )


class LastUpdate(NamedTuple):
    """The server's state of `cmfl`.

    Attributes:
      sign: int8, of the last global update, shaped as the payload.
      known: bool `[]`, whether there has been one.
    """

    sign: Payload
    known: jax.Array


def cmfl(threshold: optax.ScalarOrSchedule, *, keep: bool) -> Channel:
    """Sends an update only if it points where the model as a whole is going.

    The relevance of an update u of d parameters, with u' the last global update:

        e(u, u') = (1 / d) sum_j [sgn(u_j) = sgn(u'_j)] >= threshold

    In the first round everyone sends. Place it left of `mean()`, so that the global
    update it sees is the mean. A round in which nobody sends leaves u' as it was.

    Client sends: a flag, and the update if it is set. Server sees: who sent, and what.
    Bits: 1, and those of what is sent. Clients are taken to know u', as those do that
    compare two broadcasts; it is not counted.

    Args:
      threshold: in [0, 1], or a function of the round; the paper's examples decay.
      keep: whether a withheld update is added to the client's next one or dropped, as
        in the paper.

    Returns:
      A channel whose server state is a `LastUpdate`; it reports `{"relevance",
      "open"}`.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if threshold is not in [0, 1].

    >>> from types import SimpleNamespace as Round
    >>> channel = cmfl(0.6, keep=False)
    >>> state, _ = channel.init(jnp.zeros(4))
    >>> going = jnp.array([1.0, -2.0, 0.5, 3.0])
    >>> _, state = channel.decode(Round(), going, state, {"open": 1})
    >>> update = Message(jnp.array([4.0, -1.0, 0.1, -1.0]), jnp.float32(1.0), 128.0)
    >>> _, _, report = channel.encode(Round(), update, state, ())
    >>> report["relevance"].item(), report["open"].item()
    (0.75, True)

    Reference: Luping et al. 2019, CMFL: Mitigating Communication Overhead for Federated
    Learning, ICDCS, algorithm 1.
    """
    if isinstance(threshold, int | float) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}.")

    def init(payload):
        return LastUpdate(_signs(payload), jnp.array(False))

    def decide(ctx, payload, last):
        same = jax.tree.map(jnp.equal, _signs(payload), last.sign)
        agree = sum(jnp.sum(x) for x in jax.tree.leaves(same))
        relevance = jnp.where(last.known, agree / optax.tree.size(payload), 1.0)
        send = ~last.known | (relevance >= _now(threshold, ctx))
        return send, {"relevance": relevance}

    def decode(ctx, payload, last, report):
        now = LastUpdate(_signs(payload), jnp.array(True))
        return payload, optax.tree.where(report["open"] > 0, now, last)

    return gate_by(decide, keep=keep, init=tree.of_floats("cmfl", init), decode=decode)


class LastSent(NamedTuple):
    """What a client last sent, which the server remembers too.

    Attributes:
      value: its model (`last_sent_threshold`) or its update (`lag`).
      known: bool `[]`, whether it has sent anything yet.
    """

    value: Payload
    known: jax.Array


def last_sent_threshold(
    threshold: optax.ScalarOrSchedule, *, model: Model = itself
) -> Channel:
    """Sends a model only if it has moved away from the one that was last sent.

    Event-triggered communication: with `w_i = w - x` the client's model after training
    and `w_i^sent` the one that the server has of it,

        w_i^sent <- w_i   if ||w_i - w_i^sent||_2 > threshold
        payload   = w - w_i^sent

    so the server goes on with a client's last model where it withholds a newer one, and
    nothing is dropped or added up. A client that has never sent does so.

    Client sends: a flag, and the update if it is set. Server sees: the last model that
    each client sent; it keeps one of every client. Bits: 1, and those of what is sent.
    Place it left of any codec; a weight that `mean()` sends is counted in every round,
    with a `mean(denominator)` none is. `info.sent` says whose model was averaged.

    Args:
      threshold: at least 0, or a function of the round.
      model: `broadcast -> w`; the broadcast itself by default.

    Returns:
      A channel whose client state is a `LastSent`; it reports `{"norm", "open"}`, the
      norm of the difference, 0 the first time.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if threshold is negative.

    >>> from types import SimpleNamespace as Round
    >>> channel = last_sent_threshold(1.0)
    >>> _, last = channel.init(jnp.float32(0.0))
    >>> ctx = Round(broadcast=jnp.float32(10.0))
    >>> for x in (3.0, 3.5, 5.0):  # it trains to 7, 6.5, 5
    ...     update = Message(jnp.float32(x), jnp.float32(1.0), jnp.float32(32.0))
    ...     message, last, report = channel.encode(ctx, update, (), last)
    ...     print(message.payload.item(), report["norm"].item(), message.bits.item())
    3.0 0.0 32.0
    3.0 0.5 0.0
    5.0 2.0 32.0

    Reference: Ghosh et al. 2021, EventGraD, arXiv:2103.07454, whose neighbours go on
    with the parameters last received; here the server does.
    """
    _at_least_zero("threshold", threshold)

    def init(payload):
        tree.require_floats(payload, "last_sent_threshold")
        return (), LastSent(payload, jnp.array(False))

    def encode(ctx, message, server_state, last):
        given = model(ctx.broadcast)
        trained = optax.tree.sub(given, message.payload)
        moved = tree.norm(optax.tree.sub(trained, last.value))
        moved = jnp.where(last.known, moved, 0.0)
        send = ~last.known | (moved > _now(threshold, ctx))
        send &= message.weight > 0
        old = optax.tree.sub(given, last.value)
        last = optax.tree.where(send, LastSent(trained, jnp.array(True)), last)
        return _repeat(message, send, old), last, {"norm": moved, "open": send}

    return Channel(init, encode)


class LagState(NamedTuple):
    """The server's state of `lag`.

    Attributes:
      model: the last broadcast, `w^{k-1}`.
      moved: float32 `[D]`, `||w^{k-d} - w^{k-1-d}||^2` for d = 1, ..., D.
    """

    model: Params
    moved: jax.Array


def lag(
    rate: float,
    xi: Sequence[float] | jax.typing.ArrayLike = (0.1,) * 10,
    *,
    model: Model = itself,
) -> Channel:
    """Lazily aggregated gradients: sends one only if it has changed enough.

    Worker m of M skips its upload in round k, and the server goes on with the last
    gradient that it has of it, if

        ||g_m^last - g_m^k||^2
            <= 1 / (alpha^2 M^2) sum_{d=1..D} xi_d ||w^{k+1-d} - w^{k-d}||^2

    In its first round every worker sends. The whole population takes part in every
    round: who is not asked or not alive is missing from the sum.

    Client sends: a flag, and the gradient if it is set. Server sees: the last gradient
    that each client sent; it keeps one of every client. Bits: 1, and those of what is
    sent; the D differences on their way down are not counted. A weight that `mean()`
    sends is counted in every round. `info.sent` says whose gradient was summed.

    Args:
      rate: alpha, of the step `w <- w - alpha sum_m g_m`, positive; may be traced. With
        the mean in place of the sum and a server's rate eta, alpha is eta / M.
      xi: `[D]`, weights of the last D steps; the paper's 0.1 for each of ten.
      model: `broadcast -> w`; the broadcast itself by default.

    Returns:
      A channel, states `LagState` and `LastSent`; it reports `{"change", "open"}`, the
      left-hand side, 0 the first time.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if rate is not positive, or xi empty.

    >>> from types import SimpleNamespace as Round
    >>> channel = lag(0.5, [1.0])
    >>> server, last = channel.init(jnp.float32(0.0))
    >>> for k, (w, g) in enumerate([(4.0, 3.0), (2.5, 2.0), (1.0, -2.0)]):
    ...     ctx = Round(round=k, population=1, broadcast=jnp.float32(w))
    ...     gradient = Message(jnp.float32(g), jnp.float32(1.0), jnp.float32(32.0))
    ...     message, last, report = channel.encode(ctx, gradient, server, last)
    ...     payload, server = channel.decode(ctx, message.payload, server, report)
    ...     print(payload.item(), report["change"].item(), report["open"].item())
    3.0 0.0 True
    3.0 1.0 False
    -2.0 25.0 True

    Reference: Chen et al. 2018, arXiv:1805.09965, algorithm 1 (LAG-WK), rule (15a).
    """
    if isinstance(rate, int | float) and not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}.")
    xi = jnp.asarray(xi, jnp.float32)
    if xi.ndim != 1 or xi.size == 0:
        raise ValueError(f"xi must be a row of weights [D], got shape {xi.shape}.")

    def init(payload):
        tree.require_floats(payload, "lag")
        server = LagState(payload, jnp.zeros(xi.shape))
        return server, LastSent(payload, jnp.array(False))

    def steps(ctx, state):
        """The last D squared steps up to this round's model, the newest first."""
        step = optax.tree.sub(model(ctx.broadcast), state.model)
        newest = jnp.where(ctx.round > 0, tree.norm(step, squared=True), 0.0)
        return jnp.append(newest, state.moved[:-1])

    def encode(ctx, message, state, last):
        change = tree.norm(optax.tree.sub(last.value, message.payload), squared=True)
        change = jnp.where(last.known, change, 0.0)
        bound = jnp.sum(xi * steps(ctx, state)) / (rate * ctx.population) ** 2
        send = (~last.known | (change > bound)) & (message.weight > 0)
        now = LastSent(message.payload, jnp.array(True))
        message = _repeat(message, send, last.value)
        last = optax.tree.where(send, now, last)
        return message, last, {"change": change, "open": send}

    def decode(ctx, payload, state, report):
        return payload, LagState(model(ctx.broadcast), steps(ctx, state))

    return Channel(init, encode, decode)


def gaia(threshold: optax.ScalarOrSchedule, *, model: Model = itself) -> Channel:
    """Sends, parameter by parameter, what is significant, and adds up the rest.

    With `a_j` the updates of parameter j since it was last sent, and w the model,

        |a_j / w_j| > threshold

    is sent and `a_j` begun anew; the rest is 0 in this message and waits at the client.
    A mean counts those zeros, as the paper sums updates.

    Client sends: which n of the d parameters follow, and these. Server sees: them.
    Bits: 1 to say how the n are named, `min(d, 32 + n ceil(log2 d))` for a bitmap or
    for their number and places, and the n numbers in their dtypes.

    Args:
      threshold: at least 0, or a function of the round; the paper's is
        `v / sqrt(t)`: `lambda round: v / jnp.sqrt(round + 1.0)`.
      model: `broadcast -> w`; the broadcast itself by default.

    Returns:
      A channel; it reports `{"significant"}`, n / d.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if threshold is negative.

    >>> from types import SimpleNamespace as Round
    >>> channel = gaia(0.1)
    >>> ctx = Round(broadcast=jnp.array([1.0, 10.0]))
    >>> update = Message(jnp.array([0.75, 0.75]), jnp.float32(1.0), jnp.float32(64.0))
    >>> _, kept = channel.init(update.payload * 0)
    >>> for _ in range(2):
    ...     message, kept, _ = channel.encode(ctx, update, (), kept)
    ...     print(message.payload.tolist(), kept.tolist(), message.bits.item())
    [0.75, 0.0] [0.0, 0.75] 35.0
    [0.75, 1.5] [0.0, 0.0] 67.0

    Reference: Hsieh et al. 2017, Gaia: Geo-Distributed Machine Learning Approaching LAN
    Speeds, NSDI, section 4.1 (significance filter).
    """
    _at_least_zero("threshold", threshold)

    def init(payload):
        tree.require_floats(payload, "gaia")
        return (), payload

    def encode(ctx, message, server_state, kept):
        message = with_kept(message, kept)
        least = _now(threshold, ctx)
        sends = message.weight > 0

        def significant(a, w):
            return sends & (jnp.abs(a) > least * jnp.abs(w))

        chosen = jax.tree.map(significant, message.payload, model(ctx.broadcast))
        zeros = jax.tree.map(jnp.zeros_like, message.payload)
        payload = jax.tree.map(jnp.where, chosen, message.payload, zeros)
        kept = jax.tree.map(jnp.where, chosen, zeros, message.payload)

        counts = jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), chosen)
        n, d = sum(jax.tree.leaves(counts)), optax.tree.size(payload)
        numbers = sum(
            8 * x.dtype.itemsize * count
            for x, count in zip(
                jax.tree.leaves(payload), jax.tree.leaves(counts), strict=True
            )
        )
        names = jnp.minimum(d, 32 + n * math.ceil(math.log2(d)))
        bits = jnp.where(sends, 1 + names + numbers, 0.0)
        message = message._replace(payload=payload, bits=bits)
        return message, kept, {"significant": n / d}

    return Channel(init, encode)


def _repeat(message: Message, send: jax.Array, old: Payload) -> Message:
    """The message, or for the length of a flag the old payload with its new weight."""
    return message._replace(
        payload=optax.tree.where(send, message.payload, old),
        bits=jnp.where(send, message.bits, 0.0),
        header=jnp.where(send, message.header, 0.0) + 1.0,
    )


def _at_least_zero(name: str, value: optax.ScalarOrSchedule) -> None:
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")


def _now(threshold: optax.ScalarOrSchedule, ctx: Context) -> jax.typing.ArrayLike:
    """The threshold in this round."""
    return threshold(ctx.round) if callable(threshold) else threshold


def _signs(x: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sign(x).astype(jnp.int8), x)
