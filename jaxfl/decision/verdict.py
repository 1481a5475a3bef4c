"""The rules: from differences between scores to an answer and what speaks for it."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxfl.decision.curve import quantile_of_t

Answer = Literal[
    "federate", "federate with personalisation", "not worth it", "not shown"
]
# A node with fewer held-out examples is not said to lose, whatever it scored.
FEWEST_HELDOUT = 10


class Effect(NamedTuple):
    """A mean difference, and how well the runs and the test examples tell it.

    Attributes:
      mean: of seeds and examples; positive where the change is for the better.
      of_seeds: standard error over seeds.
      of_examples: standard error over held-out examples.
      low, high: the ends of its interval.
    """

    mean: float
    of_seeds: float
    of_examples: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """`sqrt(of_seeds^2 + of_examples^2)`."""
        return math.hypot(self.of_seeds, self.of_examples)


def effect(difference: Any, confidence: float = 0.95) -> Effect:
    """The mean difference of two regimes, and its standard error in both directions.

    With `d_sie` the difference of seed s on example e of node i, the mean is that over
    nodes of the means over their examples, and

        of_seeds^2    = var_s(mean of seed s) / S
        of_examples^2 = sum_i var_e(mean over seeds of d_sie) / H_i / N^2

    so that the nodes are the ones there are, and seeds and examples are samples of what
    might have been. The interval is `mean +- t error`, with the degrees of freedom of
    Welch and Satterthwaite; a single seed has no error over seeds, and the interval is
    then one of these very models.

    Args:
      difference: `[S, N, H]`, paired; NaN where a node has fewer than H examples.
      confidence: of the interval.

    Returns:
      An `Effect`; NaN where there is no example.

    >>> effect(np.array([[[0.1, 0.3]], [[0.1, 0.3]]])).mean
    0.2
    >>> found = effect(np.array([[[1.0, 1.0]], [[3.0, 3.0]]]))  # seeds alone differ
    >>> found.mean, found.of_seeds, found.of_examples
    (2.0, 1.0, 0.0)

    Reference: Bouthillier et al. 2021, arXiv:2103.03098 (sources of variance);
    Satterthwaite 1946.
    """
    d = np.asarray(difference, np.float64)
    seeds, held = len(d), (~np.isnan(d[0])).sum(-1)
    d, held = d[:, held > 0], held[held > 0]
    if not len(held):
        return Effect(*[math.nan] * 5)
    of_node = np.nanmean(d, -1)  # [S, N]
    of_seed, per_example = of_node.mean(1), d.mean(0)
    s2 = of_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    squares = np.nansum((per_example - of_node.mean(0)[:, None]) ** 2, -1)
    # A single example says nothing of how much examples differ.
    free = np.maximum(held - 1, 1)
    variances = np.where(held > 1, squares / free / held, np.inf) / len(held) ** 2
    e2 = variances.sum()
    total = s2 + e2
    if total == 0 or not np.isfinite(total):
        half = total
    else:
        parts = s2**2 / max(seeds - 1, 1) + (variances**2 / free).sum()
        half = quantile_of_t(total**2 / parts, confidence) * math.sqrt(total)
    mean = float(of_seed.mean())
    return Effect(mean, math.sqrt(s2), math.sqrt(e2), mean - half, mean + half)


class NodeEffects(NamedTuple):
    """What each node has of it, on its own held-out examples, `[N]` each.

    Attributes:
      gain: the mean difference.
      low, high: the ends of its interval, for all nodes at once.
      loses: whether it is worse off, for certain and by as much as matters.
    """

    gain: np.ndarray
    low: np.ndarray
    high: np.ndarray
    loses: np.ndarray


def node_effects(
    difference: Any, *, worth: float, confidence: float, counted: Any
) -> NodeEffects:
    """The effect at each node; the interval allows for there being N of them.

    A node loses if its gain is at most `-worth`, the interval at the confidence
    `1 - (1 - confidence) / N` (Bonferroni) is below 0, it has at least
    `FEWEST_HELDOUT` examples held out, and it is `counted`.

    Args:
      difference: `[S, N, H]`, see `effect`.
      worth: the least difference that matters.
      confidence: that no node is said to lose that does not.
      counted: bool `[N]`, nodes to be judged.
    """
    d = np.asarray(difference, np.float64)
    each = 1 - (1 - confidence) / d.shape[1]
    found = [effect(d[:, [i]], each) for i in range(d.shape[1])]
    gain, low, high = (
        np.array([getattr(e, name) for e in found]) for name in ("mean", "low", "high")
    )
    enough = (~np.isnan(d[0])).sum(-1) >= FEWEST_HELDOUT
    loses = (gain <= -worth) & (high < 0) & enough & np.asarray(counted, bool)
    return NodeEffects(gain, low, high, loses)


class Verdict(NamedTuple):
    """The answer, and the rule that gave it.

    Attributes:
      answer: one of four.
      because: the rule in words, with its numbers.
    """

    answer: Answer
    because: str


def judge(
    gain: Effect,
    tuned: Effect,
    pooled: Effect,
    *,
    worth: float,
    losers: int = 0,
    losers_tuned: int = 0,
    show: Any = "{:+.3g}".format,
) -> Verdict:
    """The verdict, by rules that are tried in this order.

    1. "federate": the gain over isolated nodes is at least `worth` and its interval
       above 0, and no node loses, or fine-tuning helps none of those that do.
       "federate with personalisation": the same, but k nodes lose on their own
       examples and fewer do after fine-tuning at home.
    2. "federate with personalisation": the gain of the federated model that is
       fine-tuned at home is at least `worth` and its interval above 0, though that of
       the model as it is was not.
    3. "not worth it": the intervals of both gains are below `worth`: even the best
       that the runs allow would not be worth the trouble.
    4. "not shown": the rest. Whether there is a gain of that size is within the noise
       of seeds and test.

    Args:
      gain: federated less isolated, for the better, on the judged examples.
      tuned: the same of the federated model fine-tuned at each node; the gain again
        where it is not of interest.
      pooled: pooled less isolated; says why it is not worth it.
      worth: the least gain that is worth the trouble, in the unit of the score.
      losers: nodes that lose with the federated model.
      losers_tuned: those of them that lose after fine-tuning too.
      show: how to write a difference.

    Returns:
      A `Verdict`.

    >>> clear, none = Effect(0.3, 0.01, 0.01, 0.27, 0.33), Effect(0, 0, 0, -0.01, 0.01)
    >>> judge(clear, clear, clear, worth=0.02).answer
    'federate'
    >>> judge(none, none, none, worth=0.02).answer
    'not worth it'
    """

    def of(e):
        return f"{show(e.mean)} (interval {show(e.low)} to {show(e.high)})"

    def pays(e):
        return e.mean >= worth and e.low > 0

    least = f"the least that is worth it is {show(worth)}"
    if pays(gain):
        because = f"Federating gains {of(gain)} over nodes on their own; {least}."
        if not losers:
            return Verdict("federate", because)
        because += f" {_nodes(losers)} on their own examples"
        if losers_tuned < losers:
            left = f"{losers_tuned} of them" if losers_tuned else "none"
            because += f"; after fine-tuning at home {left} still do."
            return Verdict("federate with personalisation", because)
        because += ", and fine-tuning at home does not mend that: let them opt out."
        return Verdict("federate", because)
    if pays(tuned):
        because = (
            f"The federated model fine-tuned at each node gains {of(tuned)} over nodes "
            f"on their own; as it comes it gains {of(gain)}; {least}."
        )
        return Verdict("federate with personalisation", because)
    if gain.high < worth and tuned.high < worth:
        because = f"Federating gains {of(gain)} over nodes on their own; {least}."
        if pooled.high < worth:
            because += (
                f" Even all data in one place would gain {of(pooled)}: your nodes have "
                "enough of their own."
            )
        elif pays(pooled):
            because += (
                f" All data in one place would gain {of(pooled)}: there is something "
                "to be had, but this federation on this budget does not get it; more "
                "rounds, other rates or another algorithm may."
            )
        else:
            because += f" All data in one place: {of(pooled)}."
        return Verdict("not worth it", because)
    because = f"Federating gains {of(gain)} over nodes on their own"
    unsure = gain
    if gain.high < worth:
        unsure = tuned
        because += f", and fine-tuned at each node {of(tuned)}"
    larger = "seeds" if unsure.of_seeds > unsure.of_examples else "test examples"
    because += (
        f"; {least}, and whether it is that much is within the noise of seeds and test "
        f"size. Most of the noise is that of {larger}: use more of them."
    )
    return Verdict("not shown", because)


def _nodes(k: int) -> str:
    return "1 node loses" if k == 1 else f"{k} nodes lose"
