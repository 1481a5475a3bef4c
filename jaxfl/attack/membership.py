"""Membership inference: was this example, or this client, in the training data?

An attack is a function of arrays: it gives each candidate a score, the higher the more
likely it took part. `auc` and `tpr_at_fpr` say how good the scores are. Nothing of it
asks how the model came about, so that any federation and any defence can be attacked.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.scipy.stats import norm

from jaxfl import local
from jaxfl.core import Params

PyTree = Any
Array = jax.Array | np.ndarray


# ------------------------------------------------------------------------- scores


def loss_threshold(losses: jax.Array, expected_loss: float | jax.Array) -> jax.Array:
    """What the loss of an example is short of that expected of a member.

    `score(z) = E - l(w; z)`; the paper's adversary calls member whoever has a score of
    0 or more. Every other threshold is a point on its curve.

    Args:
      losses: `[...]`, of the model on each candidate.
      expected_loss: E, the mean loss of the training data.

    Returns:
      Scores `[...]`.

    >>> loss_threshold(jnp.array([0.25, 2.0]), 0.5).tolist()
    [0.25, -1.5]

    Reference: Yeom et al. 2018, arXiv:1709.01604, adversary 2 (threshold).
    """
    return expected_loss - losses


def confidence(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How sure a classifier is of the right class, on a scale without ends.

    `phi = log(p_y / (1 - p_y)) = f_y - log sum_{c != y} exp f_c`

    It orders candidates as their cross-entropy does, and over models it is nearly
    normal, which the loss is not.

    Args:
      logits: f, `[..., C]`.
      labels: y, int `[...]`.

    Returns:
      float `[...]`.

    >>> confidence(jnp.array([[0.0, 2.0], [1e4, 0.0]]), jnp.array([1, 0])).tolist()
    [2.0, 10000.0]

    Reference: Carlini et al. 2022, arXiv:2112.03570, section V.C.
    """
    right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(right, -jnp.inf, logits), axis=-1)
    return jnp.sum(jnp.where(right, logits, 0), axis=-1) - others


def lira(
    observed: Array,
    shadows: Array,
    inside: Array,
    *,
    online: bool = True,
    shared_variance: bool = False,
) -> jax.Array:
    """The likelihood ratio of a model that was trained on a candidate, and one not.

    For each candidate two normal distributions are fitted to what shadow models give
    that had it, and that had not:

        score = log N(phi; mu_in, s_in^2) - log N(phi; mu_out, s_out^2)

    Offline, where no shadow model may have seen the candidate, `score = (phi - mu_out)
    / s_out`, of which the paper's `Pr[N(mu_out, s_out^2) <= phi]` is a function that
    rises but soon is 1.

    Candidates may be examples or clients, and phi any number that an observer sees: of
    the last model (`confidence`), of an update (`alignment`). Scores of several
    observations, such as of all rounds, are log-likelihoods: add them up.

    Args:
      observed: phi of the attacked model, `[..., E]`.
      shadows: phi of S shadow models, `[S, ..., E]`.
      inside: bool `[S, E]`, which shadow models had which candidate. A variance needs
        two that had it, and two that had not.
      online: False for the variant that looks only at shadow models without the
        candidate.
      shared_variance: one variance for all candidates, which is better estimated where
        shadow models are few.

    Returns:
      Scores `[..., E]`.

    Raises:
      ValueError: if the shapes do not fit, or a candidate was in, or out of, fewer than
        two shadow models.

    >>> shadows = jnp.array([[3.0], [5.0], [-1.0], [1.0]])
    >>> inside = jnp.array([[True], [True], [False], [False]])
    >>> [lira(jnp.array([x]), shadows, inside).item() for x in (2.0, 4.0)]
    [0.0, 4.0]

    Reference: Carlini et al. 2022, arXiv:2112.03570, algorithm 1 and section V.
    """
    observed, shadows = jnp.asarray(observed), jnp.asarray(shadows)
    inside = jnp.asarray(inside)
    if shadows.shape[1:] != observed.shape:
        raise ValueError(
            f"shadows must have shape [S, {', '.join(map(str, observed.shape))}], as "
            f"observed has, got {shadows.shape}."
        )
    if inside.shape != (shadows.shape[0], observed.shape[-1]):
        raise ValueError(
            f"inside must have shape {(shadows.shape[0], observed.shape[-1])}, one "
            f"entry a shadow model and candidate, got {inside.shape}."
        )
    if not isinstance(inside, Tracer):
        least = _least(inside) if online else np.min(np.sum(~inside, axis=0))
        if least < 2:
            raise ValueError(
                "inside: every candidate must be in two shadow models, and out of two, "
                f"got {least}."
            )
    inside = inside.reshape(len(inside), *[1] * (observed.ndim - 1), -1)

    def fitted(chosen):
        count = jnp.sum(chosen, 0)
        mean = jnp.sum(jnp.where(chosen, shadows, 0), 0) / count
        squares = jnp.sum(jnp.where(chosen, (shadows - mean) ** 2, 0), 0)
        degrees = count - 1
        if shared_variance:
            squares = jnp.sum(squares, -1, keepdims=True)
            degrees = jnp.sum(degrees, -1, keepdims=True)
        # Models that all agree to the last bit say no more than that.
        return mean, jnp.sqrt(squares / degrees) + 1e-6

    mean_out, std_out = fitted(~inside)
    if not online:
        return (observed - mean_out) / std_out
    mean_in, std_in = fitted(inside)
    return norm.logpdf(observed, mean_in, std_in) - norm.logpdf(
        observed, mean_out, std_out
    )


