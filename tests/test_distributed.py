"""Two processes on the loopback, a device each, give what one process gives."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import jax
import numpy as np
import pytest

try:
    jaxlib = importlib.import_module("jaxlib._jax")
    GLOO = hasattr(jaxlib, "make_gloo_tcp_collectives")
except ImportError:
    GLOO = False
HERE = Path(__file__).parent


def start(port, process, folder):
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return subprocess.Popen(
        [
            sys.executable,
            worker.__file__,
            f"127.0.0.1:{port}",
            str(process),
            str(folder),
        ],
        env=os.environ | {"PYTHONPATH": paths},
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
def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = results([start(port, i, tmp_path) for i in range(2)])
    (done, by_other), (same, by_signal) = (
        each.pop("interrupted") for each in (first, second)
    )
    assert first == second
    assert first["here"] == [4]  # of 8 clients' states

    for name, federation, rounds in (
        ("resumed", worker.averaging(), 4),
        ("streamed", worker.averaging(), 4),
        ("robust", worker.robust(), 2),
    ):
        want = worker.numbers(*worker.simulate(federation, rounds=rounds))
        assert first[name].pop("client") == want.pop("client")
        assert_close(first[name], want)

    assert first["until"] == 1
    assert done == same
    assert by_other == f"interrupted after {done} of 1000000 rounds by another process"
    assert by_signal == f"interrupted after {done} of 1000000 rounds by SIGINT"


def assert_close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )
