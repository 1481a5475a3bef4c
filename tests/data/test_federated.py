"""The container: grouping, pooling, stacking, counting."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxfl.data import (
    ClientData,
    client_rows,
    from_arrays,
    group,
    label_counts,
    pool,
    stack,
    stack_axes,
)


@pytest.fixture
def ragged():
    """Five clients: 3, 0, 1, 4 and 0 examples."""
    ids = np.array([3, 0, 3, 2, 0, 3, 0, 3])
    return ids, group({"x": np.arange(8) * 10, "y": ids % 3}, ids, num_clients=5)


def random_ids(seed, examples=200, clients=7):
    return np.random.default_rng(seed).integers(clients, size=examples)


def test_a_client_holds_its_own_rows_in_their_order(ragged):
    ids, data = ragged
    assert data.num_clients == 5
    assert (data.shortest, data.longest, data.static_size) == (0, 4, None)
    for client, rows in enumerate(client_rows(data)):
        np.testing.assert_array_equal(rows, np.flatnonzero(ids == client))


def test_the_order_is_kept_in_large_sets_too():
    ids = random_ids(0, examples=50_000)
    data = group(ids, ids)
    assert all((np.diff(rows) > 0).all() for rows in client_rows(data))


def test_integers_are_int32_on_the_host_and_examples_are_not_copied():
    x = np.zeros((4, 2), np.uint8)
    data = group({"x": x}, [0, 1, 1, 0])
    assert data.examples["x"] is x
    for field in (data.index, data.start, data.size):
        assert isinstance(field, np.ndarray) and field.dtype == np.int32
    device = jnp.zeros(4)
    assert from_arrays(device, device, [0, 1, 1, 0]).examples["x"] is device


@pytest.mark.parametrize("on_device", [False, True])
def test_take_reads_only_the_clients_rows(ragged, on_device):
    ids, data = ragged
    if on_device:
        data = jax.device_put(data)
    own = np.flatnonzero(ids == 3) * 10
    np.testing.assert_array_equal(data[3].take(jnp.arange(4))["x"], own)
    past_the_end = data[3].take(jnp.array([4, 99]))["x"]
    assert set(np.asarray(past_the_end)) <= set(own)


def test_a_cohort_inside_jit_and_vmap_is_a_loop_over_clients(ragged):
    _, data = ragged

    @jax.jit
    def sums(data, clients):
        def total(client: ClientData):
            position = jnp.arange(data.longest)
            x = client.take(position)["x"]
            return jnp.where(position < client.size, x, 0).sum()

        axes = (ClientData(None, None, 0, 0, data.shortest, data.longest),)  # type: ignore
        return jax.vmap(total, in_axes=axes)(data[clients])

    clients = jnp.array([4, 3, 0, 2])
    expected = [data.examples["x"][client_rows(data)[c]].sum() for c in clients]
    np.testing.assert_array_equal(sums(data, clients), expected)


def test_pool_holds_all_rows_once_whatever_the_partition(ragged):
    _, data = ragged
    pooled = pool(data)
    assert pooled.num_clients == 1 and pooled.static_size == 8
    np.testing.assert_array_equal(pooled.index, np.arange(8))
    np.testing.assert_array_equal(pooled.size, [8])


def test_pool_of_a_cohort_holds_the_cohorts_rows(ragged):
    ids, data = ragged
    pooled = pool(data[np.array([2, 3])])
    np.testing.assert_array_equal(pooled.index, np.flatnonzero(ids >= 2))
    assert pooled.longest == 5


def test_vmap_over_a_stack_is_a_loop_over_partitions():
    examples = {"x": np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)}
    datasets = [group(examples, random_ids(s), num_clients=7) for s in range(4)]
    stacked = stack(datasets)
    assert stacked.examples is examples
    assert stacked.index.shape == (4, 200)
    assert stacked.start.shape == stacked.size.shape == (4, 7)
    assert stacked.shortest == min(d.shortest for d in datasets)
    assert stacked.longest == max(d.longest for d in datasets)

    def client_sum(data, client):
        position = jnp.arange(stacked.longest)
        x = data[client].take(position)["x"]
        return jnp.where((position < data[client].size)[:, None], x, 0).sum(axis=0)

    def sums(data):
        return jax.vmap(lambda client: client_sum(data, client))(jnp.arange(7))

    found = jax.jit(jax.vmap(sums, in_axes=(stack_axes(stacked),)))(stacked)
    expected = [
        [examples["x"][rows].sum(axis=0) for rows in client_rows(data)]
        for data in datasets
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_stack_pads_partitions_that_hold_fewer_rows(ragged):
    _, data = ragged
    three = pool(data[np.array([0])])
    both = stack([pool(data), three])
    assert both.index.shape == (2, 8)
    axes = (stack_axes(both),)
    held = jax.vmap(lambda d: d[0].take(jnp.arange(8))["x"], in_axes=axes)(both)
    np.testing.assert_array_equal(held[0], np.arange(8) * 10)
    np.testing.assert_array_equal(held[1][:3], [10, 40, 60])
    assert set(np.asarray(held[1])) == {10, 40, 60}  # never the padding


def test_stack_wants_the_very_same_examples_and_number_of_clients():
    x = np.zeros(4)
    data = group({"x": x}, [0, 1, 1, 0])
    assert stack([data, group({"x": x}, [0, 0, 0, 1])]).start.shape == (2, 2)
    with pytest.raises(ValueError, match="datasets had different examples"):
        stack([data, group({"x": x.copy()}, [0, 1, 1, 0])])
    with pytest.raises(ValueError, match="datasets had 2 and 3 clients"):
        stack([data, group({"x": x}, [0, 1, 1, 0], num_clients=3)])
    with pytest.raises(ValueError, match="datasets was empty"):
        stack([])


def test_label_counts_are_the_histogram_of_every_client(ragged):
    ids, data = ragged
    counts = label_counts(data, num_classes=4)
    expected = np.zeros((5, 4), int)
    np.add.at(expected, (ids, ids % 3), 1)
    np.testing.assert_array_equal(counts, expected)
    # The classes are those of all examples, also where a cohort lacks the last ones.
    assert label_counts(data[np.array([1, 0])]).shape == (2, 3)


def text(table):
    console = rich.console.Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_describe_has_a_row_a_client_and_fits_80_columns():
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=60_000)
    data = from_arrays(y, y, rng.integers(20, size=60_000))
    table = data.describe()
    assert table.row_count == 20
    shown = text(table)
    assert "20 clients, 60,000 examples" in shown
    assert "…" not in shown  # nothing was cut
    first = [f"{data.size[0]:,d}", "10", *map(str, label_counts(data)[0])]
    assert shown.splitlines()[4].split() == ["0", *first]


def test_describe_summarises_many_clients_by_quantiles():
    y = np.arange(2100) % 3
    ids = np.repeat(np.arange(21), np.arange(21) * 10)
    data = from_arrays(y, y, ids)
    table = data.describe(label=None)
    assert table.row_count == 5
    rows = [line.split() for line in text(table).splitlines()[4:9]]
    assert [row[-1] for row in rows] == ["0", "50", "100", "150", "200"]


def test_describe_leaves_out_the_columns_of_very_many_classes():
    y = np.arange(100)
    assert len(from_arrays(y, y, y % 4).describe().columns) == 3


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            "client_ids had the type float64",
            lambda: group(np.ones(2), [0.0]),
        ),
        (ValueError, "client_ids had the shape", lambda: group(np.ones(2), [[0, 1]])),
        (ValueError, r"shape \(0,\)", lambda: group(np.ones(0), [])),
        (ValueError, r"shape \(3,\)", lambda: group(np.ones(3), [0, 1])),
        (ValueError, r"shape \(\)", lambda: group(np.float32(3), [0, 1])),
        (ValueError, "examples was {}", lambda: group({}, [0, 1])),
        (ValueError, r"in \[0, 1\)", lambda: group(np.ones(2), [0, 1], num_clients=1)),
        (ValueError, "between -1 and 1", lambda: group(np.ones(2), [-1, 1])),
        (
            ValueError,
            "data had start of shape",
            lambda: pool(group(np.ones(1), [0])[0]),
        ),
        (
            ValueError,
            "label was 'z'.*had .'x', 'y'",
            lambda: label_counts(from_arrays([1], [1], [0]), "z"),
        ),
        (
            ValueError,
            r"should be in \[0, 2\)",
            lambda: label_counts(from_arrays([1], [2], [0]), num_classes=2),
        ),
        (
            TypeError,
            r"examples\['y'\] had the type float64",
            lambda: label_counts(from_arrays([1], [0.5], [0])),
        ),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
