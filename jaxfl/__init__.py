"""jaxfl: a JAX vectorized research toolkit for federated learning.

The public names, in the order of a round: data, a model, what is computed
(algorithms), what happens to a message (channels), how many become one (aggregators),
the round, the run, and what is looked at.
"""

from importlib.metadata import version

from jaxfl import (
    aggregate,
    attack,
    communicate,
    compress,
    contribution,
    data,
    decision,
    drift,
    evaluate,
    faults,
    history,
    local,
    models,
    plan,
    plot,
    privacy,
    secure,
    topology,
    tree,
)
from jaxfl.aggregate import (
    bucketing,
    bulyan,
    centered_clip,
    dynamic_average,
    geometric_median,
    krum,
    median,
    mix,
    multi_krum,
    total,
    trimmed_mean,
)
from jaxfl.algorithms.agnostic import agnostic
from jaxfl.algorithms.apfl import apfl
from jaxfl.algorithms.asynchronous import asynchronous
from jaxfl.algorithms.ditto import ditto
from jaxfl.algorithms.fedasync import fedasync
from jaxfl.algorithms.fedavg import fedavg
from jaxfl.algorithms.feddyn import feddyn
from jaxfl.algorithms.fedexp import fedexp
from jaxfl.algorithms.fednova import fednova
from jaxfl.algorithms.fedopt import ema_of_params, fedadagrad, fedadam, fedyogi
from jaxfl.algorithms.fedper import fedper
from jaxfl.algorithms.fedprox import fedprox
from jaxfl.algorithms.ifca import ifca
from jaxfl.algorithms.isolated import isolated
from jaxfl.algorithms.local_models import local_models
from jaxfl.algorithms.mime import mime
from jaxfl.algorithms.perfedavg import per_fedavg
from jaxfl.algorithms.pfedme import pfedme
from jaxfl.algorithms.qfedavg import qfedavg
from jaxfl.algorithms.scaffold import scaffold
from jaxfl.channel import at_client, at_server, chain, gate, identity, mean, on, tap
from jaxfl.conv import matmul_conv
from jaxfl.core import (
    Aggregator,
    Algorithm,
    Channel,
    Cohort,
    Context,
    Federation,
    Info,
    Message,
    Outcome,
    State,
)
from jaxfl.data.federated import ClientData, from_arrays
from jaxfl.decision.report import should_i_federate
from jaxfl.dense import fused_dot
from jaxfl.downlink import downlink
from jaxfl.evaluate import compare, on_server
from jaxfl.history import History
from jaxfl.mesh import client_mesh
from jaxfl.moments import Moments, moments
from jaxfl.plan import cores_as_devices, dry_run, tune
from jaxfl.privacy.clip import clip
from jaxfl.round import federate, map_clients
from jaxfl.sampling import Cyclic, Poisson, sample_cohort
from jaxfl.simulate import scan_rounds, simulate
from jaxfl.stream import on_host

__version__ = version("jaxfl")

__all__ = [
    # data
    "data",
    "ClientData",
    "from_arrays",
    "moments",
    "Moments",
    # models
    "models",
    "matmul_conv",
    "fused_dot",
    # algorithms
    "Algorithm",
    "Context",
    "Outcome",
    "fedavg",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "ema_of_params",
    "fedprox",
    "scaffold",
    "feddyn",
    "fednova",
    "mime",
    "fedexp",
    "qfedavg",
    "agnostic",
    "ditto",
    "apfl",
    "pfedme",
    "per_fedavg",
    "fedper",
    "ifca",
    "isolated",
    "local_models",
    "local",
    "downlink",
    "asynchronous",
    "fedasync",
    # channels
    "Channel",
    "Message",
    "chain",
    "identity",
    "clip",
    "mean",
    "privacy",
    "gate",
    "communicate",
    "tap",
    "on",
    "at_client",
    "at_server",
    "compress",
    "secure",
    # aggregators
    "Aggregator",
    "aggregate",
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
    "topology",
    # faults
    "faults",
    # attacks
    "attack",
    # the round
    "Federation",
    "Cohort",
    "State",
    "Info",
    "federate",
    "map_clients",
    "client_mesh",
    # the execution plan
    "cores_as_devices",
    "tune",
    "dry_run",
    "plan",
    # the run
    "simulate",
    "on_host",
    "scan_rounds",
    "sample_cohort",
    "Poisson",
    "Cyclic",
    "History",
    "history",
    # what is looked at
    "evaluate",
    "compare",
    "on_server",
    "should_i_federate",
    "decision",
    "contribution",
    "drift",
    "plot",
    "tree",
]
