"""Histories, and the tables made of them."""

import csv

import jax
import numpy as np
import optax
import pytest
import toy

import jaxfl
from jaxfl import history as histories


@pytest.fixture(scope="module")
def history():
    algorithm = jaxfl.fedavg(
        toy.loss, optax.sgd(0.1), batch_size=2, probe=lambda p: p["b"], probes=2
    )
    _, history = jaxfl.simulate(
        jaxfl.federate(algorithm, jaxfl.mean()),
        toy.params(),
        toy.data(),
        rounds=5,
        every=2,
        cohort_size=3,
        key=jax.random.key(0),
        evaluate=lambda state: {"b": state.params["b"], "w": state.params["w"]},
        progress=False,
    )
    return history


def test_metrics_by_name(history):
    assert history["b"].shape == (3,) and history["w"].shape == (3, 3)
    assert history.round.tolist() == [2, 4, 5]
    with pytest.raises(KeyError, match="accuracy.*'b', 'w'"):
        history["accuracy"]


def test_evaluation_table_has_the_single_numbers(history):
    table = history.evaluation_table()
    assert list(table) == ["round", "b"]
    np.testing.assert_array_equal(table["b"], history["b"])


def test_client_table_has_a_row_a_client_and_round(history):
    table = history.client_table()
    assert {len(column) for column in table.values()} == {15}
    assert table["round"].tolist() == np.repeat([1, 2, 3, 4, 5], 3).tolist()
    info = history.clients
    assert {"client", "sent", "bits_up", "loss", "steps"} <= set(table)
    assert "probe" not in table  # two numbers, not one
    for i, r in enumerate(table["round"]):
        assert table["client"][i] == info.client[r - 1, i % 3]
        assert table["steps"][i] == info.metrics["steps"][r - 1, i % 3]


def test_client_table_of_an_algorithm_that_measures_nothing():
    algorithm = jaxfl.Algorithm(
        lambda params: (params, ()),
        lambda ctx, broadcast, own, data: (data, (), ()),
        lambda ctx, state, outcome: state,
    )
    _, history = jaxfl.simulate(
        jaxfl.federate(algorithm, jaxfl.mean()),
        np.float32(0),
        np.arange(3, dtype=np.float32),
        rounds=2,
        key=jax.random.key(0),
        progress=False,
    )
    assert history.client_table()["client"].tolist() == [0, 1, 2, 0, 1, 2]


def test_bits_are_sums_over_clients(history):
    """Four numbers, and a weight where the client has examples."""
    sizes = np.array(toy.SIZES)[history.clients.client]
    bits = history.bits()
    assert bits["up"].dtype == np.float64
    np.testing.assert_array_equal(bits["up"], 32 * 5 * (sizes > 0).sum(1))
    np.testing.assert_array_equal(bits["down"], np.full(5, 32 * 4 * 3))


def test_concatenate(history):
    first, rest = (
        jax.tree.map(lambda x, s=s: x[s], history) for s in (slice(2), slice(2, None))
    )
    whole = histories.concatenate([first, rest])
    jax.tree.map(np.testing.assert_array_equal, whole, history)


def test_csv_round_trip(history, tmp_path):
    table = history.client_table()
    path = tmp_path / "new" / "clients.csv"
    histories.write_csv(path, table)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(table) and len(rows) == 15
    for name in ("client", "steps", "round"):
        assert [int(row[name]) for row in rows] == table[name].tolist()
    np.testing.assert_array_equal([float(r["loss"]) for r in rows], table["loss"])


def test_csv_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    histories.write_csv(path, {"a": np.arange(3)})
    before = path.read_text()
    with pytest.raises(ValueError):
        histories.write_csv(path, {"a": np.arange(9999), "b": np.arange(9998)})
    assert path.read_text() == before
    histories.write_csv(path, {"a": np.arange(2)})
    assert path.read_text().split() == ["a", "0", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
