"""Tests run on the CPU as four virtual devices, so that every test meets more than one.

Programs are compiled without optimisation: for the small networks here compiling is the cost. Compiled ones are kept in
pytest's cache folder, because several tests run the same step.
"""

import gc
import os
import pathlib
from importlib import metadata

FLAGS = {"xla_force_host_platform_device_count": 4, "xla_backend_optimization_level": 0}
# XLA's older code generator compiles a train step in 0.6 of the time, and without these hints to LLVM it takes a tenth
# less. XLA ends the process over a flag it does not know, hence the exact version.
if metadata.version("jaxlib") == "0.10.2":
    FLAGS |= {
        "xla_cpu_use_fusion_emitters": "false",
        "xla_llvm_enable_alias_scope_metadata": "false",
        "xla_llvm_enable_noalias_metadata": "false",
    }
# Tracing makes millions of small objects, none of which is garbage yet.
gc.set_threshold(100_000, 20, 20)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled")
)

import jax  # noqa: E402
import pytest  # noqa: E402

from diffax.training import cpu_flags, parallel  # noqa: E402

# So that a command run inside the tests computes exactly what it computes as a process of its own.
cpu_flags.set_cpu_flags()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the programs of a file of tests behind it: each takes memory maps, and a process has 65,530 at most."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def cut_small_arrays(monkeypatch):
    """So that fsdp has something to cut in the small networks here."""
    monkeypatch.setattr(parallel, "WHOLE_BELOW", 1)
