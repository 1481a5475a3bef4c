"""NASA's C-MAPSS turbofan engines, run to failure: the tables, and windows of them."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfl.data.files import read_checked

Table = dict[str, np.ndarray]

SUBSETS = ("FD001", "FD002", "FD003", "FD004")
SENSORS = (
    *("T2", "T24", "T30", "T50", "P2", "P15", "P30", "Nf", "Nc", "epr", "Ps30"),
    *("phi", "NRf", "NRc", "BPR", "farB", "htBleed", "Nf_dmd", "PCNfR_dmd"),
    *("W31", "W32"),
)
# Setting 1, the altitude in 1000 ft, tells the six operating conditions apart.
ALTITUDES = (0, 10, 20, 25, 35, 42)

_ORIGIN = "https://data.nasa.gov/dataset/cmapss-jet-engine-simulated-data"
_SHA256 = {
    "RUL_FD001.txt": (
        "a19c8ec94931949d0485bdc35118206e9c81c4547b422efb9cf86f4ceddbceca"
    ),
    "RUL_FD002.txt": (
        "c851dd96a6ea6998d3c4a8f834d3c8013aa90e93a6ed950dc826ad0655b2906b"
    ),
    "RUL_FD003.txt": (
        "df1e0566306b174a2de41c67a3e7a51877889598b78643fc3e5685259091b7cb"
    ),
    "RUL_FD004.txt": (
        "196b836b85a95ac7fdbbf29c5fdf1657382eafa445644d114ffaaf50dc2975e1"
    ),
    "test_FD001.txt": (
        "3cda7109ce17bafb5443f2ac926cfcf88154b941b8c4cf95eb55d1ddd6f52851"
    ),
    "test_FD002.txt": (
        "de7b5bf7e998a985c378488480528b7c02cff1406a46740def362dda8d9b4e02"
    ),
    "test_FD003.txt": (
        "299babd63c8d987cef079c4a425429f33b3a34797d803bbe2ad48c29dbd0d790"
    ),
    "test_FD004.txt": (
        "1dc675fff0624bac10786927c6715b37d1297657137400d2b1a3138d777a3ba5"
    ),
    "train_FD001.txt": (
        "963b5e22825b34d8b21c69e1aeb4af3e647050eb672ee8834ba4b5d91d2de0f8"
    ),
    "train_FD002.txt": (
        "dac6c4dbc4e7c1bdeb5747da3d313d05c395bb99801b44a002b26a2ba13d788f"
    ),
    "train_FD003.txt": (
        "2abbe9968cc5e8eb091980f51b20f62bb4127336d3482cb52071d53bf23329e2"
    ),
    "train_FD004.txt": (
        "27ef6160b6a1dcb2613a88de9c239f763b223f02cdc41dc5cdedc5dc189b6218"
    ),
}


def cmapss(
    *subsets: str, data_dir: str | os.PathLike | None = None
) -> tuple[Table, Table]:
    """Turbofan engines that wear out: training and test tables, a row a flight.

    The training engines were run until they failed. The test engines were stopped
    before, and `rul` continues to their failure, which NASA gives in a file of its own.

    Args:
      *subsets: of `"FD001"` to `"FD004"`, put together in this order. FD001 and FD003
        fly in one operating condition, FD002 and FD004 in six; FD001 and FD002 have one
        kind of fault, FD003 and FD004 two.
      data_dir: the data folder, whose folder `cmapss` has the original text files,
        plain or gzipped; None reads the environment variable `JAXFL_DATA_DIR`.

    Returns:
      `(train, test)`, each of E rows: `"engine"`, int32 `[E]`, numbered from 0 through
      all the subsets; `"subset"`, int32 `[E]`, which of the arguments; `"cycle"`,
      int32 `[E]`, flights from 1; `"condition"`, int32 `[E]`, 0 to 5; `"settings"`,
      float32 `[E, 3]`; `"sensors"`, float32 `[E, 21]`, as named by `cmapss_sensors`;
      `"rul"`, int32 `[E]`, the remaining useful life, in cycles, not capped.

    Raises:
      ValueError: a subset is unknown or none is given, or a checksum is wrong.
      FileNotFoundError: an original file is missing; says where to get it.

    Example:
      ```python
      train, test = cmapss("FD001")  # 20,631 and 13,096 rows of 100 engines each
      capped = np.minimum(train["rul"], 125)
      data = from_arrays(train["sensors"], capped, train["engine"])  # 100 clients
      ```

    Reference: Saxena, Goebel, Simon, Eklund 2008, "Damage Propagation Modeling for
      Aircraft Engine Run-to-Failure Simulation", PHM08; the cap on the remaining life
      is that of Heimes 2008, "Recurrent Neural Networks for Remaining Useful Life
      Estimation", PHM08.
    """
    if not subsets or set(subsets) - set(SUBSETS):
        raise ValueError(f"subsets was {subsets}; it should be some of {SUBSETS}")
    train, test = [], []
    for subset in subsets:
        train.append(_table(_read(f"train_{subset}.txt", data_dir)))
        test.append(_table(_read(f"test_{subset}.txt", data_dir)))
        left = _read(f"RUL_{subset}.txt", data_dir)[:, 0].astype(np.int32)
        test[-1]["rul"] += left[test[-1]["engine"]]
    return _joined(train), _joined(test)


def last_rows(engine: Any) -> np.ndarray:
    """The last row of each engine: where its remaining life is asked for.

    Args:
      engine: `[E]`, the engine of each row, whose rows are together.

    Returns:
      int64 `[engines]`.

    Raises:
      ValueError: as `window_rows`.

    >>> last_rows([0, 0, 0, 1, 1])
    array([2, 4])
    """
    first = _first_rows(engine)
    return np.append(first[1:], len(np.asarray(engine))) - 1


def window_rows(engine: Any, length: int = 30) -> np.ndarray:
    """For each row, the rows of the window of its engine that ends with it.

    `x[window_rows(engine, W)]` is `[E, W, F]`. Before an engine's first row stands that
    row again, so that the window of an engine that flew less than W times is full too;
    `cycle >= W` are the windows without such padding.

    Args:
      engine: `[E]`, the engine of each row, whose rows are together and in order.
      length: W, rows in a window.

    Returns:
      int32 `[E, W]`.

    Raises:
      ValueError: length is not positive, or an engine's rows are not together.

    >>> window_rows([0, 0, 0, 1, 1], length=2).tolist()
    [[0, 0], [0, 1], [1, 2], [3, 3], [3, 4]]
    """
    if length < 1:
        raise ValueError(f"length was {length}; it should be at least 1")
    first = _first_rows(engine)
    size = np.diff(np.append(first, len(np.asarray(engine))))
    row = np.arange(size.sum())[:, None] + np.arange(1 - length, 1)
    return np.maximum(row, np.repeat(first, size)[:, None]).astype(np.int32)


def cmapss_sensors(names: Sequence[str]) -> np.ndarray:
    """The columns of `"sensors"` with these names, as NASA's paper has them.

    Raises:
      ValueError: a name is unknown.

    >>> cmapss_sensors(["T24", "W32"])
    array([ 1, 20])
    """
    if unknown := set(names) - set(SENSORS):
        raise ValueError(f"names had {sorted(unknown)}; there are {SENSORS}")
    return np.array([SENSORS.index(name) for name in names])


def _read(name: str, data_dir: str | os.PathLike | None) -> np.ndarray:
    content = read_checked(
        f"cmapss/{name}", sha256=_SHA256[name], origin=_ORIGIN, data_dir=data_dir
    )
    values = np.array(content.split(), np.float64)
    return values.reshape(-1, 1 if name.startswith("RUL") else 5 + len(SENSORS))


def _table(values: np.ndarray) -> Table:
    engine = values[:, 0].astype(np.int32) - 1
    cycle = values[:, 1].astype(np.int32)
    last = last_rows(engine)
    return {
        "engine": engine,
        "cycle": cycle,
        "condition": np.searchsorted(ALTITUDES, values[:, 2].round()).astype(np.int32),
        "settings": values[:, 2:5].astype(np.float32),
        "sensors": values[:, 5:].astype(np.float32),
        "rul": cycle[last][engine] - cycle,
    }


def _joined(tables: list[Table]) -> Table:
    engines = np.cumsum([0] + [table["engine"].max() + 1 for table in tables])
    for i, (table, before) in enumerate(zip(tables, engines[:-1], strict=True)):
        table["engine"] += np.int32(before)
        table["subset"] = np.full(len(table["engine"]), i, np.int32)
    return {
        name: np.concatenate([table[name] for table in tables]) for name in tables[0]
    }


def _first_rows(engine: Any) -> np.ndarray:
    engine = np.asarray(engine)
    if engine.ndim != 1 or not len(engine):
        raise ValueError(
            f"engine had the shape {engine.shape}; it should be [E], E > 0"
        )
    first = np.flatnonzero(np.append(True, engine[1:] != engine[:-1]))
    if len(np.unique(engine[first])) != len(first):
        raise ValueError("engine: the rows of each engine should be together")
    return first
