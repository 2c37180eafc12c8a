"""How our programs are compiled: what suits this network on each backend, and a cache that outlives the process."""

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

import jax

_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Options for `jax.jit` that make this network faster on a platform; none that its compiler lacks.

    The platform ("cpu", "gpu", "tpu") is the default backend's, unless a program for other devices is compiled.

    On a CPU, XLA's YNNPACK fusions are off: they save work and lose more of it to waiting, so that ResNet-18 took 3 to
    10 % longer with them on two cores of AMD's Zen 5, and 15 % longer on Intel's with matrix tiles.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda x: x + 1, compiler_options=dict(_WITHOUT_YNNPACK))(0).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_WITHOUT_YNNPACK)


def enable_persistent_cache() -> Path | None:
    """Keeps compiled programs in the user's cache folder, unless a cache is set or switched off already.

    `JAX_COMPILATION_CACHE_DIR` names another folder, or none if it is empty; `JAX_ENABLE_COMPILATION_CACHE=false`
    switches it off.

    Returns:
        The folder in use, or None where there is none.
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None:
        folder = user_cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that can't be written to is no reason not to detect
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Path(folder) if folder else None


def keep_freed_memory() -> None:
    """Lets this process keep the memory it has freed, for the next run of a program to use.

    XLA asks for its scratch memory anew in each run; glibc gives blocks of that size back to the system at once, and
    the page faults of fetching them again are a tenth of a detection's time, and a quarter of a training step's. Few
    heaps remain, for the compiler (see `executables`) and to run in: where each thread has one, each faults in its own.
    It holds for the whole process, so programs call it and libraries should not; it has an effect only before other
    threads start, and only with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        option = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_most, arenas_most = -1, -4, -8
        option(trim_threshold, -1)  # never
        option(mmap_most, 0)
        option(arenas_most, 3)


def user_cache_folder() -> Path:
    """Where this system keeps what can be made again: `XDG_CACHE_HOME`, ~/Library/Caches or %LOCALAPPDATA%."""
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "rtdetrv2_jax"
