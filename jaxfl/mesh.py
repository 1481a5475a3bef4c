"""The mesh: clients, their states and their messages spread over devices."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxfl import tree

PyTree = Any

AXIS = "clients"
# A client id that no population has: writes to it are out of range, and dropped.
NOBODY = jnp.iinfo(jnp.int32).max


def client_mesh(devices: Sequence[Any] | None = None, *, model: int = 1) -> Mesh:
    """A mesh that spreads clients over devices, all of them by default.

    On a CPU, `cores_as_devices()` before JAX is used makes each core a device.

    For a client that is larger than a device, `model` devices together hold and train
    each one. How its parameters are split over them the user says, by

        jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "model")))

    for the `params` given to `simulate`; XLA splits the rest to match, so such rounds
    want a `jit` round them.

    Args:
      devices: the devices.
      model: how many of them make up one client's.

    Returns:
      A mesh with the axis `"clients"`, and the axis `"model"` if there is a use for it.

    Raises:
      ValueError: if model is not positive or does not divide the devices.

    >>> dict(client_mesh(jax.devices()[:1]).shape)
    {'clients': 1}
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or len(devices) % model:
        raise ValueError(f"model must divide the {len(devices)} devices, got {model}.")
    axes = {AXIS: len(devices) // model} | ({"model": model} if model > 1 else {})
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), auto, devices=devices)


def per_device(fn: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree):
    """`fn` on each of the devices over which clients are spread, as `jax.shard_map`.

    The axes of the mesh other than that of the clients are left to the compiler.
    """
    # Without check_vma=False a gradient with respect to `shared` would be summed over
    # devices, and a client's own loop, begun from zeros, would be refused under a mesh.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )


def by_coordinates(apply: Callable, mesh: Mesh, place: jax.Array | slice) -> Callable:
    """A coordinatewise `apply` whose work is spread over devices by coordinates.

    `place` says which rows of the stack are those of the cohort.

    An all-to-all gives each device its share of the coordinates, of all clients, and
    what it makes of them is gathered: none ever holds the stack `[K, ...]`.
    """
    devices = mesh.shape[AXIS]

    def on_device(ctx, payloads, sent, state):
        def share(x):  # [K / devices, ...] -> [K, coordinates / devices]
            x = x.reshape(x.shape[0], -1)
            x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % devices)))
            x = jax.lax.all_to_all(x, AXIS, 1, 0, tiled=True)
            return x[place]

        def whole(x, like):
            x = jax.lax.all_gather(x, AXIS, tiled=True)
            return x[: math.prod(like.shape[1:])].reshape(like.shape[1:])

        payload, delivered, state = apply(
            ctx, jax.tree.map(share, payloads), sent, state
        )
        return jax.tree.map(whole, payload, payloads), delivered, state

    return per_device(on_device, mesh, (P(), P(AXIS), P(), P()), P())


def are_spread(states: PyTree, mesh: Mesh) -> bool:
    """Whether clients' states `[N, ...]` are spread over a mesh: it divides N."""
    lengths = {x.shape[0] % mesh.shape[AXIS] for x in jax.tree.leaves(states)}
    return lengths == {0}


def read_rows(states: PyTree, client: jax.Array, mesh: Mesh | None) -> PyTree:
    """The states `[K, ...]` of these clients; of nobody, anyone's."""

    def rows_at(states, place):
        return jax.tree.map(lambda x: x.at[place].get(mode="clip"), states)

    if mesh is None or not are_spread(states, mesh):
        return rows_at(states, client)

    def visit(states, here, place, rows):
        return states, tree.where_rows(here, rows_at(states, place), rows)

    def on_device(states, client):
        return _travel(visit, states, client, rows_at(states, client), mesh)[1]

    return per_device(on_device, mesh, P(AXIS), P(AXIS))(states, client)


def write_rows(
    states: PyTree, client: jax.Array, rows: PyTree, mesh: Mesh | None
) -> PyTree:
    """The states `[N, ...]` with these clients' replaced; nobody's are dropped."""

    def replaced(states, place, rows):
        return jax.tree.map(
            lambda x, new: x.at[place].set(new, mode="drop"), states, rows
        )

    if mesh is None or not are_spread(states, mesh):
        return replaced(states, client, rows)

    def visit(states, here, place, rows):
        return replaced(states, jnp.where(here, place, NOBODY), rows), rows

    def on_device(states, client, rows):
        return _travel(visit, states, client, rows, mesh)[0]

    return per_device(on_device, mesh, P(AXIS), P(AXIS))(states, client, rows)


def _travel(
    visit: Callable, states: PyTree, client: jax.Array, rows: PyTree, mesh: Mesh
) -> tuple[PyTree, PyTree]:
    """Takes rows `[K / devices, ...]` to the devices that hold their clients' states.

    All go once round the ring of devices, so that none ever holds `[K, ...]`; where
    every client is at home, as those of a whole population are, none goes anywhere.

    Args:
      visit: `(states, here, place, rows) -> (states, rows)`, with `here` saying whose
        states this device has, and `place` in which row.
      states: this device's, `[N / devices, ...]`.
      client: int32 `[K / devices]`, the clients of the rows.
      rows: of this device's clients of the cohort.
      mesh: the devices.

    Returns:
      The states and, home again, the rows.
    """
    devices = mesh.shape[AXIS]
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    n = jax.tree.leaves(states)[0].shape[0]

    def held(client):
        place = client - n * jax.lax.axis_index(AXIS)
        return (place >= 0) & (place < n), place

    def stay(states, client, rows):
        return visit(states, *held(client), rows)

    def go_on(_, carry):
        states, client, rows = carry
        states, rows = stay(states, client, rows)
        return states, *jax.lax.ppermute((client, rows), AXIS, ring)

    def all_round(states, client, rows):
        states, _, rows = jax.lax.fori_loop(0, devices, go_on, (states, client, rows))
        return states, rows

    at_home = jnp.all(held(client)[0] | (client == NOBODY))
    everyone_is = jax.lax.psum(at_home, AXIS) == devices
    return jax.lax.cond(everyone_is, stay, all_round, states, client, rows)
