"""What is kept of a measurement: the figures, and on what, when and by which command they were taken."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "optax", "scipy", "torch", "transformers")
ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino")


def record(
    what: str, figures: Sequence[dict[str, Any]], *, program: str, failed: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A measurement as JSON has it, in the same form whatever was measured.

    Args:
        what: Was measured, such as "network"; a table of it is laid out by this name.
        figures: One row for each thing that was measured, complete in itself: model, dtype and batch included.
        program: The command, without its arguments.
        failed: What could not be measured, and why.
    """
    return {
        "what": what,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        "versions": versions(),
        "figures": list(figures),
        "failed": list(failed),
    }


def machine() -> str:
    """The processor, as the system calls it, and how many of its cores there are; the accelerator, if there is one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{name}, {os.cpu_count()} cores{accelerator}"


def versions() -> dict[str, str]:
    """Of Python, and of the packages that figures may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *ENGINES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def leave_memory_to_others() -> None:
    """Keeps JAX, here and in processes started from here, from taking most of a GPU's memory before it is needed.

    Several processes share the GPU while they take turns. To be called before JAX is used.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
