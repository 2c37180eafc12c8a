"""What every runtime gives when it is loaded, and the pictures that all of them are given."""

import importlib.metadata
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

SIDE = 640


class LoadingError(RuntimeError):
    """A runtime that cannot do what is asked for here; the message says what to do."""


class Cost(NamedTuple):
    """What one run of a program takes, as its compiler counts it; a processor reads more, or less from its caches."""

    flops: float
    bytes: float


class Loaded(NamedTuple):
    """A runtime with a model in it: `device` runs the network on a resident input, `whole` goes from JPEG to boxes.

    Both end when the answer is there. `scores` are the best class scores of every query of the first image, sorted, for
    telling that all runtimes do the same. `cost`, where there is one, is of a run of `device`.
    """

    device: Callable[[], Any]
    whole: Callable[[], Any]
    scores: Float[np.ndarray, " q"]
    version: str
    cost: Callable[[], Cost | None] = lambda: None


def picture() -> bytes:
    """A JPEG of 640x480 with content at all scales, the same everywhere."""
    generator = np.random.default_rng(0)
    layers = [
        np.asarray(Image.fromarray(generator.integers(0, 256, (size * 3, size * 4, 3), np.uint8)).resize((640, 480)))
        for size in (2, 8, 32, 160)
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as the network takes it, before its levels become numbers."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def channels_first(images: list[bytes]) -> Float32[np.ndarray, "b 3 h w"]:
    """A batch of pictures as PyTorch's networks take it."""
    batch = np.stack([pixels(data) for data in images])
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def best_scores(logits: Float[np.ndarray, "b q k"]) -> Float[np.ndarray, " q"]:
    """The best class score of every query of the first image, sorted."""
    return np.sort(1 / (1 + np.exp(-logits[0].astype(np.float64).max(-1))))[::-1]


def version(package: str) -> str:
    """Of an installed package."""
    return importlib.metadata.version(package)
