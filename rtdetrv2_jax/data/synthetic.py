"""Scenes drawn by this program: a data set without a download, in which every box is exact to the pixel."""

import math
import operator
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image, ImageFilter, ImageOps

from rtdetrv2_jax.data import synthetic_paint as paint
from rtdetrv2_jax.data.dice import Dice
from rtdetrv2_jax.data.sample import Sample
from rtdetrv2_jax.data.synthetic_shapes import SHAPES, coverage

CLASS_NAMES = tuple(SHAPES)
DEFAULT_SIZE = (256, 256)
MOST_OBJECTS = 12
SHARES = (0.05, 0.6)
"""Smallest and largest diameter, as a share of the image's shorter side."""
LEAST_DIAMETER = 14.0
LEAST_VISIBLE = 0.5
"""An object is not put where it, or one under it, would be visible to a smaller part than this."""
LEAST_SIDE = 6
PLACES_TRIED = 8
MOST_NOISE = 14
HALF = 128
"""A pixel is an object's if half of it or more is."""


class Scene(NamedTuple):
    """A picture and what is in it; boxes are tight around the visible part of each object."""

    image: UInt8[np.ndarray, "h w 3"]
    boxes_xyxy_pixels: Float32[np.ndarray, "t 4"]
    labels: Int32[np.ndarray, " t"]


@dataclass(frozen=True, eq=False)
class Placed:
    """An object in a scene.

    Attributes:
        label: an index into `CLASS_NAMES`.
        left: column in the scene where `visible` begins.
        top: row in the scene where `visible` begins.
        visible: how much of each pixel shows the object, 0 to 255.
        whole: the sum of what would show without other objects and without the image's border.
    """

    label: int
    left: int
    top: int
    visible: UInt8[np.ndarray, "h w"]
    whole: int

    def box(self) -> tuple[int, int, int, int] | None:
        """The box (left, top, right, bottom) around the pixels that are the object's; None if there are none."""
        owned = self.visible >= HALF
        columns, rows = np.flatnonzero(owned.any(axis=0)), np.flatnonzero(owned.any(axis=1))
        if not len(columns):
            return None
        left, right = self.left + int(columns[0]), self.left + int(columns[-1]) + 1
        return left, self.top + int(rows[0]), right, self.top + int(rows[-1]) + 1

    def is_recognisable(self) -> bool:
        """Whether enough of it shows."""
        box = self.box()
        large = box is not None and min(box[2] - box[0], box[3] - box[1]) >= LEAST_SIDE
        return large and int(self.visible.sum(dtype=np.int64)) >= LEAST_VISIBLE * self.whole

    def covered_by(self, other: "Placed") -> "Placed":
        """This object once the other lies upon it."""
        (height, width), (other_height, other_width) = self.visible.shape, other.visible.shape
        left, right = max(self.left, other.left), min(self.left + width, other.left + other_width)
        top, bottom = max(self.top, other.top), min(self.top + height, other.top + other_height)
        if left >= right or top >= bottom:
            return self
        visible = self.visible.astype(np.uint16)
        free = 255 - other.visible[top - other.top : bottom - other.top, left - other.left : right - other.left]
        region = visible[top - self.top : bottom - self.top, left - self.left : right - self.left]
        region[:] = (region * free + 127) // 255
        return Placed(self.label, self.left, self.top, visible.astype(np.uint8), self.whole)


def scene(seed: int, index: int, *, size: tuple[int, int] = DEFAULT_SIZE) -> Scene:
    """The scene with this number under this seed: always the same, whatever was drawn before.

    None to twelve objects, small to large, turned and stretched a little, upon a cluttered background. They may lie
    upon each other and reach out of the image, but no object is put where less than half of it or of another would
    be seen: whatever is in the picture is in the truth.

    Args:
        seed: 0 or more.
        index: 0 or more.
        size: (height, width).
    """
    image, objects = compose(Dice(seed, index), size=size)
    boxes = [box for placed in objects if (box := placed.box())]
    return Scene(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([placed.label for placed in objects], np.int32),
    )


