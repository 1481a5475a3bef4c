"""What an accountant must know of the noise in a channel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Gaussian(NamedTuple):
    """Normal noise, once a round, on what one client moves by at most 1 in Euclidean
    norm, if it is added or removed.

    Attributes:
      noise_multiplier: z, the noise's standard deviation.
    """

    noise_multiplier: float | Any


class Laplace(NamedTuple):
    """Laplace noise, once a round, on what one client moves by at most 1 in the sum of
    absolute values, if it is added or removed.

    Attributes:
      noise_multiplier: the noise's scale b; its standard deviation is sqrt(2) b.
    """

    noise_multiplier: float | Any


class RandomisedResponse(NamedTuple):
    """Pure differential privacy of a message: any other data in the place of a client's
    own change the probability of what is sent by a factor of at most `e^epsilon`.

    No such mechanism reveals more than a bit that is flipped with probability
    `1 / (1 + e^epsilon)` (Kairouz, Oh, Viswanath 2015, arXiv:1311.0776).

    Attributes:
      epsilon: of all that a message has, together.
    """

    epsilon: float | Any


class Reported(NamedTuple):
    """Noise at the server on what clients report beside their payloads, not on these.

    Attributes:
      noise: its distribution.
    """

    noise: Gaussian | Laplace


class Local(NamedTuple):
    """Noise that every client adds to its own message, of norm at most 1.

    It protects the message from the server as well. Whatever the client has is replaced
    by anything else, so that the message moves by at most 2.

    Attributes:
      noise: its distribution.
    """

    noise: Gaussian | Laplace | RandomisedResponse


class Skellam(NamedTuple):
    """Integer noise in a sum, a difference of two Poisson variables of equal mean.

    The integers of one client, rounded at random, have a norm of at most `l2`; the
    noise has variance `(noise_multiplier steps)^2`. See `skellam_rdp`.

    Attributes:
      noise_multiplier: z, the noise's standard deviation in clip norms.
      steps: s, the clip norm in steps of the grid.
      dimension: d, the number of coordinates.
    """

    noise_multiplier: float
    steps: float
    dimension: int


class DiscreteGaussian(NamedTuple):
    """Integer noise in a sum, of n independent discrete normal variables.

    As in `Skellam`, with variances that sum up to `(noise_multiplier steps)^2`. See
    `discrete_gaussian_rdp`.

    Attributes:
      noise_multiplier: z, the noise's standard deviation in clip norms.
      steps: s, the clip norm in steps of the grid.
      dimension: d, the number of coordinates.
      clients: n.
    """

    noise_multiplier: float
    steps: float
    dimension: int
    clients: int


class Distributed(NamedTuple):
    """Noise that clients add together: each its share, which protects only their sum.

    The data of one client are there or blank; its own share of the noise is counted.

    Attributes:
      noise: the distribution of the sum of all shares.
      clients: n, how many must send for the noise to be that.
    """

    noise: Skellam | DiscreteGaussian
    clients: int


class Correlated(NamedTuple):
    """Normal noise that is correlated over rounds, on what one client moves in all of
    them together by at most 1 in Euclidean norm, if it is added or removed.

    The whole run is one Gaussian mechanism, as long as the pattern is kept in which
    clients take part.

    Attributes:
      noise_multiplier: z, of the whole run.
      rounds: of the run, at most.
      min_separation: from one participation of a client to its next, at least.
      max_participations: of a client; None if the separation alone limits them.
    """

    noise_multiplier: float | Any
    rounds: int
    min_separation: int
    max_participations: int | None = None


def noise_left(noise_multiplier: float, spent: float) -> float:
    """The noise that a second mechanism needs, after a first, for both to count as one.

    `z' = (z^-2 - s^-2)^(-1/2)`: normal noise of multipliers s and z' on two sums over
    the same clients is as private as one of multiplier z.

    Args:
      noise_multiplier: z, of both together; it and `spent` may be traced arrays.
      spent: s, of the first; larger than z.

    Raises:
      ValueError: if the first alone is no more private than z.

    >>> round(noise_left(1.0, spent=10.0), 4)  # adaptive_clip(..., count_std=5)
    1.005

    Reference: Andrew et al. 2021, arXiv:1905.03871, theorem 1.
    """
    known = isinstance(noise_multiplier, int | float) and isinstance(spent, int | float)
    if known and not 0 < noise_multiplier < spent:
        raise ValueError(
            f"noise_multiplier must be between 0 and spent = {spent}, "
            f"got {noise_multiplier}."
        )
    return (noise_multiplier**-2.0 - spent**-2.0) ** -0.5


BETA = math.exp(-0.5)  # how often rounding may be repeated: the papers' own choice


def rounded_norms(steps: float, dimension: int) -> tuple[float, float]:
    """The norms, l2 and l1, that a vector does not exceed once rounded to integers.

    A vector of Euclidean norm s in d dimensions, each coordinate rounded up or down at
    random, is rounded again until

      `l2^2 <= min((s + sqrt(d))^2, s^2 + d/4 + sqrt(2 log(1/beta)) (s + sqrt(d)/2))`

    which holds with a probability of at least `1 - beta` each time. Integers that are
    not 0 are at least 1, so that `l1 <= min(sqrt(d) l2, l2^2)`.

    Args:
      steps: s, positive.
      dimension: d.

    >>> [round(x, 3) for x in rounded_norms(10.0, 100)]
    [11.832, 118.322]

    Reference: Kairouz, Liu, Steinke 2021, arXiv:2102.06387, theorem 1, beta = e^-0.5.
    """
    root = math.sqrt(dimension)
    spread = math.sqrt(2 * math.log(1 / BETA)) * (steps + root / 2)
    l2 = min(steps + root, math.sqrt(steps**2 + dimension / 4 + spread))
    return l2, min(root * l2, l2**2)


def skellam_rdp(noise: Skellam, orders: Sequence[float]) -> list[float]:
    """The Renyi divergence of one round with Skellam noise.

    With variance mu and norms `l2`, `l1` of the rounded message

      `rdp(a) <= a l2^2 / (2 mu) + min(((2 a - 1) l2^2 + 6 l1) / (4 mu^2),
                                       3 l1 / (2 mu))`

    Args:
      noise: the mechanism.
      orders: a; whole numbers above 1, for which the theorem is.

    Raises:
      ValueError: if an order is not a whole number above 1.

    >>> fine = Skellam(noise_multiplier=1.0, steps=1e4, dimension=100)
    >>> round(skellam_rdp(fine, [8])[0], 3)  # of a normal variable: 8 / 2
    4.0

    Reference: Agarwal, Kairouz, Liu 2021, arXiv:2110.04995, theorem 3.5.
    """
    _require_whole(orders)
    l2, l1 = rounded_norms(noise.steps, noise.dimension)
    mu = (noise.noise_multiplier * noise.steps) ** 2

    def more(a):
        return min(((2 * a - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))

    return [a * l2**2 / (2 * mu) + more(a) for a in orders]


def discrete_gaussian_rdp(
    noise: DiscreteGaussian, orders: Sequence[float]
) -> list[float]:
    """The Renyi divergence of one round with n clients' discrete normal noise.

    With variance `sigma^2` of each, `Sigma^2 = n sigma^2` of all, norms `l2`, `l1` of
    the rounded message, and `tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k / (k + 1))`

      `rdp(a) <= min(a/2 (l2/Sigma)^2 + tau d,
                     a/2 ((l2/Sigma)^2 + 2 tau l1/Sigma + tau^2 d),
                     a/2 (l2/Sigma + tau sqrt(d))^2)`

    Args:
      noise: the mechanism.
      orders: a, above 1.

    Raises:
      ValueError: if an order is not above 1.

    >>> fine = DiscreteGaussian(1.0, steps=1e4, dimension=100, clients=10)
    >>> round(discrete_gaussian_rdp(fine, [8])[0], 3)  # of a normal variable: 8 / 2
    4.0

    Reference: Kairouz, Liu, Steinke 2021, arXiv:2102.06387, proposition 14.
    """
    if not all(a > 1 for a in orders):
        raise ValueError(f"orders must be above 1, got {list(orders)}.")
    l2, l1 = rounded_norms(noise.steps, noise.dimension)
    std = noise.noise_multiplier * noise.steps
    l2, l1, d = l2 / std, l1 / std, noise.dimension
    each = 2 * math.pi**2 * std**2 / noise.clients
    tau = 10 * sum(math.exp(-each * k / (k + 1)) for k in range(1, noise.clients))

    def rdp(a):
        return min(
            a / 2 * l2**2 + tau * d,
            a / 2 * (l2**2 + 2 * tau * l1 + tau**2 * d),
            a / 2 * (l2 + tau * math.sqrt(d)) ** 2,
        )

    return [rdp(a) for a in orders]


def _require_whole(orders):
    if not all(a > 1 and float(a).is_integer() for a in orders):
        raise ValueError(f"orders must be whole numbers above 1, got {list(orders)}.")
