"""What a server does about clients that are slow: schedules made by a virtual clock."""

import heapq
from typing import Any, NamedTuple

import numpy as np

from jaxfl.faults.clock import Clock
from jaxfl.faults.schedule import Schedule
from jaxfl.mesh import NOBODY


class Dropout(NamedTuple):
    """How probably a client vanishes in a turn; one number or `[N]` each.

    Attributes:
      before: cannot be reached: it is as one never asked.
      during: it gets the broadcast and never answers; its state stays as it was.
      after: it has trained, and its state moves on, but its message is lost.
    """

    before: Any = 0.0
    during: Any = 0.0
    after: Any = 0.0

    def drawn(self, client: np.ndarray, rng: np.random.Generator) -> "Dropout":
        """To whom of these clients it happens, one thing at most; bool `[...]` each."""
        before, during, after = (
            np.take(rate, client, mode="clip") if np.ndim(rate) else rate
            for rate in self
        )
        draw = rng.random(np.shape(client))
        gone = draw < before
        dead = (draw < before + during) & ~gone
        lost = (draw < before + during + after) & ~gone & ~dead
        return Dropout(gone, dead, lost)

    def check(self) -> None:
        """Raises ValueError unless these are probabilities, together below 1."""
        together = np.add(np.add(self.before, self.during), self.after)
        if any(np.any(np.asarray(p) < 0) for p in self) or np.any(together >= 1):
            raise ValueError(
                f"dropout: its rates must not be negative, and less than 1 together; "
                f"got {self}."
            )


NEVER = Dropout()


