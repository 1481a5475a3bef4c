"""Synthetic(alpha, beta): every deviation in its definition, and no other."""

import numpy as np
import pytest
from scipy import stats

from jaxfl.data import synthetic

CLIENTS = 400


def client_means(examples, ids):
    sizes = np.bincount(ids)
    sums = np.zeros((len(sizes), 60))
    np.add.at(sums, ids, examples["x"].astype(np.float64))
    return sums / sizes[:, None], sizes


def accepts(values, deviation, axis_size=1):
    """Whether a chi-square test finds nothing against a normal deviation."""
    values = np.ravel(values)
    statistic = (values**2).sum() / deviation**2
    share = stats.chi2.cdf(statistic, len(values))
    return 1e-4 < share < 1 - 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_inputs(beta):
    examples, ids = synthetic(1.0, beta, num_clients=CLIENTS, seed=1)
    means, sizes = client_means(examples, ids)
    variance = np.arange(1, 61) ** -1.2
    # The mean of a client's 60 means is N(0, beta^2 + 1 / 60 + that of the examples).
    rest = (1 + variance.mean() / sizes) / 60
    standard = means.mean(1) / np.sqrt(beta**2 + rest)
    assert accepts(standard, 1)
    assert not accepts(standard, 1.3) and not accepts(standard, 0.75)
    # Round it they are N(0, 1).
    around = means - means.mean(1, keepdims=True)
    scale = np.sqrt(60 / 59 / (1 + variance / sizes[:, None]))
    assert 0.98 < np.std(around * scale) < 1.02
    # And examples round the client's mean have the variances j^-1.2.
    within = examples["x"] - means[ids]
    got = (within**2).sum(0) / (len(ids) - CLIENTS)
    np.testing.assert_allclose(got, variance, rtol=0.03)


def test_sizes_are_lognormal():
    _, ids = synthetic(0.0, 0.0, num_clients=CLIENTS, seed=2)
    extra = np.bincount(ids) - 50
    assert extra.min() >= 0
    # The shares of a normal variable below 0, -1 and 1.
    for log, share in ((4, 0.5), (2, 0.1587), (6, 0.8413)):
        below = np.sum(extra < np.exp(log))
        assert stats.binomtest(int(below), CLIENTS, share).pvalue > 1e-3
        assert stats.binomtest(int(below), CLIENTS, share * 0.75).pvalue < 1e-3


def test_clients_share_labels_only_if_iid():
    """Least squares on one client's labels classifies another's if and only if iid."""

    def agreement(**options):
        examples, ids = synthetic(num_clients=20, seed=3, **options)
        x = np.hstack([examples["x"], np.ones((len(ids), 1), np.float32)])
        largest = np.bincount(ids).argmax()
        mine = ids == largest
        w = np.linalg.lstsq(x[mine], np.eye(10)[examples["y"][mine]], rcond=None)[0]
        return np.mean((x[~mine] @ w).argmax(1) == examples["y"][~mine])

    assert agreement(alpha=0.0, beta=0.0, iid=True) > 0.6
    assert agreement(alpha=0.0, beta=0.0) < 0.4


def test_alpha_moves_the_bias_of_all_classes_alike():
    """W is u_k plus noise: u_k adds the same number to every class's logit.

    So labels are those of alpha = 0, example by example; what alpha changes is W.
    """
    one, _ = synthetic(0.0, 1.0, num_clients=20, seed=4)
    other, _ = synthetic(1.0, 1.0, num_clients=20, seed=4)
    np.testing.assert_array_equal(one["x"], other["x"])
    assert np.mean(one["y"] == other["y"]) > 0.999


def test_iid_inputs_have_no_mean():
    examples, _ = synthetic(0.0, 0.0, num_clients=CLIENTS, seed=5, iid=True)
    error = np.arange(1, 61) ** -0.6 / len(examples["y"]) ** 0.5
    assert np.all(np.abs(examples["x"].mean(0)) < 5 * error)


def test_same_seed_same_data_and_what_is_refused():
    np.testing.assert_array_equal(
        synthetic(1.0, 1.0, seed=0)[0]["x"], synthetic(1.0, 1.0, seed=0)[0]["x"]
    )
    with pytest.raises(ValueError, match="alpha was -1"):
        synthetic(-1.0, 0.0, seed=0)
    with pytest.raises(ValueError, match="beta was nan"):
        synthetic(0.0, float("nan"), seed=0)
    with pytest.raises(ValueError, match="with iid"):
        synthetic(1.0, 0.0, seed=0, iid=True)
    with pytest.raises(ValueError, match="num_clients was 0"):
        synthetic(0.0, 0.0, seed=0, num_clients=0)
