"""The execution plan: how many clients at once, on which devices, and what it costs.

A plan changes how fast a round is and how much memory it takes, and nothing else; so
it is chosen here, apart from the algorithm, and can be looked at before anything runs.
"""

import dataclasses
import math
import os
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import tree
from jaxfl.core import Data, Federation, Params
from jaxfl.data.federated import ClientData
from jaxfl.faults.schedule import Schedule
from jaxfl.mesh import client_mesh
from jaxfl.round import (
    execution_order,
    federate,
    message_shapes,
    population_size,
)
from jaxfl.sampling import Cyclic, Poisson, cohort_rows, expected_size, sample_cohort
from jaxfl.stream import OnHost, population_of

# Floating-point operations of one local step, below which a CPU spends its time
# between operations and not in them.
SMALL_STEP = 2e6
# Ragged clients wait for each other in a chunk, and an accelerator wants chunks.
ENOUGH_USEFUL, FEWEST = 0.9, 8


def cores_as_devices() -> None:
    """Makes each CPU core a JAX device, the fastest way to run small clients there.

    Call it before anything else uses JAX. It changes nothing on accelerators.
    """
    linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)


class Estimate(NamedTuple):
    """What a round costs under a plan, before anything has run.

    Attributes:
      chunk_size: clients vmapped at once on each device; None for all.
      devices: how many devices share the cohort.
      flops: floating-point operations of all clients in a round; those of ragged
        clients as if all had the population's mean size.
      bits_down: length of the broadcast to the cohort.
      bits_up: length of the cohort's payloads before any channel makes them shorter.
      peak_bytes: memory of the round on one device, by the compiler's own account:
        arguments, results and temporaries; 0 if it gives none.
      utilisation: useful over executed local steps, see `utilisation`.
    """

    chunk_size: int | None
    devices: int
    flops: float
    bits_down: float
    bits_up: float
    peak_bytes: int
    utilisation: float

    def __str__(self) -> str:
        at_once = "all its" if self.chunk_size is None else self.chunk_size
        return (
            f"{at_once} clients at once on each of {self.devices} device(s); a round: "
            f"{self.flops:.3g} FLOP, {self.bits_down / 8e6:.3g} MB down, "
            f"{self.bits_up / 8e6:.3g} MB up, {self.peak_bytes / 2**20:.0f} MiB on "
            f"each device, {self.utilisation:.0%} of the executed steps useful"
        )


def dry_run(
    federation: Federation,
    params: Params,
    data: Data | OnHost,
    *,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
) -> Estimate:
    """What a round would cost: compiled, and not run.

    Args:
      federation: the composed round.
      params: the model, or its `jax.ShapeDtypeStruct`s.
      data: the population's; one `on_host` counts as if it were on the device.
      cohort_size: K, or `Poisson(...)`, `Cyclic(K)`, a `faults.Schedule`; None for all.

    Returns:
      An `Estimate`; print it.

    Raises:
      ValueError: if cohort_size is not between 1 and N.

    >>> import optax
    >>> from jaxfl import fedavg, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return ((batch["x"] @ w) - batch["y"]) ** 2
    >>> data = from_arrays(np.ones((8, 3), np.float32), np.ones(8), [0] * 6 + [1] * 2)
    >>> federation = federate(fedavg(loss, optax.sgd(0.1), batch_size=2), mean())
    >>> cost = dry_run(federation, jnp.zeros(3), data)
    >>> cost.bits_down, cost.bits_up, round(cost.utilisation, 2)  # 4 steps of 2 x 3
    (192.0, 192.0, 0.67)
    """
    data = population_of(data)
    n = population_size(data)
    k = min(cohort_rows(cohort_size, n), n)
    mesh = federation.mesh
    devices = 1 if mesh is None else mesh.size
    asked = expected_size(cohort_size, n)
    abstract = _abstract(params), _abstract(data)
    server, own = jax.eval_shape(federation.parts[0].init, abstract[0])
    broadcast, payload = message_shapes(federation.parts[0], server, own, abstract[1])
    return Estimate(
        chunk_size=federation.chunk_size,
        devices=devices,
        flops=flops(federation, params, data, cohort_size=cohort_size),
        bits_down=float(asked * tree.num_bits(broadcast)),
        bits_up=float(asked * tree.num_bits(payload)),
        peak_bytes=_peak_bytes(federation, params, data, k),
        utilisation=utilisation(
            _typical_sizes(data, k), federation.chunk_size, devices
        ),
    )


