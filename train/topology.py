"""Devices that are not here, to compile for: TPUs by libtpu, GPUs by JAX's CUDA plugin."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from rtdetrv2_jax.sharding import data_mesh

# What libtpu says, though nothing is wrong, where there is no TPU; and that another process may use it meanwhile.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class TopologyError(ValueError):
    """Devices that cannot be compiled for: their compiler is missing, or there are none of that name."""


class Gpu(NamedTuple):
    """What XLA wants to know of a GPU: of a multiprocessor ("core"), its float32 units and bytes of shared memory.

    `bandwidth` is in bytes a second, `clock` in GHz, `memory` and `cache` in bytes.
    """

    capability: tuple[int, int]
    cores: int
    units: int
    shared_memory: int
    bandwidth: int
    cache: int
    clock: float
    memory: int


GPUS = {
    "a100": Gpu((8, 0), 108, 64, 164 * 1024, 2_039 * 10**9, 40 * 2**20, 1.41, 80 * 2**30),
    "h100": Gpu((9, 0), 132, 128, 228 * 1024, 3_352 * 10**9, 50 * 2**20, 1.98, 80 * 2**30),
    "h200": Gpu((9, 0), 132, 128, 228 * 1024, 4_800 * 10**9, 60 * 2**20, 1.98, 141 * 10**9),
}
"""Of 80, 80 and 141 GB, for servers. Source: NVIDIA's data sheets and tuning guides."""


def topology_mesh(name: str) -> Mesh:
    """A mesh of devices to compile for, which need not be there; what compiles for them must.

    Args:
        name: TPUs as libtpu calls them, kind and grid, such as "v5e:2x2"; or GPUs of one machine, kind and number, such
            as "h200" or "h100:8".

    Raises:
        TopologyError: libtpu or JAX's CUDA plugin is missing, or there are no such devices.
    """
    kind, _, count = name.partition(":")
    return _gpu_mesh(name, kind, count or "1") if kind in GPUS else _tpu_mesh(name)


def _tpu_mesh(name: str) -> Mesh:
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return data_mesh(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"no devices are called {name!r}: give a kind and a grid of chips, such as v5e:2x2, v6e:4x4 or v5p:2x2x1, "
            f"or GPUs and how many, such as h200 or h100:8 ({error})"
        ) from error
    except RuntimeError as error:
        raise TopologyError(f"compiling for a TPU takes libtpu: pip install -e '.[tpu]' ({error})") from error


def _gpu_mesh(name: str, kind: str, count: str) -> Mesh:
    if not count.isdecimal() or not int(count):
        raise TopologyError(f"{name!r} says no number of GPUs: give for instance {kind}:8")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=_target(kind), topology=f"1x1x{int(count)}")
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise TopologyError(
            "compiling for a GPU that is not there takes JAX 0.11 or newer and its CUDA plugin: "
            f"pip install -e '.[cuda]' ({error})"
        ) from error
    return data_mesh(found.devices)


def _target(kind: str) -> str:
    """A GPU, described as XLA wants it (`stream_executor.GpuTargetConfigProto`)."""
    gpu = GPUS[kind]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    numbers = " ".join(f"{field}: {value}" for field, value in device.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 minor: 0 }} '
        f'device_description_str: "NVIDIA {kind.upper()}"'
    )
