"""Faults: who is there, who is late, who is lost, how stale, and what time it is.

All of it is data, made on the host from a seed: traces of who is available, a virtual
clock, and a server's policy make a `Schedule`, which goes where a `cohort_size` goes.
Synchronous and asynchronous runs are then one compiled program over other arrays.
"""

from jaxfl.faults.availability import bernoulli, cohorts, diurnal, markov
from jaxfl.faults.clock import Clock, clock, log_normal, pareto
from jaxfl.faults.corrupt import becomes, corrupt, flip_bits, garbage
from jaxfl.faults.policies import Dropout, buffered, synchronous
from jaxfl.faults.schedule import Schedule
from jaxfl.faults.staleness import discount, hinge, polynomial
from jaxfl.mesh import NOBODY

__all__ = [
    "NOBODY",
    # who is there
    "bernoulli",
    "diurnal",
    "markov",
    "cohorts",
    # how long it takes
    "Clock",
    "clock",
    "log_normal",
    "pareto",
    # what the server does about it
    "Schedule",
    "Dropout",
    "synchronous",
    "buffered",
    # what is late
    "discount",
    "polynomial",
    "hinge",
    # what is broken
    "corrupt",
    "becomes",
    "flip_bits",
    "garbage",
]