def flops(
    federation: Federation,
    params: Params,
    data: Data | OnHost,
    *,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
) -> float:
    """Floating-point operations of a round, see `Estimate`; nothing is compiled.

    Args:
      federation, params, data, cohort_size: as for `dry_run`.

    Raises:
      ValueError: if cohort_size is not between 1 and N.

    >>> import optax
    >>> from jaxfl import fedavg, federate, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return (w - batch["y"]) ** 2
    >>> data = from_arrays(np.ones(6), np.ones(6), [0, 0, 0, 1, 1, 1])
    >>> federation = federate(fedavg(loss, optax.sgd(0.1), batch_size=1), mean())
    >>> few = flops(federation, jnp.float32(0), data, cohort_size=1)
    >>> few < flops(federation, jnp.float32(0), data) < 3 * few
    True
    """
    data = population_of(data)
    n = population_size(data)
    k = min(cohort_rows(cohort_size, n), n)
    return _flops(_round(federation, params, data, k))


def tune(
    federation: Federation,
    params: Params,
    data: Data | OnHost,
    *,
    cohort_size: int | Poisson | Cyclic | Schedule | None = None,
    verbose: bool = True,
) -> Federation:
    """The same federation under the plan that suits this machine.

    All devices, and on a CPU (see `cores_as_devices`) chunks of ten clients where a
    local step is little work, else one client after another. On an accelerator, as many
    clients at once as its memory holds, by the compiler's account of at most three
    programs, and as lets ragged clients waste at most a tenth of the steps (but not
    fewer than 8).

    The choice depends on the shapes, the sizes of the clients and the machine, and not
    on the clock, so that a run that is resumed there has the plan that it had.

    Args:
      federation: as from `federate`; its own plan is left aside.
      params: the model, or its `jax.ShapeDtypeStruct`s.
      data: the population's; one `on_host` counts as if it were on the device.
      cohort_size: K, or `Poisson(...)`, `Cyclic(K)`, a `faults.Schedule`; None for all.
      verbose: whether to print the plan, and why it was chosen.

    Returns:
      The federation, with its `chunk_size` and `mesh`.

    Raises:
      ValueError: if cohort_size is not between 1 and N.

    >>> import optax
    >>> from jaxfl import fedavg, from_arrays, mean
    >>> def loss(w, batch, key):
    ...     return (w - batch["y"]) ** 2
    >>> data = from_arrays(np.ones(6), np.ones(6), [0, 1, 2, 3, 4, 5])
    >>> federation = federate(fedavg(loss, optax.sgd(0.1)), mean())
    >>> tune(federation, jnp.float32(0), data, verbose=False).chunk_size
    10
    """
    data = population_of(data)
    n = population_size(data)
    k = min(cohort_rows(cohort_size, n), n)
    devices = jax.devices()[:k]  # more would have no client
    mesh = client_mesh(devices) if len(devices) > 1 else None
    if jax.default_backend() == "cpu":
        step = _flops(_round(federation, params, data, 1), loops=False)
        chunk = 10 if step < SMALL_STEP else 1
        much = "little" if step < SMALL_STEP else "much"
        reason = f"as a local step of {step:.1g} FLOP is {much} work for a core"
    else:
        chunk, reason = _largest_chunk(federation, params, data, k, mesh)
    if verbose:
        print(f"plan: chunk_size={chunk} on {len(devices)} device(s), {reason}")
    return federate(*federation.parts, chunk_size=chunk, mesh=mesh)


