"""What each client is worth to a federation: values of coalitions of clients.

A *game* gives each coalition of clients a value. `game` plays one with whole runs, in
which those outside the coalition are never asked; many coalitions are one program, a
vmap over their masks. `leave_one_out`, `shapley` and `sampled_shapley` divide the value
of everyone among the clients, of any game.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl.core import Cohort, Data, Federation, Params, State
from jaxfl.faults.schedule import Schedule
from jaxfl.round import population_size
from jaxfl.sampling import Cyclic, Poisson
from jaxfl.simulate import scan_rounds

# bool [M, N] -> float64 [M]: the value of each of M coalitions of N clients.
Game = Callable[[np.ndarray], np.ndarray]

# A million coalitions, of whom each is a run.
MOST_CLIENTS = 20


def participating(federation: Federation, mask: Any) -> Federation:
    """The federation in which only some of the clients ever take part.

    A client that is left out is as one never asked: it stays in the population, where
    its id is its own and N is the same, and cohorts are drawn as they were, but it is
    alive in none of them. All others draw the random numbers that they would have.

    Args:
      federation: any; laid out already, as `tune` starts from its parts, which know of
        no mask.
      mask: bool `[N]`, who takes part; may be traced, and vmapped over.

    Returns:
      A federation.

    Raises:
      ValueError: from its init, if the mask is not one of all clients.

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0, 8.0])
    >>> data = from_arrays(y, y, client_ids=[0, 1, 2])
    >>> federation = federate(fedavg(loss, optax.sgd(1.0)), mean())
    >>> def model(mask):
    ...     some = participating(federation, mask)
    ...     state = some.init(jnp.float32(0), data)
    ...     return scan_rounds(some, state, data, rounds=1, key=jax.random.key(0))[0]
    >>> masks = jnp.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]]) > 0
    >>> jax.vmap(model)(masks).params.tolist()
    [2.0, 8.0, 0.0]
    """
    mask = jnp.asarray(mask, bool)

    def init(params, data, clients=None):
        n = population_size(data)
        if mask.shape != (n,):
            raise ValueError(f"mask must have shape ({n},), got {mask.shape}.")
        return federation.init(params, data, clients)

    def round(key, state: State, cohort: Cohort):
        its = mask[cohort.client]  # of padding, which is not alive, whatever it may be
        asked = None if cohort.asked is None else cohort.asked & its
        cohort = cohort._replace(alive=cohort.alive & its, asked=asked)
        return federation.round(key, state, cohort)

    return federation._replace(init=init, round=round)


def game(
    federation: Federation,
    params: Params,
    data: Data,
    *,
    utility: Callable[[State], jax.Array],
    rounds: int,
    key: jax.Array,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
    weight: jax.Array | None = None,
    chunk_size: int = 8,
) -> Game:
    """The value of a coalition is what a run is worth in which only it takes part.

    `v(S) = utility(state after R rounds of the clients in S)`. All runs have one key,
    the same cohorts and the same draws of each client, so that two values differ by
    who took part and by nothing else. Nobody's run, `v({})`, is the initial model's.

    Args:
      federation: the composed round.
      params: the initial model.
      data: the population's, of N clients.
      utility: `state -> float []`, the more the better: the accuracy on held-out
        examples, or a loss with a minus. What is not finite makes values not finite.
      rounds: R.
      key: of every run.
      cohort_size: see `scan_rounds`; drawn from the whole population.
      weight: float32 `[N]`, see `scan_rounds`.
      chunk_size: runs done at once. Memory grows with it times what a run needs.

    Returns:
      `masks -> values`, of bool `[M, N]`, float64 `[M]`. It is compiled once, at the
      first call.

    Raises:
      ValueError: if chunk_size is not positive, or as `scan_rounds`; at the call, if
        masks are not `[M, N]`, or the utility is not a scalar.

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return 0.5 * (w - batch["y"]) ** 2
    >>> y = jnp.array([1.0, 3.0, 8.0])
    >>> value = game(
    ...     federate(fedavg(loss, optax.sgd(1.0)), mean()), jnp.float32(0),
    ...     from_arrays(y, y, client_ids=[0, 1, 2]), rounds=1, key=jax.random.key(0),
    ...     utility=lambda state: -((state.params - 2.0) ** 2))
    >>> value(np.array([[True, True, False], [False, False, True]])).tolist()
    [0.0, -36.0]
    >>> leave_one_out(value, 3).tolist()  # without client 2 the model would be right
    [8.25, 2.25, -4.0]
    >>> shapley(value, 3).round(3).tolist()  # they sum to v(everyone) - v(nobody)
    [8.875, 5.875, -14.75]
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    n = population_size(data)
    given = jax.tree.map(jnp.asarray, (params, data, weight, key))

    def run(mask, params, data, weight, key):
        coalition = participating(federation, mask)
        state, _ = scan_rounds(
            coalition,
            coalition.init(params, data),
            data,
            rounds=rounds,
            key=key,
            cohort_size=cohort_size,
            weight=weight,
        )
        value = utility(state)
        if jnp.shape(value) != ():
            raise ValueError(
                f"utility must return a scalar, got the shape {jnp.shape(value)}."
            )
        return jnp.float32(value)

    runs = jax.jit(jax.vmap(run, (0, None, None, None, None)))

    def values(masks):
        masks = np.asarray(masks, bool)
        if masks.ndim != 2 or masks.shape[1] != n:
            raise ValueError(f"masks must be [M, {n}], got the shape {masks.shape}.")
        found = []
        for first in range(0, len(masks), chunk_size):
            chunk = masks[first : first + chunk_size]
            # The last chunk is filled, so that there is one program.
            extra = chunk_size - len(chunk)
            found.append(runs(np.pad(chunk, ((0, extra), (0, 0)), mode="edge"), *given))
        return np.concatenate([np.zeros(0), *found])[: len(masks)]

    return values


