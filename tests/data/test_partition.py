"""Partitions: their closed forms, their statistics, their seeds, their errors."""

import functools
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jaxfl.data import (
    dirichlet,
    dominant_class,
    iid,
    natural,
    quantity_skew,
    shards,
    similarity,
)

LABELS = np.random.default_rng(7).integers(10, size=20_000)

PARTITIONS = {
    "iid": iid,
    "dominant_class": functools.partial(dominant_class, bias=0.9),
    "dirichlet": functools.partial(dirichlet, alpha=0.5),
    "shards": shards,
    "similarity": functools.partial(similarity, share=0.3),
    "quantity_skew": functools.partial(quantity_skew, sigma=1.0),
}
every_partition = pytest.mark.parametrize(
    "partition", PARTITIONS.values(), ids=PARTITIONS.keys()
)


def counts(ids, labels, clients, classes=10):
    table = np.zeros((clients, classes), int)
    np.add.at(table, (ids, labels), 1)
    return table


def p_value(observed, expected):
    """The chi-square p-value; cells that should be empty must be."""
    observed, expected = np.ravel(observed), np.ravel(expected)
    assert not observed[expected == 0].any()
    possible = expected > 0
    return scipy.stats.chisquare(observed[possible], expected[possible]).pvalue


def dependence_p_value(table) -> float:
    result: Any = scipy.stats.chi2_contingency(table)
    return result.pvalue


@every_partition
def test_ids_are_int32_in_range_and_follow_the_seed(partition):
    first = partition(LABELS, num_clients=10, seed=3)
    assert first.dtype == np.int32 and first.shape == LABELS.shape
    assert set(first) == set(range(10))
    np.testing.assert_array_equal(first, partition(LABELS, num_clients=10, seed=3))
    assert (first != partition(LABELS, num_clients=10, seed=4)).any()


@every_partition
def test_neither_labels_nor_the_global_generator_are_touched(partition):
    labels = LABELS.copy()
    before = np.random.get_state()[1].copy()  # type: ignore
    partition(labels, num_clients=10, seed=0)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore


@every_partition
def test_one_client_gets_everything(partition):
    assert not partition(LABELS[:50], num_clients=1, seed=0).any()


@pytest.mark.parametrize(
    ("examples", "clients"), [(100, 10), (101, 10), (7, 7), (9, 4)]
)
def test_iid_sizes_differ_by_one_at_most(examples, clients):
    sizes = np.bincount(iid(np.zeros(examples), num_clients=clients, seed=0))
    assert len(sizes) == clients and np.ptp(sizes) == (examples % clients > 0)


def test_iid_classes_are_independent_of_clients():
    table = counts(iid(LABELS, num_clients=10, seed=0), LABELS, 10)
    assert dependence_p_value(table) > 1e-3
    biased = dominant_class(LABELS, num_clients=10, bias=0.15, seed=0)
    table = counts(biased, LABELS, 10)
    assert dependence_p_value(table) < 1e-9


def dominant_law(clients, classes, bias):
    """P(client | class), `[N, C]`, written out by hand."""
    law = np.zeros((clients, classes))
    for d in range(classes):
        home = [k for k in range(clients) if k % classes == d] or [d % clients]
        for k in range(clients):
            if bias == 0 or len(home) == clients:
                law[k, d] = 1 / clients
            elif k in home:
                law[k, d] = bias / len(home)
            else:
                law[k, d] = (1 - bias) / (clients - len(home))
    return law


