"""Randomised response: local differential privacy in a few bits."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxfl import tree
from jaxfl.compress.vector import dither, if_sent
from jaxfl.core import Channel, unchanged
from jaxfl.privacy.mechanism import Local, RandomisedResponse
from jaxfl.privacy.noise import NORMAL


def randomised_response(
    epsilon: float, *, coordinates: int | None = None, levels: int = 2
) -> Channel:
    """Sends one of k levels of some coordinates, the true one or, at random, another.

    With C the bound on the message that comes in, m of its d coordinates are drawn at
    random; each is rounded at random to one of k levels from -C to C, at equal
    distances; and of each the level is kept with probability `p = e^a / (e^a + k - 1)`,
    `a = epsilon / m`, else another one is sent, all alike. With `q = (1 - p) / (k - 1)`
    the server makes of a level v

      y_i = (d / m) v / (p - q)

    and 0 of what was not drawn, so that `E y = x`. With two levels
    `E y_i^2 = C^2 (d / m) ((e^a + 1) / (e^a - 1))^2`, which is least for an m of about
    epsilon / 2.2, and for 1 if that is less.

    Client sends: m coordinates and their levels. Server sees: y. Bits:
    `m (ceil(log2 d) + ceil(log2 k))`, with no indices if m = d. Guarantee: one client's
    against the server: epsilon-differential privacy of one message, whatever else it
    could have been.

    Args:
      epsilon: of a whole message, positive; it may be a traced array.
      coordinates: m; None for all.
      levels: k, from 2 to 65536.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if epsilon is not positive, coordinates or levels is not such a whole
        number; when a payload has fewer coordinates; by `federate`, if no channel to
        its left bounds a message.

    >>> from jaxfl import chain, clip
    >>> from jaxfl.channel import mechanisms
    >>> mechanisms(chain(clip(0.5), randomised_response(3.0, coordinates=1)))
    [Local(noise=RandomisedResponse(epsilon=3.0))]

    Reference: Warner 1965; k levels, Kairouz et al. 2016, arXiv:1602.07387; one
    coordinate of many, Nguyen et al. 2016, arXiv:1606.05053, and several, Wang et al.
    2019, arXiv:1907.00782, algorithm 4.
    """
    if isinstance(epsilon, int | float) and not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    if coordinates is not None and (
        not isinstance(coordinates, int) or coordinates < 1
    ):
        raise ValueError(
            f"coordinates must be a positive integer or None, got {coordinates!r}."
        )
    if levels not in range(2, 2**16 + 1):
        raise ValueError(
            f"levels must be a whole number from 2 to 65536, got {levels}."
        )

    def init(payload):
        tree.require_floats(payload, "randomised_response")
        size = sum(x.size for x in jax.tree.leaves(payload))
        if coordinates is not None and coordinates > size:
            raise ValueError(
                f"coordinates must be at most the payload's {size}, got {coordinates}."
            )
        return (), ()

    def encode(ctx, message, server_state, client_state):
        limit = NORMAL.limit("randomised_response", ctx.bound)
        x, unravel = ravel_pytree(message.payload)
        d = x.size
        m = coordinates or d
        which, rounding, keeping, other = jax.random.split(ctx.key, 4)
        at = jnp.arange(d) if m == d else jax.random.permutation(which, d)[:m]

        share = x[at].astype(jnp.float32) / limit  # no coordinate exceeds that
        level = jnp.floor((share + 1) / 2 * (levels - 1) + dither(rounding, m))
        level = jnp.clip(level, 0, levels - 1).astype(jnp.int32)
        more = jnp.expm1(jnp.float32(epsilon) / m)
        kept = jax.random.uniform(keeping, (m,)) < (more + 1) / (more + levels)
        shift = jax.random.randint(other, (m,), 1, levels)
        level = jnp.where(kept, level, (level + shift) % levels)

        value = (2 * level - (levels - 1)) / (levels - 1)
        value = value * limit * (d / m) * (more + levels) / more
        decoded = jnp.zeros(d, jnp.float32).at[at].set(value)
        width = (levels - 1).bit_length() + ((d - 1).bit_length() if m < d else 0)
        message = message._replace(
            payload=unravel(decoded.astype(x.dtype)), bits=if_sent(message, m * width)
        )
        return message, client_state, ()

    def mechanism(bound, sensitivity):
        NORMAL.limit("randomised_response", bound)
        return Local(RandomisedResponse(epsilon))

    return Channel(init, encode, sensitivity=unchanged, mechanism=mechanism)
