"""Files of weights: safetensors and JSON, and the folders of checkpoints."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from rtdetrv2_jax.replacing import replaced_file, replaced_folder
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
    """Writes an object as an indented JSON file, at once or not at all."""
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced_checkpoint(destination: Path, *, needs: int = 0) -> Iterator[Path]:
    """A new folder to write a checkpoint into, which takes the place of `destination` as `replaced_folder` says.

    Raises:
        FileExistsError: `destination` is there and is something else than a checkpoint.
        OSError: The disk is full, or something else about the place is wrong.
    """
    strangers = _strangers(destination) if destination.exists() else []
    if strangers:
        raise FileExistsError(
            f"{destination} is not a checkpoint folder (it holds {', '.join(strangers[:4])}): name a new folder"
        )
    with replaced_folder(destination, needs=needs) as partial:
        yield partial


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({error}): is the download complete? A Git LFS pointer or a page of "
            f"HTML looks like this too (the file has {path.stat().st_size} bytes)"
        ) from None


def _strangers(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["not even a folder"]
    return sorted(entry.name for entry in folder.iterdir() if not _CHECKPOINT_FILES.fullmatch(entry.name))
