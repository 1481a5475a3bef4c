"""CIFAR-10, from the source that was asked for."""

import io
import os
from typing import Literal

import numpy as np

from jaxfl.data.files import read_checked
from jaxfl.data.tfds import prepared

_SHA256 = "5ab35b2792943e4ceb0bee7e0550380e986c084323a6a90cf2d6d85597b5ef2d"
_ORIGIN = (
    "https://www.cs.toronto.edu/~kriz/cifar.html (no page has this file itself: it is "
    "data_batch_1 and the first 2,000 images of test_batch), or take source='tfds'"
)


def cifar10(
    source: Literal["subset", "tfds"],
    *,
    data_dir: str | os.PathLike | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """CIFAR-10, small colour images of ten kinds of things: training and test examples.

    Accuracies on the subset are not comparable with those published for the whole: it
    has a fifth of the training images.

    Args:
      source: where the images come from.
        `"subset"`: 10,000 + 2,000 of them, the file `cifar10/cifar10-10k.npz` in the
        data folder, checksum verified: `data_batch_1` of the original, in order, and
        the first images of its `test_batch`; arrays `x_train`, `y_train`, `x_test` and
        `y_test`.
        `"tfds"`: all 50,000 + 10,000, from TensorFlow Datasets, see `mnist`.
      data_dir: for `"subset"` the data folder (None reads the environment variable
        `JAXFL_DATA_DIR`); for `"tfds"` the `data_dir` of TensorFlow Datasets.

    Returns:
      `(train, test)`, each `{"x": uint8 [E, 32, 32, 3], "y": int32 [E]}`.

    Raises:
      ValueError: an unknown source, or a file whose checksum is wrong.
      FileNotFoundError: the file is missing.
      ImportError: TensorFlow Datasets, or the TensorFlow it prepares with, is missing.

    Example:
      ```python
      train, test = cifar10("subset")
      ids = dirichlet(train["y"], num_clients=100, alpha=0.1, seed=0)
      data = from_arrays(train["x"], train["y"], ids)
      ```

    Reference: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images",
      technical report, University of Toronto.
    """
    if source == "subset":
        content = read_checked(
            "cifar10/cifar10-10k.npz", sha256=_SHA256, origin=_ORIGIN, data_dir=data_dir
        )
        with np.load(io.BytesIO(content)) as arrays:
            return (
                _images(arrays["x_train"], arrays["y_train"]),
                _images(arrays["x_test"], arrays["y_test"]),
            )
    if source == "tfds":
        train, test = (
            [(example["image"], example["label"]) for example in split]
            for split in prepared("cifar10", ("train", "test"), data_dir)
        )
        return (
            _images(*map(np.stack, zip(*train, strict=True))),
            _images(*map(np.stack, zip(*test, strict=True))),
        )
    raise ValueError(f"source was {source!r}; it should be 'subset' or 'tfds'")


def _images(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": images, "y": labels.astype(np.int32)}
