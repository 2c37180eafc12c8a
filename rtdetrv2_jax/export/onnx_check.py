"""The check of an exported detector: what ONNX Runtime finds with it, beside what the library does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
import onnxruntime
from jaxtyping import UInt8

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.detector import detect
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.preprocessing import Preprocessing

SCORE, BOX = 1e-3, 1e-3
"""How far apart scores may be, and corners, in units of the image's longer side."""
SHARE = 0.95
"""The share of detections that must agree. Rounding may let two candidates change places, and others see those."""


class Agreement(NamedTuple):
    """How many of the library's detections the file gives too, and how far those are apart at most."""

    found: int
    total: int
    score: float
    pixels: float

    @property
    def good(self) -> bool:
        """Whether the file does what the library does."""
        return self.found >= SHARE * self.total


def agreement(
    graph: onnx.ModelProto,
    model: RTDETRv2,
    preprocessing: Preprocessing,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
) -> Agreement:
    """Compares a graph with the model that it was made from, image by image."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    repeats = batch if isinstance(batch, int) else 1
    run = jax.jit(lambda model, pixels, sizes: detect(model, pixels, sizes, preprocessing=preprocessing))
    parts = []
    for image in images:
        prepared = preprocessing.prepare(image)
        pixels, sizes = prepared.pixels[None], np.array([prepared.scale_size], np.float32)
        with jax.default_matmul_precision("float32"):
            ours = Detections(*(part[0] for part in jax.device_get(run(model, pixels, sizes))))
        feeds = {"images": np.repeat(pixels, repeats, axis=0), "sizes": np.repeat(sizes, repeats, axis=0)}
        answer: Sequence[Any] = session.run(None, feeds)
        theirs = Detections(*(part[0] for part in answer))
        parts.append(compare(ours, theirs, side=max(image.shape[:2])))
    found, total, score, pixels = zip(*parts, strict=True)
    return Agreement(sum(found), sum(total), max(score), max(pixels))


def compare(ours: Detections, theirs: Detections, *, side: int) -> Agreement:
    """The detections of one image against others of it: each looks for a partner of its label, score and box."""
    scores = np.abs(np.subtract.outer(ours.scores, theirs.scores))
    pixels = np.abs(ours.boxes_xyxy_pixels[:, None] - theirs.boxes_xyxy_pixels).max(-1)
    alike = np.equal.outer(ours.labels, theirs.labels) & (scores <= SCORE) & (pixels <= BOX * side)
    partner = np.where(alike, pixels, np.inf).argmin(1)
    rows = np.flatnonzero(alike.any(1))
    return Agreement(
        len(rows),
        len(ours.scores),
        float(scores[rows, partner[rows]].max(initial=0)),
        float(pixels[rows, partner[rows]].max(initial=0)),
    )
