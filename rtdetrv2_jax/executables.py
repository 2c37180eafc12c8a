"""Compiled programs kept whole: a later process has nothing to trace, lower or compile, and starts in half the time.

JAX's own cache is found by the program that it is asked to compile, and to make that program, by tracing and lowering,
takes as long as all else of a start together. What is kept here is found by what the program would be made from.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.layout import Format, Layout

from rtdetrv2_jax.compilation import compiler_options, enable_persistent_cache
from rtdetrv2_jax.replacing import replaced_file

MOST_FILES = 64
"""How many programs are kept; the one that was not used for longest goes first."""
NOT_KEPT = b"a program that can't be kept"
"""Stands in the place of one that its backend can't write, or not read again: JAX's own cache is for such."""

COMPILERS_CHOICE = Format(Layout.AUTO)
"""How bound arrays lie in memory."""

Arrays = Sequence[jax.Array | np.ndarray]
Shapes = tuple[tuple[tuple[int, ...], str], ...]

logger = logging.getLogger(__name__)


class KeptProgram:
    """A function of arrays, jitted; each of its compiled programs is kept for later processes.

    The arrays that are always the same lie in memory as the compiler wants them: in the usual layout, GPUs would
    transpose every kernel of a convolution in every run.

    Args:
        function: Takes a list of arrays that are always the same, such as weights, and then others; gives a tuple or
            list of arrays. Nothing else may decide what it does but `about` and this library's own source.
        bound: The arrays that are always the same.
        about: All that decides what the function does; None if that can't be said, and nothing is kept.
    """

    def __init__(self, function: Callable[..., Any], bound: Arrays, *, about: str | None) -> None:
        self.bound = list(bound)
        self._function = function
        self._about = about
        self._plain = _is_plain(self.bound)
        self._jitted = jax.jit(function, compiler_options=compiler_options())
        self._programs: dict[Shapes, Callable[..., Any]] = {}

    def __call__(self, *arrays: jax.Array | np.ndarray) -> Any:
        """What the function gives."""
        if not self._plain or not _is_plain(arrays):
            return self._jitted(self.bound, *arrays)
        shapes = _shapes(arrays)
        if shapes in self._programs:
            return self._programs[shapes](*arrays)
        self._programs[shapes], result = self._first(arrays)
        return result

    def compiled(self, *arrays: jax.Array | np.ndarray) -> jax.stages.Compiled:
        """The program for arrays like these, out of JAX's cache if it is there."""
        return self._lowered(self._function, arrays).compile()

    def _first(self, arrays: Arrays) -> tuple[Callable[..., Any], Any]:
        """The program for these arrays, which takes them alone, and what it gives for them."""
        if not _is_usual():
            return lambda *others: self._jitted(self.bound, *others), self._jitted(self.bound, *arrays)
        if (file := self._file(arrays)) is None:
            return self._ran(self.compiled(*arrays), arrays)
        if found := self._tried(file, arrays):
            return found
        compiled = self._compiled_anew(arrays)
        try:
            _write(file, pickle.dumps(serialize_executable.serialize(compiled)))
        except OSError as error:  # the disk is full
            logger.debug("%s can't be written: %s", file, error)
            return self._ran(compiled, arrays)
        except Exception as error:  # such programs can't be kept
            logger.debug("%s can't be kept: %s", file, error)
        if found := self._tried(file, arrays):
            return found
        with contextlib.suppress(OSError):
            _write(file, NOT_KEPT)
        return self._ran(self.compiled(*arrays), arrays)

    def _file(self, arrays: Arrays) -> Path | None:
        """Where the program for these arrays is kept; None if it is not to be kept."""
        if self._about is None or (folder := _folder()) is None:
            return None
        name = self._function.__name__
        parts = (name, self._about, _shapes(self.bound), _shapes(arrays), _source(), _machine(), _settings())
        return folder / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()}"

    def _tried(self, file: Path, arrays: Arrays) -> tuple[Callable[..., Any], Any] | None:
        """A kept program and what it gives, or None if there is none that works."""
        try:
            kept = file.read_bytes()
            found = self._ran(self.compiled(*arrays) if kept == NOT_KEPT else _loaded(kept), arrays)
            os.utime(file)
            return found
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with it, it can be made again
            logger.debug("%s is of no use, and goes: %s", file, error)
            file.unlink(missing_ok=True)
            return None

    def _ran(self, program: jax.stages.Compiled, arrays: Arrays) -> tuple[Callable[..., Any], Any]:
        """A program with what is bound to it, laid out as it wants that, and what it gives for some arrays."""
        wanted = program.input_formats[0][0]
        self.bound = [_laid_out(array, form) for array, form in zip(self.bound, wanted, strict=True)]
        ready = functools.partial(program, self.bound)
        return ready, jax.block_until_ready(ready(*arrays))

    def _compiled_anew(self, arrays: Arrays) -> jax.stages.Compiled:
        """The program, compiled here and now: one that comes out of JAX's cache can't be written again.

        JAX finds programs by their text, the function's name in it.
        """

        @functools.wraps(self._function)
        def once(*arguments: Any) -> Any:
            return self._function(*arguments)

        once.__name__ = f"{self._function.__name__}_{secrets.token_hex(4)}"
        lowered = self._lowered(once, arrays)
        # In a thread of its own, whose share of the heap takes what the compiler leaves behind: runs of the program
        # would search through it for each piece of memory.
        with _unwritten(), ThreadPoolExecutor(1) as thread:
            return thread.submit(lowered.compile).result()

    def _lowered(self, function: Callable[..., Any], arrays: Arrays) -> jax.stages.Lowered:
        bound = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self.bound]
        layouts = (COMPILERS_CHOICE, *[None] * len(arrays))
        return jax.jit(function, in_shardings=layouts, compiler_options=compiler_options()).lower(bound, *arrays)


