"""What every data set gives: samples, by position."""

from pathlib import Path
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from rtdetrv2_jax.data.faults import DataError
from rtdetrv2_jax.image import read_image


class Sample(NamedTuple):
    """One image and what is in it.

    Boxes are (left, top, right, bottom) in pixels of the image, edges and not centres of pixels: a box around the
    whole image is (0, 0, width, height). All of them lie inside the image and have an area.

    Attributes:
        image: a file, or the pixels where there is no file.
        image_id: what the data set itself calls the image.
        size: (height, width), as the annotations say.
        boxes_xyxy_pixels: the objects; none in a background image.
        labels: an index into the data set's `class_names` for each object.
        areas: pixels of each object as its annotation says (COCO: of its mask), else of its box. Evaluation by size
            goes by it.
        crowd_boxes_xyxy_pixels: regions with uncounted objects of a class. Not to be trained on; evaluation forgives
            what is found in them.
        crowd_labels: a class for each crowd.
    """

    image: Path | UInt8[np.ndarray, "h w 3"]
    image_id: int | str
    size: tuple[int, int]
    boxes_xyxy_pixels: Float32[np.ndarray, "t 4"]
    labels: Int32[np.ndarray, " t"]
    areas: Float32[np.ndarray, " t"]
    crowd_boxes_xyxy_pixels: Float32[np.ndarray, "t_crowd 4"]
    crowd_labels: Int32[np.ndarray, " t_crowd"]

    def read(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, RGB and upright.

        Raises:
            rtdetrv2_jax.image.ImageError: the file cannot be read.
            DataError: the image has another size than its annotation, so that the boxes would be wrong.
        """
        pixels = self.image if isinstance(self.image, np.ndarray) else read_image(self.image)
        if pixels.shape[:2] != self.size:
            (height, width), (rows, columns) = self.size, pixels.shape[:2]
            raise DataError(
                f"{self.image} (image {self.image_id!r}) is {columns}×{rows} pixels once upright, but its annotation "
                f"says {width}×{height}. Its boxes cannot be trusted: correct the annotation, or take the rotation out "
                "of the file's EXIF data if the boxes belong to the image unrotated. check_images lists all of them."
            )
        return pixels


@runtime_checkable
class Dataset(Protocol):
    """Samples by position, in an order that stays, and the classes that their labels index.

    `category_ids` has what the data set itself calls each class, -1 for a class that it does not know.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of their labels."""
        ...

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The original id of each label."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> Sample: ...
