"""What the protocol of secure aggregation sends, by its formula."""

from typing import NamedTuple

import jax

from jaxfl.secure.graph import Graph

KEY = 256  # X25519
SHARE = 256  # of a secret below 2^255 - 19
TAG = 128  # Poly1305


class Traffic(NamedTuple):
    """Of one client, in bits: what it sends to the server, and what it is sent."""

    up: int | jax.Array
    down: int | jax.Array


def traffic(graph: Graph, coordinates: int, bits: int, *, tag: int = TAG) -> Traffic:
    """What one client sends and gets in a round in which nobody drops out.

    With k neighbours, d coordinates, and a_K, a_S and a_T the bits of a public key, of
    a share and of what authenticated encryption adds to a pair of shares:

        up   = 2 a_K   + k (2 a_S + a_T) + (k + 1) a_S + bits d
        down = 2 k a_K + k (2 a_S + a_T)

    a pair of keys; a pair of shares to each neighbour; a share of one's own and each
    neighbour's secret; and the masked input. Names and lists of clients are not
    counted. In a complete graph with a_T = 0 the sum is that of the paper,
    `2 n a_K + (5 n - 4) a_S + bits d`.

    Args:
      graph: who shares secrets with whom.
      coordinates: d.
      bits: of one masked coordinate; n inputs of R values each need
        `ceil(log2(n (R - 1) + 1))`.
      tag: a_T; 0 for the paper's own count.

    >>> from jaxfl.secure import Graph
    >>> n, d = 2**10, 2**20  # inputs of 16 bits, 26 bits in sum
    >>> round(sum(traffic(Graph(n - 1, n // 2 + 1), d, 26, tag=0)) / (16 * d), 2)
    1.73

    Reference: Bonawitz et al. 2017, arXiv:1611.04482, section 7.1.
    """
    k = graph.neighbours
    pairs = k * (2 * SHARE + tag)
    up = 2 * KEY + pairs + (k + 1) * SHARE + bits * coordinates
    return Traffic(up, 2 * k * KEY + pairs)
