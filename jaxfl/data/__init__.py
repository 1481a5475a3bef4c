"""Federated data: the container, partitions, and sources."""

from jaxfl.data.cifar import cifar10
from jaxfl.data.cmapss import cmapss, cmapss_sensors, last_rows, window_rows
from jaxfl.data.federated import (
    ClientData,
    client_rows,
    from_arrays,
    group,
    label_counts,
    of_rows,
    pool,
    stack,
    stack_axes,
    subset,
)
from jaxfl.data.files import data_root, read_checked
from jaxfl.data.mnist import mnist, mnist_writers
from jaxfl.data.partition import (
    dirichlet,
    dominant_class,
    iid,
    natural,
    quantity_skew,
    shards,
    similarity,
)
from jaxfl.data.readers import read_fedjax, read_leaf, read_tff
from jaxfl.data.shakespeare import shakespeare
from jaxfl.data.synthetic import synthetic
from jaxfl.data.table import Table, read_table

__all__ = [
    "ClientData",
    "group",
    "from_arrays",
    "pool",
    "subset",
    "stack",
    "stack_axes",
    "client_rows",
    "of_rows",
    "label_counts",
    "iid",
    "dominant_class",
    "dirichlet",
    "shards",
    "similarity",
    "quantity_skew",
    "natural",
    "mnist",
    "mnist_writers",
    "cifar10",
    "shakespeare",
    "synthetic",
    "cmapss",
    "cmapss_sensors",
    "window_rows",
    "last_rows",
    "read_leaf",
    "read_fedjax",
    "read_tff",
    "read_table",
    "Table",
    "data_root",
    "read_checked",
]
