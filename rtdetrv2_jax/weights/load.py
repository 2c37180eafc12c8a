"""Loading a model from wherever it lies, and saving it where others look for it."""

import logging
import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jaxtyping import DTypeLike

from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.query_selection import class_head
from rtdetrv2_jax.model.rtdetrv2 import LabelEmbedding, RTDETRv2, abstract_model
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights import config_json
from rtdetrv2_jax.weights.checkpoint import read_orbax, write_orbax
from rtdetrv2_jax.weights.files import (
    CONFIG,
    ORBAX,
    PREPROCESSOR,
    TENSORS,
    read_json,
    read_tensors,
    replaced_checkpoint,
    write_json,
)
from rtdetrv2_jax.weights.hub import SourceError, find
from rtdetrv2_jax.weights.transfer import flat_state, from_tensors, to_tensors, with_values

Source = str | os.PathLike[str]
Format = Literal["orbax", "hf"]

logger = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """A checkpoint, whole: the model, how its images are prepared, and what of the file it did without and why."""

    model: RTDETRv2
    preprocessing: Preprocessing
    dropped: dict[str, str]


def load_model(
    source: Source,
    *,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> tuple[RTDETRv2, ModelConfig]:
    """The model of a checkpoint, ready for inference, and its configuration.

    Args:
        source: A hub id, a Hugging Face folder, or a folder of ours.
        dtype: What the model computes in; its parameters are float32.
        revision: A branch, tag or commit, where `source` is a hub id.
        class_names: Other classes than the checkpoint's. The class layers start anew, except that a class whose name
            the checkpoint has too keeps its weights; a warning says which.

    Raises:
        SourceError: There is no such model, or it can't be fetched; the message says what can be done.
        ConfigError, WeightsError: It is there and is not an RT-DETRv2 that this library has.
    """
    model = load_pretrained(source, dtype=dtype, revision=revision).model
    if class_names is not None:
        model = with_classes(model, class_names)
    return model, model.config


def load_pretrained(source: Source, *, dtype: DTypeLike = jnp.float32, revision: str | None = None) -> Pretrained:
    """A checkpoint with all that belongs to it. Arguments and errors are those of `load_model`."""
    folder = find(source, revision=revision)
    if not folder.is_dir():
        raise SourceError(
            f"{folder} is a file, and a checkpoint is a folder with a {CONFIG}: give the folder, or, for a checkpoint "
            "of the authors' repository, convert it first (python -m convert)"
        )
    config = config_json.from_hugging_face(read_json(folder / CONFIG))
    preprocessing = Preprocessing.from_folder(folder)
    if (folder / ORBAX).is_dir():
        return Pretrained(read_orbax(folder, config, dtype=dtype), preprocessing, {})
    model, dropped = from_tensors(read_tensors(folder), config, dtype=dtype)
    return Pretrained(model, preprocessing, dropped)


def save_model(
    model: RTDETRv2, folder: Source, *, preprocessing: Preprocessing | None = None, to: Format = "orbax"
) -> None:
    """Writes a checkpoint folder at once or not at all: `folder` is the old one or the new, whatever happens.

    Args:
        model: In its training form, as it was loaded.
        folder: Where to; a checkpoint that is there is replaced.
        preprocessing: How images are prepared for it; the published way where none is given.
        to: "orbax" for a folder of ours, "hf" for one that transformers loads.

    Raises:
        ConfigError: Hugging Face's form can't say what the model is.
        FileExistsError: `folder` holds something else than a checkpoint.
        OSError: The disk is full.
    """
    config = (config_json.to_hugging_face if to == "hf" else config_json.to_ours)(model.config)
    tensors = to_tensors(model)
    with replaced_checkpoint(Path(folder), needs=sum(tensor.nbytes for tensor in tensors.values())) as partial:
        write_json(partial / CONFIG, config)
        write_json(partial / PREPROCESSOR, (preprocessing or Preprocessing()).to_hugging_face())
        if to == "hf":
            safetensors.numpy.save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
            shutil.copymode(partial / CONFIG, partial / TENSORS)  # safetensors lets nobody else read it
        else:
            write_orbax(partial, model)


def inference_layers_only(model: RTDETRv2) -> RTDETRv2:
    """The model without the decoder layers behind its answer, which only training uses."""
    config = model.config.without_later_layers()
    slim = abstract_model(config, dtype=model.dtype)
    return with_values(slim, flat_state(model))


def with_classes(model: RTDETRv2, class_names: tuple[str, ...], *, seed: int = 0) -> RTDETRv2:
    """The model for other classes: class layers start anew, but for the classes whose names it already knows.

    A warning says which classes kept their weights and which are new.
    """
    old = {name: label for label, name in enumerate(model.config.class_names)}
    config = model.config.with_classes(class_names)
    known = [label for label, name in enumerate(config.class_names) if name in old]
    from_old = np.array([old[config.class_names[label]] for label in known], np.int32)
    rngs, values = nnx.Rngs(seed), flat_state(model)

    def keep(path: str, start: jax.Array, *, axis: int) -> None:
        rows = np.array(known, np.int32)
        kept = jnp.take(values[path], from_old, axis=axis)
        values[path] = start.at[rows].set(kept) if axis == 0 else start.at[..., rows].set(kept)

    for path in ("selection.class_head", *(f"decoder.class_heads.{layer}" for layer in range(config.decoder.layers))):
        head = class_head(config, dtype=model.dtype, rngs=rngs)
        keep(f"{path}.kernel", head.kernel[...], axis=1)
        keep(f"{path}.bias", cast(nnx.Param, head.bias)[...], axis=0)
    if config.decoder.denoising:
        keep("denoising.table", LabelEmbedding(config, rngs=rngs).table[...], axis=0)
    logger.warning(
        "class layers: %d of %d classes keep the checkpoint's weights by name (%s), the others start anew (%s)",
        len(known),
        config.classes,
        _shown([config.class_names[label] for label in known]),
        _shown([name for name in config.class_names if name not in old]),
    )
    return with_values(abstract_model(config, dtype=model.dtype), values)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
