"""Sketches: sums of numbers at random, in which the large ones are found again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.compress.sparse import check_fraction, count, largest
from jaxfl.compress.vector import Layout, if_sent
from jaxfl.core import Channel


class Tables(NamedTuple):
    """Where a count sketch of r rows and c columns adds up d numbers.

    Each row is a random permutation of the numbers, filled up to d' = c ceil(d / c),
    dealt to its c columns in turn.

    Attributes:
      order: int32 `[r, d']`, which number is dealt at each turn; 2 d' numbers are the
        vector and its negative.
      cell: int32 `[r, d]`, where each number is; 2 c cells are the row and its
        negative.
    """

    order: jax.Array
    cell: jax.Array


class FetchState(NamedTuple):
    """The server's state.

    Attributes:
      layout: of the payload.
      tables: of the sketch.
      momentum: S_u, float32 `[rows, columns]`.
      error: S_e, float32 `[rows, columns]`.
    """

    layout: Layout
    tables: Tables
    momentum: jax.Array
    error: jax.Array


def fetchsgd(
    rows: int, columns: int, fraction: float, momentum: float = 0.9, seed: int = 0
) -> Channel:
    """Sums count sketches, with momentum and error feedback of the sum at the server.

    Clients send the sketch `S(x)`, which is linear. With the server's mean S_t of them,
    made by `mean()` to the right, and the median U of a coordinate's r estimates,

        S_u <- rho S_u + S_t
        S_e <- S_e + S_u
        Delta = Top-k(U(S_e))
        S_e <- S_e - S(Delta)

    and the payload becomes Delta. Clients need no memory, so it serves clients that
    are asked once. A round without messages changes nothing.

    Two deviations. A learning rate eta multiplies S_u in the paper; here it is the
    server optimiser's, which is the same while it is constant. Rows are dealt by random
    permutations in place of hash functions that are independent by pairs: two numbers
    meet in a cell no more often, and the sketch is a gather, not a scatter.

    The time is that of r random passes over the payload at each client, and at the
    server of r more, a median of r and a `top_k`; memory of 8 r bytes a parameter.

    Client sends: the sketch, float32 `[rows, columns]`. Server sees: the sketches.
    Bits: `32 r c`; nothing for the tables, whose seed is agreed.

    Args:
      rows: r, estimates of each number.
      columns: c, cells of each row.
      fraction: k / d, in (0, 1]; it may be a traced array.
      momentum: rho, in [0, 1); it may be a traced array.
      seed: of the tables.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if rows or columns is not positive, fraction not in (0, 1], or
        momentum not in [0, 1); by `federate`, with an aggregator that makes no sum.

    >>> from jaxfl.core import Message
    >>> x = jnp.zeros(1000).at[jnp.array([3, 70])].set(jnp.array([5.0, -2.0]))
    >>> update = Message(x, jnp.float32(1.0), jnp.float32(32_000.0))
    >>> sketch = fetchsgd(rows=5, columns=50, fraction=0.002)
    >>> state, _ = sketch.init(x)
    >>> message, _, report = sketch.encode(None, update, state, ())
    >>> message.payload.shape, message.bits.item()
    ((5, 50), 8000.0)
    >>> payload, state = sketch.decode(None, message.payload, state, report)
    >>> bool((payload == x).all())
    True

    Reference: Rothchild et al. 2020, arXiv:2007.07682, algorithm 1; Charikar, Chen and
    Farach-Colton 2002 (count sketch).
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}.")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    check_fraction(fraction)

    def init(payload):
        tree.require_floats(payload, "fetchsgd")
        layout = Layout.of(payload)
        keys = jax.random.split(jax.random.key(seed), rows)
        tables = Tables(*jax.vmap(lambda key: _deal(key, layout.size, columns))(keys))
        return FetchState(layout, tables, *jnp.zeros((2, rows, columns))), ()

    def sends(payload):
        return jnp.zeros((rows, columns), jnp.float32)

    def encode(ctx, message, server_state, client_state):
        x, _ = ravel_pytree(message.payload)
        message = message._replace(
            payload=_sketch(x.astype(jnp.float32), server_state.tables, columns),
            bits=if_sent(message, 32 * rows * columns),
        )
        return message, client_state, {"messages": jnp.int32(1)}

    def decode(ctx, payload, server_state, report):
        layout, tables, old_momentum, old_error = server_state
        velocity = momentum * old_momentum + payload
        error = old_error + velocity
        found = _estimate(error, tables)
        chosen = largest(jnp.abs(found), count(fraction, layout.size))
        found = jnp.where(chosen, found, 0.0)
        error = error - _sketch(found, tables, columns)
        someone = report["messages"] > 0
        server_state = server_state._replace(
            momentum=jnp.where(someone, velocity, old_momentum),
            error=jnp.where(someone, error, old_error),
        )
        return layout.unravel(jnp.where(someone, found, 0.0)), server_state

    return Channel(init, encode, decode, of_sums=True, sends=sends)


def _deal(key: jax.Array, d: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """One row of the tables."""
    filled = columns * -(-d // columns)
    order_key, sign_key = jax.random.split(key)
    order = jax.random.permutation(order_key, filled)
    negative = jax.random.bernoulli(sign_key, shape=(filled,))
    cell = jnp.argsort(order) % columns + columns * negative
    order = order + filled * negative[order]
    return order.astype(jnp.int32), cell[:d].astype(jnp.int32)


def _sketch(x: jax.Array, tables: Tables, columns: int) -> jax.Array:
    """Every cell's sum, `[rows, columns]`, of numbers `[d]`."""
    rows, filled = tables.order.shape
    x = jnp.pad(x, (0, filled - x.size))
    dealt = jnp.concatenate([x, -x])[tables.order]
    return jnp.sum(dealt.reshape(rows, -1, columns), axis=1)


def _estimate(sketch: jax.Array, tables: Tables) -> jax.Array:
    """Every number's estimate, `[d]`: the median of those of the rows."""
    cells = jnp.concatenate([sketch, -sketch], axis=1)
    estimates = [*jnp.take_along_axis(cells, tables.cell, axis=1)]
    n = len(estimates)
    for i in range(n):  # an odd-even transposition sort: of few rows, but long ones
        for j in range(i % 2, n - 1, 2):
            a, b = estimates[j : j + 2]
            estimates[j : j + 2] = jnp.minimum(a, b), jnp.maximum(a, b)
    return (estimates[(n - 1) // 2] + estimates[n // 2]) / 2
