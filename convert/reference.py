"""The reference: the same checkpoint in PyTorch, run by transformers."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float

from rtdetrv2_jax.weights.table import canonical
from rtdetrv2_jax.weights.transfer import WeightsError

from .stages import Answer, Stages

# What a file may leave out: the model's own initial value is right, and the table calls them optional too.
_OPTIONAL = (".num_batches_tracked", ".n_points_scale")


def run(folder: Path, images: Float[np.ndarray, "1 h w 3"], *, dropped: Collection[str] = ()) -> tuple[Stages, Stages]:
    """The stages of one image in the model of a Hugging Face folder, on the CPU: in float32, and in float64.

    How far the two are apart is how much rounding alone moves this model on this image.

    Args:
        folder: What transformers loads.
        images: The network's input.
        dropped: Keys of the file that we did without; transformers may then do without them too.

    Raises:
        WeightsError: transformers finds keys missing, left over or of the wrong shape.
    """
    model = _load(folder, dropped)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return _stages(model, pixels), _stages(model.double(), pixels.double())


def _stages(model: Any, pixels: torch.Tensor) -> Stages:
    seen: dict[str, Any] = {}
    hooks = (
        model.model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(backbone=output)),
        model.model.decoder.register_forward_pre_hook(
            lambda module, inputs, named: seen.update(memory=named["encoder_hidden_states"]), with_kwargs=True
        ),
    )
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about CUDA kernels
        output = model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    scores = output.enc_outputs_class.max(-1).values
    tokens = torch.topk(scores, output.logits.shape[1], dim=1).indices  # as the model itself selects them
    return Stages(
        backbone=tuple(_map(features) for features, _ in seen["backbone"]),
        encoder=tuple(_map(features) for features in output.encoder_last_hidden_state),
        memory=_first(seen["memory"]),
        scores=_first(scores),
        tokens=_first(tokens),
        selected_boxes=_first(output.enc_topk_bboxes),
        layers=tuple(
            Answer(logits, boxes)
            for logits, boxes in zip(
                _first(output.intermediate_logits), _first(output.intermediate_reference_points), strict=True
            )
        ),
        output=Answer(_first(output.logits), _first(output.pred_boxes)),
    )


def _load(folder: Path, dropped: Collection[str]) -> Any:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = transformers.RTDetrV2ForObjectDetection.from_pretrained(
                folder, output_loading_info=True, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, TypeError, StrictDataclassError) as error:
        raise WeightsError(f"transformers can't load {folder}: {error}") from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
    model, info = loaded
    faults = [
        f"{what}: {key}"
        for what, keys in (
            ("missing", info["missing_keys"]),
            ("left over", info["unexpected_keys"]),
            ("of another shape", info["mismatched_keys"]),
        )
        for key in map(str, keys)
        if not key.endswith(_OPTIONAL) and canonical(key) not in dropped
    ]
    if faults:
        shown = "\n  ".join(faults[:8])
        raise WeightsError(f"transformers finds {len(faults)} faults in the weights of {folder}:\n  {shown}")
    return model.eval()


def _first(batch: torch.Tensor) -> np.ndarray:
    return batch[0].numpy()


def _map(batch: torch.Tensor) -> np.ndarray:
    return _first(batch).transpose(1, 2, 0)
