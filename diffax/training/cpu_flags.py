"""XLA's flags for a CPU; no JAX is imported, so that they can be set before it starts."""

import importlib.metadata
import os


def set_cpu_flags() -> None:
    """Makes XLA:CPU fast, where the user did not choose otherwise; without effect once JAX has met a device.

    One device per core (a power of two), because one device computes little but convolutions on all cores. And the new
    kernels of jaxlib 0.10.2 off: with them the weight gradient of a 3x3 convolution at 32 pixels takes ten times as
    long.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        flags += f" --xla_force_host_platform_device_count={min(8, 1 << (cores.bit_length() - 1))}"
    # XLA ends the process over a flag it does not know, hence the exact version.
    if "xla_cpu_experimental_ynn" not in flags and importlib.metadata.version("jaxlib") == "0.10.2":
        flags += " --xla_cpu_experimental_ynn_fusion_type="
    os.environ["XLA_FLAGS"] = flags.strip()
