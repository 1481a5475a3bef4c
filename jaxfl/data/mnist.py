"""MNIST, from the source that was asked for."""

import gzip
import importlib.resources
import os
from typing import Literal

import numpy as np

from jaxfl.data.files import read_checked
from jaxfl.data.tfds import prepared

Digits = dict[str, np.ndarray]

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_QMNIST = "https://github.com/facebookresearch/qmnist"
_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
    "qmnist-train-labels-idx2-int.gz": (
        "2c05dc77f6b916b38e455e97ab129a42a444f3dbef09b278a366f82904e0dd9f"
    ),
    "qmnist-test-labels-idx2-int.gz": (
        "9fbcbe594c3766fdf4f0b15c5165dc0d1e57ac604e01422608bb72c906030d06"
    ),
}


def mnist(
    source: Literal["embedded", "files", "tfds"],
    *,
    data_dir: str | os.PathLike | None = None,
) -> tuple[Digits, Digits]:
    """The MNIST handwritten digits: training and test examples.

    No source stands in for another: one that is not there is an error that says where
    to get it.

    Args:
      source: where the digits come from.
        `"embedded"`: 5,000 + 1,000 of them, as many of each class, shipped with jaxfl.
        `"files"`: all 60,000 + 10,000, from the four original idx files in the folder
        `mnist` of the data folder, checksums verified.
        `"tfds"`: all of them, from TensorFlow Datasets, which downloads and prepares
        what it does not have. Reading an `array_record` data set needs no TensorFlow,
        preparing one does. The order is the one TensorFlow Datasets shuffles them to.
      data_dir: for `"files"` the data folder (None reads the environment variable
        `JAXFL_DATA_DIR`); for `"tfds"` the `data_dir` of TensorFlow Datasets.

    Returns:
      `(train, test)`, each `{"x": uint8 [E, 28, 28, 1], "y": int32 [E]}`.

    Raises:
      ValueError: an unknown source, a `data_dir` for the embedded digits, or a file
        whose checksum is wrong.
      FileNotFoundError: an original file is missing.
      ImportError: TensorFlow Datasets, or the TensorFlow it prepares with, is missing.

    Example:
      >>> train, test = mnist("embedded")
      >>> train["x"].shape, train["x"].dtype, test["y"].shape, test["y"].dtype
      ((5000, 28, 28, 1), dtype('uint8'), (1000,), dtype('int32'))
      >>> np.bincount(train["y"])
      array([500, 500, 500, 500, 500, 500, 500, 500, 500, 500])

    Reference: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to
      document recognition", Proceedings of the IEEE 86(11).
    """
    if source == "embedded":
        if data_dir is not None:
            raise ValueError(
                f"data_dir was {data_dir!r}; it should be None for source='embedded', "
                "whose digits are shipped with jaxfl"
            )
        return _embedded()
    if source == "files":
        return _files("train", data_dir), _files("t10k", data_dir)
    if source == "tfds":
        train, test = prepared("mnist", ("train", "test"), data_dir)
        return _collect(train), _collect(test)
    raise ValueError(
        f"source was {source!r}; it should be 'embedded', 'files' or 'tfds'"
    )


def mnist_writers(
    data_dir: str | os.PathLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Who wrote each MNIST digit: the natural partition of MNIST.

    Rows are those of `mnist("files")`. 539 people wrote the training digits and 297
    others the test digits; `natural` makes client ids of them. They come from QMNIST,
    which found every MNIST digit again in the NIST collection it was taken from.

    Args:
      data_dir: the data folder, whose folder `mnist` has the two label files of QMNIST
        and those of MNIST; None reads the environment variable `JAXFL_DATA_DIR`.

    Returns:
      `(train, test)`, NIST's number of the writer, int32 `[60000]` and `[10000]`.

    Raises:
      FileNotFoundError: a label file is missing.
      ValueError: a checksum is wrong, or the two sets of labels do not agree.

    Example:
      ```python
      train, test = mnist("files")
      writers, test_writers = mnist_writers()
      data = from_arrays(train["x"], train["y"], natural(writers))  # 539 clients
      ```

    Reference: Yadav, Bottou 2019, "Cold Case: The Lost MNIST Digits",
      arXiv:1905.10498.
    """
    return _writers("train", "train", data_dir), _writers("test", "t10k", data_dir)


def read_idx(content: bytes) -> np.ndarray:
    """The array in a file of the idx format, plain or gzipped.

    The magic number `00 00 type rank` and `rank` big-endian sizes precede the elements;
    MNIST and QMNIST have the types `08`, unsigned byte, and `0C`, 32-bit integer.

    Args:
      content: the bytes of the file.

    Returns:
      The array, uint8 or int32, of the shape in the header.

    Raises:
      ValueError: the content is not idx of a known type, or is cut short.

    Example:
      >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
      array([7, 9], dtype=uint8)
    """
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    dtype = {b"\0\0\x08": np.dtype(np.uint8), b"\0\0\x0c": np.dtype(">i4")}.get(
        content[:3]
    )
    if dtype is None:
        raise ValueError(
            f"content began with {content[:4]!r}; an idx file should begin with "
            "00 00 08 (unsigned bytes) or 00 00 0C (32-bit integers)"
        )
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    array = np.frombuffer(content, dtype, offset=4 + shape.nbytes)
    return array.reshape(shape).astype(dtype.newbyteorder("="))


def _digits(images: np.ndarray, labels: np.ndarray) -> Digits:
    return {"x": images.reshape(-1, 28, 28, 1), "y": labels.astype(np.int32)}


def _embedded() -> tuple[Digits, Digits]:
    file = importlib.resources.files("jaxfl.data") / "mnist_embedded.npz"
    with file.open("rb") as stream, np.load(stream) as arrays:
        return (
            _digits(arrays["train_images"], arrays["train_labels"]),
            _digits(arrays["test_images"], arrays["test_labels"]),
        )


def _read(name: str, origin: str, data_dir: str | os.PathLike | None) -> np.ndarray:
    return read_idx(
        read_checked(
            f"mnist/{name}", sha256=_SHA256[name], origin=origin, data_dir=data_dir
        )
    )


def _files(split: str, data_dir: str | os.PathLike | None) -> Digits:
    return _digits(
        _read(f"{split}-images-idx3-ubyte.gz", _MNIST, data_dir),
        _read(f"{split}-labels-idx1-ubyte.gz", _MNIST, data_dir),
    )


def _writers(qmnist: str, split: str, data_dir: str | os.PathLike | None) -> np.ndarray:
    labels = _read(f"{split}-labels-idx1-ubyte.gz", _MNIST, data_dir)
    extended = _read(f"qmnist-{qmnist}-labels-idx2-int.gz", _QMNIST, data_dir)
    # QMNIST's test file goes on with the 50,000 digits that MNIST had lost.
    extended = extended[: len(labels)]
    if not np.array_equal(extended[:, 0], labels):
        raise ValueError(
            f"the classes in qmnist-{qmnist}-labels-idx2-int.gz should be those in "
            f"{split}-labels-idx1-ubyte.gz, and were not"
        )
    return np.ascontiguousarray(extended[:, 2])


def _collect(examples) -> Digits:
    images, labels = zip(
        *((example["image"], example["label"]) for example in examples), strict=True
    )
    return _digits(np.stack(images), np.asarray(labels))
