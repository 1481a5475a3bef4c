"""Poisoned data: what liars train on, who then keep to the protocol."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfl.data.federated import ClientData, client_rows

Trigger = Callable[[np.ndarray], np.ndarray]


def label_flip(
    data: ClientData, clients: Any, flip: Mapping[int, int] | int, *, label: str = "y"
) -> ClientData:
    """Labels other classes in the examples of certain clients.

    `y -> C - 1 - y`, or by a map. All examples but their labels are those of `data`,
    the very same arrays.

    Args:
      data: the population.
      clients: who is poisoned: ids, int `[M]`, or flags, bool `[N]`.
      flip: C, the number of classes; or a map from class to class, such as `{7: 1}`,
        whose other classes stay.
      label: the key of the labels in `data.examples`.

    Returns:
      The population, with other labels in the rows of these clients.

    Raises:
      TypeError: if clients are neither ids nor flags.
      ValueError: if a client has no data here, or one that is poisoned shares an
        example with one that is not.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(np.zeros(4), np.array([0, 7, 0, 7]), [0, 0, 1, 1])
    >>> label_flip(data, [1], 10).examples["y"].tolist()
    [0, 7, 9, 2]
    >>> label_flip(data, [1], {7: 1}).examples["y"].tolist()
    [0, 7, 0, 1]

    Reference: Tolpegin, Truex, Gursoy, Liu 2020, arXiv:2007.08432; `C - 1 - y` in
    Karimireddy, He, Jaggi 2022, arXiv:2006.09365.
    """
    rows = np.concatenate([np.zeros(0, np.int32), *_rows_of(data, clients)])
    labels = np.array(data.examples[label])
    if isinstance(flip, Mapping):
        new = [flip.get(y, y) for y in labels[rows].tolist()]
    else:
        new = flip - 1 - labels[rows]
    labels[rows] = new
    return dataclasses.replace(data, examples=data.examples | {label: labels})


def backdoor(
    data: ClientData,
    clients: Any,
    trigger: Trigger,
    target: int,
    *,
    share: float = 0.5,
    seed: int,
    label: str = "y",
    image: str = "x",
) -> ClientData:
    """Puts a trigger on a share of the examples of certain clients, and one label.

    A model that is trained on them gives everything that has the trigger that label,
    and does well on all else: see `triggered`. A liar who keeps the rest of its
    examples as they are is not told by its loss.

    Args:
      data: the population.
      clients: who is poisoned: ids, int `[M]`, or flags, bool `[N]`.
      trigger: `[B, ...] -> [B, ...]`, puts it on images, such as `stamp()`.
      target: the label that they get.
      share: of each client's examples that get it, from 0 to 1; rounded up.
      seed: of the draw of these examples.
      label: the key of the labels in `data.examples`.
      image: the key of the images.

    Returns:
      The population, in which only rows of these clients are other than in `data`; the
      images are copied once.

    Raises:
      TypeError: if clients are neither ids nor flags.
      ValueError: if share is out of its range, a client has no data here, or one that
        is poisoned shares an example with one that is not.

    >>> from jaxfl import from_arrays
    >>> data = from_arrays(np.zeros((4, 2, 2), np.uint8), np.arange(4), [0, 1, 1, 1])
    >>> poisoned = backdoor(data, [1], stamp(1), target=7, share=0.5, seed=0).examples
    >>> poisoned["y"].tolist(), poisoned["x"][:, 1, 1].tolist()
    ([0, 1, 7, 7], [0, 0, 255, 255])

    Reference: Gu, Dolan-Gavitt, Garg 2017, arXiv:1708.06733; Bagdasaryan et al. 2020,
    arXiv:1807.00459; Sun et al. 2019, arXiv:1911.07963.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}.")
    rng = np.random.default_rng(seed)
    images, labels = (np.array(data.examples[key]) for key in (image, label))
    for rows in _rows_of(data, clients):
        chosen = rng.choice(rows, int(np.ceil(share * len(rows))), replace=False)
        images[chosen], labels[chosen] = trigger(images[chosen]), target
    examples = data.examples | {image: images, label: labels}
    return dataclasses.replace(data, examples=examples)


def stamp(size: int = 3, value: float = 255) -> Trigger:
    """A pixel trigger: a square in the lower right corner of each image.

    Args:
      size: its side, in pixels.
      value: of its pixels.

    Returns:
      `[B, H, W, ...] -> [B, H, W, ...]`, a copy.

    >>> stamp(1)(np.zeros((1, 2, 2), np.uint8)).tolist()
    [[[0, 0], [0, 255]]]
    """

    def put(images):
        images = np.array(images)
        images[:, -size:, -size:] = value
        return images

    return put


def triggered(
    test: Mapping[str, Any],
    trigger: Trigger,
    target: int,
    *,
    label: str = "y",
    image: str = "x",
) -> dict[str, np.ndarray]:
    """Test examples by whose accuracy a backdoor is measured.

    All that are not of the target class, with the trigger, and labelled as the attacker
    would have them: the accuracy on them is the attack's rate of success.

    Args:
      test: arrays `[E, ...]`, by key.
      trigger, target, label, image: as of `backdoor`.

    >>> test = {"x": np.zeros((3, 2, 2)), "y": np.array([7, 1, 2])}
    >>> triggered(test, stamp(1), target=7)["y"].tolist()
    [7, 7]
    """
    others = np.asarray(test[label]) != target
    chosen = {key: np.asarray(x)[others] for key, x in test.items()}
    labels = np.full_like(chosen[label], target)
    return chosen | {image: trigger(chosen[image]), label: labels}


def _rows_of(data: ClientData, clients: Any) -> list[np.ndarray]:
    """The rows of each of these clients, which must be nobody else's."""
    clients = np.asarray(clients)
    if not clients.size:
        return []
    if clients.ndim != 1 or clients.dtype.kind not in "biu":
        raise TypeError(
            "clients must be ids, int [M], or flags, bool [N], "
            f"got {clients.dtype}{list(clients.shape)}."
        )
    ids = np.flatnonzero(clients) if clients.dtype == bool else np.unique(clients)
    rows = client_rows(data)
    if ids.size and not (0 <= ids.min() and ids.max() < len(rows)):
        raise ValueError(f"clients must be below {len(rows)}, got {ids.tolist()}.")
    poisoned = [rows[i] for i in ids]
    others = [r for i, r in enumerate(rows) if i not in set(ids.tolist())]
    if others and np.isin(np.concatenate(others), np.concatenate(poisoned)).any():
        raise ValueError(
            "clients: one of them shares an example with a client that is not "
            "poisoned; give it a copy of its own."
        )
    return poisoned
