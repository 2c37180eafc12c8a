"""This library, as one of the runtimes that are measured, and the models that all of them are given."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdetrv2_jax.benchmark.loaded import SIDE, Cost, Loaded, best_scores, picture, pixels
from rtdetrv2_jax.config import RELEASED, named
from rtdetrv2_jax.detector import Detector
from rtdetrv2_jax.weights.load import inference_layers_only, load_pretrained, save_model
from rtdetrv2_jax.weights.untrained import untrained_model


def write_checkpoint(name: str, folder: Path) -> None:
    """Writes what all runtimes can load: a released size with random weights, or a checkpoint that there is.

    Raises:
        ConfigError, SourceError: There is no such size or checkpoint; the message says what can be done.
    """
    if name not in RELEASED and not Path(name).exists() and "/" not in name:
        named(name)  # raises, and suggests a name
    model = untrained_model(named(name)) if name in RELEASED else load_pretrained(name).model
    save_model(inference_layers_only(model), folder, to="hf")


def load_jax(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The detector of a folder."""
    detector = Detector.from_pretrained(folder, dtype="bfloat16" if dtype == "bfloat16" else "float32", max_batch=batch)
    images = [picture()] * batch
    inputs = jax.device_put(
        (
            np.stack([pixels(data) for data in images]),
            np.tile(np.array([480, 640], np.float32), (batch, 1)),
            np.full((batch, 2), SIDE, np.int32),
        )
    )
    logits = jax.jit(lambda model, x: model(x).logits)(
        detector.model, jnp.asarray(pixels(images[0])[None], jnp.float32) / jnp.float32(255)
    )
    return Loaded(
        device=lambda: jax.block_until_ready(detector.run(*inputs)),
        whole=lambda: detector(list(images)),
        scores=best_scores(np.asarray(logits, np.float32)),
        version=f"jax {jax.__version__}",
        cost=lambda: cost_of(detector.run.compiled(*inputs)),
    )


def cost_of(compiled: Any) -> Cost | None:
    """What XLA says that a compiled program takes, or None where it says nothing."""
    costs = compiled.cost_analysis() or {}
    if not costs.get("flops"):
        return None
    return Cost(flops=float(costs["flops"]), bytes=float(costs.get("bytes accessed", 0.0)))