def lira_each(shadows: Array, inside: Array, **options: bool) -> jax.Array:
    """Each shadow model attacked with all the others: S attacks for the price of one.

    Of the others, one fewer had what this model had, so that where there is nothing to
    be told members score a little lower: with few models the AUC is then below 1/2.

    Args:
      shadows: `[S, ..., E]`, see `lira`.
      inside: bool `[S, E]`.
      **options: of `lira`.

    Returns:
      Scores `[S, ..., E]`, whose truth is `inside`.

    Raises:
      ValueError: if a candidate is in, or out of, fewer than three models, so that
        without one of them less than two may be left.

    >>> masks = random_halves(jax.random.key(0), 8, 20)
    >>> scores = lira_each(jnp.where(masks, 3.0, 1.0) + jnp.arange(8)[:, None], masks)
    >>> scores.shape
    (8, 20)

    Reference: Carlini et al. 2022, arXiv:2112.03570, section VI.A.
    """
    shadows, inside = jnp.asarray(shadows), jnp.asarray(inside)
    models = len(shadows)
    if not isinstance(inside, Tracer):
        if (least := _least(inside)) < 3:
            raise ValueError(
                "inside: every candidate must be in three models, and out of three, "
                f"got {least}."
            )

    def attack(target):
        others = (target + 1 + jnp.arange(models - 1)) % models
        return lira(shadows[target], shadows[others], inside[others], **options)

    return jax.lax.map(attack, jnp.arange(models))


def _least(inside) -> int:
    """In how few models a candidate is, or out of how few."""
    count = np.sum(inside, axis=0)
    return int(min(count.min(), (len(inside) - count).min()))


