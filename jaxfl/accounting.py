"""How private a run is: its epsilon, by the noise of the very channel that adds it.

Computed by dp_accounting (`pip install "jaxfl[privacy]"`), which `import jaxfl` leaves
alone: `from jaxfl import accounting`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import dp_accounting as dp
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from jaxfl.channel import mechanisms
from jaxfl.core import Bound, Channel, Federation, pass_on
from jaxfl.faults.schedule import Schedule
from jaxfl.history import History
from jaxfl.privacy.mechanism import (
    Correlated,
    DiscreteGaussian,
    Distributed,
    Gaussian,
    Laplace,
    Local,
    RandomisedResponse,
    Reported,
    Skellam,
    discrete_gaussian_rdp,
    skellam_rdp,
)
from jaxfl.sampling import Cyclic, Poisson, cohort_rows

# Made with the keyword `neighboring_relation`, as those of dp_accounting are.
Accountant = Callable[..., dp.PrivacyAccountant]
ADD_OR_REMOVE, REPLACE = (
    dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    dp.NeighboringRelation.REPLACE_ONE,
)


class ClassicRdp(RdpAccountant):
    """Renyi accounting with the conversion that older published numbers were got by.

    `epsilon = min_a rdp(a) + log(1 / delta) / (a - 1)`, over the orders a; McMahan et
    al. 2018 took whole ones. `RdpAccountant`'s own conversion is never worse.

    Reference: Mironov 2017, arXiv:1702.07476, proposition 3.
    """

    def get_epsilon(self, target_delta: float) -> float:
        above = self.orders > 1
        slack = -math.log(target_delta) / (self.orders[above] - 1)
        return float(np.min(self.rdp[above] + slack))


def epsilon(
    private: Federation | Channel,
    *,
    population: int,
    cohort: int | Poisson | Cyclic | None,
    rounds: int,
    delta: float,
    accountant: Accountant | None = None,
) -> float:
    """The epsilon of a run that is (epsilon, delta)-differentially private by client.

    `P(M(D) in S) <= e^epsilon P(M(D') in S) + delta` for every set S of what a run may
    show of its models, where D and D' differ in all that one client has. Which D' there
    are, and what chance does for privacy, is a matter of how cohorts are drawn:

      - `Poisson(...)`: amplified; one client is added or removed. To delta are added
        the `(1 + e^epsilon) rounds overflow` of cohorts with more clients than rows.
      - K, without replacement: amplified; one client is replaced by another, which
        moves a sum twice as far, so that the noise counts half (Wang et al. 2019).
      - `Cyclic(K)`: not amplified; one client is added or removed, or silent in its
        turn, which comes `rounds K / N` times, rounded up.
      - None, for everyone: not amplified; one client is added or removed. Also for
        cohorts that are made in any other way that does not look at data, such as
        shuffled ones: D' then has a client that stays silent in its turn (zero-out,
        Kairouz et al. 2021), and `rounds` may be the most that one takes part in.

    Normal noises of one round, as of `adaptive_clip` and `gaussian`, count as one of
    multiplier `(sum_i z_i^-2)^(-1/2)`. Local noise protects what a client sends from
    the server as well, but not the weights beside it, if `mean` sends any; the server
    knows who sends, so that nothing is amplified, and a client counts as if it took
    part in all `rounds`. The same holds of distributed noise, if as many clients send
    in each round as share in it. That, by its papers, and randomised response are
    accounted for by Renyi divergences, whichever accountant is given.

    Noise that is correlated over rounds is one Gaussian mechanism for all of them, and
    amplified by nothing; a run must keep the pattern that it was made for.

    Who was in a cohort, and the rest of a `History`, is not private.

    Args:
      private: the federation; or its channel, for a sum.
      population: N.
      cohort: what `simulate` is given as `cohort_size`.
      rounds: how many.
      delta: between 0 and 1, and below 1 / N for it to mean anything.
      accountant: `PLDAccountant` or `RdpAccountant` of dp_accounting, `ClassicRdp`, or
        a `functools.partial` of one. The first by default, which is the tightest, but
        the second for K of N, of which the first knows nothing.

    Returns:
      epsilon; infinite if nothing is guaranteed with this delta.

    Raises:
      ValueError: where no bound is known: no noise, or multiplier 0; noise on what
        nothing bounds, as with an aggregator that is not linear; a channel left of the
        noise that heeds what clients report, such as a mean weighted by data or a
        `communicate.target_rate`; multipliers that are traced; local and central noise
        in one channel; a mechanism that the accountant does not know under this
        sampling, such as Laplace noise with K of N; if a number is out of range.

    >>> from jaxfl import Poisson, chain, clip, mean
    >>> from jaxfl.privacy import gaussian
    >>> channel = chain(clip(0.5), mean(denominator=256), gaussian(1.3))
    >>> run = dict(population=60_000, cohort=Poisson(256), rounds=3515, delta=1e-5)
    >>> round(epsilon(channel, **run), 2)
    0.86
    >>> round(epsilon(channel, **run, accountant=RdpAccountant), 2)
    0.95
    >>> round(epsilon(channel, **run, accountant=ClassicRdp), 2)
    1.19

    Reference: Abadi et al. 2016, arXiv:1607.00133; Mironov et al. 2019,
    arXiv:1908.10530; Wang et al. 2019, arXiv:1808.00087, theorem 27; Koskela et al.
    2020, arXiv:1906.03049.
    """
    _check(population, rounds, delta)
    return _epsilon(private, population, cohort, rounds, delta, accountant)


def calibrate(
    make: Callable[[float], Federation | Channel],
    target: float,
    *,
    population: int,
    cohort: int | Poisson | Cyclic | None,
    rounds: int,
    delta: float,
    accountant: Accountant | None = None,
    start: float = 1.0,
    tolerance: float = 1e-3,
) -> float:
    """The least noise multiplier for a target epsilon.

    Args:
      make: `noise_multiplier -> federation or channel`.
      target: epsilon, positive.
      population, cohort, rounds, delta, accountant: see `epsilon`.
      start: the first multiplier to try; others are found by halving and doubling it.
      tolerance: by which part the result may be larger than the least.

    Returns:
      A multiplier with which epsilon is at most the target.

    Raises:
      ValueError: as `epsilon`; if target, start or tolerance is not positive, or no
        noise will do.

    >>> from jaxfl import chain, clip, mean
    >>> from jaxfl.privacy import gaussian
    >>> def channel(z):
    ...     return chain(clip(1.0), mean(denominator=10), gaussian(z))
    >>> run = dict(population=10, cohort=None, rounds=1, delta=1e-5)
    >>> round(calibrate(channel, 1.0, **run), 2)
    3.73
    """
    _check(population, rounds, delta)
    for name, value in (("target", target), ("start", start), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}.")

    def enough(multiplier):
        run = population, cohort, rounds, delta, accountant
        return _epsilon(make(multiplier), *run) <= target

    high = start
    while not enough(high):
        high *= 2
        if high > start * 2**20:
            raise ValueError(f"target: no noise gives epsilon {target}.")
    low = high / 2
    while enough(low):
        high, low = low, low / 2
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def ledger(
    history: History,
    private: Federation | Channel,
    *,
    population: int,
    cohort: int | Poisson | Cyclic | None,
    delta: float,
    accountant: Accountant | None = None,
) -> History:
    """The history with a metric more: "epsilon", spent up to each evaluation.

    Args:
      history: as from `simulate`.
      private: what was run.
      population, cohort, delta, accountant: see `epsilon`.

    Returns:
      The history, in whose `evaluations`, and tables, "epsilon" is an `[n]` array.

    Raises:
      ValueError: as `epsilon`.
    """
    spent = [
        epsilon(
            private,
            population=population,
            cohort=cohort,
            rounds=int(rounds),
            delta=delta,
            accountant=accountant,
        )
        for rounds in history.round
    ]
    evaluations = history.evaluations | {"epsilon": np.array(spent)}
    return dataclasses.replace(history, evaluations=evaluations)


class _Release(NamedTuple):
    """What one round shows, and by which neighbours it is judged."""

    event: dp.DpEvent
    relation: dp.NeighboringRelation = ADD_OR_REMOVE
    overflow: float = 0.0


def _epsilon(private, population, cohort, rounds, delta, accountant) -> float:
    if isinstance(cohort, Schedule):
        raise ValueError(
            "cohort: of a schedule nothing is known; None, for which nothing is "
            "amplified, if it was made without a look at the data."
        )
    found = _noise_of(private)
    if isinstance(found[0], Distributed):
        return _of_distributed(found, rounds, delta)
    if any(isinstance(getattr(x, "noise", x), RandomisedResponse) for x in found):
        return _of_responses(found, rounds, delta)
    if any(isinstance(noise, Correlated) for noise in found):
        # One release of the whole run, as its noise depends on that of other rounds.
        releases, rounds = [_whole_run(found, population, cohort, rounds)], 1
    else:
        releases = _releases(found, population, cohort)
        if isinstance(cohort, Cyclic) and not isinstance(found[0], Local):
            rounds = _turns(cohort, population, rounds)
    return min(_spent(release, rounds, delta, accountant) for release in releases)


def _spent(release: _Release, rounds: int, delta: float, accountant) -> float:
    if accountant is None:
        replaced = release.relation is REPLACE
        accountant = RdpAccountant if replaced else PLDAccountant
    count = accountant(neighboring_relation=release.relation)
    if not count.supports(release.event):
        raise ValueError(
            f"accountant: {type(count).__name__} knows no bound for this mechanism "
            f"under this sampling, {release.event}."
        )
    spent = count.compose(release.event, rounds).get_epsilon
    if not release.overflow:
        return float(spent(delta))

    # The run differs from one whose rows are always enough with probability `lost` at
    # most, on either side of the inequality: delta grows by `(1 + e^epsilon) lost`.
    lost = rounds * release.overflow

    def growth(epsilon):
        return lost * (1 + math.exp(epsilon)) if epsilon < 700 else math.inf

    kept_back = 2 * growth(spent(delta))
    if kept_back >= delta:
        return math.inf
    result = float(spent(delta - kept_back))
    return result if growth(result) <= kept_back else math.inf


def _of_distributed(found: list, rounds: int, delta: float) -> float:
    if len(found) > 1:
        raise ValueError("private: noise of clients together must be its only noise.")
    divergences = {Skellam: skellam_rdp, DiscreteGaussian: discrete_gaussian_rdp}
    noise, orders = found[0].noise, range(2, 513)
    rdp = [rounds * x for x in divergences[type(noise)](noise, orders)]
    return float(compute_epsilon(orders, rdp, delta)[0])


def _of_responses(found: list, rounds: int, delta: float) -> float:
    noises = [mechanism.noise for mechanism in found]
    if not all(isinstance(noise, RandomisedResponse) for noise in noises):
        raise ValueError("private: randomised response must be its only local noise.")
    pure = sum(float(noise.epsilon) for noise in noises)
    event = dp.RandomizedResponseDpEvent(2 / (1 + math.exp(pure)), num_buckets=2)
    # PLDAccountant 0.6 counts one answer, however many there are.
    count = RdpAccountant(neighboring_relation=REPLACE).compose(event, rounds)
    return min(rounds * pure, float(count.get_epsilon(delta)))


def _noise_of(private: Federation | Channel) -> list:
    """Of each layer that has any; raises where there is something that none hides."""
    if isinstance(private, Federation):
        _, channel, aggregator = private.parts
        found = mechanisms(channel, aggregator.makes_sum)
    elif isinstance(private, Channel):
        channel, found = private, mechanisms(private)
    else:
        raise TypeError(f"private must be a Federation or a Channel, got {private!r}.")
    if all(isinstance(mechanism, Reported) for mechanism in found):
        raise ValueError(
            "private: its channel adds no noise to whole messages or to their sum "
            "(noise on a part of them, by `on`, leaves the rest as it is)."
        )
    local = [isinstance(mechanism, Local) for mechanism in found]
    if any(local) and not all(local):
        raise ValueError(
            "private: noise at the clients and noise at the server protect from "
            "different observers; account for a channel with either alone."
        )
    if not any(isinstance(x, Local | Distributed) for x in found):
        _require_deaf(channel, found)
    return [x.noise if isinstance(x, Reported) else x for x in found]


def _require_deaf(channel: Channel, found: list) -> None:
    """What is decoded after the noise must heed no report, which has none of it."""
    layers = (channel,) if channel.layers is None else channel.layers
    noisy = [i for i, layer in enumerate(layers) if layer.mechanism is not None]
    places = zip(noisy, found, strict=True)
    first_decoded = max(i for i, x in places if not isinstance(x, Reported))
    for i, layer in enumerate(layers[:first_decoded]):
        heeds = layer.decode is not pass_on and layer.mechanism is None
        if heeds and layer.sensitivity(Bound(0.0, 0.0)).l2 != 0:
            raise ValueError(
                f"private: layer {i} of its channel, left of the noise, may decode by "
                "what clients report, such as their weights, which has no noise (its "
                "`sensitivity` does not rule it out). Of means, only "
                "mean(denominator=...) may stand there."
            )


def _releases(
    found: list, population: int, cohort: int | Poisson | Cyclic | None
) -> list[_Release]:
    """Of one round, as it may be seen; each gives a bound."""
    if isinstance(found[0], Local):
        return [_Release(_together([mechanism.noise for mechanism in found], moved=2))]
    event = _together(found, moved=1)
    if cohort is None or cohort == population or isinstance(cohort, Cyclic):
        return [_Release(event)]
    if isinstance(cohort, Poisson):
        sampled = dp.PoissonSampledDpEvent(cohort.rate(population), event)
        return [_Release(sampled, overflow=cohort.overflow)]
    size = cohort_rows(cohort, population)
    event = _together(found, moved=2)
    sampled = dp.SampledWithoutReplacementDpEvent(population, size, event)
    # Of nearly all clients the bound is worse than if it were shown who was drawn.
    return [_Release(sampled, REPLACE), _Release(event, REPLACE)]


def _turns(cohort: Cyclic, population: int, rounds: int) -> int:
    """How often one client takes part, at most."""
    return -(-rounds * cohort_rows(cohort, population) // population)


def _whole_run(found: list, population: int, cohort, rounds: int) -> _Release:
    """Of noise that is correlated over rounds, if the run keeps to its pattern."""
    noise, *others = found
    if others:
        raise ValueError(
            f"private: correlated noise is accounted for alone, not beside {others}."
        )
    if rounds > noise.rounds:
        raise ValueError(
            f"rounds: the noise was made for {noise.rounds}, got {rounds}."
        )
    separation, turns, most = 1, rounds, noise.max_participations
    if isinstance(cohort, Cyclic):
        turns = _turns(cohort, population, rounds)
        separation = population // cohort.size
    if separation < noise.min_separation or (most is not None and turns > most):
        raise ValueError(
            f"cohort: with {cohort!r} of {population} clients one may take part "
            f"{turns} times, {separation} rounds apart; the noise was made for "
            f"{'any number of' if most is None else most} times, "
            f"{noise.min_separation} apart. Cyclic(K) keeps N // K apart."
        )
    return _Release(dp.GaussianDpEvent(_multiplier(noise)))


def _together(noises: Sequence, moved: float) -> dp.DpEvent:
    """One event for the noises of a round, of which each covers one sum of messages.

    All sums in units of their noise are one vector, which a client moves in Euclidean
    norm by `sqrt(sum_i z_i^-2)`, and in the sum of absolute values by `sum_i b_i^-1`.

    Args:
      noises: `Gaussian`s and `Laplace`s.
      moved: by how many messages neighbours differ.
    """
    kinds = {Gaussian: (2, dp.GaussianDpEvent), Laplace: (1, dp.LaplaceDpEvent)}
    for noise in noises:
        if type(noise) not in kinds:
            raise ValueError(f"private: no accountant knows the mechanism {noise!r}.")
    events = []
    for kind, (power, event) in kinds.items():
        shares = [(moved / _multiplier(x)) ** power for x in noises if type(x) is kind]
        if shares:
            events.append(event(sum(shares) ** (-1 / power)))
    return events[0] if len(events) == 1 else dp.ComposedDpEvent(events)


def _multiplier(noise: Gaussian | Laplace | Correlated) -> float:
    try:
        multiplier = float(noise.noise_multiplier)
    except TypeError as error:  # a tracer's too
        raise ValueError(
            "private: noise_multiplier must be a number, not traced or an array; got "
            f"{noise.noise_multiplier!r}. Of a vmap of runs, account for each."
        ) from error
    if not 0 < multiplier < math.inf:
        raise ValueError(
            f"private: {noise!r} hides nothing; the noise multiplier must be positive."
        )
    return multiplier


def _check(population, rounds, delta):
    for name, value in (("population", population), ("rounds", rounds)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}.")
