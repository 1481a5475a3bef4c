"""Aggregators: how many messages become one."""

from jaxfl.aggregate.coordinates import median
from jaxfl.aggregate.local import dynamic_average, mix
from jaxfl.aggregate.sums import total

__all__ = ["total", "median", "dynamic_average", "mix"]
