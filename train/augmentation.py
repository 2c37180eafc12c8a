"""Augmentation: every operation with its parameters, its probability, and the epoch at which it stops.

The host does geometry (`geometry`), image by image. Colours, the flip and the size of the batch belong to the device
(`device_augmentation`): there they are part of the compiled step and cost next to nothing.

Source: lyuwenyu/RT-DETR, rtdetrv2_pytorch, configs/rtdetrv2/include/dataloader.yml, and torchvision, transforms/v2,
for the parameters and for what each operation draws. The order differs: there colours change before geometry, at the
image's own size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal, get_args

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.data.dice import Dice

Range = tuple[float, float]

PUBLISHED_SIDES = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)

Purpose = Literal["order", "size", "geometry", "replacement", "excess"]


@dataclass(frozen=True)
class PhotometricDistortion:
    """Other colours. Each of the five changes tosses its own coin; the fifth permutes the channels.

    Args:
        probability: of each change.
        brightness: range of the factor.
        contrast: range of the factor.
        saturation: range of the factor.
        hue: range of the shift; 1 goes once round the circle.
        stop_epoch: the first epoch without it, None to go on to the end.
    """

    probability: float = 0.5
    brightness: Range = (0.875, 1.125)
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Range = (-0.05, 0.05)
    stop_epoch: int | None = None


@dataclass(frozen=True)
class ZoomOut:
    """The image somewhere on a larger black canvas.

    Args:
        probability: of it.
        side: range of the canvas' sides, in sides of the image; one draw for both.
        stop_epoch: the first epoch without it, None to go on to the end.
    """

    probability: float = 0.5
    side: Range = (1.0, 4.0)
    stop_epoch: int | None = None


@dataclass(frozen=True)
class IoUCrop:
    """A part of the image that overlaps with one of its objects as much as is drawn by lot.

    Args:
        probability: of an attempt.
        side: range of the part's sides, in sides of the whole; a draw for each.
        aspect: the least and the largest width by height.
        least_ious: one of them is drawn, and one of the objects in the part must have that IoU with it; with 1 the
            image stays whole, and the search ends.
        trials: parts looked at before another of `least_ious` is drawn.
        stop_epoch: the first epoch without it, None to go on to the end.
    """

    probability: float = 0.8
    side: Range = (0.3, 1.0)
    aspect: Range = (0.5, 2.0)
    least_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    trials: int = 40
    stop_epoch: int | None = None


@dataclass(frozen=True)
class MultiScale:
    """Another size of the input for each step.

    Args:
        sides: one of them is drawn for a step; one listed twice comes twice as often.
        resample: from the base size to it. "bilinear" is antialiased, and shows objects as the resize at inference
            does. The published models had "nearest", which leaves out or repeats rows and columns, and so moves what
            it shows by up to half a pixel against the boxes.
        stop_epoch: the first epoch that has the base size alone, None to go on to the end.
    """

    sides: tuple[int, ...] = PUBLISHED_SIDES
    resample: Literal["bilinear", "nearest"] = "bilinear"
    stop_epoch: int | None = None


Operation = PhotometricDistortion | ZoomOut | IoUCrop | MultiScale


@dataclass(frozen=True)
class Augmentation:
    """All operations of a recipe, as published; None for one that it does without.

    Args:
        photometric: on the device.
        zoom_out: on the host.
        crop: on the host, after `zoom_out`.
        least_side: boxes with a smaller side are dropped after that: in pixels of the image before its resize, and of
            the base size after it.
        flip_probability: of the mirror image, on the device; it never stops.
        multi_scale: on the device.
    """

    photometric: PhotometricDistortion | None = field(default_factory=PhotometricDistortion)
    zoom_out: ZoomOut | None = field(default_factory=ZoomOut)
    crop: IoUCrop | None = field(default_factory=IoUCrop)
    least_side: float = 1.0
    flip_probability: float = 0.5
    multi_scale: MultiScale | None = field(default_factory=MultiScale)

    def __post_init__(self) -> None:
        """Checks that every operation can be carried out; all faults are raised together."""
        if faults := [*_faulty_numbers(self), *_faulty_choices(self)]:
            raise ConfigError("\n".join(["Augmentation that cannot work:", *faults]))

    def stopping_at(self, epoch: int | None) -> "Augmentation":
        """The same, with everything that can stop stopping at this epoch."""
        names = [each.name for each in fields(self) if is_dataclass(getattr(self, each.name))]
        return replace(self, **{name: replace(getattr(self, name), stop_epoch=epoch) for name in names})

    def sides(self, base: int, *, epoch: int) -> tuple[int, ...]:
        """The sides that inputs can have in an epoch, each as often as it counts."""
        multi_scale = self.multi_scale
        return multi_scale.sides if multi_scale is not None and is_active(multi_scale, epoch=epoch) else (base,)


def is_active(operation: Operation | None, *, epoch: int) -> bool:
    """Whether an operation takes part in an epoch, counted from 0."""
    return operation is not None and (operation.stop_epoch is None or epoch < operation.stop_epoch)


def size_of_step(sides: Sequence[int], *, seed: int, step: int) -> int:
    """One of `sides`, a function of the global step, so that all hosts agree; one listed twice comes twice as often.

    Source: lyuwenyu/RT-DETR, rtdetrv2_pytorch, src/data/dataloader.py, `BatchImageCollateFuncion`. There every process
    draws for itself, and in each step the devices wait for the one with the largest images.
    """
    return draws("size", seed=seed, index=step).pick(sides)


def draws(purpose: Purpose, *, seed: int, epoch: int = 0, index: int = 0) -> Dice:
    """Random numbers of their own for each purpose, epoch and index under a seed, whoever asks and in what order."""
    code = 1 + get_args(Purpose).index(purpose)  # never 0: those are the numbers that synthetic scenes are drawn with
    return Dice(seed, (code << 96) + (epoch << 64) + index)


def _faulty_numbers(this: Augmentation) -> Iterator[str]:
    """Probabilities and ranges that make no sense, one line a fault, in the names of the fields."""
    probabilities = {"flip_probability": this.flip_probability}
    ranges: dict[str, tuple[Range, float, float]] = {}
    if this.photometric is not None:
        probabilities["photometric.probability"] = this.photometric.probability
        ranges["photometric.brightness"] = this.photometric.brightness, 0, math.inf
        ranges["photometric.contrast"] = this.photometric.contrast, 0, math.inf
        ranges["photometric.saturation"] = this.photometric.saturation, 0, math.inf
        ranges["photometric.hue"] = this.photometric.hue, -0.5, 0.5
    if this.zoom_out is not None:
        probabilities["zoom_out.probability"] = this.zoom_out.probability
        ranges["zoom_out.side"] = this.zoom_out.side, 1, math.inf
    if this.crop is not None:
        probabilities["crop.probability"] = this.crop.probability
        ranges["crop.side"] = this.crop.side, 0, 1
        ranges["crop.aspect"] = this.crop.aspect, 0, math.inf
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            yield f"{name}: a probability is a number from 0 to 1, not {value}."
    for name, ((low, high), least, most) in ranges.items():
        if not (least <= low <= high <= most and math.isfinite(high)):
            yield f"{name}: expected a low and a high end between {least:g} and {most:g}, got {low:g} and {high:g}."


def _faulty_choices(this: Augmentation) -> Iterator[str]:
    if this.crop is not None and not any(iou >= 1 for iou in this.crop.least_ious):
        yield f"crop.least_ious: needs a 1, with which the search for a part ends, and has {this.crop.least_ious}."
    if this.crop is not None and this.crop.trials < 1:
        yield f"crop.trials: expected 1 or more, got {this.crop.trials}."
    if this.multi_scale is not None and not this.multi_scale.sides:
        yield "multi_scale.sides: expected one side or more; without multi-scale, multi_scale is none."
    if this.multi_scale is not None and this.multi_scale.resample not in ("bilinear", "nearest"):
        yield f"multi_scale.resample: expected bilinear or nearest, got {this.multi_scale.resample!r}."


NO_AUGMENTATION = Augmentation(photometric=None, zoom_out=None, crop=None, flip_probability=0.0, multi_scale=None)
"""The resize to the base size and nothing else."""
