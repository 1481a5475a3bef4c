"""Partitions: which client each example belongs to.

Every function here takes the labels, `[E]`, and returns client ids, int32 `[E]`, for
`group` or `from_arrays`; `iid` and `quantity_skew` use their number only. All run on
the host, and the same arguments give the same partition.
"""

from typing import Any

import numpy as np


def iid(labels: Any, *, num_clients: int, seed: int) -> np.ndarray:
    """Deals the examples at random, as many to each client.

    Sizes differ by one at most, where N does not divide E.

    Args:
      labels: `[E]`, only their number is used.
      num_clients: N, at most E.
      seed: of the shuffle.

    Returns:
      Client ids, int32 `[E]`.

    Raises:
      ValueError: `labels` are not `[E]`, or there are more clients than examples.

    Example:
      >>> np.bincount(iid(np.zeros(11), num_clients=3, seed=0))
      array([4, 4, 3])
    """
    examples = _num_examples(labels, at_least=_clients(num_clients))
    return _ids(np.random.default_rng(seed).permutation(examples) % num_clients)


def dominant_class(
    labels: Any,
    *,
    num_clients: int,
    bias: float,
    seed: int,
    num_classes: int | None = None,
) -> np.ndarray:
    """Gives every client one class that dominates its examples.

    An example of class d goes to client d with the probability `bias`, and otherwise to
    one of the other clients, each as probable:

      P(client k | class d) = bias if k = d, (1 - bias) / (N - 1) if not.

    A bias of 1 is one class on each client. A bias of 0 is defined as the uniform case,
    every client as probable for every example, its own client included; it is the same
    distribution as a bias of 1 / N. Biases between the two push a class away from its
    client.

    Where the numbers differ, the clients of class d are

      - more clients than classes: all k with k mod C = d, as probable as each other;
        they have the class's share `bias` together, and the others the rest,
      - fewer clients than classes: client d mod N, which has several classes.

    Where these are all clients, all examples stay on them.

    Args:
      labels: int `[E]`, from 0.
      num_clients: N.
      bias: from 0 to 1.
      seed: of the draws.
      num_classes: C; None means the largest label + 1.

    Returns:
      Client ids, int32 `[E]`.

    Raises:
      TypeError: `labels` are not integers.
      ValueError: an argument is out of its range.

    Example:
      >>> dominant_class([0, 1, 2, 2, 1, 0], num_clients=3, bias=1.0, seed=0)
      array([0, 1, 2, 2, 1, 0], dtype=int32)
      >>> dominant_class([0, 1, 2, 3, 4, 5], num_clients=3, bias=1.0, seed=0)
      array([0, 1, 2, 0, 1, 2], dtype=int32)
    """
    labels = _classes(labels)
    clients = np.arange(_clients(num_clients))
    if not 0 <= bias <= 1:
        raise ValueError(f"bias was {bias}; it should be from 0 to 1")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.max() >= classes:
        raise ValueError(
            f"num_classes was {num_classes}; it should be above the largest label, "
            f"{labels.max()}"
        )
    rng = np.random.default_rng(seed)
    if bias == 0:
        return _ids(rng.integers(num_clients, size=len(labels)))
    ids = np.empty(len(labels), np.int32)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        # One of these two remainders is the identity: N > C or N <= C.
        at_home = clients % classes == label % num_clients
        away = clients if at_home.all() else clients[~at_home]
        stays = rng.random(len(rows)) < bias
        home_draw = rng.choice(clients[at_home], len(rows))
        ids[rows] = np.where(stays, home_draw, rng.choice(away, len(rows)))
    return ids


