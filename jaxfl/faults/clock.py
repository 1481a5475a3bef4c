"""The virtual clock: how long a client takes to fetch a model, to train, to send."""

from typing import Any, NamedTuple, Unpack

import numpy as np

from jaxfl import local
from jaxfl.data.federated import ClientData


class Clock(NamedTuple):
    """How long each client takes for its part of a round, in seconds.

    Arrays are float64 `[N]`, or `[R, N]` where a client is not always as fast: row r
    then is for round r, and round again after the last (of an asynchronous client, for
    its r-th turn).

    Attributes:
      download: to get the broadcast.
      step: of one local step.
      steps: how many of them there are.
      upload: to send its message.
    """

    download: Any
    step: Any
    steps: Any
    upload: Any

    @property
    def turn(self) -> np.ndarray:
        """From being asked to the message's arrival, `[N]` or `[R, N]`."""
        return self.download + self.step * self.steps + self.upload

    @property
    def population(self) -> int:
        """N."""
        return np.shape(self.turn)[-1]


def clock(
    data: ClientData,
    *,
    step: float | np.ndarray,
    bits_down: float = 0.0,
    bits_up: float = 0.0,
    downlink: float | np.ndarray = np.inf,
    uplink: float | np.ndarray = np.inf,
    latency: float | np.ndarray = 0.0,
    **work: Unpack[local.Work],
) -> Clock:
    """The clock of a population that computes and sends at given speeds.

    `download = latency + bits_down / downlink`, and so the upload.

    Args:
      data: the population's, which says how many steps a client has to do.
      step: seconds a local step; as all that follows one number, `[N]`, or `[R, N]`.
        See `log_normal` and `pareto`, or measure it.
      bits_down, bits_up: the lengths of a broadcast and of a message: of a model,
        `tree.num_bits(params)`; after channels, what a first `history.bits()` says.
      downlink, uplink: bits a second.
      latency: seconds before the first bit, each way.
      **work: as given to the algorithm, see `local.Work`.

    Raises:
      ValueError: if something takes negative time, or endless.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(np.zeros(5), np.zeros(5), client_ids=[0, 0, 0, 1, 1])
    >>> slow = clock(
    ...     data, step=np.array([1.0, 10.0]), bits_up=6e6, uplink=1e6, latency=0.5,
    ...     batch_size=2, epochs=3)
    >>> slow.turn  # 6 and 3 steps, and 7 seconds on the way
    array([13., 37.])
    """
    n = data.num_clients

    def per_client(x):
        return np.broadcast_to(x, (*np.shape(x)[:-1], n)).astype(np.float64)

    steps = local.num_steps(data, **work)
    made = Clock(
        per_client(latency + bits_down / np.asarray(downlink)),
        per_client(step),
        steps.astype(np.float64),
        per_client(latency + bits_up / np.asarray(uplink)),
    )
    for name, value in made._asdict().items():
        if not np.all(np.isfinite(value) & (value >= 0)):
            raise ValueError(f"{name} takes negative or endless time: {value}.")
    return made


def log_normal(population: int, *, median: float, sigma: float, seed: int):
    """Log-normal speeds, `median exp(sigma z)`, `[N]`.

    >>> log_normal(3, median=2.0, sigma=0.0, seed=0)
    array([2., 2., 2.])
    """
    normal = np.random.default_rng(seed).normal(size=population)
    return median * np.exp(sigma * normal)


def pareto(population: int, *, least: float, tail: float, seed: int):
    """Heavy-tailed speeds, `[N]`: slower than `x` with probability `(least / x)^tail`.

    The mean is `least tail / (tail - 1)`, endless from tail 1 down, and the variance
    from 2 down.

    >>> bool((pareto(100, least=2.0, tail=1.5, seed=0) >= 2.0).all())
    True
    """
    return least * (1 + np.random.default_rng(seed).pareto(tail, population))
