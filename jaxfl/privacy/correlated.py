"""Noise that is correlated over rounds: matrix mechanisms, DP-FTRL.

What an optimiser makes of a run depends on sums of updates over rounds more than on any
one of them. Noise `C^-1 z`, of which each round takes back some of what those before it
have added, is smaller in these sums than independent noise that is as private.

What `C^-1` is, a `StreamingMatrix` of jax_privacy says, which is imported only once one
is asked for.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import tree
from jaxfl.core import Channel, unchanged
from jaxfl.privacy.mechanism import Correlated
from jaxfl.privacy.noise import (
    NORMAL,
    add_noise,
    random_like,
    require_multiplier,
)

if TYPE_CHECKING:
    from jax_privacy.matrix_factorization import StreamingMatrix


def correlated_gaussian(
    noise_multiplier: float,
    noising_matrix: "StreamingMatrix",
    *,
    rounds: int,
    min_separation: int,
    max_participations: int | None = None,
) -> Channel:
    """Adds normal noise that is correlated over rounds to the aggregate at the server.

    In round t, `x_t + z S sens(C) (C^-1 g)_t` with independent standard normal g; S is
    how far one client can move x_t in Euclidean norm, as for `gaussian`, and sens(C)
    how far it then moves `C x` in all rounds together, see `participation_sensitivity`.
    Whatever C is, the whole run is hence one Gaussian mechanism of multiplier z, and
    one matrix for another is as private. With the identity noise is independent.

    Client sends: the payload as it came. Server sees: it; only what it publishes is
    protected. Bits: as before. Guarantee: that of one Gaussian mechanism for the whole
    run, no matter how cohorts are drawn, as long as nobody takes part more often than
    is said here: `simulate(..., cohort_size=Cyclic(K))` keeps N // K rounds between.
    Noise is added even when nobody sends. After the last round there is no guarantee,
    and so no aggregate: the model stays as it was.

    Args:
      noise_multiplier: z, of the whole run, at least 0; it may be a traced array.
      noising_matrix: `C^-1`, lower triangular: jax_privacy's
        `ColumnNormalizedBanded(...).inverse_as_streaming_matrix()`, the same of a
        `BufferedToeplitz` with parameters in float32, or `tree_aggregation`.
      rounds: of the run, at most.
      min_separation: rounds from one participation of a client to its next, at least;
        1 if it may take part in every round.
      max_participations: of one client; as many as its separation allows if None.

    Raises:
      TypeError: if noising_matrix is no `StreamingMatrix`; when a payload has integers.
      ValueError: if noise_multiplier is negative, or a number not positive; by
        `federate`, if no channel bounds what one client contributes.

    >>> from jax_privacy.matrix_factorization.banded import ColumnNormalizedBanded
    >>> from jaxfl import chain, clip, mean
    >>> from jaxfl.channel import mechanisms
    >>> banded = ColumnNormalizedBanded.default(n=60, bands=20)
    >>> noise = correlated_gaussian(
    ...     2.0, banded.inverse_as_streaming_matrix(), rounds=60, min_separation=20)
    >>> mechanisms(chain(clip(0.5), mean(denominator=10), noise))[0].noise_multiplier
    2.0

    Reference: Denisov et al. 2022, arXiv:2202.08312; banded, Choquette-Choo et al.
    2023, arXiv:2306.08153; buffered Toeplitz, Dvijotham et al. 2024, arXiv:2404.16706;
    trees, see `tree_aggregation`.
    """
    from jax_privacy.matrix_factorization import StreamingMatrix

    require_multiplier(noise_multiplier)
    if not isinstance(noising_matrix, StreamingMatrix):
        raise TypeError(
            "noising_matrix must be a StreamingMatrix of jax_privacy, as "
            f"inverse_as_streaming_matrix() gives, got {noising_matrix!r}."
        )
    scale = noise_multiplier * participation_sensitivity(
        noising_matrix, rounds, min_separation, max_participations
    )

    def init(payload):
        zeros: Any = optax.tree.cast(payload, jnp.float32)
        return noising_matrix.init_multiply(zeros), ()

    def decode(ctx, payload, state, report):
        limit = NORMAL.limit("correlated_gaussian", ctx.bound)
        draws = random_like(ctx.key, payload, NORMAL.draw)
        noise, state = noising_matrix.multiply_next(draws, state)
        size = jnp.where(ctx.round < rounds, scale * limit, jnp.nan)
        return add_noise(payload, size, noise), state

    def mechanism(bound, sensitivity):
        NORMAL.limit("correlated_gaussian", sensitivity)
        return Correlated(noise_multiplier, rounds, min_separation, max_participations)

    return Channel(
        tree.of_floats("correlated_gaussian", init),
        decode=decode,
        bound=unchanged,
        sensitivity=unchanged,
        mechanism=mechanism,
    )


@functools.lru_cache(maxsize=16)  # a sweep asks for the same many times
def participation_sensitivity(
    noising_matrix: "StreamingMatrix",
    rounds: int,
    min_separation: int,
    max_participations: int | None = None,
) -> float:
    """How far one client moves `C x` if it moves x by 1 in each round it takes part in.

    `max_pi sqrt(sum_{i, j in pi} |C^T C|_ij)` over the sets pi of rounds that are far
    enough apart, or slightly more: the bound of jax_privacy, which is exact for banded
    C with at most as many bands as rounds between. It takes O(rounds^3), once.

    Args:
      noising_matrix: `C^-1`.
      rounds: n, so that C is `[n, n]`.
      min_separation: rounds from one participation to the next, at least.
      max_participations: in all; as many as fit if None.

    Raises:
      ValueError: if a number is not positive.

    >>> from jax_privacy.matrix_factorization.streaming_matrix import identity
    >>> participation_sensitivity(identity(), rounds=9, min_separation=1)
    3.0

    Reference: Choquette-Choo et al. 2023, arXiv:2306.08153, algorithm 4.
    """
    import scipy.linalg
    from jax_privacy.matrix_factorization import sensitivity

    for name, value in (
        ("rounds", rounds),
        ("min_separation", min_separation),
        ("max_participations", max_participations or 1),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    with jax.ensure_compile_time_eval():
        inverse = np.asarray(noising_matrix.materialize(rounds), np.float64)
        strategy = scipy.linalg.solve_triangular(inverse, np.eye(rounds), lower=True)
        return sensitivity.get_min_sep_sensitivity_upper_bound(
            jnp.asarray(strategy), min_separation, max_participations
        )


def tree_aggregation(
    rounds: int, *, restart: int | None = None, efficient: bool = True
) -> "StreamingMatrix":
    """`C^-1` of the binary tree of DP-FTRL.

    Each node of a binary tree over the rounds has noise of its own. The noise in the
    sum of the first t updates is that of the nodes whose subtrees make up these rounds;
    of each the best estimate from all noise below it, if `efficient`, which is

      v_0 = 1,  1 / v_l = 1 + 1 / (2 v_{l-1}),
      e_l = v_l z_l + (1 - v_l) (e_left + e_right)

    A round takes one draw and log2(rounds) arrays are kept: what a round's own node and
    those that end with it contribute is only ever seen as one sum.

    Args:
      rounds: n, of the run.
      restart: rounds after which a new tree begins, such as an epoch; never if None.
      efficient: the estimator of Honaker, as far as it needs no node of the future;
        else a node's own noise only.

    Raises:
      ValueError: if rounds or restart is not positive.

    >>> plain = tree_aggregation(4, efficient=False).materialize(4)
    >>> jnp.cumsum(plain, 0).astype(int).tolist()  # rounds 1, 1-2, 1-2 and 3, 1-4
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]

    Reference: Kairouz et al. 2021, arXiv:2103.00039, algorithm 1 and appendix B;
    Honaker 2015, "Efficient use of differentially private binary trees".
    """
    from jax_privacy.matrix_factorization import StreamingMatrix

    period = rounds if restart is None else min(restart, rounds)
    for name, value in (("rounds", rounds), ("restart", period)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    levels = period.bit_length()
    fresh, kept = _of_last_node(levels, efficient)
    level = np.arange(levels)

    def init(value):
        return jnp.int32(0), jnp.zeros((levels, *value.shape), jnp.float32)

    def multiply_next(value, state):
        t, open_nodes = state
        place = t % period
        open_nodes = jnp.where(place == 0, 0.0, open_nodes)  # of the last tree
        # The last node to end with this round, over 2^top rounds: it takes the place of
        # all open ones below it, which are its left child, that child's sibling's, ...
        top = jax.lax.population_count(place ^ (place + 1)) - 1
        below = (level < top).reshape(-1, *[1] * value.ndim)
        replaced = jnp.where(below, open_nodes, 0.0)
        node = jnp.asarray(fresh)[top] * value + jnp.tensordot(
            jnp.asarray(kept)[top], replaced, 1
        )
        noise = node - jnp.sum(replaced, 0)
        open_nodes = jnp.where(below, 0.0, open_nodes).at[top].set(node)
        return noise, (t + 1, open_nodes)

    return StreamingMatrix.from_array_implementation(init, multiply_next)


def _of_last_node(levels: int, efficient: bool) -> tuple[np.ndarray, np.ndarray]:
    """A node's estimate in terms of one draw and of its right spine's left children.

    Unrolled, `e_l` is the noise of the nodes that end with it, all of it new, and what
    is known of the left child of each, at levels j < l.

    Returns:
      The standard deviation of all that is new, `[levels]`, and the weights of the left
      children, `[levels, levels]`.
    """
    variance = [1.0]
    for _ in range(levels - 1):
        variance.append(1 / (1 + 1 / (2 * variance[-1])) if efficient else 1.0)
    fresh, kept = np.ones(levels), np.zeros((levels, levels))
    for top in range(levels):
        share, squares = 1.0, 0.0
        for j in range(top, -1, -1):
            own = variance[j] if efficient else 1.0
            kept[top, j] = share if j < top else 0.0
            squares += (share * own) ** 2
            share *= 1 - own
        fresh[top] = math.sqrt(squares)
    return fresh.astype(np.float32), kept.astype(np.float32)
