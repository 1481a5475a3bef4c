"""Channels that add noise in proportion to what one client can contribute."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.core import Bound, Channel, Payload, no_state, unchanged
from jaxfl.privacy.mechanism import Gaussian, Laplace, Local


def gaussian(noise_multiplier: float) -> Channel:
    """Adds normal noise to the aggregate at the server: central differential privacy.

    `x + N(0, (z S)^2 I)`, with S how far one client can move x in Euclidean norm. S
    comes from the chain: in `chain(clip(C), mean(denominator=d), gaussian(z))` noise is
    added to the sum, before it is divided, and S = C; left of the `mean` it would be
    C / d. What stands left of it acts on the noised aggregate, which costs no privacy.

    Client sends: the payload as it came. Server sees: it; only what it publishes is
    protected. Bits: as before. Guarantee: that of the Gaussian mechanism, see
    `jaxfl.accounting.epsilon`. Noise is added even when nobody sends.

    Args:
      noise_multiplier: z, at least 0; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if noise_multiplier is negative; by `federate`, if no channel bounds
        what one client contributes.

    >>> import optax
    >>> from jaxfl import chain, clip, fedavg, federate, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["x"]) ** 2
    >>> algorithm = fedavg(loss, optax.sgd(1.0), batch_size=None)
    >>> private = chain(clip(0.5), mean(denominator=10), gaussian(1.0))
    >>> federate(algorithm, private).parts[1] is private
    True
    >>> federate(algorithm, chain(mean(denominator=10), gaussian(1.0)))
    Traceback (most recent call last):
    ValueError: gaussian: nothing bounds the Euclidean norm of what one client ...

    Reference: McMahan et al. 2018, arXiv:1710.06963, algorithm 1.
    """
    return _at_server("gaussian", NORMAL, noise_multiplier)


def laplace(noise_multiplier: float) -> Channel:
    """Adds Laplace noise to the aggregate at the server.

    `x + Laplace(b S)`, with S how far one client can move x in the sum of absolute
    values; one round is 1/b-differentially private. See `gaussian`, which it is like in
    all else.

    Args:
      noise_multiplier: b, at least 0; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if noise_multiplier is negative; by `federate`, if no channel bounds
        the sum of absolute values, as `clip(C, ord=1)` does.

    Reference: Dwork et al. 2006, "Calibrating noise to sensitivity in private data
    analysis", definition 3.
    """
    return _at_server("laplace", DOUBLE_EXPONENTIAL, noise_multiplier)


def local_gaussian(noise_multiplier: float) -> Channel:
    """Adds normal noise to each message at its client: local differential privacy.

    `x + N(0, (z C)^2 I)`, with C the bound on the norm of the message that comes in, as
    of `clip(C)` to its left.

    Client sends: the noised payload. Server sees: it. Bits: as before. Guarantee: one
    client's against the server; that of the Gaussian mechanism with multiplier z / 2,
    as other data in the place of its own move its message by at most 2 C.

    Args:
      noise_multiplier: z, at least 0; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if noise_multiplier is negative; by `federate`, if no channel to its
        left bounds the Euclidean norm of a message.

    >>> from jaxfl import chain, clip
    >>> from jaxfl.channel import mechanisms
    >>> mechanisms(chain(clip(0.5), local_gaussian(2.0)))
    [Local(noise=Gaussian(noise_multiplier=2.0))]

    Reference: Dwork and Roth 2014, "The algorithmic foundations of differential
    privacy", appendix A.
    """
    return _at_client("local_gaussian", NORMAL, noise_multiplier)


def local_laplace(noise_multiplier: float) -> Channel:
    """Adds Laplace noise to each message at its client.

    `x + Laplace(b C)`, with C the bound on the sum of absolute values of the message
    that comes in, as of `clip(C, ord=1)` to its left; one message is 2/b-differentially
    private. See `local_gaussian`, which it is like in all else.

    Args:
      noise_multiplier: b, at least 0; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if noise_multiplier is negative; by `federate`, if no channel to its
        left bounds the sum of absolute values.

    Reference: Duchi et al. 2013, arXiv:1302.3203.
    """
    return _at_client("local_laplace", DOUBLE_EXPONENTIAL, noise_multiplier)


class _Distribution(NamedTuple):
    draw: Callable
    described: Callable
    norm: str  # which norm its scale goes by
    words: str

    def limit(self, name: str, bound: Bound | None) -> float | jax.Array:
        """The bound on the norm; raises ValueError unless there is one."""
        limit = getattr(bound or Bound(), self.norm)
        if isinstance(limit, int | float) and not math.isfinite(limit):
            raise ValueError(
                f"{name}: nothing bounds the {self.words} of what one client "
                "contributes; a clip must stand left of it, and whatever is between "
                "them must keep the bound: mean(denominator=...) does, a mean weighted "
                "by data does not, for nothing bounds a weight."
            )
        return limit


NORMAL = _Distribution(jax.random.normal, Gaussian, "l2", "Euclidean norm")
DOUBLE_EXPONENTIAL = _Distribution(
    jax.random.laplace, Laplace, "l1", "sum of absolute values"
)


def _at_server(name, noise, multiplier) -> Channel:
    def decode(ctx, payload, server_state, report):
        scale = multiplier * noise.limit(name, ctx.bound)
        return _noised(ctx.key, payload, noise.draw, scale), server_state

    def mechanism(bound, sensitivity):
        noise.limit(name, sensitivity)
        return noise.described(multiplier)

    return Channel(
        _checked(name, multiplier),
        decode=decode,
        bound=unchanged,
        sensitivity=unchanged,
        mechanism=mechanism,
    )


def _at_client(name, noise, multiplier) -> Channel:
    def encode(ctx, message, server_state, client_state):
        scale = multiplier * noise.limit(name, ctx.bound)
        payload = _noised(ctx.key, message.payload, noise.draw, scale)
        return message._replace(payload=payload), client_state, ()

    def mechanism(bound, sensitivity):
        noise.limit(name, bound)
        return Local(noise.described(multiplier))

    return Channel(
        _checked(name, multiplier),
        encode,
        sensitivity=unchanged,
        mechanism=mechanism,
    )


def _noised(key: jax.Array, payload: Payload, draw: Callable, scale) -> Payload:
    """The payload plus independent draws, each leaf in the dtype it had."""
    return add_noise(payload, scale, random_like(key, payload, draw))


def random_like(key: jax.Array, payload: Payload, draw: Callable) -> Any:
    """Independent draws of float32, as many as the payload has numbers."""
    return optax.tree.random_like(key, payload, draw, jnp.float32)


def add_noise(payload: Payload, scale, draws: Payload) -> Payload:
    """The payload plus a multiple of the draws, each leaf in the dtype it had."""
    return jax.tree.map(lambda x, d: (x + scale * d).astype(x.dtype), payload, draws)


def _checked(name, multiplier) -> Callable:
    require_multiplier(multiplier)
    return tree.of_floats(name, no_state)


def require_multiplier(noise_multiplier) -> None:
    """Raises ValueError if it is a number below 0; it may be traced."""
    if isinstance(noise_multiplier, int | float) and not noise_multiplier >= 0:
        raise ValueError(
            f"noise_multiplier must be at least 0, got {noise_multiplier}."
        )