def leave_one_out(game: Game, num_clients: int) -> np.ndarray:
    """What is lost without a client: `v(N) - v(N without i)`.

    Two clients that have the same to offer are each worth nothing by it, as the other
    would do: `shapley` divides it between them.

    Args:
      game: `masks -> values`, see `game`.
      num_clients: N.

    Returns:
      float64 `[N]`, of N + 1 coalitions.

    >>> best = np.array([1.0, 5.0, 5.0])
    >>> leave_one_out(lambda masks: (masks * best).max(1), 3).tolist()
    [0.0, 0.0, 0.0]
    """
    _check_clients(num_clients)
    everyone = np.ones((1, num_clients), bool)
    value = _values(game, np.vstack([everyone, ~np.eye(num_clients, dtype=bool)]))
    return value[0] - value[1:]


def shapley(game: Game, num_clients: int) -> np.ndarray:
    """Shapley values, exactly, for few clients: the mean of what a client adds.

    `phi_i = sum over S without i of |S|! (N - |S| - 1)! / N! (v(S + i) - v(S))`: over
    all orders in which clients may come, what client i adds to those before it. They
    sum to `v(N) - v({})`, are equal for clients that add the same to every coalition,
    and 0 for one that adds nothing to any; no other division of every game does all
    of this and is linear in the game.

    Args:
      game: `masks -> values`, see `game`; called on all 2^N coalitions.
      num_clients: N, up to 20; `sampled_shapley` is for more.

    Returns:
      float64 `[N]`.

    Raises:
      ValueError: if there are too many clients.

    >>> best = np.array([1.0, 5.0, 5.0])
    >>> shapley(lambda masks: (masks * best).max(1), 3).round(3).tolist()
    [0.333, 2.333, 2.333]

    Reference: Shapley 1953, A Value for n-Person Games; Ghorbani, Zou 2019, arXiv
    1904.02868, equation 1.
    """
    _check_clients(num_clients)
    if num_clients > MOST_CLIENTS:
        raise ValueError(
            f"num_clients: {num_clients} have 2^{num_clients} coalitions; shapley "
            f"takes {MOST_CLIENTS} at most, sampled_shapley any number."
        )
    n, code = num_clients, np.arange(2**num_clients)
    masks = (code[:, None] >> np.arange(n)) & 1 == 1
    value, size = _values(game, masks), masks.sum(1)
    orders = np.array([1 / (n * math.comb(n - 1, s)) for s in range(n)])
    shares = np.empty(n)
    for i in range(n):
        without = code[~masks[:, i]]
        added = value[without | 1 << i] - value[without]
        shares[i] = orders[size[without]] @ added
    return shares