def utilisation(
    work: np.ndarray, chunk_size: int | None = None, devices: int = 1
) -> float:
    """Useful over executed steps of a cohort of ragged clients, at most 1.

    `sum_i s_i / (D c max_d sum_{chunks of d} max_{i in chunk} s_i)`: a chunk of c
    clients runs until its longest is done, a round until its slowest device is. The
    longest clients come first and share their chunks, as in `federate`.

    Args:
      work: steps (or examples) of each client, `[K]`, for instance
        `history.clients.metrics["steps"][r]`.
      chunk_size: c; None for all clients of a device.
      devices: D.

    Returns:
      The fraction; 1 if there is nothing to do.

    >>> utilisation(np.array([1, 1, 4, 4]), chunk_size=2)
    1.0
    >>> utilisation(np.array([1, 1, 4, 4]))  # all at once
    0.625
    """
    per_device = -(-len(work) // devices)
    chunk = per_device if chunk_size is None else min(chunk_size, per_device)
    padded = np.zeros(len(work) + -len(work) % (devices * chunk))
    padded[: len(work)] = np.sort(work)[::-1]
    order = np.asarray(execution_order(jnp.asarray(padded), chunk, devices))
    longest = padded[order].reshape(devices, -1, chunk).max(2).sum(1).max()
    return float(np.sum(work) / (longest * chunk * devices)) if longest else 1.0


def _typical_sizes(data: Data, k: int) -> np.ndarray:
    """The sizes of K clients that are spread as those of the population are."""
    if not isinstance(data, ClientData):
        return np.ones(k)
    places = (np.arange(k) + 0.5) / k
    return np.quantile(np.asarray(data.size), places, method="inverted_cdf")


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree
    )


def _arguments(federation: Federation, params: Params, data: Data, k: int):
    """The shapes of what `federation.round` takes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(federation.init, params, data)
    cohort = jax.eval_shape(lambda key, data: sample_cohort(key, data, k), key, data)
    return key, state, cohort


def _round(federation: Federation, params: Params, data: Data, k: int):
    """The program of a round of K clients alike, without any plan."""
    if isinstance(data, ClientData):
        size = max(1, math.ceil(np.mean(np.asarray(data.size))))
        data = dataclasses.replace(data, shortest=size, longest=size)
    plain = federate(*federation.parts)
    arguments = _arguments(plain, _abstract(params), _abstract(data), k)
    return jax.make_jaxpr(plain.round)(*arguments)


def _flops(closed: Any, loops: bool = True) -> float:
    """Floating-point operations of a program; without `loops`, one turn of each."""

    def count(jaxpr):
        total = 0.0
        for equation in jaxpr.eqns:
            out = sum(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            name, params = equation.primitive.name, equation.params
            inner = [count(getattr(j, "jaxpr", j)) for j in _programs(params)]
            if name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2 * out * math.prod(shape[i] for i in contracted)
            elif name == "conv_general_dilated":
                kernel = equation.invars[1].aval
                features = params["dimension_numbers"].rhs_spec[0]
                total += 2 * out * kernel.size / kernel.shape[features]
            elif name == "cond":
                total += max(inner)
            elif inner:
                total += sum(inner) * (params.get("length", 1) if loops else 1)
            elif name in ARITHMETIC:
                total += out
            elif name == "reduce_sum":
                total += equation.invars[0].aval.size
        return total

    return count(closed.jaxpr)


ARITHMETIC = set("add add_any sub mul div max min exp log tanh sqrt".split())


def _programs(params: dict) -> list:
    """The programs inside an equation."""
    return [
        x
        for value in params.values()
        for x in (value if isinstance(value, tuple | list) else [value])
        if hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ]


def _peak_bytes(federation: Federation, params: Params, data: Data, k: int) -> int:
    """Memory of a compiled round on one device, its state donated."""
    arguments = _arguments(federation, _abstract(params), _abstract(data), k)
    lowered = jax.jit(federation.round, donate_argnums=1).lower(*arguments)
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return 0
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _largest_chunk(federation, params, data, k, mesh) -> tuple[int | None, str]:
    """As many clients at once as fit the memory and do not wait for each other."""
    devices = 1 if mesh is None else mesh.size
    sizes, per_device = _typical_sizes(data, k), -(-k // devices)
    chunk = per_device
    while chunk > FEWEST and utilisation(sizes, chunk, devices) < ENOUGH_USEFUL:
        chunk = max(FEWEST, -(-chunk // 2))
    stats = jax.devices()[0].memory_stats() or {}
    limit = 0.9 * stats.get("bytes_limit", math.inf)
    for _ in range(3):
        planned = federate(*federation.parts, chunk_size=chunk, mesh=mesh)
        peak = _peak_bytes(planned, params, data, k)
        if peak <= limit or chunk == 1:
            break
        chunk = max(1, min(chunk // 2, int(chunk * limit / peak)))
    useful = utilisation(sizes, chunk, devices)
    reason = f"{peak / 2**30:.2g} GiB on each, {useful:.0%} of the steps useful"
    return (None if chunk == per_device else chunk), reason
