"""Mixing matrices: their weights by hand, and how fast they average."""

import numpy as np
import pytest

from jaxfl import topology

STAR = np.zeros((4, 4), int)
STAR[0, 1:] = STAR[1:, 0] = 1

ALL = {
    "ring": topology.ring(7),
    "ring of one": topology.ring(1),
    "ring of two": topology.ring(2),
    "torus": topology.torus(3, 4),
    "thin torus": topology.torus(2, 3),
    "complete": topology.complete(6),
    "star": topology.metropolis(STAR),
}


@pytest.mark.parametrize("name", ALL)
def test_weights_are_symmetric_and_doubly_stochastic(name):
    weights = ALL[name]
    assert weights.dtype == np.float32 and (weights >= 0).all()
    np.testing.assert_array_equal(weights, weights.T)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-6)


def test_metropolis_by_hand():
    """A star: the middle has three neighbours, each of its leaves one."""
    want = np.full((4, 4), 0.0)
    want[0] = want[:, 0] = 1 / 4
    want[[1, 2, 3], [1, 2, 3]] = 3 / 4
    np.testing.assert_allclose(ALL["star"], want, rtol=1e-6)
    with_loops = STAR + 5 * np.eye(4, dtype=int)
    np.testing.assert_array_equal(topology.metropolis(with_loops), ALL["star"])


def test_neighbours():
    ring, torus = topology.ring(7), topology.torus(3, 4)
    assert np.flatnonzero(ring[0]).tolist() == [0, 1, 6]
    # node 5 is in row 1 and column 1 of 3 x 4
    assert np.flatnonzero(torus[5]).tolist() == [1, 4, 5, 6, 9]
    np.testing.assert_allclose(torus[torus > 0], 1 / 5, rtol=1e-6)
    np.testing.assert_allclose(topology.complete(6), 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(topology.ring(2), 1 / 2)


@pytest.mark.parametrize("n", [3, 4, 9, 16])
def test_spectral_gap_of_a_ring(n):
    """Its eigenvalues are (1 + 2 cos(2 pi k / n)) / 3."""
    others = np.abs(1 + 2 * np.cos(2 * np.pi * np.arange(1, n) / n)) / 3
    assert abs(topology.spectral_gap(topology.ring(n)) - (1 - others.max())) < 1e-6


def test_spectral_gap_of_a_torus_is_that_of_its_longer_ring():
    """Its eigenvalues are (1 + 2 cos a + 2 cos b) / 5."""
    gap = 1 - (3 + 2 * np.cos(2 * np.pi / 6)) / 5
    assert abs(topology.spectral_gap(topology.torus(4, 6)) - gap) < 1e-6


def test_spectral_gap_at_its_ends():
    assert abs(topology.spectral_gap(topology.complete(5)) - 1) < 1e-6
    assert topology.spectral_gap(topology.ring(1)) == 1
    parts = np.kron(np.eye(2), np.ones((2, 2)))
    assert abs(topology.spectral_gap(topology.metropolis(parts))) < 1e-6


def test_metropolis_of_a_networkx_graph():
    networkx = pytest.importorskip("networkx")
    graph = networkx.Graph([("hub", "a"), ("hub", "b"), ("hub", "c")])
    np.testing.assert_array_equal(topology.metropolis(graph), ALL["star"])
    graph = networkx.erdos_renyi_graph(12, 0.3, seed=1)
    np.testing.assert_array_equal(
        topology.metropolis(graph),
        topology.metropolis(networkx.to_numpy_array(graph)),
    )


def test_metropolis_of_what_lists_its_neighbours():
    """All that is asked of a graph is an adjacency, as a networkx graph has."""

    class Graph:
        def adjacency(self):
            return iter(
                [("hub", "abc"), ("a", ["hub"]), ("b", ["hub"]), ("c", {"hub"})]
            )

    np.testing.assert_array_equal(topology.metropolis(Graph()), ALL["star"])


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: topology.ring(0), "n must .* 0"),
        (lambda: topology.complete(-1), "n must .* -1"),
        (lambda: topology.torus(0, 3), "rows .* 0"),
        (lambda: topology.torus(3, 0), "columns .* 0"),
        (lambda: topology.metropolis(np.ones((2, 3))), "graph must be a matrix"),
        (lambda: topology.metropolis(np.triu(np.ones((3, 3)))), "undirected"),
    ],
)
def test_impossible_graphs(make, match):
    with pytest.raises(ValueError, match=match):
        make()
