"""Means and deviations over a population, of sums that clients make of their rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jaxfl.data.federated import ClientData
from jaxfl.round import map_clients


class Moments(NamedTuple):
    """Of each group of rows and each feature.

    Attributes:
      count: int32 `[G]`, rows in the group.
      mean: float32 `[G, F]`; 0 for a group without rows.
      std: float32 `[G, F]`, of the population (divided by the count).
    """

    count: jax.Array
    mean: jax.Array
    std: jax.Array

    def varies(self, tolerance: float = 1e-6) -> jax.Array:
        """Which features are not constant in every group, bool `[F]`.

        Args:
          tolerance: a deviation of that share of the mean is rounding.

        >>> Moments(jnp.array([3]), jnp.array([[1.0, 9.0]]), jnp.array([[0.0, 2.0]])
        ...        ).varies().tolist()
        [False, True]
        """
        return jnp.any(self.std > tolerance * jnp.abs(self.mean), 0)

    def standardize(self, x: Any, group: Any = None) -> jax.Array:
        """`(x - mean_g) / std_g`, and 0 where a feature is constant in the group.

        Args:
          x: `[..., F]`.
          group: int `[...]`; None if there is one group.

        Returns:
          float32 `[..., F]`, NaN for a group that is none of the G.
        """
        group = jnp.zeros(jnp.shape(x)[:-1], int) if group is None else group
        group = jnp.asarray(group)
        known = (group >= 0) & (group < len(self.count))
        mean, std = self.mean[group], self.std[group]
        moves = std > 1e-6 * jnp.abs(mean)
        z = jnp.where(moves, (x - mean) / jnp.where(moves, std, 1), 0)
        return jnp.where(known[..., None], z, jnp.nan)


def moments(
    data: ClientData,
    x: str = "x",
    group: str | None = None,
    num_groups: int = 1,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> Moments:
    """Mean and deviation of every feature in every group of rows, by sums over clients.

    Two rounds, in which client k sends sums over its rows b of each group g, first

        n_kg,  s_kg = sum_b x_b,  and with m_g = sum_k s_kg / sum_k n_kg

        d_kg = sum_b (x_b - m_g),  q_kg = sum_b (x_b - m_g)^2

    of which the mean is `m_g + d_g / n_g` and the variance `q_g / n_g - (d_g / n_g)^2`.
    That a second round looks at deviations, and not at squares as large as they are,
    keeps float32 from cancelling what is small beside its mean. Groups are for instance
    operating conditions, in each of which sensors have another normal.

    Client sends: `n`, `s`, then `d`, `q`: `G (1 + 3 F)` numbers, and no row. Server
    sees: their sums alone, if it adds them securely.

    Args:
      data: the population.
      x: key of the features, `[E, F]`, in `data.examples`.
      group: key of the rows' groups, int `[E]`; None if there is one.
      num_groups: G.
      chunk_size: see `map_clients`.
      mesh: see `map_clients`.

    Returns:
      A `Moments`.

    Raises:
      ValueError: examples lack a key, features are not `[E, F]`, num_groups is not
        positive, or a row's group is none of them.

    >>> from jaxfl import from_arrays
    >>> rows = jnp.array([[1.0], [2.0], [6.0]])
    >>> found = moments(from_arrays(rows, rows, client_ids=[0, 1, 1]))
    >>> found.mean.item(), round(found.std.item(), 3)
    (3.0, 2.16)

    Reference: Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample
    Variance, equation 1.7 (the corrected two-pass algorithm).
    """
    for key in (x,) if group is None else (x, group):
        if key not in data.examples:
            raise ValueError(f"examples have no {key!r}; they have {[*data.examples]}.")
    shape = jnp.shape(data.examples[x])
    if len(shape) != 2:
        raise ValueError(f"examples[{x!r}] must be [E, F], got shape {shape}.")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}.")
    if group is not None and not isinstance(data.examples[group], Tracer):
        found = np.unique(data.examples[group])
        if found.size and not 0 <= found[0] <= found[-1] < num_groups:
            raise ValueError(
                f"num_groups: {num_groups} groups are 0 to {num_groups - 1}, and "
                f"examples[{group!r}] has {found[0]} to {found[-1]}."
            )

    def summed(sums_of, *known):
        """`sums_of(features [B, F], group [B], belongs [B, G], *known)`, added over all
        clients' rows."""

        def client(shared, i):
            data, known = shared
            own, place = data[jnp.minimum(i, n - 1)], jnp.arange(max(1, data.longest))
            rows = own.take(place)
            features = jnp.asarray(rows[x], jnp.float32)
            of = jnp.zeros(place.shape, int) if group is None else rows[group]
            real = (place < own.size) & (i < n)
            belongs = (of[:, None] == jnp.arange(num_groups)) & real[:, None]
            return sums_of(features, of, belongs, *known), ()

        # Ids beyond the last fill the last chunk of every device.
        n, together = data.num_clients, (chunk_size or 1) * (mesh.size if mesh else 1)
        ids = jnp.arange(-(-n // together) * together)
        shared = data, known
        return map_clients(client, shared, ids, chunk_size=chunk_size, mesh=mesh)[0]

    def per_group(values, belongs):
        # By where: what is beyond a client's rows may be NaN.
        chosen = jnp.where(belongs[..., None], values[:, None], 0)
        return jnp.sum(chosen, 0)

    count, total = summed(
        lambda v, of, belongs: (
            jnp.sum(belongs, 0, dtype=jnp.int32),
            per_group(v, belongs),
        )
    )
    some = jnp.maximum(count, 1)[:, None]
    near = total / some

    def deviations(v, of, belongs, near):
        d = v - near[of]
        return per_group(d, belongs), per_group(d**2, belongs)

    off, square = (s / some for s in summed(deviations, near))
    return Moments(count, near + off, jnp.sqrt(jnp.maximum(square - off**2, 0)))
