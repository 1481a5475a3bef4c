"""Who can be asked: traces of availability, and cohorts drawn from those who can."""

import numpy as np

from jaxfl.mesh import NOBODY


def bernoulli(
    rounds: int, population: int, rate: float | np.ndarray, *, seed: int
) -> np.ndarray:
    """Every client is available in every round with a probability, all independent.

    Args:
      rounds: R.
      population: N.
      rate: one, or `[N]`.
      seed: of the draws.

    Returns:
      bool `[R, N]`, as all traces of availability.

    >>> bernoulli(4, 2, [0.0, 1.0], seed=0).mean(0).tolist()
    [0.0, 1.0]
    """
    rate = _probability("rate", rate)
    return np.random.default_rng(seed).random((rounds, population)) < rate


def diurnal(
    rounds: int,
    population: int,
    *,
    period: float,
    mean: float = 0.5,
    swing: float = 0.5,
    zones: np.ndarray | float = 0.0,
    seed: int,
) -> np.ndarray:
    """Day and night: client i is available in round t with probability

    `mean + swing sin(2 pi (t / period + zone_i))`, cut off at 0 and 1.

    Args:
      rounds: R.
      population: N.
      period: of a day, in rounds.
      mean, swing: of the probability.
      zones: in days, one or `[N]`; clients of one zone come and go together.
      seed: of the draws.

    Returns:
      bool `[R, N]`.

    >>> diurnal(4, 1, period=4, zones=0.25, seed=0).ravel().tolist()[::2]
    [True, False]
    """
    day = np.arange(rounds)[:, None] / period + np.broadcast_to(zones, (population,))
    rate = np.clip(mean + swing * np.sin(2 * np.pi * day), 0, 1)
    return np.random.default_rng(seed).random((rounds, population)) < rate


def markov(
    rounds: int,
    population: int,
    *,
    leaves: float | np.ndarray,
    returns: float | np.ndarray,
    seed: int,
) -> np.ndarray:
    """Clients that come and stay: from round to round who is there leaves, and who is
    not returns, with a probability each.

    It begins in the stationary distribution, so that in every round a client is there
    with probability `returns / (leaves + returns)`; it stays for `1 / leaves` rounds on
    average.

    Args:
      rounds: R.
      population: N.
      leaves, returns: one, or `[N]`; not both 0.
      seed: of the draws.

    Returns:
      bool `[R, N]`.

    >>> markov(3, 1, leaves=1.0, returns=1.0, seed=0).astype(int).ravel().tolist()
    [0, 1, 0]
    """
    leaves, returns = _probability("leaves", leaves), _probability("returns", returns)
    if np.any(leaves + returns == 0):
        raise ValueError("leaves and returns must not both be 0.")
    draws = np.random.default_rng(seed).random((rounds, population))
    there = np.empty((rounds, population), bool)
    there[0] = draws[0] < returns / (leaves + returns)
    for t in range(1, rounds):
        there[t] = np.where(there[t - 1], draws[t] >= leaves, draws[t] < returns)
    return there


def cohorts(available: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """Draws each round's clients uniformly from those available, without replacement.

    Args:
      available: bool `[R, N]`: any trace; of everyone always, `np.ones((R, N), bool)`.
      size: K.
      seed: of the draws.

    Returns:
      int32 `[R, K]`, for a `Schedule`; where fewer are available, the rest is NOBODY.

    Raises:
      ValueError: if available is not `[R, N]`, or size not between 1 and N.

    >>> cohorts(np.array([[True, False, False], [True, False, True]]), 2, seed=0) % 1000
    array([[  0, 647],
           [  0,   2]], dtype=int32)
    """
    if np.ndim(available) != 2:
        raise ValueError(f"available must be [R, N], got {np.shape(available)}.")
    n = np.shape(available)[1]
    if not 1 <= size <= n:
        raise ValueError(f"size must be between 1 and {n}, got {size}.")
    rng = np.random.default_rng(seed)
    client = np.full((len(available), size), NOBODY, np.int32)
    for row, there in zip(client, np.asarray(available, bool), strict=True):
        ids = rng.permutation(np.flatnonzero(there))[:size]
        row[: len(ids)] = ids
    return client


def _probability(name: str, value) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if not np.all((value >= 0) & (value <= 1)):
        raise ValueError(f"{name} must be between 0 and 1, got {value}.")
    return value
