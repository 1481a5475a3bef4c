"""Original data files: where they are looked for, and that they are genuine."""

import contextlib
import gzip
import hashlib
import os
import pathlib
import zlib

VARIABLE = "JAXFL_DATA_DIR"


def data_root(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder under which the original files of every data set are looked for.

    Args:
      data_dir: the folder; None reads the environment variable `JAXFL_DATA_DIR`.

    Returns:
      The folder, which need not exist.

    Raises:
      ValueError: `data_dir` is None and `JAXFL_DATA_DIR` is not set.

    Example:
      >>> data_root("my_data").name
      'my_data'
    """
    root = os.environ.get(VARIABLE) if data_dir is None else data_dir
    if not root:
        raise ValueError(
            f"data_dir was None and the environment variable {VARIABLE} is not set; "
            "one of them should be the folder with the original files"
        )
    return pathlib.Path(root).expanduser()


def read_checked(
    name: str,
    *,
    sha256: str,
    origin: str,
    data_dir: str | os.PathLike | None = None,
) -> bytes:
    """The bytes of an original file, after its SHA-256 has been verified.

    Args:
      name: the file, relative to the data folder, such as `"mnist/labels.gz"`; where
        it is not there, but `NAME.gz` is, that is unpacked.
      sha256: the checksum of the genuine file, 64 hexadecimal digits.
      origin: where a reader can get the file; part of the error messages.
      data_dir: the data folder; None reads the environment variable `JAXFL_DATA_DIR`.

    Returns:
      The content, still compressed where the file is.

    Raises:
      FileNotFoundError: there is no such file; says where it was looked for and where
        to get it.
      ValueError: the file is not the genuine one.

    Example:
      >>> read_checked("a.gz", sha256="0" * 64, origin="https://a.org", data_dir="no")
      Traceback (most recent call last):
      ...
      FileNotFoundError: no/a.gz: no such file. Get it from https://a.org, or set the
        environment variable JAXFL_DATA_DIR (or data_dir) to the folder that has a.gz
    """
    path = data_root(data_dir) / name
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        path, content = packed, packed.read_bytes()
        with contextlib.suppress(OSError, EOFError, zlib.error):  # else: wrong checksum
            content = gzip.decompress(content)
    else:
        raise FileNotFoundError(
            f"{path}: no such file. Get it from {origin}, or set the environment "
            f"variable {VARIABLE} (or data_dir) to the folder that has {name}"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: the SHA-256 was {found} and should be {sha256}; the file is "
            f"damaged or another one. Get it again from {origin}"
        )
    return content
