"""Liars who know each other's messages and everyone's: what they craft from them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.special import ndtri

from jaxfl import tree
from jaxfl.attack.among import Clients, Rounds, membership, schedule
from jaxfl.core import Aggregator, Context


class Craft(NamedTuple):
    """What colluders send, one vector for all of them.

    Attributes:
      apply: `(ctx, rows, honest, liars, state) -> (lie [d], state)`, from the messages
        of this round as vectors, float32 `[K, d]`, and whose they are, bool `[K]` each;
        a row of someone who sent nothing is zero and in neither.
      init: `[d] -> state`, given zeros.
    """

    apply: Callable[
        [Context, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]
    ]
    init: Callable[[jax.Array], Any] = lambda zeros: ()


def collude(
    aggregator: Aggregator, clients: Clients, craft: Craft, rounds: Rounds = None
) -> Aggregator:
    """Replaces the messages of certain clients by what they craft together.

    The liars are omniscient: they know all messages of this round as they reach the
    server, and answer after everyone. They do not know what the aggregator draws. What
    they send passes no channel, so a `clip` or a codec there does not bind them;
    what the server enforces belongs into `aggregator`. With `mean()` messages are
    weighted shares, so give all the same weight. Until here a liar works as if it were
    honest; if it has sent nothing it lies nothing, and if no honest client has sent
    anything the liars send zeros.

    Args:
      aggregator: what the server does with the messages. If it is linear the stack is
        summed here, after the lies.
      clients: the liars: ids, int `[M]`, or flags, bool `[N]`; they may be traced.
      craft: what they send: `alie`, `ipm`, `min_max`, `min_sum`, `mimic`, or your own.
      rounds: when, see `among`; at other times they are honest.

    Returns:
      An `Aggregator` that needs the stack `[K, ...]`, and makes a sum if `aggregator`
      does; it raises TypeError when initialised with integers.

    >>> from types import SimpleNamespace as Context
    >>> from jaxfl import total
    >>> ctx = Context(roster=jnp.arange(3), round=jnp.int32(0))
    >>> payload, sent = jnp.array([[2.0], [4.0], [5.0]]), jnp.ones(3, bool)
    >>> lied_to = collude(total(), [2], ipm(0.5))
    >>> lied_to.apply(ctx, payload, sent, lied_to.init(payload[0]))[0].tolist()
    [4.5]
    """
    lies, now = membership(clients), schedule(rounds)

    def init(payload):
        flat, _ = ravel_pytree(payload)
        return aggregator.init(payload), craft.init(jnp.zeros(flat.shape, jnp.float32))

    def apply(ctx, payload, sent, state):
        inner, crafted = state
        liars = lies(ctx.roster)
        honest, liars = sent & ~liars, sent & liars
        active = now(ctx.round) & jnp.any(honest)
        shape = jax.tree.map(lambda x: x[0], payload)
        _, unravel = ravel_pytree(shape)
        rows = jax.vmap(lambda x: ravel_pytree(x)[0])(payload).astype(jnp.float32)
        lie, state = craft.apply(ctx, rows, honest, liars, crafted)
        crafted = jax.tree.map(lambda a, b: jnp.where(active, a, b), state, crafted)
        flat, _ = ravel_pytree(shape)
        lie = unravel(tree.mask(jnp.any(honest), lie).astype(flat.dtype))
        lie = jax.tree.map(
            lambda x, like: jnp.broadcast_to(x, like.shape), lie, payload
        )
        payload = tree.where_rows(liars & now(ctx.round), lie, payload)
        if aggregator.linear:
            payload = jax.tree.map(lambda x: jnp.sum(x, 0).astype(x.dtype), payload)
        payload, delivered, inner = aggregator.apply(ctx, payload, sent, inner)
        return payload, delivered, (inner, crafted)

    return Aggregator(
        tree.of_floats("collude", init),
        apply,
        personal=aggregator.personal,
        traffic=aggregator.traffic,
        sums=aggregator.makes_sum,
        bits=aggregator.bits,
    )


def alie(z: float | None = None) -> Craft:
    """A little is enough: as far from the mean as honest messages are.

    `mu - z sigma` in each coordinate, with the mean and the standard deviation of the
    honest messages. Of n who sent and f liars, `s = floor(n / 2 + 1) - f` more would
    make a majority; z is the largest for which as many honest clients are expected to
    be further off than the lie,

        z = Phi^-1((n - f - s) / (n - f))

    Args:
      z: in its place a number of your own; it may be traced.

    >>> rows = jnp.array([[1.0], [3.0], [0.0]])
    >>> honest = jnp.array([True, True, False])
    >>> alie(z=1.5).apply(None, rows, honest, ~honest, ())[0].tolist()  # 2 - 1.5 x 1
    [0.5]

    Reference: Baruch, Baruch, Goldberg 2019, arXiv:1902.06156, its attack
    on convergence.
    """

    def apply(ctx, rows, honest, liars, state):
        center, std = moments(rows, honest)
        if z is not None:
            return center - z * std, state
        f, good = jnp.sum(liars), jnp.sum(honest)
        support = (good + f) // 2 + 1 - f
        share = (good - support) / jnp.maximum(good, 1)
        # where the liars are the majority they need nobody, and any z will do
        return center - ndtri(jnp.clip(share, 1e-6, 1 - 1e-6)) * std, state

    return Craft(apply)


def ipm(epsilon: float) -> Craft:
    """Inner product manipulation: the mean of the honest messages, the wrong way round.

    `-epsilon mu`. A small epsilon is not far from honest messages where those are far
    from each other; a large one turns the mean of all, which is `(n - f (1 + epsilon))
    mu / n`.

    Args:
      epsilon: it may be traced.

    >>> rows = jnp.array([[1.0], [3.0], [0.0]])
    >>> honest = jnp.array([True, True, False])
    >>> ipm(0.5).apply(None, rows, honest, ~honest, ())[0].tolist()
    [-1.0]

    Reference: Xie, Koyejo, Gupta 2020, arXiv:1903.03936.
    """

    def apply(ctx, rows, honest, liars, state):
        return -epsilon * moments(rows, honest)[0], state

    return Craft(apply)


def against_std(mean: jax.Array, std: jax.Array) -> jax.Array:
    """The default direction of `min_max` and `min_sum`: `-sigma`."""
    del mean
    return -std


Direction = Callable[[jax.Array, jax.Array], jax.Array]


def min_max(
    direction: Direction = against_std,
    *,
    largest: float = 10.0,
    tolerance: float = 1e-5,
) -> Craft:
    """As far off as possible, and as near to all as they are to each other.

    `m = mu + gamma p` with the largest gamma for which

        max_i ||m - x_i|| <= max_{i, j} ||x_i - x_j||

    over honest i and j, found by halving steps from `largest` until they are below
    `tolerance`. It needs neither the aggregator nor the number of liars.

    Args:
      direction: `(mu, sigma) -> p`, `[d]` each; `-sigma` by default. Others of the
        paper are `-mu / ||mu||` and `-sign(mu)`.
      largest: gamma to begin with; one of twice that is never found.
      tolerance: tau.

    Raises:
      ValueError: unless `largest > tolerance > 0`.

    >>> rows = jnp.array([[0.0], [4.0], [9.0]])
    >>> honest = jnp.array([True, True, False])
    >>> lie, _ = min_max().apply(None, rows, honest, ~honest, ())  # 2 - gamma x 2
    >>> round(lie.item(), 3)
    0.0

    Reference: Shejwalkar, Houmansadr 2021, Manipulating the Byzantine, NDSS,
    algorithm 1.
    """

    def fits(apart):  # squared, all the better
        most = jnp.max(apart)
        return lambda off, honest: jnp.max(jnp.where(honest, off, -jnp.inf)) <= most

    return _as_far_as(fits, direction, largest, tolerance)


def min_sum(
    direction: Direction = against_std,
    *,
    largest: float = 10.0,
    tolerance: float = 1e-5,
) -> Craft:
    """As far off as possible, and as near to all together as the farthest of them is.

    `m = mu + gamma p` with the largest gamma for which

        sum_i ||m - x_i||^2 <= max_i sum_j ||x_i - x_j||^2

    over honest i and j; found as in `min_max`.

    Args:
      direction, largest, tolerance: see `min_max`.

    Raises:
      ValueError: unless `largest > tolerance > 0`.

    >>> rows = jnp.array([[0.0], [4.0], [9.0]])
    >>> honest = jnp.array([True, True, False])
    >>> lie, _ = min_sum().apply(None, rows, honest, ~honest, ())
    >>> round(lie.item(), 3)  # (2 - 2)^2 + ... : 8 + 8 gamma^2 = 16
    0.0

    Reference: Shejwalkar, Houmansadr 2021, Manipulating the Byzantine, NDSS,
    algorithm 1.
    """

    def fits(apart):
        most = jnp.max(jnp.sum(apart, 1))
        return lambda off, honest: jnp.sum(jnp.where(honest, off, 0.0)) <= most

    return _as_far_as(fits, direction, largest, tolerance)


def _as_far_as(fits, direction: Direction, largest: float, tolerance: float) -> Craft:
    """`mu + gamma p` with the largest gamma that fits, by the paper's algorithm 1."""
    if not largest > tolerance > 0:
        raise ValueError(
            "largest must be above tolerance, and that above 0, "
            f"got {largest=} and {tolerance=}."
        )
    halvings = math.ceil(math.log2(largest / tolerance))

    def apply(ctx, rows, honest, liars, state):
        center, std = moments(rows, honest)
        p = direction(center, std)
        rows = jnp.where(honest[:, None], rows - center, 0.0)
        highest = jax.lax.Precision.HIGHEST
        gram = jnp.matmul(rows, rows.T, precision=highest)
        size = jnp.diag(gram)
        apart = size[:, None] + size - 2 * gram
        allowed = fits(jnp.where(honest[:, None] & honest, apart, 0.0))
        along, length = jnp.matmul(rows, p, precision=highest), jnp.sum(p * p)

        def step(_, search):
            gamma, found, by = search
            # ||x_i - mu - gamma p||^2, without another pass over the rows
            fine = allowed(size - 2 * gamma * along + gamma**2 * length, honest)
            found = jnp.where(fine, gamma, found)
            return jnp.where(fine, gamma + by / 2, gamma - by / 2), found, by / 2

        start = jnp.float32(largest), jnp.float32(0), jnp.float32(largest)
        _, gamma, _ = jax.lax.fori_loop(0, halvings, step, start)
        return center + gamma * p, state

    return Craft(apply)


