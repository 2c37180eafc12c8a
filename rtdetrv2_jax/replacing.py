"""Files and folders that change at once or not at all, whatever stops the writing: an error, a kill, a full disk."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_file(destination: Path) -> Iterator[Path]:
    """A path to write a new file to, which takes the place of `destination` when the block ends well.

    Until then `destination` is as it was, and after an exception or a kill too; what a kill left behind is cleared away
    by the next write to the same place. Where `destination` is a link, what it points to is replaced, and where it is
    no file but a device or a pipe, it is written as it is.

    Raises:
        OSError: The disk is full, or something else about the place is wrong.
    """
    if destination.exists() and not destination.is_file():
        yield destination
        return
    destination = destination.resolve()
    partial = _partial(destination)
    try:
        with _explained(destination):
            yield partial
            _flush(partial)
            partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(destination: Path, *, needs: int = 0) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `destination` when the block ends well.

    All that is in `destination` goes; else as with `replaced_file`.

    Args:
        destination: What is replaced; where it is a link, what it points to.
        needs: How many bytes will be written: a disk that can't hold them is found out before, not half-way.

    Raises:
        OSError: The disk is full, or something else about the place is wrong.
    """
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(destination)
    partial.mkdir()
    try:
        with _explained(destination):
            if shutil.disk_usage(partial).free < needs:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            _take_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(destination: Path) -> Path:
    """Where this process writes what will be at `destination`; what others left there, no longer running, goes.

    It has the suffix of `destination`, by which some writers choose what they write.
    """
    prefix, suffix = f".{destination.stem}.partial-", destination.suffix
    for stale in destination.parent.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        if not _is_running(stale.name.removeprefix(prefix).removesuffix(suffix)):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
    return destination.with_name(f"{prefix}{os.getpid()}{suffix}")


def _is_running(process: str) -> bool:
    """Whether the process with this number, another than this one, is there: it may be writing still."""
    if not process.isdecimal() or int(process) == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Says what to do where the disk is full; safetensors and Orbax hand on the system's error in words only."""
    try:
        yield
    except Exception as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full):
            raise OSError(
                errno.ENOSPC, f"the disk is full: nothing at {destination} was changed; free some space and run again"
            ) from error
        raise


def _flush(path: Path) -> None:
    """Brings a file to the disk, so that a power cut can't follow the rename with an empty one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(new: Path, destination: Path) -> None:
    """Puts `new` where `destination` is. On Linux in one step; elsewhere there is a moment with the old set aside."""
    if not destination.exists():
        new.rename(destination)
    elif not _exchange(new, destination):
        aside = destination.with_name(f".{destination.name}.previous")
        destination.rename(aside)
        new.rename(destination)
        shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, where the system can; tells whether it did."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