class Estimate(NamedTuple):
    """Shapley values from a sample of orders.

    Attributes:
      value: float64 `[N]`.
      error: float64 `[N]`, the standard error of each, of the sampling of orders.
      coalitions: how many were played; none is played twice.
    """

    value: np.ndarray
    error: np.ndarray
    coalitions: int


def sampled_shapley(
    game: Game,
    num_clients: int,
    *,
    permutations: int,
    seed: int,
    tolerance: float = 0.0,
) -> Estimate:
    """Shapley values by truncated Monte Carlo: what clients add in random orders.

    Clients join one after another in each order; what client i adds, `v(those before
    it, and it) - v(those before it)`, is an unbiased sample of its value. Where
    those before it are worth what everyone is, up to a tolerance, it and all after it
    are taken to add nothing, and are not played. All orders advance together, so that
    a game of `game` has many coalitions at once to run.

    Args:
      game: `masks -> values`, see `game`.
      num_clients: N.
      permutations: P, orders drawn; at least 2.
      seed: of the orders.
      tolerance: in the unit of the value; 0 truncates nothing. The values sum to
        `v(N) - v({})` up to it.

    Returns:
      An `Estimate`, of P N coalitions at most.

    Raises:
      ValueError: if there are fewer than 2 orders, or the tolerance is negative.

    >>> best = np.array([1.0, 5.0, 5.0])
    >>> found = sampled_shapley(
    ...     lambda masks: (masks * best).max(1), 3, permutations=1000, seed=0)
    >>> bool((abs(found.value - [1 / 3, 7 / 3, 7 / 3]) < 4 * found.error).all())
    True
    >>> found.coalitions
    8

    Reference: Ghorbani, Zou 2019, arXiv 1904.02868, algorithm 1 (with a number of
    orders in place of its test of convergence).
    """
    _check_clients(num_clients)
    if permutations < 2:
        raise ValueError(f"permutations must be at least 2, got {permutations}.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}.")
    n, known = num_clients, {}

    def value(masks):
        new = {m.tobytes(): m for m in masks if m.tobytes() not in known}
        if new:
            played = _values(game, np.stack(list(new.values())))
            known.update(zip(new, played, strict=True))
        return np.array([known[m.tobytes()] for m in masks])

    nobody, everyone = value(np.array([[False] * n, [True] * n]))
    everyone_in_turn = np.tile(np.arange(n), (permutations, 1))
    order = np.random.default_rng(seed).permuted(everyone_in_turn, axis=1)
    joined = np.zeros((permutations, n), bool)
    before = np.full(permutations, nobody)
    added = np.zeros((permutations, n))
    for place in range(n):
        # Not `>=`: a value that is not a number truncates nothing.
        (going,) = np.nonzero(~(abs(everyone - before) < tolerance))
        if not len(going):
            break
        client = order[going, place]
        joined[going, client] = True
        after = value(joined[going])
        added[going, client] = after - before[going]
        before[going] = after
    error = added.std(0, ddof=1) / math.sqrt(permutations)
    return Estimate(added.mean(0), error, len(known))


def _check_clients(num_clients: int) -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}.")


def _values(game: Game, masks: np.ndarray) -> np.ndarray:
    value = np.asarray(game(masks), np.float64)
    if value.shape != masks.shape[:1]:
        raise ValueError(
            f"game must return a value for each of {len(masks)} coalitions, got the "
            f"shape {value.shape}."
        )
    return value
