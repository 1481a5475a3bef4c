"""Channels that bound what one client contributes."""

import math

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.core import Bound, Channel, no_state, unchanged
from jaxfl.privacy.mechanism import Gaussian, Reported


def clip(norm: float, *, ord: int = 2) -> Channel:
    """Scales each update down to a bounded norm.

    `x min(1, C / ||x||)`, the norm over all leaves together.

    Client sends: the clipped payload. Server sees: it, and whether it was clipped.
    Bits: as before. Sensitivity: one client moves a sum by at most C, up to rounding
    (one part in 10^6 in float32, in 10^2 in bfloat16).

    Args:
      norm: C, the clip norm, positive; it may be a traced array.
      ord: 2 for the Euclidean norm, 1 for the sum of absolute values.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if norm is not positive, or ord neither 1 nor 2.

    >>> from jaxfl.core import Message
    >>> far = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, report = clip(1.0).encode(None, far, (), ())
    >>> [round(x, 3) for x in message.payload.tolist()], report["clipped"].item()
    ([0.6, 0.8], True)

    Reference: McMahan et al. 2018, arXiv:1710.06963, FlatClip.
    """
    _require_positive("norm", norm)
    if ord not in (1, 2):
        raise ValueError(f"ord must be 1 or 2, got {ord!r}.")
    size_of = tree.norm if ord == 2 else _absolute

    def encode(ctx, message, server_state, client_state):
        size = size_of(message.payload)
        factor = norm / jnp.maximum(size, norm)
        message = message._replace(payload=tree.scale(factor, message.payload))
        return message, client_state, {"clipped": size > norm}

    def bound(bound):
        l2 = _least(norm, bound.l2)  # which no vector's l1 is less than
        return Bound(l2, bound.l1 if ord == 2 else _least(norm, bound.l1))

    return Channel(
        tree.of_floats("clip", no_state), encode, bound=bound, sensitivity=unchanged
    )


def clip_layers(norm: float) -> Channel:
    """Scales every array of an update down to a bounded Euclidean norm.

    `x_j min(1, (C / sqrt(m)) / ||x_j||_2)` for each of m arrays, so that of all
    together the norm is at most C.

    Client sends: the clipped payload. Server sees: it, and the share of arrays that
    were clipped. Bits: as before. Sensitivity: as of `clip`.

    Args:
      norm: C, of all arrays together, positive; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if norm is not positive.

    >>> from jaxfl.core import Message
    >>> payload = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.1])}
    >>> far = Message(payload, jnp.float32(1.0), jnp.float32(96.0))
    >>> message, _, report = clip_layers(math.sqrt(2.0)).encode(None, far, (), ())
    >>> jax.tree.map(lambda x: x.round(3).tolist(), message.payload)
    {'b': [0.1], 'w': [0.6, 0.8]}
    >>> report["clipped"].item()
    0.5

    Reference: McMahan et al. 2018, arXiv:1710.06963, PerLayerClip.
    """
    _require_positive("norm", norm)

    def encode(ctx, message, server_state, client_state):
        leaves, structure = jax.tree.flatten(message.payload)
        each = norm / math.sqrt(len(leaves))
        sizes = [tree.norm(x) for x in leaves]
        leaves = [
            tree.scale(each / jnp.maximum(size, each), x)
            for x, size in zip(leaves, sizes, strict=True)
        ]
        clipped = jnp.mean((jnp.stack(sizes) > each).astype(jnp.float32))
        message = message._replace(payload=structure.unflatten(leaves))
        return message, client_state, {"clipped": clipped}

    def bound(bound):
        return Bound(_least(norm, bound.l2), bound.l1)

    return Channel(
        tree.of_floats("clip_layers", no_state),
        encode,
        bound=bound,
        sensitivity=unchanged,
    )


def adaptive_clip(
    quantile: float,
    initial: float,
    *,
    clients: float,
    count_std: float | None = None,
    learning_rate: float = 0.2,
) -> Channel:
    """Clips to a norm that follows a quantile of the clients' norms, privately.

    With C^t at the server, a client's update `x` becomes `x min(1/C^t, 1/||x||_2)`, of
    norm at most 1, and it reports `b = 1[||x||_2 <= C^t]`. The server scales what comes
    back by C^t, and

      b~ = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / m
      C^{t+1} = C^t exp(-eta_C (b~ - gamma))

    Noise that stands right of it need not know C^t. As `b - 1/2` is at most 1/2, the
    count is a mechanism of its own with noise multiplier `2 sigma_b`; for both to be as
    private as one of multiplier z, the noise of the updates is
    `gaussian(noise_left(z, 2 * count_std))`.

    Client sends: the clipped payload of unit norm, and one bit. Server sees: both.
    Bits: 1 more. Sensitivity: 1, of what is right of it.

    Args:
      quantile: gamma, between 0 and 1; 0.5 for the median.
      initial: C^0, positive.
      clients: m, how many are expected in a round.
      count_std: sigma_b; m / 20 if None, as in the paper. With 0 nothing is private.
      learning_rate: eta_C.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if quantile is not between 0 and 1, initial or clients is not
        positive, or count_std is negative.

    >>> channel = adaptive_clip(0.5, initial=2.0, clients=1, count_std=0.0)
    >>> server_state, _ = channel.init(jnp.zeros(2))
    >>> from jaxfl.core import Message
    >>> far = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, report = channel.encode(None, far, server_state, ())
    >>> [round(x, 3) for x in message.payload.tolist()]
    [0.6, 0.8]

    Reference: Andrew et al. 2021, arXiv:1905.03871, algorithm 1.
    """
    if isinstance(quantile, int | float) and not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}.")
    _require_positive("initial", initial)
    _require_positive("clients", clients)
    count_std = clients / 20 if count_std is None else count_std
    if isinstance(count_std, int | float) and not count_std >= 0:
        raise ValueError(f"count_std must be at least 0, got {count_std}.")

    def init(payload):
        return jnp.float32(initial), ()

    def encode(ctx, message, norm, client_state):
        size = tree.norm(message.payload)
        below = (size <= norm) - 0.5
        message = message._replace(
            payload=tree.scale(1.0 / jnp.maximum(size, norm), message.payload),
            header=message.header + 1.0 * (message.weight > 0),
        )
        return message, client_state, {"below": below, "norm": norm}

    def decode(ctx, payload, norm, report):
        noise = count_std * jax.random.normal(ctx.key)
        share = 0.5 + (report["below"] + noise) / clients
        new = norm * jnp.exp(-learning_rate * (share - quantile))
        return tree.scale(norm, payload), new

    return Channel(
        *(tree.of_floats("adaptive_clip", init), encode, decode),
        bound=lambda bound: Bound(1.0, math.inf),
        mechanism=lambda bound, sensitivity: Reported(Gaussian(2 * count_std)),
    )


