"""Sizes of images from their headers, and the check of a data set against them."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

from rtdetrv2_jax.data.faults import DataError, Fault
from rtdetrv2_jax.data.sample import Dataset, Sample
from rtdetrv2_jax.image import ImageError

SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations that exchange height and width."""


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as it is once upright, from its header.

    Raises:
        ImageError: it has no header that can be read.
    """
    try:
        with Image.open(path) as image:
            # Pillow would decode a whole PNG in search of a late EXIF chunk.
            has_exif = image.format != "PNG" or "exif" in image.info
            sideways = has_exif and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            width, height = image.size
    except (
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        struct.error,
        Image.DecompressionBombError,
        Warning,
    ) as error:
        raise ImageError(f"cannot read the header of {path}: {error}") from error
    return (width, height) if sideways else (height, width)


def upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | ImageError]:
    """The size of each image, or why there is none; many files at once."""

    def size_or_error(path: Path) -> tuple[int, int] | ImageError:
        try:
            return upright_size(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(size_or_error, paths))


def check_images(dataset: Dataset, *, read: Literal["headers", "pixels"] = "headers") -> tuple[Fault, ...]:
    """The faults of a data set's images: those that cannot be read, and those of another size than annotated.

    Args:
        dataset: its images that are files are looked at.
        read: "headers" finds wrong sizes and files that are no images; "pixels" also finds images that break off
            or are damaged inside, and takes as long as an epoch of reading.
    """
    samples = [sample for sample in map(dataset.__getitem__, range(len(dataset))) if isinstance(sample.image, Path)]
    if read == "headers":
        return tuple(_size_faults(samples))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(fault for fault in pool.map(_pixel_fault, samples) if fault)


def _size_faults(samples: Sequence[Sample]) -> list[Fault]:
    paths = [sample.image for sample in samples if isinstance(sample.image, Path)]
    faults = []
    for sample, size in zip(samples, upright_sizes(paths), strict=True):
        if isinstance(size, ImageError):
            faults.append(Fault(str(sample.image), sample.image_id, "unreadable image", str(size)))
        elif size != sample.size:
            (height, width), (rows, columns) = sample.size, size
            hint = ": the boxes may belong to the image before its EXIF rotation" if size == sample.size[::-1] else ""
            what = f"{columns}×{rows} once upright, annotated as {width}×{height}{hint}"
            faults.append(Fault(str(sample.image), sample.image_id, "image of another size", what))
    return faults


def _pixel_fault(sample: Sample) -> Fault | None:
    try:
        sample.read()
    except ImageError as error:
        return Fault(str(sample.image), sample.image_id, "unreadable image", str(error))
    except DataError as error:
        return Fault(str(sample.image), sample.image_id, "image of another size", str(error))
    return None
