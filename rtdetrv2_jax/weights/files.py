"""Files of weights: safetensors read whole, and folders that change at once or not at all."""

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from rtdetrv2_jax.weights.transfer import WeightsError

CONFIG, PREPROCESSOR, TENSORS, INDEX = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
ORBAX = "weights"
_CHECKPOINT_FILES = re.compile(
    r"(config|preprocessor_config|model\.safetensors\.index)\.json|model(-\d+-of-\d+)?\.safetensors|weights"
)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, or of a folder that holds one or an index of several.

    Raises:
        WeightsError: There is none, one of several is missing, or a file is damaged.
    """
    if path.is_file():
        return _read_file(path)
    if (path / INDEX).is_file():
        shards = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
        missing = [name for name in shards if not (path / name).is_file()]
        if missing:
            raise WeightsError(f"{path / INDEX} names {len(shards)} files, and these are missing: {', '.join(missing)}")
        return {key: tensor for name in shards for key, tensor in _read_file(path / name).items()}
    if (path / TENSORS).is_file():
        return _read_file(path / TENSORS)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    raise WeightsError(f"{path} holds no {TENSORS}, no {INDEX} and no folder {ORBAX!r}, but: {found}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        WeightsError: The file is missing, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: a checkpoint folder has a {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds a {type(data).__name__} where an object is expected")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes an object as an indented JSON file."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced_folder(destination: Path, *, needs: int = 0) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `destination` when the block ends well.

    Until then `destination` is as it was, and after an exception or a kill too; what a kill left behind is cleared away
    by the next write to the same place.

    Args:
        destination: What is replaced; where it is a link, what it points to.
        needs: How many bytes will be written: a disk that can't hold them is found out before, not half-way.

    Raises:
        FileExistsError: `destination` is there and is something else than a checkpoint.
        OSError: The disk is full, or something else about the place is wrong.
    """
    destination = destination.resolve()
    if destination.exists():
        strangers = _strangers(destination)
        if strangers:
            raise FileExistsError(
                f"{destination} is not a checkpoint folder (it holds {', '.join(strangers[:4])}): name a new folder"
            )
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for stale in destination.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(stale.name.removeprefix(prefix)):
            shutil.rmtree(stale, ignore_errors=True)
    partial = destination.with_name(f"{prefix}{os.getpid()}")
    partial.mkdir()
    try:
        if shutil.disk_usage(partial).free < needs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        _flush(partial)
        _take_place(partial, destination)
    except Exception as error:
        if _says_full(error):
            raise OSError(
                errno.ENOSPC, f"the disk is full: nothing at {destination} was changed; free some space and run again"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({error}): is the download complete? A Git LFS pointer or a page of "
            f"HTML looks like this too (the file has {path.stat().st_size} bytes)"
        ) from None


def _says_full(error: Exception) -> bool:
    """Whether an error means a full disk: safetensors and Orbax hand on the system's in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)


def _strangers(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["not even a folder"]
    return sorted(entry.name for entry in folder.iterdir() if not _CHECKPOINT_FILES.fullmatch(entry.name))


def _flush(folder: Path) -> None:
    """Brings every file below a folder to the disk, so that a power cut can't follow the rename with empty files."""
    for path in [*folder.rglob("*"), folder]:
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