@pytest.mark.parametrize("bias", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("clients", [10, 4, 23, 2, 1])
def test_dominant_class_follows_its_law_and_no_other(clients, bias):
    ids = dominant_class(LABELS, num_clients=clients, bias=bias, seed=1)
    observed = counts(ids, LABELS, clients)
    sizes = np.bincount(LABELS)
    assert p_value(observed, dominant_law(clients, 10, bias) * sizes) > 1e-4
    if clients > 1 and 0 < bias < 1:
        wrong = dominant_law(clients, 10, bias + 0.08) * sizes
        assert p_value(observed, wrong) < 1e-4


def test_dominant_class_with_bias_one_is_one_class_a_client():
    ids = dominant_class(LABELS, num_clients=10, bias=1.0, seed=0)
    np.testing.assert_array_equal(ids, LABELS)


def test_dominant_class_with_bias_zero_includes_the_own_client():
    ids = dominant_class(LABELS, num_clients=10, bias=0.0, seed=0)
    assert 0.09 < np.mean(ids == LABELS) < 0.11


def test_dominant_class_with_more_clients_than_classes_gives_each_client_one():
    ids = dominant_class(LABELS, num_clients=25, bias=1.0, seed=0)
    np.testing.assert_array_equal(ids % 10, LABELS)
    assert set(ids) == set(range(25))


def test_dominant_class_with_fewer_clients_shares_out_the_classes():
    ids = dominant_class(LABELS, num_clients=4, bias=1.0, seed=0)
    np.testing.assert_array_equal(ids, LABELS % 4)


def test_dominant_class_with_classes_that_do_not_occur():
    labels = np.zeros(4000, int)  # class 0 of 10
    ids = dominant_class(labels, num_clients=10, bias=0.5, seed=0, num_classes=10)
    assert 0.46 < np.mean(ids == 0) < 0.54
    assert set(ids) == set(range(10))


def test_dirichlet_shares_follow_the_beta_marginals_of_alpha():
    # Share of one client of one class ~ Beta(alpha, (N - 1) alpha).
    labels, clients, alpha = np.repeat(np.arange(400), 500), 5, 0.5
    ids = dirichlet(labels, num_clients=clients, alpha=alpha, seed=0)
    share = counts(ids, labels, clients, 400)[2] / 500

    def test(alpha):
        law = scipy.stats.beta(alpha, (clients - 1) * alpha)
        # Shares are multiples of 1/500; a jitter of that width undoes the rounding.
        jitter = np.random.default_rng(0).uniform(-0.5, 0.5, 400) / 500
        return scipy.stats.kstest(np.clip(share + jitter, 0, 1), law.cdf).pvalue

    assert test(alpha) > 1e-3
    assert test(0.8) < 1e-3 and test(0.3) < 1e-3


def test_dirichlet_limits_of_alpha():
    even = counts(dirichlet(LABELS, num_clients=10, alpha=1e6, seed=0), LABELS, 10)
    np.testing.assert_allclose(even, np.tile(np.bincount(LABELS) / 10, (10, 1)), atol=3)
    ids = dirichlet(LABELS, num_clients=10, alpha=1e-4, seed=0, min_size=0)
    assert counts(ids, LABELS, 10).max(axis=0).sum() > 0.99 * len(LABELS)


def test_dirichlet_shares_a_class_out_at_random_and_not_in_file_order():
    labels = np.zeros(5000, int)
    ids = dirichlet(labels, num_clients=2, alpha=100, seed=0)
    late = np.arange(5000) >= 2500
    assert dependence_p_value(counts(ids, late.astype(int), 2, 2)) > 1e-3


def test_dirichlet_respects_min_size():
    def smallest(min_size):
        ids = dirichlet(LABELS, num_clients=20, alpha=0.1, seed=1, min_size=min_size)
        return np.bincount(ids, minlength=20).min()

    assert smallest(0) < 100 <= smallest(100)


def test_shards_are_equal_and_hold_few_classes():
    labels = np.repeat(np.arange(10), 600)[np.random.default_rng(0).permutation(6000)]
    ids = shards(labels, num_clients=100, seed=0)
    assert set(np.bincount(ids)) == {60}
    classes = np.count_nonzero(counts(ids, labels, 100), axis=1)
    # 20 shards a class: a second one of the same class has the probability 19/199.
    assert set(classes) == {1, 2}
    assert 1 <= (classes == 1).sum() <= 20


def test_shards_of_the_mcmahan_setting_keep_the_files_order_inside_a_class():
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    ids = shards(labels, num_clients=4, shards_per_client=1, seed=0)
    # Shards, sorted and stable: rows (1, 3), (5, 7), (0, 2), (4, 6).
    assert ids[1] == ids[3] and ids[5] == ids[7]
    assert ids[0] == ids[2] and ids[4] == ids[6]
    assert sorted(np.bincount(ids)) == [2, 2, 2, 2]


def test_shards_of_a_large_set_are_stretches_of_the_stable_sort():
    ids = shards(LABELS, num_clients=100, shards_per_client=1, seed=0)
    in_order = ids[np.lexsort((np.arange(len(LABELS)), LABELS))]
    assert (in_order.reshape(100, 200) == in_order[::200, None]).all()


def test_similarity_is_a_share_at_random_and_the_rest_in_order():
    labels = np.repeat(np.arange(10), 600)[np.random.default_rng(0).permutation(6000)]
    ids = similarity(labels, num_clients=100, share=0.0, seed=0)
    table = counts(ids, labels, 100)
    assert (np.count_nonzero(table, axis=1) == 1).all()  # 10 clients a class
    assert (table.sum(1) == 60).all() and (table.sum(0) == 600).all()
    ids = similarity(labels, num_clients=100, share=0.1, seed=0)
    sizes = np.bincount(ids)
    assert sizes.sum() == 6000 and np.ptp(sizes) <= 2
    # Of its 60, 54 are of one class, or of two where the draw has shifted the order.
    top_two = np.sort(counts(ids, labels, 100), axis=1)[:, -2:].sum(1)
    assert (top_two >= 54).all() and (top_two < 60).any()
    table = counts(similarity(labels, num_clients=10, share=1.0, seed=0), labels, 10)
    assert dependence_p_value(table) > 0.01


def test_shards_that_do_not_divide_differ_by_one():
    sizes = np.bincount(shards(LABELS[:107], num_clients=5, seed=0))
    assert sizes.sum() == 107 and sizes.min() >= 20 and sizes.max() <= 22


def test_quantity_skew_sizes_are_log_normal_of_sigma():
    sizes = np.bincount(
        quantity_skew(np.zeros(1_000_000), num_clients=1000, sigma=1.5, seed=0)
    )
    assert sizes.sum() == 1_000_000 and sizes.min() >= 1

    logs = np.log(np.maximum(sizes - 1, 0.5))

    def test(sigma):
        # The sum that sizes are divided by is random: centring leaves it out.
        return scipy.stats.kstest((logs - logs.mean()) / sigma, "norm").pvalue

    assert test(1.5) > 1e-3
    assert test(1.1) < 1e-4 and test(2.1) < 1e-4


def test_quantity_skew_keeps_classes_iid_and_has_its_limits():
    ids = quantity_skew(LABELS, num_clients=10, sigma=1.0, seed=0)
    assert dependence_p_value(counts(ids, LABELS, 10)) > 1e-3
    equal = np.bincount(quantity_skew(LABELS[:103], num_clients=10, sigma=0, seed=0))
    assert np.ptp(equal) == 1
    extreme = quantity_skew(LABELS[:103], num_clients=10, sigma=1e6, seed=0)
    assert sorted(np.bincount(extreme)) == [1] * 9 + [94]


def test_natural_ids_are_dense_and_sorted():
    np.testing.assert_array_equal(natural([107, 5, 107, 99]), [2, 0, 2, 1])
    assert natural(np.array(["b", "a"])).dtype == np.int32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "num_clients was 0", lambda: iid([1], num_clients=0, seed=0)),
        (
            ValueError,
            "labels had 3 examples.*at least 4",
            lambda: iid([1, 2, 3], num_clients=4, seed=0),
        ),
        (ValueError, r"shape \(1, 2\)", lambda: iid([[1, 2]], num_clients=1, seed=0)),
        (
            ValueError,
            "bias was 1.1; it should be from 0 to 1",
            lambda: dominant_class(LABELS, num_clients=2, bias=1.1, seed=0),
        ),
        (
            ValueError,
            "bias was nan",
            lambda: dominant_class(LABELS, num_clients=2, bias=np.nan, seed=0),
        ),
        (
            ValueError,
            "num_classes was 3; it should be above the largest label, 9",
            lambda: dominant_class(
                LABELS, num_clients=2, bias=0.5, seed=0, num_classes=3
            ),
        ),
        (
            TypeError,
            "labels had the type float64",
            lambda: dominant_class([0.5], num_clients=2, bias=1.0, seed=0),
        ),
        (
            ValueError,
            "labels had -1",
            lambda: dirichlet([-1, 0], num_clients=2, alpha=1.0, seed=0),
        ),
        (
            ValueError,
            "alpha was 0",
            lambda: dirichlet(LABELS, num_clients=2, alpha=0, seed=0),
        ),
        (
            ValueError,
            "min_size was 1900, which no draw reached",
            lambda: dirichlet(
                LABELS, num_clients=10, alpha=0.01, seed=0, min_size=1900
            ),
        ),
        (
            ValueError,
            "labels had 20000 examples",
            lambda: dirichlet(LABELS, num_clients=10, alpha=9, seed=0, min_size=2001),
        ),
        (
            ValueError,
            "shards_per_client was 0",
            lambda: shards(LABELS, num_clients=2, shards_per_client=0, seed=0),
        ),
        (ValueError, "at least 4", lambda: shards([1, 2], num_clients=2, seed=0)),
        (
            ValueError,
            "share was 1.5",
            lambda: similarity(LABELS, num_clients=2, share=1.5, seed=0),
        ),
        (
            ValueError,
            "sigma was -1",
            lambda: quantity_skew(LABELS, num_clients=2, sigma=-1, seed=0),
        ),
        (ValueError, r"shape \(\)", lambda: natural(3)),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
