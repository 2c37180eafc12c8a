"""The host's part of augmentation: where in the input the image goes, and one resample that puts it there.

Zoom-out and crop both only say which window becomes the input, a part of the image or of the black around it. So
windows are drawn, not pixels; the image is resampled once, and boxes follow by the same four numbers.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, UInt8
from PIL import Image

from rtdetrv2_jax.data.dice import Dice

from .augmentation import Augmentation, IoUCrop, ZoomOut, is_active


class AugmentedImage(NamedTuple):
    """An image at the base size and what is in it; `content_xyxy_pixels` is the part that no zoom-out made black."""

    pixels: UInt8[np.ndarray, "h w 3"]
    boxes: Float32[np.ndarray, "t 4"]
    labels: Int32[np.ndarray, " t"]
    content_xyxy_pixels: Int32[np.ndarray, "4"]


class Window(NamedTuple):
    """What becomes the input, in pixels of the image; it may reach beyond the image, where all is black."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top


def augment_image(
    pixels: UInt8[np.ndarray, "h_image w_image 3"],
    *,
    boxes_xyxy_pixels: Float32[np.ndarray, "t 4"],
    labels: Int32[np.ndarray, " t"],
    size: tuple[int, int],
    augmentation: Augmentation,
    epoch: int,
    dice: Dice,
) -> AugmentedImage:
    """An image through zoom-out, crop and the resize to `size`, with those of its boxes that are left.

    Without zoom-out and crop its pixels are those of `Preprocessing(resize="stretch")`, to the last bit.
    """
    window = Window(0, 0, pixels.shape[1], pixels.shape[0])
    if augmentation.zoom_out is not None and is_active(augmentation.zoom_out, epoch=epoch):
        window = zoomed_out(window, augmentation.zoom_out, dice=dice)
    if augmentation.crop is not None and is_active(augmentation.crop, epoch=epoch):
        window = cropped(window, augmentation.crop, boxes_xyxy_pixels=boxes_xyxy_pixels, dice=dice)
    boxes, kept = boxes_in(window, boxes_xyxy_pixels, size=size, least_side=augmentation.least_side)
    resampled, content = resample(pixels, window, size=size)
    return AugmentedImage(resampled, boxes, labels[kept], content)


def zoomed_out(window: Window, settings: ZoomOut, *, dice: Dice) -> Window:
    """A window that is larger to all sides, each by its own share.

    Source: torchvision, transforms/v2, `RandomZoomOut`.
    """
    if not dice.chance(settings.probability):
        return window
    ratio = dice.between(*settings.side)
    width, height = int(window.width * ratio), int(window.height * ratio)
    left = window.left - int((width - window.width) * dice.between(0, 1))
    top = window.top - int((height - window.height) * dice.between(0, 1))
    return Window(left, top, left + width, top + height)


def cropped(window: Window, settings: IoUCrop, *, boxes_xyxy_pixels: Float32[np.ndarray, "t 4"], dice: Dice) -> Window:
    """A part of a window in which one of the boxes has its centre, and the IoU with it that the lot asks for.

    Without boxes the window stays whole.

    Source: torchvision, transforms/v2, `RandomIoUCrop`. All trials are drawn at once; the first that fits is taken.
    """
    if not len(boxes_xyxy_pixels) or not dice.chance(settings.probability):
        return window
    boxes = boxes_xyxy_pixels.astype(np.float64)
    while (least_iou := dice.pick(settings.least_ious)) < 1:
        parts = _parts(window, settings, dice=dice)
        seen = _centres_inside(boxes, parts[:, None])
        fitting = np.flatnonzero((seen & (_ious(boxes, parts[:, None]) >= least_iou)).any(axis=1))
        if len(fitting):
            return Window(*parts[fitting[0]].astype(int).tolist())
    return window


def _parts(window: Window, settings: IoUCrop, *, dice: Dice) -> Float64[np.ndarray, "trials 4"]:
    """As many parts of a window as there are trials, without those that are too flat or too narrow."""
    words = np.asarray(dice.bits.random_raw(4 * settings.trials), np.uint64).reshape(4, -1)
    across, down, x, y = (words >> np.uint64(11)) * 2.0**-53
    low, high = settings.side
    width = np.floor(window.width * (low + (high - low) * across))
    height = np.floor(window.height * (low + (high - low) * down))
    left = window.left + np.floor((window.width - width) * x)
    top = window.top + np.floor((window.height - height) * y)
    flattest, narrowest = settings.aspect[1] * height, settings.aspect[0] * height
    fitting = (width > 0) & (height > 0) & (narrowest <= width) & (width <= flattest)
    return np.stack([left, top, left + width, top + height], axis=1)[fitting]