def zero_out(norm: float) -> Channel:
    """Replaces each update that is too large by zeros, as no honest one would be.

    `x 1[||x|| <= C]`, the norm over all leaves together. It counts still, as no change:
    a client that was zeroed keeps its weight. `gate` is what leaves it out. A payload
    that is not finite is too large.

    Client sends: the payload or zeros. Server sees: it, and whether it was zeroed.
    Bits: as before. Sensitivity: one client moves a sum by at most C.

    Args:
      norm: C, the largest norm that passes, positive; it may be a traced array.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if norm is not positive.

    >>> from jaxfl.core import Message
    >>> far = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, report = zero_out(4.0).encode(None, far, (), ())
    >>> message.payload.tolist(), report["zeroed"].item()
    ([0.0, 0.0], True)

    Reference: the zeroing of TensorFlow Federated, there of the largest number.
    """
    _require_positive("norm", norm)

    def encode(ctx, message, server_state, client_state):
        small = tree.norm(message.payload) <= norm
        message = message._replace(payload=tree.mask(small, message.payload))
        return message, client_state, {"zeroed": ~small}

    def bound(bound):
        return Bound(_least(norm, bound.l2), bound.l1)

    return Channel(
        tree.of_floats("zero_out", no_state), encode, bound=bound, sensitivity=unchanged
    )


def adaptive_zero_out(
    quantile: float = 0.98,
    initial: float = 10.0,
    *,
    multiplier: float = 2.0,
    increment: float = 1.0,
    learning_rate: float = math.log(10.0),
) -> Channel:
    """Zeroes what is far larger than a quantile of the norms, which it follows.

    With q^t at the server, an update with `||x||_2 > a q^t + b` becomes zeros, and its
    client reports `1[||x||_2 <= q^t]`. With p the share of those who sent that did,

      q^{t+1} = q^t exp(-eta (p - gamma))

    Client sends: the payload or zeros, and one bit. Server sees: both. Bits: 1 more.
    Sensitivity: unknown.

    Args:
      quantile: gamma, between 0 and 1.
      initial: q^0, positive.
      multiplier: a, positive.
      increment: b, at least 0.
      learning_rate: eta.

    Raises:
      TypeError: when a payload has integers.
      ValueError: if quantile is not between 0 and 1, initial or multiplier is not
        positive, or increment is negative.

    >>> channel = adaptive_zero_out(initial=1.0)
    >>> server_state, _ = channel.init(jnp.zeros(2))
    >>> from jaxfl.core import Message
    >>> far = Message(jnp.array([3.0, 4.0]), jnp.float32(1.0), jnp.float32(64.0))
    >>> message, _, report = channel.encode(None, far, server_state, ())
    >>> message.payload.tolist()  # as 5 > 2 * 1 + 1
    [0.0, 0.0]

    Reference: TensorFlow Federated, `learning.robust_aggregator`, whose numbers are the
    defaults; Andrew et al. 2021, arXiv:1905.03871, for the quantile.
    """
    if isinstance(quantile, int | float) and not 0 < quantile < 1:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}.")
    _require_positive("initial", initial)
    _require_positive("multiplier", multiplier)
    if isinstance(increment, int | float) and not increment >= 0:
        raise ValueError(f"increment must be at least 0, got {increment}.")

    def init(payload):
        return jnp.float32(initial), ()

    def encode(ctx, message, estimate, client_state):
        size = tree.norm(message.payload)
        small = size <= multiplier * estimate + increment
        message = message._replace(
            payload=tree.mask(small, message.payload),
            header=message.header + 1.0 * (message.weight > 0),
        )
        return message, client_state, {"below": size <= estimate, "zeroed": ~small}

    def decode(ctx, payload, estimate, report):
        n = jnp.sum(ctx.sent)
        share = report["below"] / jnp.maximum(n, 1)
        new = estimate * jnp.exp(-learning_rate * (share - quantile))
        return payload, jnp.where(n > 0, new, estimate)

    return Channel(tree.of_floats("adaptive_zero_out", init), encode, decode)


def _least(norm, bound):
    """The smaller of two, of which any may be traced; of Python numbers, one."""
    if isinstance(bound, int | float) and math.isinf(bound):
        return norm
    if isinstance(norm, int | float) and isinstance(bound, int | float):
        return min(norm, bound)
    return jnp.minimum(norm, bound)


def _absolute(payload):
    return optax.tree.norm(optax.tree.cast(payload, jnp.float32), ord=1)


def _require_positive(name, value):
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
