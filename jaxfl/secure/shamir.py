"""Shamir's secret sharing over a prime field, in Python's whole numbers."""

import secrets
from collections.abc import Iterable, Mapping, Sequence

PRIME = 2**255 - 19  # so that a share takes 32 bytes


def split(
    secret: int, threshold: int, holders: Iterable[int], prime: int = PRIME
) -> dict[int, int]:
    """Shares of a secret, any t of which give it back, and fewer say nothing of it.

    `f(x) = s + a_1 x + ... + a_{t-1} x^{t-1} mod p`, the a_i drawn uniformly by the
    system's generator; holder x gets f(x).

    Args:
      secret: s, from 0 to p - 1.
      threshold: t, at least 1.
      holders: where the polynomial is evaluated, distinct and from 1 to p - 1.
      prime: p.

    Raises:
      ValueError: if the secret or a holder is not in its range, a holder comes twice,
        or there are fewer of them than the threshold.

    >>> shares = split(42, 2, [1, 2, 3])
    >>> combine({1: shares[1], 3: shares[3]})
    42

    Reference: Shamir 1979, How to share a secret.
    """
    holders = list(holders)
    if not 0 <= secret < prime:
        raise ValueError("secret must be from 0 to prime - 1.")
    if not all(0 < x < prime for x in holders) or len(set(holders)) < len(holders):
        raise ValueError(f"holders must be distinct, from 1 to p - 1, got {holders}.")
    if not 1 <= threshold <= len(holders):
        raise ValueError(
            f"threshold must be from 1 to the {len(holders)} holders, got {threshold}."
        )
    drawn = [secrets.randbelow(prime) for _ in range(threshold - 1)]
    return {x: evaluate([secret, *drawn], x, prime) for x in holders}


def combine(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """The secret of t or more shares, `sum_x f(x) prod_{y != x} y / (y - x) mod p`.

    Of fewer shares, or of some that are not of one secret, it makes another number
    without a sign of it.

    Args:
      shares: holder x to f(x).
      prime: p.

    >>> combine({2: 1942, 4: 3402, 5: 4414}, 7919)  # f(x) = 1234 + 166 x + 94 x^2
    1234
    """
    secret = 0
    for x, share in shares.items():
        above = below = 1
        for y in shares:
            if y != x:
                above, below = above * y % prime, below * (y - x) % prime
        secret += share * above * pow(below, -1, prime)
    return secret % prime


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
    """A polynomial at x, modulo a prime; its constant comes first.

    >>> evaluate([1234, 166, 94], 2, 7919)
    1942
    """
    value = 0
    for a in reversed(coefficients):
        value = (value * x + a) % prime
    return value
