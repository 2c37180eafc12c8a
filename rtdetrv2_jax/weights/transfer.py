"""Between the tensors of a PyTorch file and a model, both ways, by the table."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.weights.table import DROPPED, Row, canonical, rows

Naming = Literal["hugging_face", "authors"]
Tensors = Mapping[str, np.ndarray]

_LISTED = 8


class WeightsError(ValueError):
    """Tensors that are not those of the model they are meant for."""


class Transfer(NamedTuple):
    """A model with the weights of a file, and what of the file it did without: key and reason."""

    model: RTDETRv2
    dropped: dict[str, str]


def naming_of(tensors: Tensors) -> Naming:
    """Whose names the keys are: Hugging Face's, or those of the authors' repository.

    Raises:
        WeightsError: Neither's.
    """
    if any(key.startswith("model.backbone.") for key in tensors):
        return "hugging_face"
    if any(key.startswith("backbone.res_layers.") for key in tensors):
        return "authors"
    shown = ", ".join(sorted(tensors)[:_LISTED]) or "none at all"
    raise WeightsError(
        "these are not the weights of an RT-DETRv2 with a ResNet backbone: no key starts with 'model.backbone.' "
        f"(Hugging Face) or 'backbone.res_layers.' (the authors' repository). The first keys are: {shown}"
    )


def from_tensors(tensors: Tensors, config: ModelConfig, *, dtype: DTypeLike = jnp.float32) -> Transfer:
    """The model that a file describes, with every tensor of the file in its place.

    Half-precision tensors become float32. Every key is used once or dropped for a reason; every number of the model
    comes from the file, but for those that the table calls optional.

    Raises:
        WeightsError: Keys are missing, left over or of the wrong shape: all of them are listed.
    """
    naming = naming_of(tensors)
    tensors = _merge_names(tensors) if naming == "hugging_face" else tensors
    model = abstract_model(config, dtype=dtype)
    expected = flat_state(model)
    table = rows(config)
    faults, values, used = [], {}, set()
    for row in table:
        key = getattr(row, naming)
        used.add(key)
        shape = expected[row.ours].shape
        if key not in tensors:
            if row.optional:
                values[row.ours] = _initial(row, config)
            else:
                faults.append(f"missing: {key} {_theirs(row, shape)}")
            continue
        value = _to_ours(row, tensors[key], naming=naming)
        if value.shape != shape:
            faults.append(
                f"shape: {key} is {tensors[key].shape} where the configuration asks for {_theirs(row, shape)}"
            )
        values[row.ours] = value
    dropped = {key: reason for key in tensors if key not in used and (reason := _reason(key))}
    faults += [f"left over: {key} {tensors[key].shape}" for key in tensors if key not in used and key not in dropped]
    if faults:
        shown = "\n  ".join(faults[:_LISTED]) + (
            f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        )
        raise WeightsError(
            f"the weights do not fit the configuration ({len(faults)} of {len(table)} tensors):\n  {shown}\n"
            "Is this config.json the one that belongs to these weights?"
        )
    return Transfer(with_values(model, values), dropped)


def to_tensors(model: RTDETRv2) -> dict[str, np.ndarray]:
    """The model's numbers under Hugging Face's names, as transformers lays them out on disk.

    Raises:
        WeightsError: The model is in its inference form, whose folded numbers have no place in a checkpoint.
    """
    values = flat_state(model)
    table = rows(model.config)
    if values.keys() != {row.ours for row in table}:
        raise WeightsError("this model is in its inference form (folded): save the model it was made from")
    return {row.hugging_face: _to_theirs(row, np.asarray(values[row.ours])) for row in table}


def flat_state(model: RTDETRv2) -> dict[str, Any]:
    """Every array of a model by its dotted path, as the table writes it; shapes and types of an abstract model."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def with_values(model: RTDETRv2, values: Mapping[str, np.ndarray | jax.Array]) -> RTDETRv2:
    """The model with the numbers of `values`, one for each dotted path; `model` may be abstract."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    arrays = jax.device_put([values[".".join(map(str, path))] for path, _ in flat])
    filled = [(path, variable.replace(array)) for (path, variable), array in zip(flat, arrays, strict=True)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _merge_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors under their published names; heads that a file holds twice must agree."""
    merged: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        name = canonical(key)
        if name in merged and not np.array_equal(merged[name], tensor):
            raise WeightsError(f"the file holds {name} twice (once as {key}), with different numbers")
        merged[name] = tensor
    return merged


def _to_ours(row: Row, tensor: np.ndarray, *, naming: Naming) -> np.ndarray:
    if naming == "authors" and row.third is not None:
        tensor = np.array_split(tensor, 3)[row.third]
    if row.layout == "conv" and tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif row.layout == "linear" and tensor.ndim == 2:
        tensor = tensor.T
    return tensor.astype(np.int32 if row.layout == "count" else np.float32)


def _to_theirs(row: Row, value: np.ndarray) -> np.ndarray:
    if row.layout == "conv":
        value = value.transpose(3, 2, 0, 1)
    elif row.layout == "linear":
        value = value.T
    # Not `ascontiguousarray`, which turns a counter into a list of one.
    return np.asarray(value, np.int64 if row.layout == "count" else np.float32, order="C")


def _theirs(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of ours has in a file."""
    if row.layout == "conv":
        return (shape[3], shape[2], *shape[:2])
    return shape[::-1] if row.layout == "linear" else shape


def _initial(row: Row, config: ModelConfig) -> np.ndarray:
    """The value of an optional tensor that a file leaves out."""
    if row.layout == "count":
        return np.zeros((), np.int32)
    points = config.decoder.points
    return np.repeat(1 / np.array(points), points).astype(np.float32)


def _reason(key: str) -> str | None:
    return next((reason for pattern, reason in DROPPED if re.fullmatch(pattern, key)), None)
