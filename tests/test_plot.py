"""Figures: what is drawn is what the data says, and it is labelled."""

import sys
from typing import Any

import numpy as np
import pytest

from jaxfl.data import from_arrays, label_counts
from jaxfl.plot import label_distribution

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra `plot`")
matplotlib.use("Agg")
COUNTS = np.array([[3, 1], [0, 0], [0, 5]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def drawn(ax) -> Any:
    return ax.images[0].get_array()


def test_colours_are_shares_and_empty_clients_are_blank():
    values = drawn(label_distribution(COUNTS))
    np.testing.assert_array_equal(values[:, 0], [0.75, 0.25])
    np.testing.assert_array_equal(values[:, 2], [0, 1])
    np.testing.assert_array_equal(values.mask.all(axis=0), [False, True, False])


def test_colours_can_be_counts():
    ax = label_distribution(COUNTS, share=False)
    np.testing.assert_array_equal(drawn(ax).filled(0), COUNTS.T)
    assert ax.images[0].get_clim() == (0, 5)


def test_data_is_counted():
    y = np.arange(60) % 7
    data = from_arrays(y, y, np.arange(60) // 13)
    values = drawn(label_distribution(data, share=False))
    np.testing.assert_array_equal(values, label_counts(data).T)


def test_axes_and_colourbar_are_named_and_each_client_has_its_tick():
    ax = label_distribution(np.ones((10, 10), int))
    figure = ax.figure
    figure.canvas.draw()
    assert ax.get_xlabel() == "client (id)" and ax.get_ylabel() == "class (label)"
    assert figure.axes[1].get_ylabel() == "share of the client's examples"
    shown = [tick for tick in ax.get_xticks() if 0 <= tick <= 9]
    np.testing.assert_array_equal(shown, range(10))


def test_ticks_of_many_clients_are_whole_and_do_not_overlap():
    ax = label_distribution(np.ones((539, 10), int))
    ax.figure.canvas.draw()
    assert all(tick == int(tick) for tick in ax.get_xticks())
    labels = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in zip(labels, labels[1:], strict=False))


def test_given_axes_are_drawn_on():
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2)
    assert label_distribution(COUNTS, axes[1]) is axes[1]
    assert not axes[0].images


def test_bad_input_and_a_missing_matplotlib_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"counts of shape \(3,\); they should be"):
        label_distribution(np.ones(3))
    with pytest.raises(ValueError, match="at least 0"):
        label_distribution(-np.ones((2, 2)))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxfl\[plot\]'"):
        label_distribution(COUNTS)
