"""C-MAPSS: what is in its tables, windows of them, and federated standardising."""

import gzip
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfl
from jaxfl.data import (
    cmapss,
    cmapss_sensors,
    from_arrays,
    group,
    last_rows,
    window_rows,
)

needs_files = pytest.mark.skipif(
    not os.environ.get("JAXFL_DATA_DIR"),
    reason="JAXFL_DATA_DIR is not set: no original C-MAPSS files",
)
# Rows and engines of both files, and the fewest and most cycles to a failure.
COUNTS = {
    "FD001": (20631, 100, 13096, 100, 128, 362),
    "FD002": (53759, 260, 33991, 259, 128, 378),
    "FD003": (24720, 100, 16596, 100, 145, 525),
    "FD004": (61249, 249, 41214, 248, 128, 543),
}


@needs_files
@pytest.mark.parametrize("subset", COUNTS)
def test_counts_and_remaining_life(subset):
    train, test = cmapss(subset)
    rows, engines, test_rows, test_engines, shortest, longest = COUNTS[subset]
    assert train["sensors"].shape == (rows, 21) and len(test["rul"]) == test_rows
    last, test_last = last_rows(train["engine"]), last_rows(test["engine"])
    assert (len(last), len(test_last)) == (engines, test_engines)
    lives = train["cycle"][last]
    assert (lives.min(), lives.max()) == (shortest, longest)
    assert not train["rul"][last].any()
    assert 6 <= test["rul"][test_last].min() <= 7
    for table in train, test:  # a flight older is a flight less to live
        same = np.diff(table["engine"]) == 0
        assert (np.diff(table["cycle"])[same] == 1).all()
        assert (np.diff(table["rul"])[same] == -1).all()
        assert (table["cycle"][:-1] == 1)[1:][~same[:-1]].all()
    conditions = 6 if subset in ("FD002", "FD004") else 1
    for table in train, test:
        assert (np.bincount(table["condition"]) > 0).tolist() == [True] * conditions
        for c in range(conditions):  # which are clusters: the settings hardly vary
            settings = table["settings"][table["condition"] == c]
            assert (np.ptp(settings, axis=0) < 0.02).all()


@needs_files
def test_the_lives_that_nasa_gives():
    test = cmapss("FD001")[1]
    last = last_rows(test["engine"])
    assert test["rul"][last][:5].tolist() == [112, 98, 69, 82, 91]
    assert test["cycle"][last][:5].tolist() == [31, 49, 126, 106, 98]


@needs_files
def test_subsets_are_put_together():
    train, test = cmapss("FD003", "FD001")
    one = cmapss("FD001")
    for both, alone in zip((train, test), one, strict=True):
        second = both["subset"] == 1
        assert both["engine"].max() == 199
        np.testing.assert_array_equal(both["engine"][second], alone["engine"] + 100)
        for name in ("cycle", "rul", "sensors", "settings", "condition"):
            np.testing.assert_array_equal(both[name][second], alone[name])


@needs_files
def test_plain_files_are_read_too_and_damaged_ones_are_not(tmp_path):
    root = os.environ["JAXFL_DATA_DIR"]
    (tmp_path / "cmapss").mkdir()
    for kind in ("train", "test", "RUL"):
        name = f"{kind}_FD001.txt"
        with gzip.open(f"{root}/cmapss/{name}.gz") as file:
            (tmp_path / "cmapss" / name).write_bytes(file.read())
    plain, packed = cmapss("FD001", data_dir=tmp_path), cmapss("FD001")
    jax.tree.map(np.testing.assert_array_equal, plain, packed)

    path = tmp_path / "cmapss" / "RUL_FD001.txt"
    path.write_bytes(path.read_bytes() + b"1\n")
    with pytest.raises(ValueError, match="RUL_FD001.txt: the SHA-256 was"):
        cmapss("FD001", data_dir=tmp_path)
    path.unlink()
    path.with_suffix(".txt.gz").write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(ValueError, match="RUL_FD001.txt.gz: the SHA-256 was"):
        cmapss("FD001", data_dir=tmp_path)


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Get it from https://data\.nasa\.gov"):
        cmapss("FD001", data_dir=tmp_path)
    for subsets in ((), ("FD005",), ("FD001", "train")):
        with pytest.raises(ValueError, match="subsets was"):
            cmapss(*subsets)
    with pytest.raises(ValueError, match="T99"):
        cmapss_sensors(["T24", "T99"])
    with pytest.raises(ValueError, match="length was 0"):
        window_rows([0, 0], 0)
    with pytest.raises(ValueError, match="together"):
        window_rows([0, 1, 0])
    with pytest.raises(ValueError, match="shape"):
        last_rows(np.zeros((2, 2)))


def test_windows_against_a_slow_reference():
    engine = np.repeat([4, 2, 9], [7, 1, 3])
    for length in (1, 3, 8):
        rows = window_rows(engine, length)
        for row in range(len(engine)):
            own = [r for r in range(row + 1) if engine[r] == engine[row]]
            padded = [own[0]] * length + own
            assert rows[row].tolist() == padded[-length:]
    assert last_rows(engine).tolist() == [6, 7, 10]


