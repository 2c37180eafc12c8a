"""From samples to batches of arrays in the host's memory: which images, in which order, read, augmented and padded.

Batch number n of a run is a function of n, the seed and the data, and of nothing else: not of the batches before it,
nor of how many processes make them. Resuming is starting with another n.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from rtdetrv2_jax.data import DataError, Dataset, FileDataset, SyntheticDataset
from rtdetrv2_jax.data.synthetic import MOST_OBJECTS
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.preprocessing import Preprocessing

from .augmentation import Augmentation, draws, is_active
from .geometry import AugmentedImage, augment_image

logger = logging.getLogger(__name__)

OnBadData = Literal["skip", "refuse"]
SLOTS = (16, 32, 64, 128)
"""Numbers of boxes that targets are padded to, so that data sets of like sizes share a compiled program."""
REPLACEMENTS = 20
"""So many images are tried in the place of one that cannot be read, before the data set is given up."""


class BadImage(NamedTuple):
    """An image that could not be read: its position in the data set, and what the error says, which names the file."""

    position: int
    reason: str


class HostBatch(NamedTuple):
    """This host's share of a training batch: the fields of `Batch`, and the images that had to be replaced."""

    images: UInt8[np.ndarray, "b h w 3"]
    labels: Int32[np.ndarray, "b t"]
    boxes: Float32[np.ndarray, "b t 4"]
    mask: Bool[np.ndarray, "b t"]
    image_ids: Int32[np.ndarray, " b"]
    content_xyxy_pixels: Int32[np.ndarray, "b 4"]
    distort_colours: Bool[np.ndarray, " b"]
    bad_images: tuple[BadImage, ...]


class HostEvaluationBatch(NamedTuple):
    """This host's share of an evaluation batch: the fields of `EvaluationBatch`."""

    images: UInt8[np.ndarray, "b h w 3"]
    scale_sizes: Float32[np.ndarray, "b 2"]
    content_sizes: Int32[np.ndarray, "b 2"]
    image_ids: Int32[np.ndarray, " b"]
    mask: Bool[np.ndarray, " b"]
    bad_images: tuple[BadImage, ...]


def target_slots(dataset: Dataset, *, most: int) -> int:
    """How many boxes the targets of a data set are padded to: its largest count, rounded up, and `most` at most.

    An image with more boxes is no error: `most` is the number of queries, and more objects cannot be matched anyway
    (the original's matching leaves the surplus out). Here each epoch draws by lot which ones stay, so that small
    objects are not always those that go.
    """
    if isinstance(dataset, SyntheticDataset):
        largest = MOST_OBJECTS  # counting would draw every scene
    elif isinstance(dataset, FileDataset):
        owners = np.repeat(np.arange(len(dataset)), np.diff(dataset.starts))
        counts = np.bincount(owners[~dataset.crowd], minlength=1)
        largest = int(counts.max())
        if largest > most:
            over = np.count_nonzero(counts > most)
            logger.warning("%d images have more than %d objects: %d of them, by lot, in each epoch", over, most, most)
    else:
        largest = max((len(dataset[index].labels) for index in range(len(dataset))), default=0)
    return min(next((slots for slots in SLOTS if slots >= largest), most), most)


