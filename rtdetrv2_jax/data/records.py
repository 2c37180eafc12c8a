"""From what an annotation file says to a data set: everything is checked here, for all formats alike."""

import difflib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

from rtdetrv2_jax.data.dataset import Classes, FileDataset
from rtdetrv2_jax.data.faults import DataError, Fault, FaultKind, fault_table
from rtdetrv2_jax.data.headers import upright_sizes
from rtdetrv2_jax.image import ImageError

logger = logging.getLogger(__name__)

UNKNOWN_SIZE = (0, 0)
OVERHANG_PIXELS = 1.0
"""A box may stand out of its image by this much without being counted: formats differ in where a pixel starts."""


@dataclass
class Records:
    """What annotations say, column by column, before anyone believed it. A reader fills it, `build` checks it."""

    folder: Path
    classes: Classes
    files: list[str] = field(default_factory=list)
    image_ids: list[int | str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    owners: array = field(default_factory=lambda: array("q"))
    boxes: array = field(default_factory=lambda: array("d"))
    categories: array = field(default_factory=lambda: array("q"))
    areas: array = field(default_factory=lambda: array("d"))
    crowd: array = field(default_factory=lambda: array("b"))
    box_ids: list[int | str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    rows: dict[int | str, int | None] = field(default_factory=dict)
    listings: dict[Path, frozenset[str]] = field(default_factory=dict)

    def add_image(self, file: str, *, image_id: int | str, size: tuple[int, int], source: str) -> int | None:
        """The row of a new image; None if it was left out, and why is among the faults.

        Args:
            file: from `folder`.
            image_id: what the annotations call it.
            size: (height, width), or `UNKNOWN_SIZE`.
            source: the annotation file.
        """
        if image_id in self.rows:
            self.fault(source, image_id, "duplicate image id", f"{file} has the id of an image before it")
            return None
        self.rows[image_id] = None
        path = self.folder / file
        if path.parent not in self.listings:
            entries = path.parent.iterdir() if path.parent.is_dir() else ()
            self.listings[path.parent] = frozenset(entry.name for entry in entries)
        if path.name not in self.listings[path.parent]:
            self.fault(source, image_id, "missing image", f"{path} is not there")
            return None
        self.rows[image_id] = len(self.files)
        self.files.append(file)
        self.image_ids.append(image_id)
        self.sizes.append(size)
        self.sources.append(source)
        return self.rows[image_id]

    def add_box(
        self,
        row: int,
        *,
        box_xyxy_pixels: Sequence[float],
        category: int,
        box_id: int | str,
        area: float = float("nan"),
        crowd: bool = False,
    ) -> None:
        """One more box of the image in `row`; `category` is a position in `classes`, `area` NaN if not given."""
        self.owners.append(row)
        self.boxes.extend(box_xyxy_pixels)
        self.categories.append(category)
        self.box_ids.append(box_id)
        self.areas.append(area)
        self.crowd.append(crowd)

    def fault(self, file: str, what_of: int | str, kind: FaultKind, what: str) -> None:
        """Notes one more fault."""
        self.faults.append(Fault(file, what_of, kind, what))

    def build(self, *, classes: Sequence[str] | None, on_bad_data: Literal["skip", "refuse"]) -> FileDataset:
        """The data set of what is sound, in the order in which it was added.

        Args:
            classes: the names that labels shall index, instead of the annotations' own.
            on_bad_data: "skip" leaves out what is at fault, "refuse" refuses the whole.

        Raises:
            DataError: there are faults and `on_bad_data` is "refuse", nothing is left, or no class has a name of
                `classes`.
        """
        keep_image = self._complete_sizes()
        sizes = np.array(self.sizes, np.int32).reshape(-1, 2)
        owners = np.array(self.owners, np.int64)
        with np.errstate(over="ignore"):  # too large for float32: infinite, which is a fault
            boxes = np.array(self.boxes, np.float64).astype(np.float32).reshape(-1, 4)
            areas = np.array(self.areas, np.float64).astype(np.float32)
        new_classes, labels = self._relabel(classes)
        boxes, keep = self._check_boxes(boxes, sizes=sizes, labels=labels, keep=keep_image[owners])
        if self.faults and on_bad_data == "refuse":
            raise DataError(
                f"{self.folder} has faults:\n{fault_table(self.faults, examples=5)}\n"
                'Correct them, or pass on_bad_data="skip" to go on without what is at fault.'
            )
        if not keep_image.any():
            raise DataError(f"{self.folder} has no image that can be used.\n{fault_table(self.faults)}")

        chosen = np.flatnonzero(keep)[np.argsort(owners[keep], kind="stable")]
        box_areas = np.prod(boxes[chosen, 2:] - boxes[chosen, :2], axis=1)
        counts = np.bincount(owners[chosen], minlength=len(sizes))[keep_image]
        integers = all(isinstance(image_id, int) for image_id in self.image_ids)
        dataset = FileDataset(
            classes=new_classes,
            folder=self.folder,
            files=np.array(self.files, np.dtypes.StringDType())[keep_image],
            image_ids=np.array(self.image_ids, np.int64 if integers else np.dtypes.StringDType())[keep_image],
            sizes=sizes[keep_image],
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes_xyxy_pixels=boxes[chosen],
            labels=labels[chosen],
            areas=np.where(areas[chosen] > 0, areas[chosen], box_areas),
            crowd=np.array(self.crowd, np.bool_)[chosen],
            faults=tuple(self.faults),
            notices=tuple(self.notices),
        )
        if dataset.faults or dataset.notices:
            logger.warning("%s: %s", self.folder, dataset.summary())
        return dataset

    def _complete_sizes(self) -> Bool[np.ndarray, " images"]:
        """Reads the sizes that the annotations lack; True for the images that have one now."""
        keep = np.ones(len(self.files), np.bool_)
        rows = [row for row, size in enumerate(self.sizes) if min(size) <= 0]
        for row, size in zip(rows, upright_sizes([self.folder / self.files[row] for row in rows]), strict=True):
            if isinstance(size, ImageError):
                self.fault(self.sources[row], self.image_ids[row], "unreadable image", str(size))
                keep[row] = False
            else:
                what = f"{self.files[row]} is {size[1]}×{size[0]}"
                self.fault(self.sources[row], self.image_ids[row], "no image size", what)
                self.sizes[row] = size
        return keep

    def _relabel(self, names: Sequence[str] | None) -> tuple[Classes, Int32[np.ndarray, " t"]]:
        """The classes to be used, and the label of each box among them, -1 for none."""
        categories = np.array(self.categories, np.int32)
        if names is None:
            return self.classes, categories
        if self.classes.names and not set(names) & set(self.classes.names):
            raise DataError(
                f"no class of {self.folder} is among the given classes. Given: {', '.join(names)}. "
                f"Found: {', '.join(self.classes.names)}. Give both sets the same names."
            )
        own_ids = dict(zip(*self.classes, strict=True))
        labels = {name: label for label, name in enumerate(names)}
        to_label = np.array([labels.get(name, -1) for name in self.classes.names], np.int32)
        for box in np.flatnonzero(to_label[categories] < 0) if len(categories) else ():
            name = self.classes.names[categories[box]]
            close = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=1)
            hint = f"; is it {next(known for known in names if known.lower() == close[0])!r}?" if close else ""
            source = self.sources[self.owners[box]]
            self.fault(source, self.box_ids[box], "unknown class", f"{name!r} is not a given class{hint}")
        ids = tuple(own_ids.get(name, -1) for name in names)
        return Classes(tuple(names), ids), to_label[categories] if len(categories) else categories

    def _check_boxes(
        self,
        boxes: Float32[np.ndarray, "t 4"],
        *,
        sizes: Int32[np.ndarray, "images 2"],
        labels: Int32[np.ndarray, " t"],
        keep: Bool[np.ndarray, " t"],
    ) -> tuple[Float32[np.ndarray, "t 4"], Bool[np.ndarray, " t"]]:
        """Boxes clipped to their images, and which of them are sound; the faults are noted in the order of boxes."""
        limits = sizes[np.array(self.owners, np.int64)][:, [1, 0, 1, 0]].astype(np.float32)
        clipped = np.clip(boxes, 0, limits)
        with np.errstate(invalid="ignore", over="ignore"):  # of infinite boxes
            extent, inside = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
            overhang = np.abs(boxes - clipped).max(axis=1, initial=0)
        kinds: dict[FaultKind, Any] = {  # the first that is true counts
            "box not finite": ~np.isfinite(boxes).all(axis=1),
            "box inverted": (extent < 0).any(axis=1),
            "box of zero area": (extent == 0).any(axis=1),
            "box outside the image": (inside <= 0).any(axis=1),
            "box partly outside the image": overhang > OVERHANG_PIXELS,
        }
        undecided = keep = keep & (labels >= 0)
        for kind, found in kinds.items():
            for box in np.flatnonzero(found & undecided):
                row = self.owners[box]
                corners = ", ".join(f"{value:g}" for value in boxes[box])
                what = f"[{corners}] in {self.files[row]} ({limits[box, 0]:g}×{limits[box, 1]:g})"
                self.fault(self.sources[row], self.box_ids[box], kind, what)
            undecided = undecided & ~found
            if kind != "box partly outside the image":
                keep = keep & ~found
        return clipped, keep
