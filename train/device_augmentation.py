"""The device's part of augmentation: colours, flip, and the size of the step, inside the jitted step.

Random numbers are an image's own: they follow from the step's key and the image's number in the data set, so that
neither its place in the batch nor the way the batch is cut over devices matters. All of it is float32.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rtdetrv2_jax.arrays import Targets

from .augmentation import Augmentation, PhotometricDistortion, Range
from .batch import Batch

PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
GREY_WEIGHTS = (0.299, 0.587, 0.114)
COLOUR_DRAWS = 11
"""Five coins, five amounts, and the coin for the order."""

Planes = tuple[Float[Array, "h w"], Float[Array, "h w"], Float[Array, "h w"]]
"""Red, green and blue, apart: a last axis of three wastes most of a TPU's lanes."""


class Distortion(NamedTuple):
    """How one image's colours change: factors, of which 1 changes nothing, a hue shift, and a permutation's number.

    Of the two contrasts at most one is not 1: the one before saturation and hue, or the one after.
    """

    brightness: Float[Array, "*b"]
    early_contrast: Float[Array, "*b"]
    saturation: Float[Array, "*b"]
    hue: Float[Array, "*b"]
    late_contrast: Float[Array, "*b"]
    permutation: Int[Array, "*b"]


def augment_batch(
    batch: Batch, key: PRNGKeyArray, size: tuple[int, int], *, augmentation: Augmentation
) -> tuple[Float[Array, "b h w 3"], Targets]:
    """What the network sees of a batch, in [0, 1], and the targets that go with it.

    Args:
        batch: as the input pipeline gives it.
        key: of the step.
        size: (height, width) of the result. Static: a program for each.
        augmentation: static.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.image_ids)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (COLOUR_DRAWS + 1,)))(keys)
    images, targets = batch.images.astype(jnp.float32) / 255.0, batch.targets
    if augmentation.photometric is not None:
        distortion = drawn_distortion(augmentation.photometric, draws[:, :-1], active=batch.distort_colours)
        images = jax.vmap(distort)(images, distortion, batch.content_xyxy_pixels)
    if augmentation.flip_probability > 0:
        images, targets = flip(images, targets, flipped=draws[:, -1] < augmentation.flip_probability)
    resample = "bilinear" if augmentation.multi_scale is None else augmentation.multi_scale.resample
    return resize(images, size=size, resample=resample), targets


def drawn_distortion(
    settings: PhotometricDistortion, draws: Float[Array, "b u"], *, active: Bool[Array, " b"]
) -> Distortion:
    """The distortions that uniform draws stand for, eleven an image; those that are not `active` change nothing.

    Source: torchvision, transforms/v2, `RandomPhotometricDistort`: a coin for each change, and one for the order.
    """
    coins, amounts, early = draws[:, :5], draws[:, 5:10], draws[:, 10] < 0.5
    changed = (coins < settings.probability) & active[:, None]

    def between(number: int, bounds: Range, *, neutral: float) -> Float[Array, " b"]:
        low, high = bounds
        return jnp.where(changed[:, number], low + (high - low) * amounts[:, number], neutral)

    contrast = between(1, settings.contrast, neutral=1.0)
    permutation = jnp.floor(len(PERMUTATIONS) * amounts[:, 4]).astype(jnp.int32)
    return Distortion(
        brightness=between(0, settings.brightness, neutral=1.0),
        early_contrast=jnp.where(early, contrast, 1.0),
        saturation=between(2, settings.saturation, neutral=1.0),
        hue=between(3, settings.hue, neutral=0.0),
        late_contrast=jnp.where(early, 1.0, contrast),
        permutation=jnp.where(changed[:, 4], permutation, 0),
    )


def distort(
    image: Float[Array, "h w 3"], distortion: Distortion, content_xyxy_pixels: Int[Array, "4"]
) -> Float[Array, "h w 3"]:
    """An image in other colours, in [0, 1]; what is black around its content stays black.

    Source: torchvision, transforms/v2, functional, on PIL images, and Pillow, `ImageEnhance`. Differences: nothing is
    rounded to 256 levels on the way, since it is done in one pass of floats; and contrast turns about the mean grey of
    the part that is shown, not of the whole image before its crop, which the device never sees.
    """
    content = _content_mask(image.shape[0], image.shape[1], content_xyxy_pixels)
    planes: Planes = (image[..., 0], image[..., 1], image[..., 2])
    planes = _each(lambda plane: plane * distortion.brightness, planes)
    planes = _contrast(planes, distortion.early_contrast, content=content)
    planes = _saturation(planes, distortion.saturation)
    planes = _hue(planes, distortion.hue)
    planes = _contrast(planes, distortion.late_contrast, content=content)
    order = jnp.asarray(PERMUTATIONS, jnp.int32)[distortion.permutation]
    red, green, blue = planes
    return jnp.stack([jnp.where(each == 0, red, jnp.where(each == 1, green, blue)) for each in order], axis=-1)


def _each(change: Callable[[Array], Array], planes: Planes) -> Planes:
    red, green, blue = (jnp.clip(change(plane), 0.0, 1.0) for plane in planes)
    return red, green, blue


def _content_mask(height: int, width: int, content_xyxy_pixels: Int[Array, "4"]) -> Bool[Array, "h w"]:
    left, top, right, bottom = content_xyxy_pixels
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


def _grey(planes: Planes) -> Float[Array, "h w"]:
    red, green, blue = planes
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue


def _contrast(planes: Planes, factor: Float[Array, ""], *, content: Bool[Array, "h w"]) -> Planes:
    """Each level nearer to the mean grey of the content, or farther from it."""
    pixels = jnp.maximum(jnp.sum(content, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(content, _grey(planes), 0.0)) / pixels
    return _each(lambda plane: jnp.where(content, plane * factor + mean * (1.0 - factor), 0.0), planes)


def _saturation(planes: Planes, factor: Float[Array, ""]) -> Planes:
    """Each level nearer to its pixel's grey, or farther from it."""
    grey = _grey(planes)
    return _each(lambda plane: plane * factor + grey * (1.0 - factor), planes)


def _hue(planes: Planes, shift: Float[Array, ""]) -> Planes:
    """The hue of every pixel shifted round the circle; value and saturation, in HSV, stay.

    Source: Smith 1978, Color gamut transform pairs; the way back is written without its six cases.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    sector = jnp.where(  # no equality with `value`: a compiler may have rounded it otherwise than the planes
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        jnp.where(green >= blue, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    sector = sector + 6.0 * shift

    def shifted(plane: Float[Array, "h w"], offset: float) -> Float[Array, "h w"]:
        distance = sector + offset
        distance = distance - 6.0 * jnp.floor(distance / 6.0)  # jnp.mod is many times slower on a CPU
        level = value - chroma * jnp.clip(jnp.minimum(distance, 4.0 - distance), 0.0, 1.0)
        return jnp.where(shift == 0, plane, level)  # the way there and back rounds

    return shifted(red, 5.0), shifted(green, 3.0), shifted(blue, 1.0)


def flip(
    images: Float[Array, "b h w 3"], targets: Targets, *, flipped: Bool[Array, " b"]
) -> tuple[Float[Array, "b h w 3"], Targets]:
    """The images, those of them mirrored that are `flipped`, left for right, with their boxes."""
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    mirrored = targets.boxes.at[..., 0].set(1.0 - targets.boxes[..., 0])
    boxes = jnp.where((flipped[:, None] & targets.mask)[..., None], mirrored, targets.boxes)
    return images, targets._replace(boxes=boxes)


def resize(
    images: Float[Array, "b h w 3"], *, size: tuple[int, int], resample: Literal["bilinear", "nearest"]
) -> Float[Array, "b h_new w_new 3"]:
    """The images at another size; themselves at their own.

    Source: lyuwenyu/RT-DETR, rtdetrv2_pytorch, src/data/dataloader.py, which calls torch's `interpolate` in its default
    mode: that is "nearest". "bilinear" is Pillow's filter, but for its rounding.
    """
    if images.shape[1:3] == size:
        return images
    if resample == "nearest":
        rows, columns = (np.arange(to) * side // to for side, to in zip(images.shape[1:3], size, strict=True))
        return images[:, rows][:, :, columns]
    return jax.image.resize(images, (images.shape[0], *size, 3), method="linear", antialias=True)
