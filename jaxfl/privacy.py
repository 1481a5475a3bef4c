"""Channels that bound and hide what one client contributes."""

import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Channel


def clip(norm: float) -> Channel:
    """Scales each update down to a bounded Euclidean norm.

    `x min(1, C / ||x||_2)`, the norm over all leaves together.

    Client sends: the clipped payload. Server sees: it, and whether it was clipped.
    Bits: as before. Sensitivity: placed left of `mean(denominator=d)`, one client
    moves the aggregate by at most C / d, up to rounding (one part in 10^6 in
    float32, in 10^2 in bfloat16).

    Args:
      norm: C, the clip norm, positive; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if norm is not positive.

    >>> from jaxfl.core import Message
    >>> far = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, report = clip(1.0).encode(None, far, (), ())
    >>> [round(x, 3) for x in message.payload.tolist()], report["clipped"].item()
    ([0.6, 0.8], True)

    Reference: McMahan et al. 2018, arXiv:1710.06963, FlatClip.
    """
    if isinstance(norm, int | float) and not norm > 0:
        raise ValueError(f"norm must be positive, got {norm}.")

    def encode(ctx, message, server_state, client_state):
        size = tree.norm(message.payload)
        factor = norm / jnp.maximum(size, norm)
        message = message._replace(payload=tree.scale(factor, message.payload))
        return message, client_state, {"clipped": size > norm}

    def init(payload):
        tree.require_floats(payload, "clip")
        return (), ()

    return Channel(init, encode)