@functools.lru_cache(maxsize=2)
def epoch_order(images: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " images"]:
    """The positions of all images in the order of an epoch, each order as likely as any other."""
    words = np.asarray(draws("order", seed=seed, epoch=epoch).bits.random_raw(images), np.uint64)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """The batches of a run by number. Hosts have neighbouring shares of a batch, in the order of their numbers.

    Args:
        dataset: what to train on.
        augmentation: the host's part of it is done here.
        size: (height, width) of the images, before multi-scale.
        batch_size: images of all hosts together; what an epoch has left over is dropped.
        epochs: times through the data.
        seed: of the order and of the augmentation.
        slots: boxes that targets are padded to (`target_slots`).
        on_bad_data: "skip" puts another image, drawn by lot, in the place of one that cannot be read; "refuse" stops
            with an error.
        process_index: which host this is.
        process_count: how many hosts there are.

    Raises:
        DataError: There is less than one batch in the data, or hosts cannot share a batch evenly.
    """

    dataset: Dataset
    augmentation: Augmentation
    size: tuple[int, int]
    batch_size: int
    epochs: int
    seed: int
    slots: int
    on_bad_data: OnBadData = "skip"
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        """Checks that there is a batch, and that all hosts get as much of it."""
        if self.batch_size % self.process_count:
            raise DataError(f"{self.process_count} hosts cannot share a batch of {self.batch_size} images evenly.")
        if self.batch_size > len(self.dataset):
            raise DataError(
                f"The data set has {len(self.dataset)} images, not enough for one batch of {self.batch_size}. Make the "
                "batch smaller."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches that are made of the data once."""
        return len(self.dataset) // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Positions in the data set of this host's images of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.process_count
        start = position * self.batch_size + self.process_index * share
        return epoch_order(len(self.dataset), seed=self.seed, epoch=epoch)[start : start + share].tolist()

    def __getitem__(self, step: int) -> HostBatch:
        epoch, indices = self.epoch_of(step), self.indices(step)
        shape, bad = (len(indices), self.slots), []
        colours = is_active(self.augmentation.photometric, epoch=epoch)
        batch = HostBatch(
            images=np.empty((len(indices), *self.size, 3), np.uint8),
            labels=np.zeros(shape, np.int32),
            boxes=np.zeros((*shape, 4), np.float32),
            mask=np.zeros(shape, np.bool_),
            image_ids=np.array(indices, np.int32),
            content_xyxy_pixels=np.empty((len(indices), 4), np.int32),
            distort_colours=np.full(len(indices), colours, np.bool_),
            bad_images=(),
        )
        for row, index in enumerate(indices):
            index, image = self._readable(index, epoch=epoch, bad=bad)
            kept = self._within_slots(len(image.labels), epoch=epoch, index=index)
            batch.images[row], batch.image_ids[row] = image.pixels, index
            batch.content_xyxy_pixels[row] = image.content_xyxy_pixels
            batch.labels[row, : len(kept)], batch.boxes[row, : len(kept)] = image.labels[kept], image.boxes[kept]
            batch.mask[row, : len(kept)] = True
        return batch._replace(bad_images=tuple(bad))

    def augmented(self, index: int, *, epoch: int) -> AugmentedImage:
        """An image as it is in an epoch; `ImageError` or `DataError` if it cannot be read."""
        sample = self.dataset[index]
        return augment_image(
            sample.read(),
            boxes_xyxy_pixels=sample.boxes_xyxy_pixels,
            labels=sample.labels,
            size=self.size,
            augmentation=self.augmentation,
            epoch=epoch,
            dice=draws("geometry", seed=self.seed, epoch=epoch, index=index),
        )

    def _readable(self, index: int, *, epoch: int, bad: list[BadImage]) -> tuple[int, AugmentedImage]:
        """An image, or the first of its replacements that can be read; those that cannot are added to `bad`."""
        lot = draws("replacement", seed=self.seed, epoch=epoch, index=index)
        for _ in range(REPLACEMENTS):
            try:
                return index, self.augmented(index, epoch=epoch)
            except (ImageError, DataError) as error:
                if self.on_bad_data == "refuse":
                    raise DataError(f"{error} Or train without such images: --on-bad-data skip.") from error
                bad.append(BadImage(index, str(error)))
                index = lot.integer(0, len(self.dataset) - 1)
        raise DataError(f"{REPLACEMENTS} images one after another cannot be read. The last one: {bad[-1].reason}")

    def _within_slots(self, count: int, *, epoch: int, index: int) -> np.ndarray:
        if count <= self.slots:
            return np.arange(count)
        words = np.asarray(draws("excess", seed=self.seed, epoch=epoch, index=index).bits.random_raw(count), np.uint64)
        return np.sort(np.argsort(words, kind="stable")[: self.slots])


@dataclass(frozen=True, kw_only=True)
class EvaluationSource:
    """All images of a data set once, in order, prepared as at inference; the last batch is filled up with black.

    Args:
        dataset: what to evaluate on.
        preprocessing: as the checkpoint's; it must give all images one size.
        batch_size: images of all hosts together. Hosts have neighbouring shares of a batch.
        on_bad_data: "skip" masks an image that cannot be read, so that its objects count as not found; "refuse" stops
            with an error.
        process_index: which host this is.
        process_count: how many hosts there are.
    """

    dataset: Dataset
    preprocessing: Preprocessing
    batch_size: int
    on_bad_data: OnBadData = "skip"
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        """Checks that images can share a batch, and hosts too."""
        if self.preprocessing.input_size is None:
            raise DataError("Images of different sizes cannot share a batch: set resize='stretch', or pad='size'.")
        if self.batch_size % self.process_count:
            raise DataError(f"{self.process_count} hosts cannot share a batch of {self.batch_size} images evenly.")

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, index: int) -> HostEvaluationBatch:
        share, bad = self.batch_size // self.process_count, []
        first = index * self.batch_size + self.process_index * share
        height, width = self.preprocessing.input_size or (0, 0)
        batch = HostEvaluationBatch(
            images=np.zeros((share, height, width, 3), np.uint8),
            scale_sizes=np.ones((share, 2), np.float32),
            content_sizes=np.tile(np.array([height, width], np.int32), (share, 1)),
            image_ids=np.zeros(share, np.int32),
            mask=np.zeros(share, np.bool_),
            bad_images=(),
        )
        for row, position in enumerate(range(first, min(first + share, len(self.dataset)))):
            batch.image_ids[row] = position
            try:
                prepared = self.preprocessing.prepare(self.dataset[position].read())
            except (ImageError, DataError) as error:
                if self.on_bad_data == "refuse":
                    raise DataError(f"{error} Or evaluate without such images: --on-bad-data skip.") from error
                bad.append(BadImage(position, str(error)))
                continue
            batch.images[row], batch.scale_sizes[row] = prepared.pixels, prepared.scale_size
            batch.content_sizes[row], batch.mask[row] = prepared.content_size, True
        return batch._replace(bad_images=tuple(bad))