def _centres_inside(boxes: Float64[np.ndarray, "t 4"], windows: np.ndarray) -> Bool[np.ndarray, "..."]:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = (windows[..., :2] < centres) & (centres < windows[..., 2:])
    return inside[..., 0] & inside[..., 1]


def _ious(boxes: Float64[np.ndarray, "t 4"], parts: Float64[np.ndarray, "trials 1 4"]) -> np.ndarray:
    common = np.minimum(parts[..., 2:], boxes[:, 2:]) - np.maximum(parts[..., :2], boxes[:, :2])
    intersection = np.maximum(common, 0).prod(axis=-1)
    part_areas, box_areas = (np.prod(corners[..., 2:] - corners[..., :2], axis=-1) for corners in (parts, boxes))
    return intersection / (part_areas + box_areas - intersection)


def boxes_in(
    window: Window, boxes_xyxy_pixels: Float32[np.ndarray, "t 4"], *, size: tuple[int, int], least_side: float
) -> tuple[Float32[np.ndarray, "t_kept 4"], Bool[np.ndarray, " t"]]:
    """The boxes, normalised, of the objects that the window shows, and which objects these are.

    An object counts as shown while its centre is in the window, and both sides of what the window leaves of its box
    have `least_side` pixels, in the image and at the base size too.

    Source: torchvision, transforms/v2, `SanitizeBoundingBoxes`, once before and once after the resize.
    """
    boxes, bounds = boxes_xyxy_pixels.astype(np.float64), np.array(window, np.float64)
    low, high = (np.clip(boxes[:, part], bounds[:2], bounds[2:]) for part in (slice(2), slice(2, 4)))
    extent = bounds[2:] - bounds[:2]
    pixels_at_base_size = (high - low) / extent * np.array(size[::-1], np.float64)
    sides = np.minimum(high - low, pixels_at_base_size)
    kept = _centres_inside(boxes, bounds) & (sides >= least_side).all(axis=1)
    normalised = np.concatenate([(low + high) / 2 - bounds[:2], high - low], axis=1) / np.tile(extent, 2)
    return normalised[kept].astype(np.float32), kept


def resample(
    pixels: UInt8[np.ndarray, "h_image w_image 3"], window: Window, *, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Int32[np.ndarray, "4"]]:
    """The window at `size`, black beyond the image, and the rectangle (left, top, right, bottom) that is not black.

    The filter is Pillow's bilinear one, as in the reference, which widens where it shrinks. The reference cuts and
    pads first and resizes then; here, pixels along a cut are also mixed from what lies just beyond it, and of those
    along the image's edge on black, which the reference mixes, the ones not wholly covered are black.
    """
    (height, width), (rows, columns) = size, pixels.shape[:2]
    left, right, source_left, source_right = _span(window.left, window.right, columns, width)
    top, bottom, source_top, source_bottom = _span(window.top, window.bottom, rows, height)
    if left >= right or top >= bottom:
        return np.zeros((height, width, 3), np.uint8), np.zeros(4, np.int32)
    box = (source_left, source_top, source_right, source_bottom)
    shown = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    content = np.array([left, top, right, bottom], np.int32)
    if shown.size == (width, height):
        return np.asarray(shown), content
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top:bottom, left:right] = np.asarray(shown)
    return canvas, content


def _span(low: int, high: int, extent: int, target: int) -> tuple[int, int, float, float]:
    """Along one axis: first and last edge of the whole target pixels that the image covers, and where these lie in it.

    Args:
        low: Where the window begins, in pixels of the image.
        high: Where it ends.
        extent: Pixels of the image.
        target: Pixels that the window becomes.
    """
    window = high - low
    first = -(-(max(0, low) - low) * target // window)
    last = (min(extent, high) - low) * target // window
    return first, last, max(0.0, low + first * window / target), min(float(extent), low + last * window / target)
