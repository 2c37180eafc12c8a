"""RT-DETRv2, the real-time detection transformer, in JAX and Flax NNX."""

from rtdetrv2_jax.config import ConfigError, ModelConfig
from rtdetrv2_jax.detector import Detector, Result, detect
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.weights.hub import SourceError
from rtdetrv2_jax.weights.load import load_model, save_model
from rtdetrv2_jax.weights.transfer import WeightsError

__all__ = [
    "ConfigError",
    "Detector",
    "ImageError",
    "ModelConfig",
    "Preprocessing",
    "RTDETRv2",
    "Result",
    "SourceError",
    "WeightsError",
    "detect",
    "fuse",
    "load_model",
    "save_model",
]
