"""Differential privacy of a client's single examples, against all who see its model."""

import math
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from jaxfl import local
from jaxfl.core import Params, PyTree
from jaxfl.privacy.noise import require_multiplier


def dp_sgd(
    loss: Callable[[Params, PyTree, jax.Array], jax.Array],
    *,
    clip_norm: float,
    noise_multiplier: float,
    denominator: float,
    microbatch_size: int | None = None,
) -> local.Differentiated:
    """A loss whose gradients are private: every example's is clipped, and noise added.

    `g = (sum_b m_b g_b min(1, C / ||g_b||_2) + N(0, (z C)^2 I)) / B`, with `g_b` the
    gradient of one example and `m_b` 0 for rows that only fill up a batch.

    It is taken wherever a loss is: `fedavg(dp_sgd(loss, ...), optax.sgd(0.1), ...)`,
    and whatever the channel does to what is then sent costs the examples no privacy. So
    are momentum, weight decay and the like no cost, nor is a channel's noise needed.
    Batches drawn with `poisson=True` hide who is in them, passes over shuffled data do
    not: `example_epsilon` says what that makes. The metrics, losses among them, are
    not private: they are for whoever simulates.

    Guarantee: one example's, with its client's number of examples known; that of T
    compositions of the Gaussian mechanism with multiplier z, see `example_epsilon`.
    Sensitivity: one example moves the sum by at most C.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example. Each example has a
        random key of its own, and is seen as a batch of one.
      clip_norm: C, positive; infinite only without noise.
      noise_multiplier: z, at least 0; it may be a traced array.
      denominator: B, as large as batches are expected to be.
      microbatch_size: examples whose gradients are held at once; None for all of a
        batch. Microbatches in which no example was drawn take no time.

    Returns:
      What algorithms take for a loss.

    Raises:
      TypeError: if loss has a gradient of its own, as that of a model with batch
        statistics; when a gradient is computed and loss does not return one number an
        example.
      ValueError: if clip_norm or denominator is not positive, noise_multiplier is
        negative, microbatch_size is not a positive whole number; if clip_norm is
        infinite and there is noise.

    >>> from jaxfl import fedavg
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["x"]) ** 2
    >>> private = dp_sgd(loss, clip_norm=1.0, noise_multiplier=0.0, denominator=4)
    >>> batch, mask = {"x": jnp.array([0.5, 9.0, 0.0, 7.0])}, jnp.arange(4) < 3
    >>> value, slope = private.gradient(jnp.float32(0), batch, mask, jax.random.key(0))
    >>> slope.item()  # (-0.5 - 1) / 4; the last is no example
    -0.375
    >>> algorithm = fedavg(
    ...     private, optax.sgd(0.1), batch_size=4, steps=10, poisson=True)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    if isinstance(loss, local.Differentiated):
        raise TypeError("loss: one with a gradient of its own has none an example.")
    for name, value in (("clip_norm", clip_norm), ("denominator", denominator)):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    z = noise_multiplier
    require_multiplier(z)
    quiet = isinstance(z, int | float) and z == 0
    if isinstance(clip_norm, int | float) and math.isinf(clip_norm) and not quiet:
        raise ValueError("clip_norm must be finite where there is noise, got inf.")
    local.check_work(batch_size=microbatch_size)
    from jax_privacy.clipping import clipped_grad

    def of_one(params, batch, key):
        losses = loss(params, batch, key)
        local.require_one_each(losses, 1)
        return losses[0]

    clipped = clipped_grad(
        of_one,
        l2_clip_norm=clip_norm,
        return_values=True,
        microbatch_size=microbatch_size,
        dtype=jnp.float32,
        prng_argnum=2,
    )

    def gradient(params, batch, mask, key):
        loss_key, noise_key = jax.random.split(key)
        batch, mask = _spread(batch, mask, microbatch_size)
        summed, seen = clipped(params, batch, loss_key, is_padding_example=~mask)
        if not quiet:
            std = z * clip_norm
            noise = optax.tree.random_like(noise_key, summed, jax.random.normal)
            summed = optax.tree.add_scale(summed, std, noise)
        grads = jax.tree.map(
            lambda g, w: (g / denominator).astype(w.dtype), summed, params
        )
        value = jnp.sum(jnp.where(mask, seen.values, 0)) / jnp.maximum(mask.sum(), 1)
        return value, grads

    return local.Differentiated(gradient)


def _spread(batch, mask, size: int | None):
    """Rows so ordered that the first of them are the first of optax's microbatches.

    Of n microbatches these take every n-th row each, and only the last are left out.
    """
    if size is None:
        return batch, mask
    rows = mask.size
    order = jnp.arange(-(-rows // size) * size).reshape(-1, size).T.ravel()
    inside = jnp.minimum(order, rows - 1)
    return jax.tree.map(lambda x: x[inside], batch), mask[inside] & (order < rows)


def example_epsilon(
    noise_multiplier: float,
    *,
    examples: int,
    rounds: int,
    delta: float,
    **work: Unpack[local.Work],
) -> float:
    """The epsilon of one example of a client that trains with `dp_sgd`.

    With `poisson=True`, T steps of the Gaussian mechanism of multiplier z, of which
    each is amplified by sampling with q = B / n; by privacy loss distributions, which
    are tight. Passes over shuffled data have no such bound: each example is in one
    batch of a pass, so that this is the mechanism once for each pass, and not
    amplified.

    The two data sets differ in one example, which is in one and blank in the other, so
    that n is the same and no secret; a client's weight by its number of examples is
    none either. Whoever replaces it by another doubles the distance: half the z.

    Args:
      noise_multiplier: z, as given to `dp_sgd`.
      examples: n, of this client; with fewer epsilon is larger.
      rounds: in which the client takes part.
      delta: between 0 and 1.
      **work: as given to the algorithm: `batch_size` (32), `epochs` (1) or `steps`,
        `poisson`.

    Raises:
      ValueError: if noise_multiplier is not positive, examples or rounds is not a
        positive whole number, or delta is not between 0 and 1.

    >>> work = {"batch_size": 256, "epochs": 15, "poisson": True}
    >>> round(example_epsilon(1.3, examples=60_000, rounds=1, delta=1e-5, **work), 2)
    0.87
    >>> work["poisson"] = False
    >>> round(example_epsilon(1.3, examples=60_000, rounds=1, delta=1e-5, **work), 1)
    16.5

    Reference: Abadi et al. 2016, arXiv:1607.00133; Doroshenko et al. 2022,
    arXiv:2207.04380. Of shuffled batches: Chua et al. 2024, arXiv:2403.17673.
    """
    local.check_work(**work)
    for name, value in (("examples", examples), ("rounds", rounds)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier must be positive, got {noise_multiplier}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}.")
    import dp_accounting
    from dp_accounting import pld

    batch = min(work.get("batch_size", 32) or examples, examples)
    per_pass = -(-examples // batch)
    steps = work.get("steps") or (work.get("epochs") or 1) * per_pass
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if work.get("poisson"):
        event = dp_accounting.PoissonSampledDpEvent(batch / examples, event)
    else:
        steps = -(-steps // per_pass)  # passes: an example is in one batch of each
    accountant = pld.PLDAccountant()
    accountant.compose(event, rounds * steps)
    return float(accountant.get_epsilon(delta))
