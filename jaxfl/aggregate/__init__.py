"""Aggregators: how many messages become one."""

from jaxfl.aggregate.bucketing import bucketing
from jaxfl.aggregate.centres import centered_clip, geometric_median
from jaxfl.aggregate.coordinates import median, trimmed_mean
from jaxfl.aggregate.distances import bulyan, krum, multi_krum
from jaxfl.aggregate.local import dynamic_average, mix
from jaxfl.aggregate.sums import total

__all__ = [
    "total",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
    "centered_clip",
    "bucketing",
    "dynamic_average",
    "mix",
]
