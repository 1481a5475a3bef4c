"""How a score grows with data: a power law, and what more data would bring."""

import dataclasses
import math
from typing import Any

import numpy as np

# Exponents that are looked at; a curve outside is as good as straight, or as a step.
STEEPNESS = (0.05, 4.0)
FEWEST_SIZES = 4


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted learning curve, `y(n) = limit + left (n / now)^-steepness`.

    Attributes:
      now: the largest number of examples, N0.
      limit: what the score tends to with more data of the same kind.
      left: what is between the score at N0 and that limit; negative where more is
        better.
      steepness: c.
      samples: `[B, 3]`, limit, left and steepness of curves that the deviations
        between runs allow as well; what intervals are made of.
      identifiable: whether the runs tell a limit at all.
      why: where not, why not.
    """

    now: float
    limit: float
    left: float
    steepness: float
    samples: np.ndarray
    identifiable: bool
    why: str

    def at(self, size: Any, confidence: float = 0.95) -> np.ndarray:
        """The score at so many examples, and its interval.

        Args:
          size: n, `[...]`.
          confidence: of the interval.

        Returns:
          `[3, ...]`: the fit, the lower and the upper end.
        """
        ratio = np.asarray(size, np.float64) / self.now
        limit, left, c = (x.reshape(-1, *[1] * ratio.ndim) for x in self.samples.T)
        tail = (1 - confidence) / 2
        low, high = np.quantile(limit + left * ratio**-c, [tail, 1 - tail], axis=0)
        return np.stack([self.limit + self.left * ratio**-self.steepness, low, high])

    def times(self, score: float, confidence: float = 0.95) -> np.ndarray:
        """How many times N0 the examples are at which the curve reaches a score.

        Returns:
          `[3]`: by the fit, the lower and the upper end of the interval; infinite where
          the score is beyond the limit, or the curve is flat.
        """
        each = np.vstack([[self.limit, self.left, self.steepness], self.samples])
        limit, left, c = each.T
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rest = (score - limit) / left
            factor = np.where((rest > 0) & (left != 0), rest ** (-1 / c), np.inf)
        tail = (1 - confidence) / 2
        # Not between two samples: one of them may be infinite.
        low, high = np.quantile(factor[1:], [tail, 1 - tail], method="nearest")
        return np.array([factor[0], low, high])


def fit_power_law(
    sizes: Any,
    scores: Any,
    *,
    confidence: float = 0.95,
    samples: int = 400,
    seed: int = 0,
) -> PowerLaw:
    """Least squares of a power law to the scores of several runs at several sizes.

    `min over a, b, c of sum_sn (y_sn - a - b (n / N0)^-c)^2`, for each c in closed
    form. The interval is a parametric bootstrap: curves are fitted to the fit plus
    normal noise, as large as the deviation between runs, or as what the fit leaves over
    if that is more; and as uncertain, so that few runs make a wide interval.

    The curve is not identifiable where there are fewer than four sizes or two runs;
    where the ends differ by no more than the noise (it is flat); or where exponents up
    to an end of `STEEPNESS` fit as well, so that there is no telling where it ends.

    Args:
      sizes: n, `[F]`, increasing and positive.
      scores: y, `[S, F]`, of S runs; either sign may be the better.
      confidence: of the tests.
      samples: B, curves of the bootstrap.
      seed: of the bootstrap.

    Returns:
      A `PowerLaw`.

    Raises:
      ValueError: if the shapes do not fit, or sizes are not increasing.

    >>> n = np.array([10, 20, 40, 80, 160])
    >>> error = 0.1 + 0.2 * (n / 160) ** -0.5 + np.array([[-1e-4], [1e-4]])
    >>> curve = fit_power_law(n, error)
    >>> round(curve.limit, 3), round(curve.left, 3), round(curve.steepness, 2)
    (0.1, 0.2, 0.5)
    >>> round(curve.at(640)[0].item(), 3), round(curve.times(0.2)[0].item(), 2)
    (0.2, 4.0)

    Reference: Hestness et al. 2017, arXiv:1712.00409 (the form); Golub, Pereyra 1973
    (variable projection).
    """
    sizes, scores = np.asarray(sizes, np.float64), np.asarray(scores, np.float64)
    if scores.ndim != 2 or sizes.shape != scores.shape[1:] or not scores.size:
        raise ValueError(
            f"scores must be [S, F] for sizes [F], got {scores.shape} and {sizes.shape}"
        )
    if not (sizes[0] > 0 and np.all(np.diff(sizes) > 0)):
        raise ValueError(f"sizes must be positive and increasing, got {sizes}.")
    runs, points = scores.shape
    mean, ratio = scores.mean(0), sizes / sizes[-1]
    freedom = points * (runs - 1)
    deviation = math.sqrt(((scores - mean) ** 2).sum() / max(freedom, 1))
    enough = points >= FEWEST_SIZES and runs > 1
    if not enough:
        flat = np.array([[mean[-1], 0.0, 1.0]])
        why = (
            f"it takes {FEWEST_SIZES} sizes and 2 runs, and there were {points} "
            f"and {runs}"
        )
        return PowerLaw(float(sizes[-1]), float(mean[-1]), 0.0, 1.0, flat, False, why)

    best = _least_squares(ratio, mean[None])[0]
    limit, left, steepness = map(float, best)
    fitted = limit + left * ratio**-steepness
    missed = math.sqrt(((mean - fitted) ** 2).sum() / max(points - 3, 1))
    noise = max(deviation / math.sqrt(runs), missed)
    rng = np.random.default_rng(seed)
    spread = noise * np.sqrt(freedom / rng.chisquare(freedom, (samples, 1)))
    drawn = fitted + spread * rng.standard_normal((samples, points))
    curves = _least_squares(ratio, drawn)

    gap = abs(mean[-1] - mean[0])
    least = quantile_of_t(freedom, confidence) * noise * math.sqrt(2)
    tail = (1 - confidence) / 2
    low, high = np.quantile(curves[:, 2], [tail, 1 - tail])
    why = ""
    if not gap > least:
        why = "it is flat, over these sizes it moves no more than chance may"
    elif low < STEEPNESS[0] * 1.05:
        why = "it still rises or falls too evenly to tell where it ends"
    elif high > STEEPNESS[1] / 1.05:
        why = "it bends too sharply for these sizes to tell how"
    return PowerLaw(float(sizes[-1]), limit, left, steepness, curves, not why, why)


def _least_squares(ratio: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`[B, 3]`, limit, left and steepness of the curve nearest to each row of y."""
    log = np.log(STEEPNESS)
    centre, half = np.full(len(y), log.mean()), np.ptp(log) / 2
    for _ in range(3):
        grid = centre[:, None] + half * np.linspace(-1, 1, 61)
        c = np.exp(np.clip(grid, *log))  # [B, C]
        x = ratio ** -c[..., None]  # [B, C, F]
        x_off, y_off = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        left = (x_off * y_off[:, None]).sum(-1) / (x_off**2).sum(-1)
        error = ((y_off[:, None] - left[..., None] * x_off) ** 2).sum(-1)
        rows, place = np.arange(len(y)), error.argmin(1)
        c, left, centre = c[rows, place], left[rows, place], grid[rows, place]
        limit = y.mean(-1) - left * x.mean(-1)[rows, place]
        half /= 20
    return np.stack([limit, left, c], -1)


def quantile_of_t(freedom: float, confidence: float) -> float:
    """Standard errors on either side of a mean, for an interval of that confidence.

    >>> round(quantile_of_t(4, 0.95), 3)
    2.776
    """
    from scipy.special import stdtrit  # takes longer to import than all of decision

    return float(stdtrit(freedom, (1 + confidence) / 2))
