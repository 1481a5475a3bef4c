"""Cohorts: who is asked in a round."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl.core import Cohort, Data, PyTree
from jaxfl.data.federated import ClientData
from jaxfl.faults.schedule import Schedule
from jaxfl.mesh import NOBODY
from jaxfl.round import population_size, select_clients

WORD = 2**32  # how many values a draw has


class Poisson(NamedTuple):
    """Each client takes part in a round with probability q, whoever else does.

    It is the sampling for which most is known of how it amplifies privacy: what one
    client does is independent of all others, so that not even their number says whether
    it was there. Takes the place of a `cohort_size`.

    A cohort has as many rows as are enough but once in `1 / overflow` rounds; those
    that nobody fills are padding. Of more clients than that the last are left out, for
    which an accountant must allow, see `jaxfl.accounting.epsilon`. A mean of such
    cohorts wants a denominator of its own: `mean(denominator=expected)`.

    Attributes:
      expected: q N, the mean size of a cohort; more than 0 and less than N.
      overflow: how probable it may be that a round has more clients than rows.

    >>> sampling = Poisson(100)
    >>> sampling.rate(10_000), sampling.rows(10_000)
    (0.01, 189)
    >>> cohort = sample_cohort(jax.random.key(0), jnp.zeros(10_000), sampling)
    >>> cohort.client.shape, int(cohort.alive.sum())
    ((189,), 101)
    """

    expected: float
    overflow: float = 1e-15

    def rate(self, population: int) -> float:
        """q, of a population of N clients.

        Raises:
          ValueError: unless the expected number is between 0 and N, and overflow a
            probability.
        """
        if not 0 < self.expected < population:
            raise ValueError(
                "Poisson: expected must be more than 0 and less than the "
                f"{population} clients, got {self.expected}; a cohort of everyone is "
                "None."
            )
        if not 0 < self.overflow < 1:
            raise ValueError(
                f"Poisson: overflow must be between 0 and 1, got {self.overflow}."
            )
        return self.expected / population

    def rows(self, population: int) -> int:
        """The fewest rows that more clients exceed with probability `overflow` at most.

        Raises:
          ValueError: as `rate`.
        """
        from scipy.special import bdtrc  # P(Binomial(n, q) > k)

        rate = self.rate(population)
        low, high = 1, population  # rows that may not be enough, and that are
        while low < high:
            middle = (low + high) // 2
            enough = bdtrc(middle, population, rate) <= self.overflow
            low, high = (low, middle) if enough else (middle + 1, high)
        return high


class Cyclic(NamedTuple):
    """Cohorts of K in turn, in one random order of all clients.

    Round t takes the places `t K, ..., t K + K - 1` of that order, modulo N. All take
    part equally often, with at least N // K rounds from one time to the next, which is
    what noise that is correlated over rounds asks for. Takes the place of a
    `cohort_size`.

    Attributes:
      size: K.
    """

    size: int


def sample_cohort(
    key: jax.Array,
    data: Data,
    size: int | Poisson | None = None,
    weight: PyTree = None,
) -> Cohort:
    """A cohort drawn uniformly without replacement, or by `Poisson`, on the device.

    Args:
      key: random key.
      data: the population's, `[N, ...]`.
      size: K; or `Poisson(...)`, whose rows of padding are not alive; None for all.
      weight: float32 `[N]`, of each client's message; its number of examples by
        default, or 1 where data is no `ClientData`.

    Returns:
      A cohort in which all clients are alive.

    Raises:
      ValueError: if size is not between 1 and N, or weight does not have length N.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(jnp.zeros(9), jnp.zeros(9), [0, 0, 1, 2, 2, 2, 3, 3, 3])
    >>> cohort = sample_cohort(jax.random.key(0), data, size=2)
    >>> sizes = jnp.array([2, 1, 3, 3])
    >>> bool((cohort.weight == sizes[cohort.client]).all())
    True
    """
    n = population_size(data)
    cohort_rows(size, n)
    if size is None or size == n:
        weight = _weights(data, weight)
        return Cohort(jnp.arange(n, dtype=jnp.int32), data, weight, jnp.ones(n, bool))
    return cohort_of(draw_clients(key, n, size), data, weight)


def cohort_of(client: jax.Array, data: Data, weight: PyTree = None) -> Cohort:
    """The cohort of these clients; rows of padding have the id `NOBODY`."""
    weight = _weights(data, weight)
    somebody, alive = without_padding(client)
    weight = jnp.where(alive, weight[somebody], 0.0)
    return Cohort(client, select_clients(data, somebody), weight, alive)


def _weights(data: Data, weight: PyTree) -> jax.Array:
    n = population_size(data)
    if weight is None:
        weight = data.size if isinstance(data, ClientData) else jnp.ones(n)
    if jnp.shape(weight) != (n,):
        raise ValueError(f"weight must have shape ({n},), got {jnp.shape(weight)}.")
    return jnp.asarray(weight, jnp.float32)


def cohort_rows(cohort_size: int | Poisson | Cyclic | Schedule | None, n: int) -> int:
    """How many rows a cohort has: N if no size is given.

    Raises:
      ValueError: if there cannot be such a cohort of N clients.
    """
    if cohort_size is None:
        return n
    if isinstance(cohort_size, Poisson):
        return cohort_size.rows(n)
    if isinstance(cohort_size, Cyclic):
        return cohort_rows(cohort_size.size, n)
    if isinstance(cohort_size, Schedule):
        cohort_size.check(n)
        return cohort_size.client.shape[1]
    if not 1 <= cohort_size <= n:
        raise ValueError(f"cohort_size must be between 1 and {n}, got {cohort_size}.")
    return cohort_size


def expected_size(
    cohort_size: int | Poisson | Cyclic | Schedule | None, n: int
) -> float:
    """How many clients a cohort has on average."""
    if isinstance(cohort_size, Poisson):
        return cohort_size.expected
    if isinstance(cohort_size, Schedule):
        return float((np.asarray(cohort_size.client) != NOBODY).sum(1).mean())
    return cohort_rows(cohort_size, n)


def without_padding(client):
    """Ids that are all somebody's, the first client's for padding; and what is none.

    Of arrays of JAX or NumPy.
    """
    alive = client != NOBODY
    return client * alive, alive


def draws_of_run(key: jax.Array, n: int, size: int | Poisson | Cyclic) -> Callable:
    """`round -> int32 [K]`, the clients of each round of a run that has this key."""
    if not isinstance(size, Cyclic):
        return lambda round: draw_clients(jax.random.fold_in(key, round), n, size)
    order = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
    k, cycle = size.size, n // size.size

    def in_turn(round):  # t K modulo N, of numbers that are not as large as t K
        place = round % cycle * k - round // cycle * (n % k)
        return order[(place + jnp.arange(k)) % n]

    return in_turn


def draw_clients(key: jax.Array, n: int, size: int | Poisson) -> jax.Array:
    """Ids of clients drawn from n, int32 `[K]`; rows of padding have `NOBODY`."""
    if isinstance(size, Poisson):
        return _draw_each(key, n, size)
    if n < 10_000 or 8 * size > n:
        everyone = jnp.arange(n, dtype=jnp.int32)
        return jax.random.choice(key, everyone, (size,), replace=False)
    return _draw_few(key, n, size)  # does not shuffle all n, as `choice` does


def _draw_each(key: jax.Array, n: int, sampling: Poisson) -> jax.Array:
    """Asks every client for itself, in integers: all devices draw the same.

    The rate is rounded down to a multiple of 2^-32, on the safe side of the accountant.
    """
    limit = jnp.uint32(math.floor(sampling.rate(n) * WORD))
    drawn = jax.random.bits(key, (n,), jnp.uint32) < limit
    (client,) = jnp.nonzero(drawn, size=sampling.rows(n), fill_value=NOBODY)
    return client.astype(jnp.int32)


def _draw_few(key: jax.Array, n: int, size: int) -> jax.Array:
    """Draws with replacement, and again whoever was drawn before, until nobody was.

    Only whether two ids are equal matters to it. It would hence do the same under any
    renaming of the clients, so that all ordered cohorts are as likely.
    """

    def repeated(client):
        order = jnp.argsort(client, stable=True)
        ranked = client[order]
        again = jnp.concatenate([jnp.zeros(1, bool), ranked[1:] == ranked[:-1]])
        return jnp.zeros(size, bool).at[order].set(again)

    def draw_again(carry):
        key, client, again = carry
        key, draw_key = jax.random.split(key)
        drawn = jax.random.randint(draw_key, (size,), 0, n, jnp.int32)
        client = jnp.where(again, drawn, client)
        return key, client, repeated(client)

    nobody = jnp.zeros(size, jnp.int32), jnp.ones(size, bool)
    return jax.lax.while_loop(
        lambda carry: jnp.any(carry[2]), draw_again, (key, *nobody)
    )[1]
