"""TPU slices that are not here: their devices, to compile for."""

import contextlib
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from diffax.errors import UserError

# Kinds of TPU: dimensions of a slice, and the most chips of one host.
SLICES = {"v4": (3, 4), "v5e": (2, 8), "v5p": (3, 4), "v6e": (2, 8)}

# Otherwise libtpu queries a metadata server for the TPU that this is, and JAX tries to start that one. And libtpu lets
# in one process at a time, though those that compile touch no chip.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """'v5e:4x4' -> ('v5e', (4, 4)), the kind of TPU and how many chips lie along each dimension of the slice.

    Raises:
      UserError: it names no slice.
    """
    kind, _, dims = name.partition(":")
    rank = SLICES[kind][0] if kind in SLICES else 2
    if kind not in SLICES or not re.fullmatch(rf"[1-9]\d{{0,3}}(x[1-9]\d{{0,3}}){{{rank - 1}}}", dims):
        like = f"{kind}:2x2x4" if rank == 3 else "v5e:4x4"
        raise UserError(
            f"there is no TPU slice {name!r}; --topology; kinds are {', '.join(SLICES)}, and it is written as {like}"
        )
    return kind, tuple(map(int, dims.split("x")))


def compile_only() -> None:
    """Lets programs be compiled for TPUs where there are none. To be called before any other use of JAX."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):  # it has started already, in a notebook
        jax.config.update("jax_platforms", "cpu")


def slice_devices(name: str) -> list[Any]:
    """The devices of a TPU slice such as 'v5e:4x4', to compile for and not to run on; `compile_only` comes first.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    kind, dims = parse_topology(name)
    # A slice of one host has that host's shape. A v4 chip has two cores, which programs see as one device.
    hosts = (*dims, 1, 1)[:3] if math.prod(dims) <= SLICES[kind][1] else (2, 2, 1)
    more = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=hosts, **more)
    except RuntimeError as error:
        raise _refusal(name, str(error)) from error
    return list(found.devices)


def _refusal(name: str, reason: str) -> UserError:
    if "not installed" in reason:
        return UserError(
            f"libtpu is not installed, which compiles for TPUs; --topology={name}; pip install 'diffax[tpu]'"
        )
    if "lockfile" in reason:
        return UserError(
            f"another program uses libtpu; --topology={name}; let it end, or, if there is none, remove the file "
            f"named here: {reason}"
        )
    kind, dims = parse_topology(name)
    like = f"{kind}:{'x'.join('4' * len(dims))}"
    return UserError(f"there is no TPU slice {name!r} ({reason}); --topology; sides are even, as in {like}")
