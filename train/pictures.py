"""Pictures of what a model finds in a few images, beside what is there."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, UInt8
from PIL import Image

from rtdetrv2_jax.data import DataError, Dataset, Sample
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.replacing import replaced_file
from rtdetrv2_jax.visualize import draw_detections, load_font, writable

from .show_batch import GAP, PAPER, contact_sheet

logger = logging.getLogger(__name__)

MOST_IMAGES = 16
WIDTH = 2400
"""About so many pixels across share the images of a row."""
MOST_PIXELS = 520
"""The longer side of an image in the picture, where there is room."""
LEAST_PIXELS = 200
"""The sides of an image's place at least, so that its caption can be read."""

Detections = tuple[Float[np.ndarray, " q"], Int[np.ndarray, " q"], Real[np.ndarray, "q 4"]]
"""Scores, labels and boxes (left, top, right and bottom, in pixels of the image) of what was found."""


class _Pair(NamedTuple):
    """An image with what is there, the same one with what was found, and the words above them."""

    truth: UInt8[np.ndarray, "h w 3"]
    found: UInt8[np.ndarray, "h w 3"]
    caption: str


def save_predictions(
    file: Path,
    dataset: Dataset,
    positions: Sequence[int],
    detections: Sequence[Detections],
    *,
    threshold: float = 0.4,
) -> None:
    """Writes one picture of images in pairs, at once or not at all: at left what is there, at right what was found.

    At most `MOST_IMAGES` are shown, the first. One that cannot be read is left out, with a warning; without any there
    is no picture.

    Args:
        file: where to; its suffix says in which format.
        dataset: where the images are from.
        positions: of the images in it.
        detections: what was found in each.
        threshold: the score from which on something counts as found.

    Raises:
        OSError: the file cannot be written.
        ValueError: its suffix is of no format that Pillow writes, or there are not as many detections as positions.
    """
    if len(positions) != len(detections):
        raise ValueError(f"expected what was found in each of {len(positions)} images, got that of {len(detections)}.")
    shown = list(zip(positions, detections, strict=True))[:MOST_IMAGES]
    side = min(MOST_PIXELS, WIDTH // (2 * max(1, math.ceil(math.sqrt(len(shown))))))
    pairs = list(_pairs(dataset, shown, side=side, threshold=threshold))
    if not pairs:
        return
    height = max(LEAST_PIXELS, *(pair.truth.shape[0] for pair in pairs))
    width = max(LEAST_PIXELS, *(pair.truth.shape[1] for pair in pairs))
    tiles = []
    for pair in pairs:
        tile = Image.new("RGB", (2 * width + GAP, height), PAPER)
        top, left = (height - pair.truth.shape[0]) // 2, (width - pair.truth.shape[1]) // 2
        tile.paste(Image.fromarray(pair.truth), (left, top))
        tile.paste(Image.fromarray(pair.found), (left + width + GAP, top))
        tiles.append(np.asarray(tile))
    with replaced_file(file) as partial:
        Image.fromarray(contact_sheet(tiles, [pair.caption for pair in pairs])).save(partial, quality=88)


def _pairs(
    dataset: Dataset, shown: Sequence[tuple[int, Detections]], *, side: int, threshold: float
) -> Iterator[_Pair]:
    for position, (scores, labels, boxes_xyxy_pixels) in shown:
        sample = dataset[position]
        try:
            image = sample.read()
        except (ImageError, DataError) as error:
            logger.warning("image %d has no place in the picture: %s", position, error)
            continue
        image, scale = _resized(image, side=side)
        kept = scores >= threshold
        names = dataset.class_names
        truth = draw_detections(
            image,
            boxes_xyxy_pixels=sample.boxes_xyxy_pixels * scale,
            labels=sample.labels,
            names=[names[label] for label in sample.labels],
        )
        found = draw_detections(
            image,
            boxes_xyxy_pixels=boxes_xyxy_pixels[kept] * scale,
            labels=labels[kept],
            names=[names[label] for label in labels[kept]],
            scores=scores[kept],
        )
        objects = f"{len(sample.labels)} object" + ("" if len(sample.labels) == 1 else "s")
        count = f"{np.count_nonzero(kept)} found with a score of at least {threshold:g}"
        caption = f"{_name(sample, position=position)}: {objects} (left), {count} (right)"
        yield _Pair(truth, found, caption)


def _resized(
    image: UInt8[np.ndarray, "h w 3"], *, side: int
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "4"]]:
    """An image whose longer side has so many pixels, and what its boxes are to be multiplied by."""
    height, width = image.shape[:2]
    columns, rows = (max(1, round(pixels * side / max(height, width))) for pixels in (width, height))
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.LANCZOS)
    return np.array(resized), np.array([columns / width, rows / height] * 2)


def _name(sample: Sample, *, position: int) -> str:
    """What a sample is called, in letters that the caption's font has."""
    name = sample.image.name if isinstance(sample.image, Path) else f"image {sample.image_id}"
    return writable(name, label=position, font=load_font(12))