def dirichlet(
    labels: Any, *, num_clients: int, alpha: float, seed: int, min_size: int = 1
) -> np.ndarray:
    """Shares out each class among the clients in Dirichlet proportions.

    For every class d, p_d ~ Dir_N(alpha), and client k gets the share p_{d,k} of its
    examples: the variant of Yurochkin et al. and of most benchmarks, in which the
    clients' sizes vary too. (In that of Hsu et al., arXiv:1909.06335, each client draws
    its class proportions and all sizes are the same.) A large alpha approaches equal
    shares, a small one a single client for each class.

    The draw is repeated until every client has `min_size` examples.

    Args:
      labels: int `[E]`, from 0.
      num_clients: N.
      alpha: the concentration, above 0.
      seed: of the draws.
      min_size: the fewest examples of a client; 0 allows clients without any.

    Returns:
      Client ids, int32 `[E]`.

    Raises:
      TypeError: `labels` are not integers.
      ValueError: an argument is out of its range, or each of 1,000 draws had a client
        with fewer than `min_size` examples.

    Example:
      >>> labels = np.arange(1000) % 10
      >>> np.bincount(dirichlet(labels, num_clients=4, alpha=0.5, seed=0))
      array([374, 135, 232, 259])

    Reference: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of
      Neural Networks", arXiv:1905.12022; Li, Diao, Chen, He 2021, arXiv:2102.02079.
    """
    labels = _classes(labels)
    _num_examples(labels, at_least=_clients(num_clients) * min_size)
    if not alpha > 0:
        raise ValueError(f"alpha was {alpha}; it should be above 0")
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    class_sizes = np.array([[len(rows)] for rows in classes])
    for _ in range(1000):
        shares = rng.dirichlet(np.full(num_clients, alpha), len(classes))
        ends = np.rint(np.cumsum(shares, axis=1) * class_sizes)
        ends[:, -1:] = class_sizes  # a cumulative sum may miss 1 by rounding
        sizes = np.diff(ends, axis=1, prepend=0).astype(np.int64)
        if sizes.sum(axis=0).min() >= min_size:
            break
    else:
        raise ValueError(
            f"min_size was {min_size}, which no draw reached with alpha={alpha} and "
            f"num_clients={num_clients}; it should be lower (0 allows clients without "
            "examples), or alpha higher, or the clients fewer"
        )
    ids = np.empty(len(labels), np.int32)
    for rows, size in zip(classes, sizes, strict=True):
        ids[rng.permutation(rows)] = np.repeat(np.arange(num_clients), size)
    return ids


def shards(
    labels: Any, *, num_clients: int, shards_per_client: int = 2, seed: int
) -> np.ndarray:
    """Deals shards of the examples sorted by class: the pathological non-IID partition.

    The examples are sorted by label and cut into N * S shards of the same size, and
    every client gets S of them at random. With balanced classes that is S classes at
    most, and a few more where a shard straddles two. Shard sizes differ by one at most,
    where N * S does not divide E.

    Args:
      labels: `[E]`.
      num_clients: N.
      shards_per_client: S.
      seed: of the deal.

    Returns:
      Client ids, int32 `[E]`.

    Raises:
      ValueError: `labels` are not `[E]`, or there are more shards than examples.

    Example:
      >>> shards([0, 1, 2, 3, 0, 1, 2, 3], num_clients=2, seed=0)
      array([1, 0, 0, 1, 1, 0, 0, 1], dtype=int32)

    Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017,
      "Communication-Efficient Learning of Deep Networks from Decentralized Data",
      arXiv:1602.05629, section 3.
    """
    labels = np.asarray(labels)
    if shards_per_client < 1:
        raise ValueError(
            f"shards_per_client was {shards_per_client}; it should be at least 1"
        )
    num_shards = _clients(num_clients) * shards_per_client
    _num_examples(labels, at_least=num_shards)
    owner = np.random.default_rng(seed).permutation(num_shards) // shards_per_client
    ids = np.empty(len(labels), np.int32)
    in_order = np.argsort(labels, kind="stable")
    for client, rows in zip(owner, np.array_split(in_order, num_shards), strict=True):
        ids[rows] = client
    return ids


