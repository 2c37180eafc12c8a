"""Where things are: the sine code of a feature map, and the anchors of query selection."""

import numpy as np
from jaxtyping import Bool, Float

from rtdetrv2_jax.arrays import Sizes

ANCHOR_SIDE = 0.05
ANCHOR_MARGIN = 0.01
INVALID_ANCHOR = float(np.finfo(np.float32).max)
"""The logit of an anchor that is not valid: its sigmoid is 1, and its gradient 0, as with infinity, but no NaN."""


def sine_positions(size: tuple[int, int], width: int, *, temperature: float) -> Float[np.ndarray, "s d"]:
    """The positional code of a map of `size` (height, width), row by row: sine, cosine of the row, then the column.

    Source: transformers, `RTDetrV2SinePositionEmbedding`, which follows the row-major order of the tokens. The authors'
    code agrees with it on square maps; on others it scrambles the positions, and is not followed there.
    """
    height, columns = size
    frequencies = temperature ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows = np.repeat(np.arange(height), columns)[:, None] * frequencies
    cols = np.tile(np.arange(columns), height)[:, None] * frequencies
    return np.concatenate([np.sin(rows), np.cos(rows), np.sin(cols), np.cos(cols)], axis=1).astype(np.float32)


def anchors(sizes: Sizes) -> tuple[Float[np.ndarray, "s 4"], Bool[np.ndarray, "s"]]:
    """One box for each token of the pyramid, as logits, and whether it is valid: all of it within (0.01, 0.99).

    A token's anchor is centred on its cell, with sides of 0.05 of the image on the finest level and twice that on
    each next. Invalid ones have the largest finite logit.

    Source: lyuwenyu/RT-DETR, `RTDETRTransformerv2._generate_anchors`.
    """
    levels = []
    for level, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width].astype(np.float32)
        centre = [(x + np.float32(0.5)) / np.float32(width), (y + np.float32(0.5)) / np.float32(height)]
        side = np.full_like(x, ANCHOR_SIDE * 2.0**level)
        levels.append(np.stack([*centre, side, side], axis=-1).reshape(-1, 4))
    boxes = np.concatenate(levels)
    valid = np.all((boxes > np.float32(ANCHOR_MARGIN)) & (boxes < np.float32(1 - ANCHOR_MARGIN)), axis=-1)
    logits = np.log(boxes) - np.log1p(-boxes)
    return np.where(valid[:, None], logits, np.float32(INVALID_ANCHOR)), valid