def alignment(
    loss: local.Loss,
    params: Params,
    examples: PyTree,
    update: Params,
    key: jax.Array,
    *,
    normalise: bool = True,
) -> jax.Array:
    """How far an update goes along the gradient of each candidate.

    `score(z) = <grad l(w; z), u>`, or the cosine of the angle between the two. With w
    the broadcast and u a payload, what the server had minus what the client has, a step
    on z adds the square of its gradient's norm. The gradients of examples that had no
    part in it are nearly orthogonal to u where the model is large. If u is the sum of
    what it should be with or without z and of normal noise, then `<g, u> - |g|^2 / 2`
    orders as the likelihood ratio of one candidate does.

    An observer of single updates (a `tap` before a secure sum) has u of one client, one
    of the sum that of all.

    Args:
      loss: `(params, batch, key) -> [B]`, one loss for each example.
      params: w, from where the client began.
      examples: E candidates, a pytree of `[E, ...]` arrays.
      update: u, like params.
      key: of what in the loss is random.
      normalise: True for cosines, False for inner products.

    Returns:
      Scores `[E]`.

    >>> def loss(w, batch, key):
    ...     return 0.5 * jnp.sum((w - batch["x"]) ** 2, -1)
    >>> candidates = {"x": jnp.array([[3.0, 0.0], [0.0, 3.0]])}
    >>> step_on_first = jnp.array([-0.5, 0.0])
    >>> alignment(
    ...     loss, jnp.zeros(2), candidates, step_on_first, jax.random.key(0)).tolist()
    [1.0, 0.0]

    Reference: Li et al. 2023, Effective passive membership inference attacks in
    federated learning against overparameterized models (ICLR 2023).
    """
    gradient = local.gradient(loss)

    def of_one(example):
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        _, slope = gradient(params, batch, jnp.ones(1, bool), key)
        product = optax.tree.vdot(slope, update)
        if not normalise:
            return product
        size = optax.tree.norm(slope) * optax.tree.norm(update)
        return jnp.where(size > 0, product / jnp.where(size > 0, size, 1), 0)

    return jax.lax.map(of_one, examples, batch_size=100)


# ------------------------------------------------------------------- shadow models


def random_halves(key: jax.Array, models: int, candidates: int) -> jax.Array:
    """Which candidates each shadow model is trained on: each candidate in half of them.

    Args:
      key: of the draw.
      models: S, even.
      candidates: E.

    Returns:
      bool `[S, E]`.

    Raises:
      ValueError: if models is not even.

    >>> random_halves(jax.random.key(0), 4, 100).sum(0).tolist() == 100 * [2]
    True

    Reference: Carlini et al. 2022, arXiv:2112.03570, section VI.A.
    """
    if models < 2 or models % 2:
        raise ValueError(f"models must be even and at least 2, got {models}.")
    ranks = jnp.broadcast_to(jnp.arange(models)[:, None], (models, candidates))
    return jax.random.permutation(key, ranks, independent=True) < models // 2


def shadow_scores(
    train: Callable[[jax.Array, jax.Array], Params],
    observe: Callable[[Params], PyTree],
    key: jax.Array,
    masks: jax.Array,
    *,
    at_once: int | None = None,
) -> PyTree:
    """Trains a model for each mask, and keeps what an observer makes of it.

    Args:
      train: `(key, mask [E]) -> params`, any training, such as `scan_rounds` over
        `data.subset(data, mask)`; or of what else is observed, such as all rounds.
      observe: `params -> [..., E]`, such as the `confidence` in each candidate, or a
        pytree of what else is looked at.
      key: of all models; that of model s is `fold_in(key, s)`.
      masks: bool `[S, E]`, of examples or of clients.
      at_once: models trained as one vmapped program; None for all of them. On a CPU
        1 is fastest where a single model keeps it busy.

    Returns:
      `[S, ..., E]`.

    >>> x = jnp.array([1.0, 2.0, 4.0])
    >>> masks = jnp.array([[True, True, False], [False, False, True]])
    >>> shadow_scores(
    ...     lambda key, mask: jnp.sum(x * mask), lambda w: x * w,
    ...     jax.random.key(0), masks).tolist()
    [[3.0, 6.0, 12.0], [4.0, 8.0, 16.0]]
    """
    keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(len(masks)))
    models = jnp.asarray(masks), keys
    size = len(masks) if at_once is None else at_once
    return jax.lax.map(lambda m: observe(train(m[1], m[0])), models, batch_size=size)


# ------------------------------------------------------------- how good scores are


