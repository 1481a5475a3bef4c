"""Four fake devices for every test process, so that meshes are tested everywhere.

Tests compile thousands of small programs and run each once, so the compiler is told
not to try hard, and to remember.
"""

from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
cache = Path(__file__).parent.parent / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


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
    if not (find_spec("tenseal") and find_spec("phe")):
        for item in items:
            if item.name.startswith("jaxfl.homomorphic"):
                item.add_marker(pytest.mark.skip(reason="needs the extra `he`"))
