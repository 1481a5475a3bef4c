"""What a liar sends who knows no message but its own; `among` says who lies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfl import tree
from jaxfl.core import Channel, Context, Payload, no_state, unchanged


def sign_flip(factor: float = 1.0) -> Channel:
    """Sends the update the wrong way round.

    `-a x`. With a = 1 it is the "bit flip" of Karimireddy et al.

    Client sends: that. Server sees: it. Bits: as before.

    Args:
      factor: a; it may be traced.

    Raises:
      TypeError: when a payload has integers.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([1.0, -2.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> sign_flip(3.0).encode(None, update, (), ())[0].payload.tolist()
    [-3.0, 6.0]

    Reference: Li, Xu, Chen, Giannakis, Ling 2019, arXiv:1811.03761; Karimireddy, He,
    Jaggi 2022, arXiv:2006.09365.
    """
    return _instead("sign_flip", lambda ctx, x: tree.scale(-jnp.float32(factor), x))


def noise(std: float) -> Channel:
    """Sends normal noise in place of the update.

    `N(0, sigma^2 I)`, drawn anew by each liar in each round.

    Client sends: that, and nothing of its data. Server sees: it. Bits: as before.

    Args:
      std: sigma; it may be traced.

    Raises:
      TypeError: when a payload has integers.

    >>> from types import SimpleNamespace as Context
    >>> from jaxfl.core import Message
    >>> ctx = Context(key=jax.random.key(0))
    >>> update = Message(jnp.ones(10_000), jnp.float32(1.0), jnp.float32(320_000.0))
    >>> sent = noise(5.0).encode(ctx, update, (), ())[0].payload
    >>> round(sent.std().item(), 1), abs(sent.mean().item()) < 0.2
    (5.0, True)

    Reference: Blanchard et al. 2017, arXiv:1703.02757, experiments.
    """

    def make(ctx, payload):
        leaves, structure = jax.tree.flatten(payload)
        keys = jax.random.split(ctx.key, len(leaves))
        drawn = [
            (std * jax.random.normal(key, x.shape, jnp.float32)).astype(x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        return structure.unflatten(drawn)

    return _instead("noise", make)


def scale(factor: float, norm: float | None = None) -> Channel:
    """Sends the update many times as large: model replacement.

    `gamma x`, and within a norm S that a server would not object to,
    `x min(gamma, S / ||x||)`. With `gamma = n / eta`, where the server takes the step
    `eta` along the mean over n clients, the liar's model takes the place of the
    federated one once the others have converged, and whatever it was trained on, such
    as a `backdoor`, with it. Trained as usual and sent within S, it is
    "constrain-and-scale" by the norm.

    Client sends: that. Server sees: it. Bits: as before.

    Args:
      factor: gamma; it may be traced.
      norm: S, positive; None for no bound.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if norm is not positive.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> scale(10.0).encode(None, update, (), ())[0].payload.tolist()
    [30.0, 40.0]
    >>> scale(10.0, norm=10.0).encode(None, update, (), ())[0].payload.tolist()
    [6.0, 8.0]

    Reference: Bagdasaryan, Veit, Hua, Estrin, Shmatikov 2020, arXiv:1807.00459,
    equation 3.
    """
    if isinstance(norm, int | float) and not norm > 0:
        raise ValueError(f"norm must be positive or None, got {norm}.")

    def make(ctx, payload):
        if norm is None:
            return tree.scale(jnp.float32(factor), payload)
        size = tree.norm(payload)
        most = norm / jnp.where(size > 0, size, 1.0)
        return tree.scale(jnp.minimum(factor, most), payload)

    return _instead("scale", make)


def nan() -> Channel:
    """Sends numbers that are none, as a broken machine does.

    `federate` drops a message that is not finite, and counts it in `info.rejected`.

    Client sends: NaN everywhere. Server sees: it. Bits: as before.

    Raises:
      TypeError: when a payload has integers.

    >>> from jaxfl.core import Message
    >>> update = Message(jnp.array([1.0]), jnp.float32(1.0), jnp.float32(32.0))
    >>> nan().encode(None, update, (), ())[0].payload.tolist()
    [nan]
    """
    return _instead(
        "nan", lambda ctx, x: jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), x)
    )


def _instead(name: str, make: Callable[[Context, Payload], Payload]) -> Channel:
    """Another payload in place of the client's own."""

    def encode(ctx, message, server_state, client_state):
        message = message._replace(payload=make(ctx, message.payload))
        return message, client_state, ()

    return Channel(tree.of_floats(name, no_state), encode, sensitivity=unchanged)
