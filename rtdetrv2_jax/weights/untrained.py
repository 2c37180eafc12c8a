"""Models that no one trained, quickly made: for benchmarks, tests and demonstrations of everything but detection."""

import numpy as np
from jaxtyping import DTypeLike

from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.weights.transfer import flat_state, with_values


def untrained_model(config: ModelConfig, *, seed: int = 0, dtype: DTypeLike = np.float32) -> RTDETRv2:
    """A model of random numbers that behaves as a trained one does: maps of size one, scores and boxes well spread.

    Training starts from `RTDETRv2(config, rngs=...)`, not from this.
    """
    generator = np.random.default_rng(seed)
    model = abstract_model(config, dtype=dtype)
    values = {path: _values(path, array.shape, generator) for path, array in sorted(flat_state(model).items())}
    for path in values:
        if path.endswith(".point_scale"):
            values[path] = np.repeat(1 / np.array(config.decoder.points), config.decoder.points).astype(np.float32)
    return with_values(model, values)


def _values(path: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    leaf = path.rsplit(".", 1)[-1]
    draw = generator.standard_normal(shape).astype(np.float32)
    match leaf:
        case "batches":
            return np.zeros(shape, np.int32)
        case "kernel":
            # Class heads are drawn wider, so that no two scores are near each other.
            gain = 3.0 if "class_head" in path else 1.0
            return draw * np.float32(gain * np.prod(shape[:-1]) ** -0.5)
        case "bias" if path == "selection.output.bias":
            # Tokens without a valid anchor are zeros up to here: so they stay small, and are not all selected.
            return np.zeros(shape, np.float32)
        case "bias" if ".offsets." in path:
            return draw * np.float32(2)
        case "bias" if "class_head" in path:
            return draw - np.float32(2)
        case "scale":
            return 1 + np.float32(0.1) * draw
        case "variance":
            return np.exp(np.float32(0.2) * draw)
        case "table":
            return np.concatenate([draw[:-1], np.zeros_like(draw[-1:])])
    return np.float32(0.1) * draw
