"""MNIST from each of its sources, and its writers."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxfl.data.build_embedded_mnist as build
from jaxfl.data import data_root, from_arrays, mnist, mnist_writers, natural
from jaxfl.data import read_checked as read
from jaxfl.data.mnist import read_idx

ROOT = os.environ.get("JAXFL_DATA_DIR")
needs_files = pytest.mark.skipif(
    not ROOT, reason="JAXFL_DATA_DIR is not set: no original MNIST files"
)
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
NAMES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


@pytest.fixture(scope="module")
def files():
    return mnist("files")


def check_types(digits, examples):
    assert digits["x"].shape == (examples, 28, 28, 1)
    assert digits["x"].dtype == np.uint8
    assert digits["y"].shape == (examples,) and digits["y"].dtype == np.int32


def test_embedded_is_balanced_and_small():
    train, test = mnist("embedded")
    check_types(train, 5000)
    check_types(test, 1000)
    assert set(np.bincount(train["y"])) == {500} and set(np.bincount(test["y"])) == {
        100
    }
    assert train["x"].max() == 255
    assert 0.12 < train["x"].mean() / 255 < 0.14  # 0.1307 in the whole of MNIST
    assert build.OUTPUT.stat().st_size <= 1_500_000
    licence = build.OUTPUT.with_suffix(".md").read_text()
    assert "Creative Commons" in licence and "LeCun" in licence


@needs_files
def test_embedded_rows_are_those_of_the_originals(files):
    arrays = np.load(build.OUTPUT)
    for split, embedded, original in zip(
        ("train", "test"), mnist("embedded"), files, strict=True
    ):
        rows = arrays[f"{split}_rows"]
        assert (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(embedded["x"], original["x"][rows])
        np.testing.assert_array_equal(embedded["y"], original["y"][rows])


@needs_files
def test_the_script_builds_the_embedded_file_again():
    arrays, again = np.load(build.OUTPUT), build.subset(data_root() / "mnist")
    assert set(arrays) == set(again)
    for name in again:
        np.testing.assert_array_equal(arrays[name], again[name])
        assert arrays[name].dtype == again[name].dtype


@needs_files
def test_files_are_mnist(files):
    train, test = files
    check_types(train, 60_000)
    check_types(test, 10_000)
    np.testing.assert_array_equal(np.bincount(train["y"]), TRAIN_COUNTS)
    assert abs(train["x"].mean() / 255 - 0.1307) < 5e-5
    assert abs(train["x"].std() / 255 - 0.3081) < 5e-5


@needs_files
def test_writers_are_a_natural_partition(files):
    train, test = mnist_writers()
    assert train.dtype == test.dtype == np.int32
    assert train.shape == (60_000,) and test.shape == (10_000,)
    assert len(np.unique(train)) == 539 and len(np.unique(test)) == 297
    assert not set(train) & set(test)
    data = from_arrays(files[0]["x"], files[0]["y"], natural(train))
    assert (data.num_clients, data.shortest, data.longest) == (539, 19, 131)
    assert np.median(data.size) == 116


def test_idx_is_read_and_a_file_of_another_kind_is_not():
    header = bytes([0, 0, 12, 2, 0, 0, 0, 1, 0, 0, 0, 2])
    array = read_idx(header + bytes([0, 0, 1, 0, 255, 255, 255, 255]))
    np.testing.assert_array_equal(array, [[256, -1]])
    assert array.dtype == np.int32 and array.dtype.isnative
    with pytest.raises(ValueError, match="an idx file should begin with"):
        read_idx(b"<html>")
    with pytest.raises(ValueError):
        read_idx(header)


def test_no_source_stands_in_for_another(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXFL_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="source was 'mnist'; it should be 'embedded'"):
        mnist("mnist")  # type: ignore
    with pytest.raises(ValueError, match="data_dir was 'a'; it should be None"):
        mnist("embedded", data_dir="a")
    with pytest.raises(ValueError, match="JAXFL_DATA_DIR is not set"):
        mnist("files")
    with pytest.raises(FileNotFoundError) as error:
        mnist("files", data_dir=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "mnist" / NAMES[0]) in message
    assert "https://" in message and "JAXFL_DATA_DIR" in message
    monkeypatch.setenv("JAXFL_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere.*qmnist"):
        read("qmnist", sha256="", origin="https://a.org")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / NAMES[0]).write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=f"{NAMES[0]}: the SHA-256 was .* should be 440"
    ):
        mnist("files", data_dir=tmp_path)


@needs_files
def test_the_argument_wins_over_the_environment(files, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFL_DATA_DIR", str(tmp_path))
    train, _ = mnist("files", data_dir=ROOT)
    np.testing.assert_array_equal(train["x"], files[0]["x"])


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """MNIST as TensorFlow Datasets itself prepares it, from the files, offline."""
    if not ROOT or not (script := pathlib.Path(ROOT, "seed_tfds_cache.py")).exists():
        pytest.skip("JAXFL_DATA_DIR is not set, or has no seed_tfds_cache.py")
    pytest.importorskip("tensorflow_datasets", reason="needs the extra `tfds`")
    data_dir = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, str(script), "--data-dir", str(data_dir)]
    subprocess.run(command, check=True, capture_output=True)
    return data_dir


@pytest.mark.filterwarnings("default")  # those of TensorFlow Datasets are its own
def test_tfds_has_the_same_digits_as_the_files(tfds_dir, files):
    loaded = mnist("tfds", data_dir=tfds_dir)
    for digits, original in zip(loaded, files, strict=True):
        check_types(digits, len(original["y"]))
        assert in_some_order(digits) == in_some_order(original)


def in_some_order(digits):
    return sorted(zip(map(bytes, digits["x"]), digits["y"].tolist(), strict=True))


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is there"
)
def test_tfds_that_cannot_prepare_says_what_to_do(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="needs the extra `tfds`")
    if not ROOT or not (script := pathlib.Path(ROOT, "seed_tfds_cache.py")).exists():
        pytest.skip("JAXFL_DATA_DIR is not set, or has no seed_tfds_cache.py")
    command = [sys.executable, str(script), "--data-dir", str(tmp_path)]
    subprocess.run([*command, "--format", "none"], check=True, capture_output=True)
    with pytest.raises(ImportError, match="needs the package 'tensorflow' to prepare"):
        mnist("tfds", data_dir=tmp_path)


def test_tfds_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxfl\[tfds\]'"):
        mnist("tfds")


def test_importing_the_data_package_pulls_in_no_heavy_library():
    code = (
        "import sys, jaxfl.data, jaxfl.plot; print([m for m in ('tensorflow', "
        "'tensorflow_datasets', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