# ------------------------------------------------------------- federated standardising


def pooled_moments(x, of, groups):
    rows = [np.asarray(x, np.float64)[of == g] for g in range(groups)]
    return np.stack([r.mean(0) for r in rows]), np.stack([r.std(0) for r in rows])


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_moments_are_those_of_all_rows_in_float64(chunk_size):
    rng = np.random.default_rng(0)
    # A deviation of a hundred-thousandth of the mean, as that of a shaft's speed.
    x = (rng.normal(size=(600, 3)) * [0.02, 1, 5] + [2388, 0, 40]).astype(np.float32)
    of = rng.integers(0, 4, 600)
    x[of == 2] += 300
    whose = np.concatenate([np.zeros(500, int), rng.integers(1, 6, 100)])
    data = group({"x": x, "of": of}, whose, num_clients=7)  # one has no rows
    found = jaxfl.moments(data, "x", "of", 4, chunk_size=chunk_size)
    mean, std = pooled_moments(x, of, 4)
    assert found.count.tolist() == np.bincount(of).tolist()
    np.testing.assert_allclose(found.mean, mean, rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(found.std, std, rtol=3e-5)
    z = found.standardize(x, of)
    np.testing.assert_allclose(z, (x - mean[of]) / std[of], atol=0.01)
    assert found.varies().all()


def test_moments_of_what_does_not_vary_and_of_nothing():
    x = np.stack([np.full(5, 518.67), [1.0, 2, 3, 4, 5]], 1)
    found = jaxfl.moments(from_arrays(x, x, [0, 0, 1, 1, 1]), num_groups=2)
    assert found.count.tolist() == [5, 0]
    assert found.varies().tolist() == [False, True]
    z = found.standardize(jnp.asarray(x))
    assert not z[:, 0].any() and abs(float(z[:, 1].mean())) < 1e-6
    assert np.isfinite(found.mean).all() and not found.std[1].any()


def test_moments_do_not_look_beyond_a_clients_rows():
    x = np.array([[1.0], [3.0], [np.nan]])
    data = from_arrays(x, x, [0, 1, 2])[jnp.arange(2)]
    found = jaxfl.moments(data)
    assert found.mean.item() == 2 and found.std.item() == 1


def test_moments_refuse():
    data = from_arrays(np.zeros((2, 1)), np.zeros(2), [0, 1])
    with pytest.raises(ValueError, match="no 'condition'"):
        jaxfl.moments(data, "x", "condition")
    with pytest.raises(ValueError, match=r"must be \[E, F\]"):
        jaxfl.moments(data, "y")
    with pytest.raises(ValueError, match="num_groups"):
        jaxfl.moments(data, num_groups=0)
    grouped = group({"x": np.zeros((2, 1)), "of": np.array([-1, 1])}, [0, 1])
    with pytest.raises(ValueError, match=r"1 groups are 0 to 0, .* has -1 to 1"):
        jaxfl.moments(grouped, "x", "of")


def test_moments_over_devices_that_do_not_divide_the_clients():
    x = np.arange(12.0, dtype=np.float32).reshape(6, 2) ** 2
    data = from_arrays(x, x, [0, 0, 1, 2, 2, 2])
    mesh = jaxfl.client_mesh(jax.devices()[:2])
    for chunk_size in (None, 1, 2):
        found = jaxfl.moments(data, chunk_size=chunk_size, mesh=mesh)
        assert found.count.item() == 6
        np.testing.assert_allclose(found.mean[0], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.std[0], x.std(0), rtol=1e-5)
    unknown = found.standardize(x, np.full(6, 1))
    assert (
        np.isnan(unknown).all()
        and np.isnan(found.standardize(x, -np.ones(6, int))).all()
    )


@needs_files
def test_conditions_standardised_federatedly():
    train, _ = cmapss("FD002")
    data = group(
        {"x": train["sensors"], "condition": train["condition"]}, train["engine"]
    )
    found = jaxfl.moments(data, "x", "condition", 6)
    mean, std = pooled_moments(train["sensors"], train["condition"], 6)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    moves = std > 1e-6 * mean
    np.testing.assert_allclose(np.asarray(found.std)[moves], std[moves], rtol=1e-5)
    assert (found.standardize(mean[0], jnp.zeros((), int)) < 1e-2).all()


@needs_files
def test_sensors_that_are_constant():
    for subset, constant in (
        ("FD001", [1, 5, 10, 16, 18, 19]),
        ("FD003", [1, 5, 16, 18, 19]),
    ):
        train = cmapss(subset)[0]
        found = jaxfl.moments(group({"x": train["sensors"]}, train["engine"]))
        assert (np.flatnonzero(~np.asarray(found.varies())) + 1).tolist() == constant
