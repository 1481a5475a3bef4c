"""A user's own file: what is read of it, and what is said of a bad one."""

from typing import Any

import numpy as np
import pytest

from jaxfl.data import read_table

GOOD = "site,age,dose,ill\n10,61,0.5,yes\n9,35,-1e-3,no\n10,40,2,no\n"
OPTIONS: dict[str, Any] = {"client": "site", "label": "ill"}


def written(folder, text):
    path = folder / "rows.csv"
    path.write_text(text)
    return path


def test_csv(tmp_path):
    table = read_table(written(tmp_path, GOOD), **OPTIONS)
    np.testing.assert_allclose(table.x, [[61, 0.5], [35, -1e-3], [40, 2]])
    assert table.x.dtype == np.float32 and table.features == ("age", "dose")
    assert table.clients == ("9", "10")  # by size, not by letters
    assert table.client.tolist() == [1, 0, 1]
    assert table.classes == ("no", "yes") and table.y.tolist() == [1, 0, 0]
    assert table.dropped == 0


def test_regression_and_ignored_columns(tmp_path):
    table = read_table(
        *(written(tmp_path, GOOD),),
        client="site",
        label="dose",
        task="regression",
        ignore=("ill",),
    )
    np.testing.assert_allclose(table.y, [0.5, -1e-3, 2])
    assert table.features == ("age",) and table.classes == ()


@pytest.mark.parametrize("images", [False, True])
def test_npz(tmp_path, images):
    x = (
        np.arange(24.0).reshape(4, 6)
        if not images
        else np.arange(24.0).reshape(4, 2, 3)
    )
    path = tmp_path / "rows.npz"
    np.savez(path, x=x, site=["b", "a", "b", "a"], ill=[0, 5, 0, 5])
    table = read_table(path, **OPTIONS)
    np.testing.assert_array_equal(table.x, x)
    assert table.client.tolist() == [1, 0, 1, 0] and table.classes == ("0", "5")


def test_rows_with_gaps_are_named_or_left_out(tmp_path):
    path = written(tmp_path, GOOD + "9,NA,1,yes\n9,3,,yes\n9,,?,yes\n")
    with pytest.raises(ValueError, match="3 of 6 rows.*lines 5, 6, 7") as error:
        read_table(path, **OPTIONS)
    assert "{'age': 2, 'dose': 2}" in str(error.value)
    table = read_table(path, **OPTIONS, missing="drop")
    assert table.dropped == 3 and len(table.x) == 3
    everywhere = written(tmp_path, "site,age,ill\n1,,yes\n2,,no\n")
    with pytest.raises(ValueError, match="no rows without gaps"):
        read_table(everywhere, **OPTIONS, missing="drop")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (GOOD, {"client": "hospital"}, "client: rows.csv has no column 'hospital'"),
        (GOOD, {"label": "sick"}, "label: rows.csv has no column 'sick'.*'ill'"),
        (GOOD, {"label": "site"}, "same column"),
        (GOOD, {"ignore": ("x",)}, r"no columns \['x'\]"),
        (GOOD, {"ignore": ("age", "dose")}, "no columns but"),
        (GOOD, {"ignore": ("site",)}, "ignore: 'site' is the client column"),
        (GOOD, {"ignore": ("ill",)}, "ignore: 'ill' is the label column"),
        (GOOD, {"task": "ranking"}, "task must be"),
        (GOOD, {"missing": "guess"}, "missing must be"),
        (GOOD, {"task": "regression"}, "'ill' has 'yes' in line 2, which is no number"),
        ("site,age,ill\n1,old,0\n2,3,1\n", {}, "'age' has 'old' in line 2"),
        ("site,age,ill\n1,inf,0\n2,3,1\n", {}, "'age' is not finite in line 2"),
        ("site,age,ill\n1,2,0\n1,3,1\n", {}, "one client, '1'"),
        ("site,age,ill\n1,2,0\n2,3,0\n", {}, "'ill' is '0' in all rows"),
        ("site,age,ill\n1,2,0\n2,3\n", {}, "line 3 has 2 values"),
        ("site,age,ill\n\n\n1,2,0\n2,3\n", {}, "line 5 has 2 values"),
        ("site,age,ill\n\n\n1,2,0\n2,,1\n", {}, "lines 5"),
        ('site,age,ill\n"a\nb",2,0\n2,old,1\n', {}, "'old' in line 4"),
        (",site,age,ill\n0,1,2,0\n1,2,3,1\n", {}, "without a name"),
        ("site,age,age,ill\n", {}, "a column twice"),
        ("site,age,ill\n", {}, "no rows"),
        ("", {}, "no column 'site'"),
    ],
)
def test_bad_files_are_told(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_table(written(tmp_path, text), **OPTIONS | options)


def test_other_bad_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_table(tmp_path / "none.csv", **OPTIONS)
    with pytest.raises(ValueError, match="should end in .csv or .npz"):
        read_table(tmp_path / "rows.xlsx", **OPTIONS)
    np.savez(tmp_path / "rows.npz", site=[1, 2], ill=[[0], [1]], x=[1.0, 2.0])
    with pytest.raises(
        ValueError, match=r"label: the array 'ill' .* \[E\], got \[2, 1"
    ):
        read_table(tmp_path / "rows.npz", **OPTIONS)
    np.savez(tmp_path / "rows.npz", site=[1, 2], ill=[0, 1], x=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="differ in length"):
        read_table(tmp_path / "rows.npz", **OPTIONS)
