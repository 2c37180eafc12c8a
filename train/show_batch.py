"""One picture of a batch as the network sees it: after all augmentation, with boxes, names and image ids."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, UInt8
from PIL import Image, ImageDraw

from rtdetrv2_jax.data import Dataset
from rtdetrv2_jax.visualize import draw_detections, load_font, text_size, writable

from .augmentation import Augmentation
from .batch import Batch
from .device_augmentation import augment_batch

MOST_IMAGES = 16
GAP = 6
PAPER, INK = (32, 32, 32), (235, 235, 235)


def show_batch(
    file: Path,
    batch: Batch,
    *,
    key: PRNGKeyArray,
    size: tuple[int, int],
    augmentation: Augmentation,
    dataset: Dataset,
) -> None:
    """Writes a picture of a batch's first images; its suffix says in which format.

    Pixels are the network's own, one for one. Around an image with fewer of them lies a dark frame.

    Args:
        file: where to.
        batch: from the input pipeline.
        key: of the step, for what the device draws by lot.
        size: (height, width) of the step.
        augmentation: the recipe's.
        dataset: what the batch is from.

    Raises:
        OSError: the file cannot be written.
        ValueError: its suffix is of no format that Pillow writes.
    """
    augment = jax.jit(augment_batch, static_argnums=2, static_argnames="augmentation")
    images, targets = jax.device_get(augment(batch, key, size, augmentation=augmentation))
    image_ids = np.asarray(jax.device_get(batch.image_ids))[:MOST_IMAGES]
    pixels = np.rint(images[:MOST_IMAGES] * 255).astype(np.uint8)
    corners = np.concatenate([targets.boxes[..., :2] - targets.boxes[..., 2:] / 2] * 2, axis=-1)
    corners[..., 2:] += targets.boxes[..., 2:]
    tiles, captions = [], []
    for row, image_id in enumerate(image_ids.tolist()):
        real = targets.mask[row]
        labels = targets.labels[row][real]
        boxes = corners[row][real] * (size[1], size[0], size[1], size[0])
        names = [dataset.class_names[label] for label in labels]
        tiles.append(draw_detections(pixels[row], boxes_xyxy_pixels=boxes, labels=labels, names=names))
        objects = f"{len(names)} object" + ("" if len(names) == 1 else "s")
        captions.append(f"{image_id}: image {dataset[image_id].image_id}, {objects}")
    Image.fromarray(contact_sheet(tiles, captions)).save(file)


def contact_sheet(tiles: Sequence[UInt8[np.ndarray, "h w 3"]], captions: Sequence[str]) -> UInt8[np.ndarray, "..."]:
    """Images of one size in rows, each with a line of text above it."""
    columns = math.ceil(math.sqrt(len(tiles)))
    height, width = tiles[0].shape[:2]
    font = load_font(text_size(height, width))
    line = math.ceil(1.5 * sum(font.getmetrics()))
    across, down = width + GAP, height + line + GAP
    sheet = Image.new("RGB", (columns * across + GAP, math.ceil(len(tiles) / columns) * down + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        text = writable(caption, label=number, font=font)
        while font.getlength(text) > width:
            text = text[:-2] + "…"
        draw.text((left, top + line - line // 4), text, fill=INK, font=font, anchor="ls")
        sheet.paste(Image.fromarray(tile), (left, top + line))
    return np.asarray(sheet)
