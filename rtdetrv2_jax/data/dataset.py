"""A data set read from files: annotations as a few arrays, images read one by one."""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from rtdetrv2_jax.data.faults import Fault, fault_table
from rtdetrv2_jax.data.sample import Sample


class Classes(NamedTuple):
    """The classes of a data set in the order of their labels, and what the data set itself calls them."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FileDataset:
    """Annotations of many images in a few arrays, since worker processes share arrays but copy Python objects.

    Attributes:
        classes: names and original ids.
        folder: where `files` start from.
        files: a file for each image.
        image_ids: original ids, all integers or all strings.
        sizes: (height, width) of each image.
        starts: the boxes of image i are those from `starts[i]` up to `starts[i + 1]`.
        boxes_xyxy_pixels: all boxes of all images.
        labels: of each box.
        areas: of each box.
        crowd: True where a box is a crowd.
        faults: what was wrong with the annotations, and has been left out or repaired.
        notices: what else one should know.
    """

    classes: Classes
    folder: Path
    files: np.ndarray
    image_ids: np.ndarray
    sizes: Int32[np.ndarray, "images 2"]
    starts: Int64[np.ndarray, " images+1"]
    boxes_xyxy_pixels: Float32[np.ndarray, "t 4"]
    labels: Int32[np.ndarray, " t"]
    areas: Float32[np.ndarray, " t"]
    crowd: Bool[np.ndarray, " t"]
    faults: tuple[Fault, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of their labels."""
        return self.classes.names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The original id of each label, -1 for a class that these annotations do not know."""
        return self.classes.category_ids

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Sample:
        index = range(len(self))[operator.index(index)]
        boxes = slice(self.starts[index], self.starts[index + 1])
        crowd = self.crowd[boxes]
        height, width = self.sizes[index].tolist()
        return Sample(
            image=self.folder / str(self.files[index]),
            image_id=self.image_ids[index].item() if self.image_ids.dtype.kind == "i" else str(self.image_ids[index]),
            size=(height, width),
            boxes_xyxy_pixels=self.boxes_xyxy_pixels[boxes][~crowd],
            labels=self.labels[boxes][~crowd],
            areas=self.areas[boxes][~crowd],
            crowd_boxes_xyxy_pixels=self.boxes_xyxy_pixels[boxes][crowd],
            crowd_labels=self.labels[boxes][crowd],
        )

    def summary(self) -> str:
        """A short text: how much there is of what, and what was wrong with it."""
        objects = np.add.reduceat(np.append(~self.crowd, False), self.starts[:-1]) * (np.diff(self.starts) > 0)
        counts = np.bincount(self.labels[~self.crowd], minlength=len(self.class_names))
        unused = [name for name, count in zip(self.class_names, counts.tolist(), strict=True) if not count]
        lines = [
            f"{len(self)} images, {np.count_nonzero(objects == 0)} of them without objects; "
            f"{counts.sum()} objects of {len(self.class_names)} classes; {np.count_nonzero(self.crowd)} crowds",
            *([f"classes without an object: {', '.join(unused)}"] if unused else []),
            *self.notices,
            *([f"faults:\n{fault_table(self.faults)}"] if self.faults else []),
        ]
        return "\n".join(lines)
