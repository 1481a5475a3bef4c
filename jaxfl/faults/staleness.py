"""How much a message counts that was made from an old model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Channel, no_state, unchanged

Scale = Callable[[jax.Array], jax.Array]


def polynomial(a: float | jax.Array = 0.5) -> Scale:
    """`s(tau) = (1 + tau)^-a`.

    >>> polynomial()(jnp.array([0, 3])).tolist()
    [1.0, 0.5]

    Reference: Xie et al. 2019, arXiv:1903.03934, section 5.2; Nguyen et al. 2022,
    arXiv:2106.06639, section 5, with a = 1/2.
    """
    return lambda tau: (1.0 + tau) ** -jnp.float32(a)


def hinge(a: float | jax.Array, b: float | jax.Array) -> Scale:
    """`s(tau) = 1` up to `tau = b`, and `1 / (a (tau - b) + 1)` above.

    >>> hinge(10.0, 4.0)(jnp.array([4, 5])).round(4).tolist()
    [1.0, 0.0909]

    Reference: Xie et al. 2019, arXiv:1903.03934, section 5.2.
    """
    return lambda tau: 1.0 / (a * jnp.maximum(tau - b, 0.0) + 1.0)


def discount(scale: Scale) -> Channel:
    """Each message scaled down by how stale it is: `s(tau) x`.

    It stands left of `mean`, which then divides by how many messages there are, not by
    how much they count. Without it a constant, `s = 1`.

    Client sends: its payload in the same form; the server, which knows tau, might as
    well scale it. Server sees: the same. Bits: no more.

    Args:
      scale: `tau -> s(tau)`, from 0 to 1; above 1 it is cut off.

    Raises:
      TypeError: when a payload has integers.

    >>> from jaxfl.core import Message, lone_context
    >>> ctx = lone_context(jax.random.key(0))._replace(staleness=jnp.int32(3))
    >>> update = Message(jnp.array([2.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> discount(polynomial(0.5)).encode(ctx, update, (), ())[0].payload.tolist()
    [1.0]

    Reference: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1 and section 5.
    """

    def encode(ctx, message, server_state, client_state):
        tau = jnp.int32(0) if ctx.staleness is None else ctx.staleness
        factor = jnp.minimum(scale(tau), 1.0)
        payload = tree.scale(factor, message.payload)
        return message._replace(payload=payload), client_state, ()

    init = tree.of_floats("discount", no_state)
    return Channel(init, encode, bound=unchanged, sensitivity=unchanged)
