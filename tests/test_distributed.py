"""Two processes on the loopback, a device each, give what one process gives."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

try:
    jaxlib = importlib.import_module("jaxlib._jax")
    GLOO = hasattr(jaxlib, "make_gloo_tcp_collectives")
except ImportError:
    GLOO = False
HERE = Path(__file__).parent


def start(port, process, processes):
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    worker = HERE / "distributed_worker.py"
    return subprocess.Popen(
        [sys.executable, worker, f"127.0.0.1:{port}", str(process), str(processes)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(processes):
    """What each printed; all are killed if one does not end."""
    try:
        printed = []
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err[-3000:]
            printed.append(json.loads(out.splitlines()[-1]))
        return printed
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(not GLOO, reason="this jaxlib has no gloo collectives")
def test_two_processes_are_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = results([start(port, i, 2) for i in range(2)])
    (alone,) = results([start(port, 0, 1)])
    assert first == second
    assert alone["client"] == first["client"]
    for name, want in alone.items():
        np.testing.assert_allclose(first[name], want, rtol=1e-5, atol=1e-6)
