"""What happens to whom and when in a run, as arrays."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxfl.core import Cohort
from jaxfl.mesh import NOBODY


class Schedule(NamedTuple):
    """Who is in each of R rounds, who is late, who is lost, how stale, and the time.

    Takes the place of a `cohort_size` in `simulate` and `scan_rounds`. It is data: two
    schedules of one shape, of whatever policy, are runs of one compiled program, and
    `jax.vmap` over stacked ones is a run under each. `synchronous` and `buffered` make
    one from a clock; one of your own needs only `client`.

    Attributes:
      client: int32 `[R, K]`, ids of each round's clients, each at most once in a round;
        a row that nobody fills has `faults.NOBODY`.
      asked: bool `[R, K]`, who is sent the broadcast; those alive if None.
      alive: bool `[R, K]`, who goes on to train and to send; everyone if None. Who is
        asked and not alive dies on the way: its state is as it was.
      arrives: bool `[R, K]`, whose message reaches the server in time; all if None. Of
        who is alive and does not arrive the state moves on and bits are counted, as it
        does not know that its message is lost.
      share: float32 `[R, K]`, how much of its local steps each client does, to the
        nearest whole one; all if None.
      staleness: int32 `[R, K]`, how many rounds ago the broadcast that it trains from
        was the newest; 0 if None. For an `asynchronous` algorithm.
      time: float32 `[R, K]`, seconds from the start of the run to when the message
        comes, or would have come.
      ended: float32 `[R]`, to the end of each round.

    Rounds of two clients out of three, in turn, of which one misses the second:

    >>> import jax.numpy as jnp, optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean, simulate
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0, 8.0])
    >>> schedule = Schedule(
    ...     client=np.array([[0, 1], [2, 0]]),
    ...     arrives=np.array([[True, True], [False, True]]))
    >>> state, history = simulate(
    ...     federate(fedavg(loss, optax.sgd(1.0)), mean()), jnp.float32(0),
    ...     from_arrays(y, y, client_ids=[0, 1, 2]), cohort_size=schedule,
    ...     rounds=2, key=jax.random.key(0), progress=False)
    >>> state.params.item(), history.clients.lost.tolist()
    (1.0, [[False, False], [True, False]])
    """

    client: Any
    asked: Any = None
    alive: Any = None
    arrives: Any = None
    share: Any = None
    staleness: Any = None
    time: Any = None
    ended: Any = None

    @property
    def rounds(self) -> int:
        """R."""
        return np.shape(self.client)[0]

    @property
    def versions(self) -> int:
        """How many broadcasts a server must keep: the largest staleness, and one."""
        return 1 if self.staleness is None else int(np.max(self.staleness)) + 1

    def check(self, population: int) -> None:
        """Raises ValueError unless this is a schedule for N clients.

        Of arrays that are traced the shapes alone are looked at.
        """
        shape = np.shape(self.client)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"schedule.client must be [R, K], got the shape {shape}.")
        for name, value in self._asdict().items():
            like = shape[:1] if name == "ended" else shape
            if value is not None and np.shape(value) != like:
                raise ValueError(
                    f"schedule.{name} must have the shape {like}, got {np.shape(value)}"
                )
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
            return
        client = np.asarray(self.client)
        if not np.issubdtype(client.dtype, np.integer):
            raise ValueError(f"schedule.client must be integers, got {client.dtype}.")
        somebody = client != NOBODY
        if np.any(somebody & ((client < 0) | (client >= population))):
            raise ValueError(
                f"schedule.client must be from 0 to {population - 1}, or NOBODY; got "
                f"{client[somebody].min()} to {client[somebody].max()}."
            )
        ranked = np.sort(client, axis=1)
        twice = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] != NOBODY)
        if twice.any():
            raise ValueError(
                "schedule.client must have a client once in a round; in round "
                f"{np.flatnonzero(twice.any(1))[0]} one is there twice."
            )
        share, staleness = self.share, self.staleness
        if share is not None and not np.all((np.asarray(share) >= 0) & (share <= 1)):
            raise ValueError("schedule.share must be between 0 and 1.")
        if staleness is not None and np.any(np.asarray(staleness) < 0):
            raise ValueError("schedule.staleness must not be negative.")

    def at(self, rounds: Any) -> "Schedule":
        """One round, `[K]`, or a slice of them."""
        return jax.tree.map(lambda x: x[rounds], self)

    def applied(self, cohort: Cohort) -> Cohort:
        """The cohort of the clients of a round, and what happens to them.

        Args:
          cohort: all of it alive but for its padding.
        """
        somebody = cohort.alive
        return cohort._replace(
            alive=somebody if self.alive is None else somebody & self.alive,
            asked=None if self.asked is None else somebody & self.asked,
            arrives=self.arrives,
            share=self.share,
            staleness=self.staleness,
            time=self.time,
            ended=self.ended,
        )
