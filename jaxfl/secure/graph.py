"""Who shares a mask with whom, and how many must stay for a sum to be unmasked."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Graph(NamedTuple):
    """A regular graph over the clients of a round, on a ring in random order.

    Attributes:
      neighbours: k, with how many others each client shares a mask; on the ring those
        up to k / 2 places away, and the one opposite if k is odd (Harary's graph).
      threshold: t, how many of a client and its neighbours must have sent for its masks
        to be removed. Any t of them together can do that, and fewer learn nothing.
    """

    neighbours: int
    threshold: int


def complete(n: int) -> Graph:
    """Everyone shares a mask with everyone, and more than half must stay.

    Up to `n // 2` clients may collude with the server, `(n - 1) // 2` may drop out. For
    another threshold write `lambda n: Graph(n - 1, t)`.

    >>> complete(10)
    Graph(neighbours=9, threshold=6)

    Reference: Bonawitz et al. 2017, arXiv:1611.04482.
    """
    return Graph(n - 1, n // 2 + 1)


def sparse(
    *,
    corrupt: float,
    dropout: float,
    security: float = 40.0,
    correctness: float = 20.0,
) -> Callable[[int], Graph]:
    """The smallest random graph that is safe: k grows with log n, not with n.

    With at most `gamma n` clients that collude with an honest-but-curious server and
    `delta n` that drop out, k is the smallest even number and t the smallest threshold
    for which, over the random order of the ring,

      - the clients that remain are connected: to part them takes two runs of k / 2 that
        are all gone, which n (n - k - 1) / 2 pairs of places are with a probability of
        at most `prod_{i < k} (b - i) / (n - i)` each, `b = gamma n + delta n`; in sum
        at most 2^-(sigma + 1);
      - `P[t or more colluding neighbours] <= 2^-(sigma + 1) / n`;
      - `P[fewer than t neighbours that remain] <= 2^-eta / n`,

    the last two by the hypergeometric distribution. Where no graph of degree below
    n - 1 will do, everyone shares masks with everyone.

    Args:
      corrupt: gamma, from 0 up to 1.
      dropout: delta, from 0 up to 1; gamma + delta must be at most 0.9.
      security: sigma, in bits: a breach has a probability of at most 2^-sigma.
      correctness: eta, in bits: a sum is lost with a probability of at most 2^-eta.

    Returns:
      `n -> Graph`.

    Raises:
      ValueError: if a fraction is not one, or both leave too few.

    >>> sparse(corrupt=0.05, dropout=0.05)(1000)
    Graph(neighbours=30, threshold=17)

    Reference: Bell et al. 2020, ePrint 2020/704, section 3, with the bound on
    connectivity of the authors' federated-compute library.
    """
    for name, value in (("corrupt", corrupt), ("dropout", dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
    if corrupt + dropout > 0.9:
        raise ValueError(
            f"corrupt + dropout must be at most 0.9, got {corrupt + dropout}."
        )

    @functools.cache
    def graph(n: int) -> Graph:
        tiny = 1e-14  # 0.29 * 100 is 28.999...
        colluding = math.floor((corrupt + tiny) * n)
        remaining = math.ceil((1 - dropout - tiny) * n)
        gone = colluding + math.floor((dropout + tiny) * n)
        breach = -(security + 1) * math.log(2)
        for k in range(2, n - 1, 2):
            if _log_parted(n, k, gone) >= breach:
                continue
            at_least = _tails(n, colluding, k)
            t = next(
                t for t in range(k + 2) if at_least[t] * n <= 2.0 ** -(security + 1)
            )
            t = max(t, 2)  # with one share a neighbour alone could unmask
            lost = _tails(n, n - remaining, k)  # k - t + 1 or more neighbours are gone
            if t <= k and lost[k - t + 1] * n <= 2.0**-correctness:
                return Graph(k, t)
        if not colluding < remaining:
            raise ValueError(f"{n} clients: as many may collude as remain.")
        return Graph(n - 1, colluding + 1)

    return graph


def _log_parted(n: int, k: int, gone: int) -> float:
    """log of the bound on the probability that those who remain are not connected."""
    if k > gone:
        return -math.inf
    pairs = math.log(n) + math.log(n - k - 1) - math.log(2)
    return pairs + _log_factorials(gone, -(gone - k), n - k, -n)


def _tails(n: int, marked: int, k: int) -> list[float]:
    """`P[X >= t]` for t = 0 .. k + 1, X the number of marked among k of n drawn."""

    def chance(x):
        if x > marked or k - x > n - marked:
            return 0.0
        return math.exp(
            _log_factorials(marked, -x, -(marked - x))
            + _log_factorials(n - marked, -(k - x), -(n - marked - k + x))
            + _log_factorials(k, n - k, -n)
        )

    tails = [0.0]
    for x in range(k, -1, -1):  # the smallest terms first
        tails.append(tails[-1] + chance(x))
    return tails[::-1]


def _log_factorials(*numbers: int) -> float:
    """`sum log n!` over the numbers, subtracted for those below 0."""
    return sum(math.copysign(math.lgamma(abs(n) + 1), n) for n in numbers)


def offsets(graph: Graph, n: int) -> list[int]:
    """How far along the ring of n clients the neighbours of each one are.

    Raises:
      ValueError: if there is no such graph, or the threshold can never be met.

    >>> offsets(Graph(4, 3), 7), offsets(Graph(3, 2), 6)
    ([1, 2, 5, 6], [1, 3, 5])
    """
    k, t = graph
    if not 0 <= k < n or k * n % 2:
        raise ValueError(
            f"graph: {n} clients cannot have {k} neighbours each; neighbours must be "
            "below the size of the cohort, and even if that is odd."
        )
    if not 1 <= t <= k + 1:
        raise ValueError(
            f"graph: threshold must be from 1 to neighbours + 1 = {k + 1}, got {t}."
        )
    near = range(1, k // 2 + 1)
    return [*near, *[n // 2] * (k % 2), *(n - i for i in reversed(near))]


def neighbourhoods(ring: Sequence[int], graph: Graph) -> dict[int, list[int]]:
    """Of each client its neighbours, with the clients in this order on the ring.

    >>> neighbourhoods([4, 7, 5, 6], Graph(2, 2))
    {4: [7, 6], 7: [5, 4], 5: [6, 7], 6: [4, 5]}
    """
    n = len(ring)
    steps = offsets(graph, n)
    return {u: [ring[(i + s) % n] for s in steps] for i, u in enumerate(ring)}