def similarity(labels: Any, *, num_clients: int, share: float, seed: int) -> np.ndarray:
    """Deals a share of the examples at random, and the rest sorted by class.

    Every client gets as many of either. A share of 1 is IID; of 0, each client has a
    run of the sorted examples: one class or two, where there are more clients than
    classes. Sizes differ by two at most.

    Args:
      labels: `[E]`.
      num_clients: N, at most E.
      share: what is dealt at random, from 0 to 1; the paper's s %.
      seed: of the draw and the deal.

    Returns:
      Client ids, int32 `[E]`.

    Raises:
      ValueError: `labels` are not `[E]`, there are more clients than examples, or share
        is out of its range.

    Example:
      >>> similarity([2, 0, 1, 2, 0, 1], num_clients=3, share=0.0, seed=0)
      array([2, 0, 1, 2, 0, 1], dtype=int32)

    Reference: Karimireddy et al. 2020, arXiv:1910.06378, section 7, after Hsu et al.
      2019, arXiv:1909.06335.
    """
    labels = np.asarray(labels)
    examples = _num_examples(labels, at_least=_clients(num_clients))
    if not 0 <= share <= 1:
        raise ValueError(f"share was {share}; it should be from 0 to 1")
    drawn = np.random.default_rng(seed).permutation(examples)
    alike, rest = np.split(drawn, [round(share * examples)])
    in_order = rest[np.lexsort((rest, labels[rest]))]
    ids = np.empty(examples, np.int32)
    for rows in (alike, in_order):
        for client, part in enumerate(np.array_split(rows, num_clients)):
            ids[part] = client
    return ids


def quantity_skew(
    labels: Any, *, num_clients: int, sigma: float, seed: int
) -> np.ndarray:
    """Deals the examples at random, log-normally many to each client.

    w_k ~ LogNormal(0, sigma^2), and client k has 1 + (E - N) w_k / sum_j w_j examples,
    rounded so that they sum to E. Classes are IID; sigma = 0 is `iid`, up to the draw.

    Args:
      labels: `[E]`, only their number is used.
      num_clients: N, at most E.
      sigma: the standard deviation of log w, at least 0.
      seed: of the draws.

    Returns:
      Client ids, int32 `[E]`; every client has at least one example.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> np.bincount(quantity_skew(np.zeros(100), num_clients=4, sigma=1.0, seed=0))
      array([23, 17, 38, 22])

    Reference: log-normal sizes as in Li et al. 2020, "Federated Optimization in
      Heterogeneous Networks", arXiv:1812.06127, section 5.1.
    """
    examples = _num_examples(labels, at_least=_clients(num_clients))
    if not 0 <= sigma < np.inf:
        raise ValueError(f"sigma was {sigma}; it should be finite and at least 0")
    rng = np.random.default_rng(seed)
    log_weights = sigma * rng.standard_normal(num_clients)
    # Relative to the largest, so that no sigma overflows.
    weights = np.exp(log_weights - log_weights.max())
    ends = np.rint(np.cumsum(weights) / weights.sum() * (examples - num_clients))
    sizes = 1 + np.diff(ends, prepend=0).astype(np.int64)
    return _ids(rng.permutation(np.repeat(np.arange(num_clients), sizes)))


def natural(ids: Any) -> np.ndarray:
    """One client for each id that the data came with: a writer, a speaker, an engine.

    Args:
      ids: `[E]` of anything that sorts, such as numbers or strings.

    Returns:
      Client ids, int32 `[E]`, numbered in the order of the sorted ids.

    Raises:
      ValueError: `ids` are not `[E]`.

    Example:
      >>> natural(["Romeo", "Juliet", "Romeo", "Nurse"])
      array([2, 0, 2, 1], dtype=int32)
    """
    _num_examples(ids, at_least=1)
    return _ids(np.unique(np.asarray(ids), return_inverse=True)[1])


def _ids(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32)


def _clients(num_clients: int) -> int:
    if num_clients < 1:
        raise ValueError(f"num_clients was {num_clients}; it should be at least 1")
    return num_clients


def _num_examples(labels: Any, at_least: int) -> int:
    shape = np.shape(labels)
    if len(shape) != 1:
        raise ValueError(f"labels had the shape {shape}; it should be [E]")
    if shape[0] < max(at_least, 1):
        raise ValueError(
            f"labels had {shape[0]} examples; these clients need at least {at_least}"
        )
    return shape[0]


def _classes(labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    _num_examples(labels, at_least=1)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels had the type {labels.dtype}; it should be integers")
    if labels.min() < 0:
        raise ValueError(f"labels had {labels.min()}; they should be at least 0")
    return labels
