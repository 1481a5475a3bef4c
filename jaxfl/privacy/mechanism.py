"""What an accountant must know of the noise in a channel."""

import math
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

    noise: Gaussian | Laplace


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
      noise_multiplier: z, of both together.
      spent: s, of the first; larger than z.

    Raises:
      ValueError: if the first alone is no more private than z.

    >>> round(noise_left(1.0, spent=10.0), 4)  # adaptive_clip(..., count_std=5)
    1.005

    Reference: Andrew et al. 2021, arXiv:1905.03871, theorem 1.
    """
    if not 0 < noise_multiplier < spent:
        raise ValueError(
            f"noise_multiplier must be between 0 and spent = {spent}, "
            f"got {noise_multiplier}."
        )
    return 1 / math.sqrt(noise_multiplier**-2 - spent**-2)
