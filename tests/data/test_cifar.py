"""CIFAR-10: the images are those that were published."""

import os
import sys

import numpy as np
import pytest

from jaxfl.data import cifar10

module = sys.modules["jaxfl.data.cifar"]
needs_files = pytest.mark.skipif(
    not os.environ.get("JAXFL_DATA_DIR"), reason="JAXFL_DATA_DIR is not set"
)


@needs_files
def test_subset():
    train, test = cifar10("subset")
    assert train["x"].shape == (10_000, 32, 32, 3) and train["x"].dtype == np.uint8
    assert test["x"].shape == (2_000, 32, 32, 3) and test["y"].dtype == np.int32
    counts = [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    np.testing.assert_array_equal(np.bincount(train["y"]), counts)
    # The whole's published means and deviations, within what a fifth of it may differ.
    scaled = train["x"] / 255.0
    np.testing.assert_allclose(
        scaled.mean((0, 1, 2)), [0.4914, 0.4822, 0.4465], atol=4e-3
    )
    np.testing.assert_allclose(
        scaled.std((0, 1, 2)), [0.2470, 0.2435, 0.2616], atol=4e-3
    )


def test_tfds(monkeypatch):
    rng = np.random.default_rng(0)
    examples = [
        {"image": rng.integers(0, 256, (32, 32, 3), np.uint8), "label": np.int64(i)}
        for i in range(5)
    ]
    splits = [examples[:3], examples[3:]]
    monkeypatch.setattr(module, "prepared", lambda *_: splits)
    train, test = cifar10("tfds")
    assert train["y"].tolist() == [0, 1, 2] and train["y"].dtype == np.int32
    np.testing.assert_array_equal(test["x"][1], examples[4]["image"])


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source was 'files'"):
        cifar10("files")  # pyright: ignore
    with pytest.raises(FileNotFoundError, match="source='tfds'"):
        cifar10("subset", data_dir=tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10-10k.npz").write_bytes(b"not it")
    with pytest.raises(ValueError, match="SHA-256"):
        cifar10("subset", data_dir=tmp_path)