class Mimicked(NamedTuple):
    """What colluders who mimic remember.

    Attributes:
      done: int32 `[]`, rounds that they have looked on.
      mean: float32 `[d]`, mu, the mean of the honest messages so far.
      z: float32 `[d]`, the direction in which those differ most.
      target: int32 `[]`, the id of the client that is mimicked; -1 if none is yet.
    """

    done: jax.Array
    mean: jax.Array
    z: jax.Array
    target: jax.Array


def mimic(warmup: int = 1) -> Craft:
    """All liars send what one honest client sends, and so make it count too much.

    In the first rounds z follows by Oja's rule the direction in which honest messages
    x_i differ most over time,

        mu <- t / (t + 1) mu + 1 / (t + 1) mean_i x_i
        z <- t / (t + 1) z + 1 / (t + 1) C z / ||C z||
        where C z = sum_i (x_i - mu) <x_i - mu, z>

    with z normalised and at first any direction, and the client with the largest
    `<z, x_i>` is mimicked. After them it is the one that was chosen last. Each lie is a
    true message, which no aggregator can tell from others; it harms where clients'
    data differ. Where the client that is mimicked is not there, the one nearest to it
    by that measure is.

    Args:
      warmup: T_0, the rounds in which z is learned.

    Raises:
      ValueError: if warmup is not positive.

    >>> craft, honest = mimic(), jnp.array([True, True, True, False])
    >>> from types import SimpleNamespace as Context
    >>> ctx = Context(key=jax.random.key(0), roster=jnp.arange(4))
    >>> rows = jnp.array([[0.0, 1.0], [0.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    >>> lie, state = craft.apply(ctx, rows, honest, ~honest, craft.init(rows[0]))
    >>> rows[state.target].tolist() == lie.tolist()
    True

    Reference: Karimireddy, He, Jaggi 2022, arXiv:2006.09365, as in the authors'
    code, where a round decides for itself; the paper sums `<z, x_i>` over them.
    """
    if not warmup >= 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}.")

    def init(zeros):
        return Mimicked(jnp.int32(0), zeros, zeros, jnp.int32(-1))

    def learn(ctx, rows, honest, state):
        first, t = state.done == 0, state.done.astype(jnp.float32)
        drawn = jax.random.normal(ctx.key, state.z.shape)
        center = moments(rows, honest)[0]
        center = (t * state.mean + center) / (t + 1)
        z = jnp.where(first, drawn, state.z)
        off = jnp.where(honest[:, None], rows - center, 0.0)
        highest = jax.lax.Precision.HIGHEST
        turned = jnp.matmul(
            jnp.matmul(off, z, precision=highest), off, precision=highest
        )
        z = _unit(jnp.where(first, 0.0, t * z) + _unit(turned))
        return center, z

    def apply(ctx, rows, honest, liars, state):
        learning = state.done < warmup
        center, z = learn(ctx, rows, honest, state)
        center, z = (
            jnp.where(learning, center, state.mean),
            jnp.where(learning, z, state.z),
        )
        along = jnp.matmul(rows, z, precision=jax.lax.Precision.HIGHEST)
        widest = jnp.argmax(jnp.where(honest, along, -jnp.inf))
        there = honest & (ctx.roster == state.target)
        row = jnp.where(learning | ~jnp.any(there), widest, jnp.argmax(there))
        target = jnp.where(learning, ctx.roster[widest], state.target)
        return rows[row], Mimicked(state.done + 1, center, z, target)

    return Craft(apply, init)


def moments(rows: jax.Array, flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each coordinate over the rows whose flag holds.

    >>> moments(jnp.array([[1.0], [3.0], [7.0]]), jnp.array([True, True, False]))
    (Array([2.], dtype=float32), Array([1.], dtype=float32))
    """
    n = jnp.maximum(jnp.sum(flags), 1).astype(jnp.float32)
    chosen = flags[:, None]
    center = jnp.sum(jnp.where(chosen, rows, 0.0), 0) / n
    squares = jnp.sum(jnp.where(chosen, (rows - center) ** 2, 0.0), 0) / n
    return center, jnp.sqrt(squares)


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(x * x))
    return x / jnp.where(norm > 0, norm, 1.0)
