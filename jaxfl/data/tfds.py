"""What TensorFlow Datasets downloads and prepares, as NumPy."""

import os
from collections.abc import Iterable, Sequence
from typing import Any


def prepared(
    name: str, splits: Sequence[str], data_dir: str | os.PathLike | None = None
) -> list[Iterable[Any]]:
    """The examples of a data set of TensorFlow Datasets, prepared where it is not yet.

    Reading an `array_record` data set needs no TensorFlow, preparing one does. The
    order is the one TensorFlow Datasets shuffles them to.

    Args:
      name: of the data set.
      splits: such as `("train", "test")`.
      data_dir: that of TensorFlow Datasets.

    Returns:
      The examples of each split, dicts of NumPy arrays.

    Raises:
      ImportError: TensorFlow Datasets, or the TensorFlow it prepares with, is missing.

    Example:
      ```python
      train, test = prepared("cifar10", ("train", "test"))
      ```
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "source='tfds' needs TensorFlow Datasets: pip install 'jaxfl[tfds]'"
        ) from error
    builder: Any = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        # The only format that can be read without TensorFlow afterwards.
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        try:
            builder.download_and_prepare()
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} is not prepared in {builder.data_dir}, and TensorFlow "
                f"Datasets needs the package {error.name!r} to prepare it: install "
                "that, or let data_dir be a folder where it is prepared already"
            ) from error
    file_format = builder.info.file_format
    if file_format is not None and file_format.value == "tfrecord":
        return list(tfds.as_numpy(builder.as_dataset(split=list(splits))))
    return list(builder.as_data_source(split=list(splits)))