def compose(dice: Dice, *, size: tuple[int, int]) -> tuple[UInt8[np.ndarray, "h w 3"], list[Placed]]:
    """The picture of a scene, and its objects with all that shows of them."""
    height, width = size
    canvas = paint.background(dice, (width, height))
    objects: list[Placed] = []
    radii = [_radius(dice, side=min(size)) for _ in range(dice.integer(0, MOST_OBJECTS))]
    for radius in sorted(radii, reverse=True):  # large ones behind
        label = dice.integer(0, len(CLASS_NAMES) - 1)
        aspect, angle = dice.between_logs(0.8, 1.25), dice.between(0, 2 * math.pi)
        mask = coverage(CLASS_NAMES[label], radius=radius, aspect=aspect, angle=angle)
        for _ in range(PLACES_TRIED):
            left = math.floor(dice.between(-0.3 * mask.width, width - 0.7 * mask.width))
            top = math.floor(dice.between(-0.3 * mask.height, height - 0.7 * mask.height))
            newcomer = _place(mask, label=label, corner=(left, top), size=size)
            covered = [placed.covered_by(newcomer) for placed in objects]
            changed = [after for before, after in zip(objects, covered, strict=True) if after is not before]
            if all(placed.is_recognisable() for placed in (newcomer, *changed)):
                _paint_object(dice, canvas, mask, corner=(left, top))
                objects = [*covered, newcomer]
                break
    return _expose(dice, canvas), objects


def _radius(dice: Dice, *, side: int) -> float:
    low, high = (share * side for share in SHARES)
    return dice.between_logs(max(low, LEAST_DIAMETER), max(high, LEAST_DIAMETER)) / 2


def _place(mask: Image.Image, *, label: int, corner: tuple[int, int], size: tuple[int, int]) -> Placed:
    """The object alone at a corner of the canvas, cut off at the border."""
    (left, top), (height, width) = corner, size
    pixels = np.asarray(mask)
    inside = pixels[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    return Placed(label, max(0, left), max(0, top), inside, int(pixels.sum(dtype=np.int64)))


def _paint_object(dice: Dice, canvas: Image.Image, mask: Image.Image, *, corner: tuple[int, int]) -> None:
    left, top = corner
    right, bottom = min(canvas.width, left + mask.width), min(canvas.height, top + mask.height)
    place = canvas.crop((max(0, left), max(0, top), right, bottom))
    red, green, blue = np.asarray(place.resize((1, 1), Image.Resampling.BOX))[0, 0].tolist()
    if dice.chance(0.35):
        _paint_shadow(dice, canvas, mask, corner=corner)
    filling = paint.object_paint(dice, mask.size, under=(red, green, blue))
    if dice.chance(0.4):
        width = max(1.0, min(mask.size) * dice.between(0.03, 0.07))
        filling.paste(dice.pick(((20, 20, 25), (250, 250, 245))), (0, 0), paint.rim(mask, width=width))
    canvas.paste(filling, corner, mask)


def _paint_shadow(dice: Dice, canvas: Image.Image, mask: Image.Image, *, corner: tuple[int, int]) -> None:
    softness = max(1, round(0.05 * min(mask.size)))
    margin = 3 * softness
    soft = ImageOps.expand(mask, margin).filter(ImageFilter.BoxBlur(softness))
    offset = dice.integer(1, 2 * softness)
    darkness = [level * 120 // 255 for level in range(256)]
    canvas.paste((0, 0, 0), (corner[0] - margin + offset, corner[1] - margin + offset), soft.point(darkness))


def _expose(dice: Dice, canvas: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """What a camera does to a scene: some blur, other contrast, noise."""
    if dice.chance(0.25):
        canvas = canvas.filter(ImageFilter.BoxBlur(dice.between(0.3, 0.9)))
    contrast, brightness = dice.between(0.75, 1.1), dice.between(-20, 20)
    levels = [round((level - 128) * contrast + 128 + brightness) for level in range(256)]
    canvas = canvas.point([min(255, max(0, level)) for level in levels] * 3)
    grain = dice.bytes(2, canvas.height, canvas.width, 1).astype(np.int16)
    noise = (grain[0] - grain[1]) * np.int16(dice.integer(0, MOST_NOISE)) // np.int16(128)
    return np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class SyntheticDataset:
    """Scenes 0 up to `length` under a seed, as a data set. Another seed makes a validation set.

    Attributes:
        length: how many scenes.
        seed: 0 or more.
        sizes: (height, width) of the images, in turn.
    """

    length: int
    seed: int = 0
    sizes: tuple[tuple[int, int], ...] = (DEFAULT_SIZE,)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of their labels."""
        return CLASS_NAMES

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The labels themselves."""
        return tuple(range(len(CLASS_NAMES)))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex, /) -> Sample:
        index = range(self.length)[operator.index(index)]
        size = self.sizes[index % len(self.sizes)]
        image, boxes, labels = scene(self.seed, index, size=size)
        return Sample(
            image=image,
            image_id=index,
            size=size,
            boxes_xyxy_pixels=boxes,
            labels=labels,
            areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
            crowd_boxes_xyxy_pixels=np.zeros((0, 4), np.float32),
            crowd_labels=np.zeros(0, np.int32),
        )
