"""Robust aggregators that move to a centre of the messages step by step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfl import tree
from jaxfl.core import Aggregator, Params, Payload


def geometric_median(*, iterations: int = 8, nu: float = 1e-6) -> Aggregator:
    """The point of least summed distance to all messages: RFA, robust averaging.

    `argmin_v sum_{i in S} ||v - x_i||`, by the smoothed Weiszfeld algorithm,

        beta_i = 1 / max(nu, ||v - x_i||),    v <- sum_i beta_i x_i / sum_i beta_i

    All clients count alike: of the paper's weights alpha_i, which clients would name
    themselves, one alone could be more than half. It begins at 0, no update, where the
    paper leaves the choice: from the mean, which one message can take anywhere, it
    would be many iterations back. Each iteration is a weighted mean, and could be a
    secure sum.

    Breakdown point: fewer than half of n, the number who sent. Of nobody it is 0. Over
    a mesh every device is given the stack of whole messages.

    Args:
      iterations: how many.
      nu: the smoothing, a distance below which none counts as nearer.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if iterations or nu is not positive.

    >>> payload = jnp.array([0.0, 1.0, 2.0, 3.0, -900.0])
    >>> v, *_ = geometric_median(iterations=50).apply(None, payload, payload < 9, ())
    >>> v.round(2).item()
    1.0

    Reference: Pillutla, Kakade, Harchaoui 2022, arXiv:1912.13445, algorithm 2.
    """
    _check_iterations("geometric_median", iterations)
    if isinstance(nu, int | float) and not nu > 0:
        raise ValueError(f"nu must be positive, got {nu}.")

    def apply(ctx, payload, sent, state):
        def step(_, v):
            beta = jnp.where(sent, 1.0 / jnp.maximum(_distances(payload, v), nu), 0.0)
            share = beta / jnp.maximum(jnp.sum(beta), jnp.finfo(jnp.float32).tiny)
            return _weighted(lambda x, v: x, share, payload, v)

        v = jax.lax.fori_loop(0, iterations, step, _origin(payload))
        return _as(payload, v), sent, state

    return Aggregator(tree.of_floats("geometric_median"), apply)


def centered_clip(radius: float, *, iterations: int = 1) -> Aggregator:
    """The last aggregate, moved by the mean of the messages' clipped distances from it.

    With n the number who sent, `iterations` times

        v <- v + 1/n sum_{i in S} (x_i - v) min(1, tau / ||x_i - v||)

    from the v of the round before; of the first round 0. All clients count alike. It is
    meant for messages that change little from round to round: a client's momentum,
    `at_client(optax.ema(beta, debias=False))`, makes them so.

    Breakdown point: fewer than half of n; one liar moves v by at most `tau / n` in an
    iteration, so a majority moves it anywhere, but in many rounds. The paper proves
    convergence with up to a tenth of n. If nobody sends nothing is delivered, and v
    stays. Over a mesh every device is given the stack of whole messages.

    Args:
      radius: tau, the clipping radius, positive; may be traced.
      iterations: how many a round.

    Raises:
      TypeError: when initialised with a payload of integers.
      ValueError: if radius or iterations is not positive.

    >>> aggregator = centered_clip(1.0)
    >>> payload, sent = jnp.array([[0.5], [0.7], [-900.0]]), jnp.ones(3) > 0
    >>> v, _, state = aggregator.apply(None, payload, sent, aggregator.init(payload[0]))
    >>> v.round(3).tolist()  # (0.5 + 0.7 - 1) / 3
    [0.067]

    Reference: Karimireddy, He, Jaggi 2021, arXiv:2012.10333, centered clipping.
    """
    _check_iterations("centered_clip", iterations)
    if isinstance(radius, int | float) and not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}.")

    def init(payload):
        return optax.tree.zeros_like(payload, jnp.float32)

    def apply(ctx, payload, sent, last):
        n = jnp.maximum(jnp.sum(sent), 1)

        def step(_, v):
            factor = radius / jnp.maximum(_distances(payload, v), radius)
            share = jnp.where(sent, factor / n, 0.0)
            return optax.tree.add(v, _weighted(lambda x, v: x - v, share, payload, v))

        v = jax.lax.fori_loop(0, iterations, step, last)
        anyone = jnp.any(sent)
        return tree.mask(anyone, _as(payload, v)), sent, v

    return Aggregator(tree.of_floats("centered_clip", init), apply)


def _check_iterations(name: str, iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"{name}: iterations must be at least 1, got {iterations}.")


def _origin(payload: Payload) -> Params:
    """Zeros like one row of a stack, in float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), payload)


def _as(payload: Payload, v: Params) -> Params:
    """`v` in the dtypes of a stack."""
    return jax.tree.map(lambda x, v: v.astype(x.dtype), payload, v)


def _distances(payload: Payload, v: Params) -> jax.Array:
    """`||x_i - v||` of each row of a stack, float32 `[K]`."""
    return jax.vmap(lambda row: tree.norm(optax.tree.sub(row, v)))(payload)


def _weighted(fn: Callable, share: jax.Array, payload: Payload, v: Params) -> Params:
    """`sum_i share_i fn(x_i, v)`, without rows of share 0, whatever is in them."""

    def leaf(x, v):
        rows = share.reshape(-1, *[1] * v.ndim)
        return jnp.sum(jnp.where(rows > 0, rows * fn(x, v), 0.0), 0)

    return jax.tree.map(leaf, payload, v)