def _shapes(arrays: Arrays) -> Shapes:
    return tuple((array.shape, str(array.dtype)) for array in arrays)


@contextlib.contextmanager
def _unwritten() -> Iterator[None]:
    """JAX's cache takes nothing new meanwhile."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[setting]
    jax.config.update(setting, float("inf"))
    try:
        yield
    finally:
        jax.config.update(setting, before)


def _laid_out(array: jax.Array | np.ndarray, form: Format) -> jax.Array:
    """The array in this form, itself if it has it."""
    own: Format | None = getattr(array, "format", None)
    if isinstance(array, jax.Array) and own and own.layout == form.layout:
        return array
    return jax.device_put(array, form)


def _is_usual() -> bool:
    """Whether nothing is set that changes how functions are compiled, or where they run."""
    disabled = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return not disabled and jax.process_count() == 1 and jax.sharding.get_abstract_mesh().empty


def _is_plain(arrays: Arrays) -> bool:
    """Whether arrays are numbers that lie where a program finds them: on the first device, or not yet on any."""
    first = {jax.local_devices()[0]}
    return all(isinstance(array, np.ndarray) or array.devices() == first for array in arrays)


def _folder() -> Path | None:
    """Where programs are kept, beside JAX's own; None where none may be."""
    cache = enable_persistent_cache()
    if cache is None or ":/" in str(cache):
        return None
    folder = cache / "executables"
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    return folder


def _loaded(kept: bytes) -> jax.stages.Compiled:
    return serialize_executable.deserialize_and_load(*pickle.loads(kept), execution_devices=jax.local_devices()[:1])


def _write(file: Path, kept: bytes) -> None:
    """Puts a program in its place at once or not at all, and takes the oldest away where there are too many."""
    with replaced_file(file) as partial:
        partial.write_bytes(kept)
    by_age = sorted(file.parent.iterdir(), key=lambda each: each.stat().st_mtime)
    for old in by_age[:-MOST_FILES]:
        old.unlink(missing_ok=True)


@functools.cache
def _source() -> str:
    """A digest of this library's source, and the versions of what traces and compiles it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
    return f"{digest.hexdigest()} {versions}"


@functools.cache
def _machine() -> str:
    """What programs are compiled for: the device's kind, and on a CPU its instructions."""
    device = jax.local_devices()[0]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    host = platform.machine(), platform.processor(), os.cpu_count(), instructions
    return f"{device.device_kind} {device.client.platform_version} {host}"


def _settings() -> str:
    """JAX's settings as they are here and now, but for its cache's, and what is said to its compilers besides."""
    values = {
        name: str(getattr(jax.config, name, value)) for name, value in jax.config.values.items() if "cache" not in name
    }
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return f"{sorted(values.items())} {flags}"
