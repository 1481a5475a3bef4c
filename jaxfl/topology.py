"""Mixing matrices: who averages with whom, and how much of it, for `mix`.

All are Metropolis-Hastings weights of an undirected graph: symmetric, so that averages
are kept, and computable by each node from its own and its neighbours' degrees.
"""

from typing import Any

import numpy as np


def metropolis(graph: Any) -> np.ndarray:
    """The Metropolis-Hastings weights of any undirected graph.

    `W_ij = 1 / (1 + max(d_i, d_j))` for each edge, with d the degrees, and
    `W_ii = 1 - sum_j W_ij`.

    Args:
      graph: an adjacency matrix `[N, N]`, whose entries that are not 0 are edges, or a
        networkx graph, whose i-th node is client i. Loops are ignored.

    Returns:
      float32 `[N, N]`, symmetric and doubly stochastic.

    Raises:
      ValueError: if the graph is directed, or the matrix not square.

    >>> path = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    >>> metropolis(path).round(3).tolist()
    [[0.667, 0.333, 0.0], [0.333, 0.333, 0.333], [0.0, 0.333, 0.667]]

    Reference: Xiao and Boyd 2004, Fast Linear Iterations for Distributed Averaging,
    section 4.1 of its weights by local degrees.
    """
    linked = _adjacency(graph)
    if linked.ndim != 2 or linked.shape[0] != linked.shape[1]:
        raise ValueError(f"graph must be a matrix [N, N], got shape {linked.shape}.")
    if (linked != linked.T).any():
        raise ValueError("graph must be undirected, its matrix symmetric.")
    np.fill_diagonal(linked, False)
    degree = linked.sum(1)
    weights = linked / (1.0 + np.maximum(degree[:, None], degree))
    np.fill_diagonal(weights, 1.0 - weights.sum(1))
    return weights.astype(np.float32)


def ring(n: int) -> np.ndarray:
    """n nodes in a circle, each averaging with the two beside it.

    Raises:
      ValueError: if n is not positive.

    >>> ring(4).round(3).tolist()[0]
    [0.333, 0.333, 0.0, 0.333]
    """
    _at_least_one("n", n)
    return torus(1, n)


def torus(rows: int, columns: int) -> np.ndarray:
    """A grid whose edges are joined, each node averaging with the four beside it.

    Node `i * columns + j` is in row i and column j. In a row or column of one or two
    nodes some neighbours are the same.

    Raises:
      ValueError: if rows or columns is not positive.

    >>> (torus(3, 3) > 0).sum(1).tolist()
    [5, 5, 5, 5, 5, 5, 5, 5, 5]
    """
    _at_least_one("rows", rows)
    _at_least_one("columns", columns)
    node = np.arange(rows * columns).reshape(rows, columns)
    linked = np.zeros((node.size, node.size), bool)
    for axis in (0, 1):
        for step in (-1, 1):
            linked[node, np.roll(node, step, axis)] = True
    return metropolis(linked)


def complete(n: int) -> np.ndarray:
    """Everyone averages with everyone: `W_ij = 1 / n`.

    Raises:
      ValueError: if n is not positive.

    >>> complete(4).tolist()[0]
    [0.25, 0.25, 0.25, 0.25]
    """
    _at_least_one("n", n)
    return np.full((n, n), 1.0 / n, np.float32)


def spectral_gap(weights: np.ndarray) -> float:
    """How fast averaging with these weights comes to a consensus.

    `1 - max(|lambda_2|, |lambda_N|)`: after t rounds of a symmetric W the distance to
    the average is at most `(1 - gap)^t` of what it was. 0: never, of a graph in parts.

    Args:
      weights: W, `[N, N]`, with rows that sum to 1.

    >>> round(spectral_gap(ring(6)), 3), round(spectral_gap(complete(6)), 3)
    (0.333, 1.0)
    """
    sizes = np.sort(np.abs(np.linalg.eigvals(np.asarray(weights, np.float64))))
    return 1.0 - float(sizes[-2]) if len(sizes) > 1 else 1.0


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _adjacency(graph: Any) -> np.ndarray:
    """bool `[N, N]` of a matrix, or of a graph that lists its neighbours."""
    if not hasattr(graph, "adjacency"):
        return np.array(graph) != 0
    neighbours = dict(graph.adjacency())
    place = {node: i for i, node in enumerate(neighbours)}
    linked = np.zeros((len(place), len(place)), bool)
    for node, others in neighbours.items():
        linked[place[node], [place[other] for other in others]] = True
    return linked