def auc(score: Any, member: Any) -> np.ndarray:
    """The area under the curve of true against false positives.

    `AUC = Pr[score(member) > score(other)] + Pr[equal] / 2`, the statistic of Mann and
    Whitney; 1/2 is chance, with a standard error of `sqrt((m + n + 1) / (12 m n))`.

    Args:
      score: `[..., E]`.
      member: bool `[..., E]`, the truth.

    Returns:
      float64 `[...]`, on the host.

    Raises:
      ValueError: if a score is NaN, or a row has only members or none.

    >>> auc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]).item()
    0.875
    """

    def of_row(inner, outer):
        outer = np.sort(outer)
        below = np.searchsorted(outer, inner, "left")
        not_above = np.searchsorted(outer, inner, "right")
        return (below.mean() + not_above.mean()) / 2 / len(outer)

    return _each_row(of_row, score, member)


def tpr_at_fpr(score: Any, member: Any, fpr: Any) -> np.ndarray:
    """The share of members that is found while hardly anybody else is accused.

    The largest true-positive rate of a threshold whose false-positive rate is at most
    `fpr`; all of them are the receiver operating characteristic.

    Args:
      score: `[..., E]`.
      member: bool `[..., E]`, the truth.
      fpr: between 0 and 1, `[]` or `[F]`; of n that are no members, `floor(fpr n)` may
        be called so.

    Returns:
      float64 `[...]` or `[..., F]`, on the host.

    Raises:
      ValueError: if fpr is not between 0 and 1; else as `auc`.

    >>> score, member = [4.0, 3.0, 2.0, 1.0], [True, False, True, False]
    >>> tpr_at_fpr(score, member, [0.0, 0.5, 1.0]).tolist()
    [0.5, 1.0, 1.0]
    """
    fpr = np.asarray(fpr, np.float64)
    if not ((fpr >= 0) & (fpr <= 1)).all():
        raise ValueError(f"fpr must be between 0 and 1, got {fpr}.")

    def of_row(inner, outer):
        allowed = np.floor(fpr * len(outer) + 1e-9).astype(int)
        # The threshold is just above the first of the others that may not be accused.
        beyond = np.append(np.sort(outer)[::-1], -np.inf)[allowed]
        found = np.searchsorted(np.sort(inner), beyond, "right")
        return np.where(allowed == len(outer), 1.0, 1 - found / len(inner))

    return _each_row(of_row, score, member)


def private_tpr(fpr: Any, epsilon: float, delta: float = 0.0) -> np.ndarray:
    """The most that any attack on an (epsilon, delta)-private mechanism can find.

    `TPR <= min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR))`

    Args:
      fpr: between 0 and 1, `[...]`.
      epsilon: at least 0.
      delta: between 0 and 1.

    Returns:
      float64 `[...]`.

    Raises:
      ValueError: if epsilon is negative.

    >>> private_tpr([0.0, 0.25, 1.0], math.log(2)).tolist()
    [0.0, 0.5, 1.0]

    Reference: Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, theorem 2.1.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    fpr = np.asarray(fpr, np.float64)
    low = math.exp(-epsilon)
    # e^eps FPR of 1 or more bounds nothing, and e^eps may be too large for a float.
    steep = np.minimum(fpr, low) / low if low > 0 else np.ones_like(fpr)
    return np.clip(np.minimum(steep + delta, 1 - low * (1 - delta - fpr)), 0, 1)


def _each_row(function, score, member) -> np.ndarray:
    score, member = np.broadcast_arrays(np.asarray(score), np.asarray(member, bool))
    if np.isnan(score).any():
        raise ValueError("score must be numbers, and some are NaN.")
    count = member.sum(-1)
    if (count == 0).any() or (count == member.shape[-1]).any():
        raise ValueError("member must be true of some candidates and false of others.")
    rows = zip(
        score.reshape(-1, score.shape[-1]),
        member.reshape(-1, member.shape[-1]),
        strict=True,
    )
    values = np.stack([function(s[m], s[~m]) for s, m in rows])
    return values.reshape(score.shape[:-1] + values.shape[1:])
