"""One process of a run over several: see test_distributed.py."""

import json
import os
import signal
import sys
import threading
import warnings

import jax
import numpy as np
import optax
import toy
from jax.experimental import multihost_utils

import jaxfl
from jaxfl.stream import HostStates


def averaging(mesh=None):
    return jaxfl.federate(
        jaxfl.fedavg(toy.loss, optax.sgd(0.1), optax.adam(0.05), batch_size=2),
        jaxfl.chain(jaxfl.at_client(optax.trace(0.5)), jaxfl.mean()),
        mesh=mesh,
    )


def robust(mesh=None):
    algorithm = jaxfl.fedavg(toy.loss, optax.sgd(0.1), batch_size=2)
    return jaxfl.federate(
        algorithm, jaxfl.at_client(optax.trace(0.5)), jaxfl.median(), mesh=mesh
    )


def simulate(federation, place=lambda data: data, **options):
    """A run of 8 clients, whose own states two processes share between them."""
    return jaxfl.simulate(
        federation,
        toy.params(),
        place(toy.data((*toy.SIZES, 1))),
        cohort_size=5,
        key=jax.random.key(0),
        evaluate=evaluate,
        progress=False,
        **options,
    )


def evaluate(state):
    return {"b": state.params["b"]}


def on_host(data):
    return jaxfl.on_host(jax.tree.map(np.asarray, data), states=True)


def numbers(state, history):
    """All of a run, as JSON can hold it."""
    if isinstance(state.clients, HostStates):
        own = state.clients[np.arange(len(state.clients))].channel
    else:
        own = multihost_utils.process_allgather(state.clients.channel, tiled=True)
    return {
        "w": state.params["w"].tolist(),
        "b": history["b"].tolist(),
        "loss": history.clients.metrics["loss"].tolist(),
        "client": history.clients.client.tolist(),
        "own": [x.tolist() for x in jax.tree.leaves(own)],
    }


def main(address: str, process: int, folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles sooner
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, process, initialization_timeout=120)
    assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
    mesh = jaxfl.client_mesh()

    federation = averaging(mesh)
    simulate(federation, rounds=2, checkpoint=folder)
    state, history = simulate(federation, rounds=4, checkpoint=folder)
    here = {x.addressable_data(0).shape[0] for x in jax.tree.leaves(state.clients)}
    result = {
        "resumed": numbers(state, history),
        "robust": numbers(*simulate(robust(mesh), rounds=2)),
        "streamed": numbers(*simulate(federation, on_host, rounds=4)),
        "here": list(here),
    }
    # What one process decides, the other does: it would wait for ever.
    state, _ = simulate(federation, rounds=4, until=lambda metrics: process == 0)
    result["until"] = int(state.round)
    if process == 1:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with warnings.catch_warnings(record=True) as caught:
        state, _ = simulate(federation, rounds=1_000_000)
    result["interrupted"] = int(state.round), str(caught[-1].message)
    print(json.dumps(result), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
