"""The authors' `.pth` files: the weights of a training state, read without running any code that a pickle may hold."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rtdetrv2_jax.weights.hub import SourceError
from rtdetrv2_jax.weights.transfer import WeightsError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"

# Where a training state keeps the weights, best first: their running average is what the authors evaluate.
_PLACES = (("ema", "module"), ("ema",), ("model",), ("state_dict",))


def is_pth(path: Path) -> bool:
    """Whether a file is one that `torch.save` writes, whatever it is called."""
    with path.open("rb") as file:
        head = file.read(9)
    return head.startswith((_ZIP, _PICKLE)) and head[8:] != b"{"  # a safetensors header could begin with the same byte


def read_pth(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a `.pth`, and the place in it that they come from.

    Raises:
        SourceError: PyTorch is not installed.
        WeightsError: The file is damaged, holds more than tensors and plain values, or holds no weights.
    """
    state, place = _weights(_load(path), path)
    tensors = {}
    for key, tensor in state.items():
        if not hasattr(tensor, "detach"):
            raise WeightsError(f"{path}: {place} should hold tensors, and {key} is a {type(tensor).__name__}")
        tensor = tensor.detach()
        # NumPy has no bfloat16 of its own; float32 holds all of its values.
        tensors[str(key).removeprefix("module.")] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return tensors, place


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise SourceError(
            f"{path} is a PyTorch file, and reading it takes PyTorch: pip install -e '.[torch]' (a .safetensors file "
            "needs none)"
        ) from None
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was not read: it is damaged, or holds Python objects beside tensors and plain values, and reading "
            f"those would run code that the file brings along. PyTorch says: {_first_line(error)}\n"
            "Where the file was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} can't be read as a PyTorch file ({_first_line(error)}): is the download complete? "
            f"The file has {size} bytes"
        ) from None


def _weights(data: Any, path: Path) -> tuple[Mapping[str, Any], str]:
    """The dictionary of weights within what a file holds, and where it was."""
    if not isinstance(data, Mapping):
        raise WeightsError(f"{path} holds a {type(data).__name__}, not a dictionary of weights")
    for place in _PLACES:
        found: Any = data
        for key in place:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and any("." in str(key) for key in found):
            return found, ".".join(place)
    if any("." in str(key) for key in data):
        return data, "the whole file"
    shown = ", ".join(str(key) for key in list(data)[:8]) or "nothing"
    raise WeightsError(f"{path} holds no weights at 'ema.module', 'model' or by themselves, but: {shown}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
