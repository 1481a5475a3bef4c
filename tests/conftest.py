"""Four fake devices for every test process, so that meshes are tested everywhere.

Tests compile thousands of small programs and run each once, so the compiler is told
not to try hard, and to remember.
"""

import os
import platform
from importlib.util import find_spec
from pathlib import Path

# In the environment, which other processes inherit, and before jax reads it.
# The older emitter of fused loops compiles in a third of the time; what it compiles
# takes a quarter longer to run. One piece a program: the tests keep all cores busy. And
# no fused multiply-add, or one program for the same numbers rounds where another does
# not, by how it happens to be fused.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).parent.parent / ".pytest_cache" / "jax"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_max_isa=AVX" if platform.machine() in ("x86_64", "AMD64") else "")
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True, scope="module")
def programs_go_with_their_module():
    """The system gives a process only so many mappings, and each program takes some."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_collection_modifyitems(items):
    """Doctests cannot skip themselves where an extra is not installed."""
    missing = []
    if not (find_spec("tenseal") and find_spec("phe")):
        missing.append(("jaxfl.homomorphic", "he"))
    if not find_spec("flwr"):
        missing.append(("jaxfl.interop", "flower"))
    for module, extra in missing:
        for item in items:
            if item.name.startswith(module):
                item.add_marker(pytest.mark.skip(reason=f"needs the extra `{extra}`"))
