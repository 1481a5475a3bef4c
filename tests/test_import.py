"""What `import jaxfl` does not import."""

import subprocess
import sys

import pytest

HEAVY = (
    "matplotlib",
    "tensorflow",
    "tensorflow_datasets",
    "orbax.checkpoint",
    "dp_accounting",
    "jax_privacy",
    "jaxfl.accounting",
    "cryptography",
    "jaxfl.homomorphic",
    "tenseal",
    "phe",
    "flwr",
    "jaxfl.interop",
)


@pytest.fixture(scope="module")
def imported():
    code = "import sys, jaxfl; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("module", HEAVY)
def test_import_is_light(imported, module):
    assert {"jaxfl", "jax", "optax"} <= imported
    assert not {m for m in imported if m == module or m.startswith(f"{module}.")}