def synchronous(
    client: np.ndarray,
    clock: Clock,
    *,
    deadline: float | None = None,
    partial: bool = False,
    keep: int | None = None,
    dropout: Dropout = NEVER,
    seed: int = 0,
) -> Schedule:
    """Rounds, each of which ends before the next begins.

    The server waits for all it has asked; with a `deadline`, no longer than that; with
    `keep`, until that many messages have come (over-selection: ask 130, keep 100). What
    comes later is lost. Who has vanished is waited for until it should have come.

    Args:
      client: int `[R, K]`, whom it asks, see `cohorts`.
      clock: of the population.
      deadline: seconds.
      partial: whether a client that will not be done by the deadline does what it can,
        in whole steps, and sends that in time (FedProx), instead of all of it in vain.
        One that cannot do a single step dies on the way.
      keep: how many messages are enough.
      dropout: who vanishes.
      seed: of that.

    Returns:
      A schedule of R rounds.

    Raises:
      ValueError: if an argument is out of range, or partial without a deadline.

    Four clients of which one is slow; waiting, half a minute, and the first three:

    >>> slow = Clock(np.zeros(4), np.full(4, 10.0), np.array([1, 1, 1, 6]), np.zeros(4))
    >>> everyone = np.arange(4)[None]
    >>> for how in ({}, {"deadline": 30.0}, {"deadline": 30.0, "partial": True},
    ...             {"keep": 3}):
    ...     schedule = synchronous(everyone, slow, **how)
    ...     print(schedule.ended, schedule.arrives[0, 3], schedule.share[0, 3])
    [60.] True 1.0
    [30.] False 1.0
    [30.] True 0.5
    [10.] False 1.0

    Reference: Bonawitz et al. 2019, arXiv:1902.01046, sections 2 and 9 (deadlines,
    over-selection); Li et al. 2020, arXiv:1812.06127, algorithm 2 (partial work).
    """
    client = np.asarray(client)
    _check_clients(client, clock.population)
    dropout.check()
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline must be positive, got {deadline}.")
    if partial and deadline is None:
        raise ValueError("partial: there is no deadline to be done by.")
    if keep is not None and not 1 <= keep <= client.shape[1]:
        raise ValueError(f"keep must be from 1 to {client.shape[1]}, got {keep}.")
    somebody = client != NOBODY
    download, step, steps, upload = (_of_clients(x, client) for x in clock)
    gone, dead, lost = dropout.drawn(client, np.random.default_rng(seed))
    asked = somebody & ~gone
    alive = asked & ~dead
    done = steps
    if partial:
        assert deadline is not None
        room = (deadline - download - upload) / np.where(step > 0, step, 1.0)
        fit = np.floor(room * (1 + 1e-12))  # of 3 tenths in 0.3 there are 3
        fit = np.where(step > 0, fit, np.where(room >= 0, steps, -1))
        done = np.clip(fit, 0, steps)
        alive &= (done > 0) | ((steps == 0) & (room >= 0))
    took = download + step * done + upload
    arrives = alive & ~lost
    latest = np.where(asked, took, 0.0).max(1)
    if deadline is not None:
        arrives &= took <= deadline * (1 + 1e-12)
        latest = np.minimum(latest, deadline)
    if keep is not None:
        comes = np.where(arrives, took, np.inf)
        order = np.argsort(comes, axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        arrives &= rank < keep
        last = np.take_along_axis(comes, order[:, keep - 1 : keep], 1)[:, 0]
        latest = np.minimum(latest, last)
    ended = np.cumsum(latest)
    return Schedule(
        client=client.astype(np.int32),
        asked=asked,
        alive=alive,
        arrives=arrives,
        share=(done / np.where(steps > 0, steps, 1) + (steps == 0)).astype(np.float32),
        staleness=np.zeros(client.shape, np.int32),
        time=((ended - latest)[:, None] + took).astype(np.float32),
        ended=ended.astype(np.float32),
    )


def buffered(
    clock: Clock,
    *,
    rounds: int,
    buffer: int,
    concurrency: int,
    dropout: Dropout = NEVER,
    seed: int,
) -> Schedule:
    """Asynchronous arrival: the server steps whenever so many messages have come.

    So many clients train at any time. When one is done its message goes to the buffer,
    and another, drawn from those idle, starts from the newest model; when the buffer is
    full the server steps, which is a round of the schedule, and the messages in it are
    as many rounds stale as steps were made since their clients began. Of what comes at
    the same instant all is taken in before anyone starts.

    A client that has a message in the buffer is not idle before the server's step, so
    that none is in a buffer twice, or has two turns at a time. Who vanishes, whenever
    in its turn, is replaced when its message should have come; it is in no round.

    Args:
      clock: of the population.
      rounds: R, steps of the server.
      buffer: K; 1 for FedAsync.
      concurrency: M, the clients that train at a time.
      dropout: who vanishes.
      seed: of who starts, and of who vanishes.

    Returns:
      A schedule of R rounds of K clients, in the order of their arrival.

    Raises:
      ValueError: if rounds is not positive, or buffer or concurrency not from 1 to N.

    Two clients at a time, one of which is three times slower:

    >>> slow = Clock(np.zeros(2), np.array([1.0, 3.5]), np.ones(2), np.zeros(2))
    >>> schedule = buffered(slow, rounds=4, buffer=1, concurrency=2, seed=0)
    >>> schedule.ended, schedule.client.ravel(), schedule.staleness.ravel()
    (array([1. , 2. , 3. , 3.5], dtype=float32), array([0, 0, 0, 1], dtype=int32),
     array([0, 0, 0, 3], dtype=int32))

    Reference: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1; with a buffer of one,
    Xie et al. 2019, arXiv:1903.03934, algorithm 1.
    """
    n = clock.population
    for name, value, most in (
        ("rounds", rounds, np.inf),
        ("buffer", buffer, n),
        ("concurrency", concurrency, n),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be from 1 to {most}, got {value}.")
    dropout.check()
    rng = np.random.default_rng(seed)
    turn = np.atleast_2d(clock.turn)
    turns = np.zeros(n, int)  # that each client has begun
    idle, training, waiting, made = list(range(n)), [], [], []
    now, free, started = 0.0, concurrency, 0
    while len(made) < rounds:
        while free and idle:
            place = rng.integers(len(idle))
            idle[place], idle[-1] = idle[-1], idle[place]
            who = idle.pop()
            vanishes = any(dropout.drawn(np.array(who), rng))
            comes = now + turn[turns[who] % len(turn), who]
            heapq.heappush(training, (comes, started, who, len(made), vanishes))
            turns[who] += 1
            started, free = started + 1, free - 1
        now = training[0][0]
        while training and training[0][0] == now and len(made) < rounds:
            _, _, who, version, vanishes = heapq.heappop(training)
            free += 1
            if vanishes:
                idle.append(who)
                continue
            waiting.append((who, len(made) - version, now))
            if len(waiting) == buffer:
                made.append((*zip(*waiting, strict=True), now))
                idle += [who for who, _, _ in waiting]
                waiting = []
    client, staleness, time, ended = zip(*made, strict=True)
    all_of_them = np.ones((rounds, buffer), bool)
    return Schedule(
        client=np.array(client, np.int32),
        asked=all_of_them,
        alive=all_of_them,
        arrives=all_of_them,
        share=np.ones((rounds, buffer), np.float32),
        staleness=np.array(staleness, np.int32),
        time=np.array(time, np.float32),
        ended=np.array(ended, np.float32),
    )


def _of_clients(values: np.ndarray, client: np.ndarray) -> np.ndarray:
    """Of each client in its round, `[R, K]`, from values `[N]` or `[rounds, N]`."""
    values = np.atleast_2d(values)
    which = np.arange(len(client))[:, None] % len(values)
    return values[which, np.where(client == NOBODY, 0, client)]


def _check_clients(client: np.ndarray, population: int) -> None:
    if client.ndim != 2 or not np.issubdtype(client.dtype, np.integer):
        raise ValueError(
            f"client must be integers [R, K], got {client.dtype} {client.shape}."
        )
    Schedule(client).check(population)
