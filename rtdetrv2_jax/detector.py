"""The detector: images in, named boxes out, through one compiled function."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.compilation import enable_persistent_cache
from rtdetrv2_jax.config import ConfigError, ModelConfig
from rtdetrv2_jax.executables import KeptProgram
from rtdetrv2_jax.image import ImageError, ImageSource, describe, read_image
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import ImageSizeError, RTDETRv2, abstract_model, check_image_size
from rtdetrv2_jax.postprocess import best_detections
from rtdetrv2_jax.preprocessing import Prepared, Preprocessing
from rtdetrv2_jax.weights.load import Source, load_pretrained

Threshold = float | Mapping[str, float]
"""One score for all classes, or a score for each named class; classes that are not named have 0.5."""

DEFAULT_THRESHOLD = 0.5

# An exported `detect` can be saved only if what it gives has a name.
jax.export.register_namedtuple_serialization(Detections, serialized_name="rtdetrv2_jax.arrays.Detections")
_READERS = max(4, os.cpu_count() or 1)
"""Threads that read images; they wait for each other little, since decoding and resizing run outside Python."""


def detect(
    model: RTDETRv2,
    images: UInt8[Array, "b h w 3"],
    sizes: Float[Array, "b 2"],
    *,
    preprocessing: Preprocessing,
    content_sizes: Int[Array, "b 2"] | None = None,
) -> Detections:
    """The detections in resized images: the whole way from bytes to pixel boxes, as one function of arrays.

    It holds no Python state: `jax.jit`, `jax.export` and `jax.vmap` take it as it is. A fused model gives the same at
    less cost.

    Args:
        model: In either form.
        images: RGB, resized as `preprocessing` says (`Preprocessing.prepare`).
        sizes: (height, width) in original pixels that each input spans (`Prepared.scale_size`).
        preprocessing: How levels become numbers. Static under `jax.jit`.
        content_sizes: (height, width) of each input that shows the image, for padded and normalised inputs.
    """
    output = model(preprocessing.normalise(images, content_sizes=content_sizes))
    return best_detections(output.logits, output.boxes, sizes=sizes)


@dataclass(frozen=True)
class Result:
    """What was found in one image, best first.

    `boxes` are (left, top, right, bottom) in pixels of the original image; they may reach a little over its edge.
    `names[i]` is the class name of `labels[i]`; `size` the (height, width) of the image.
    """

    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    names: tuple[str, ...]
    boxes: Float[np.ndarray, "n 4"]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


class Read(NamedTuple):
    """An image that was read for detection: its pixels as they came, and as the network takes them."""

    image: UInt8[np.ndarray, "h w 3"]
    prepared: Prepared


class Found(NamedTuple):
    """One image of a stream: where it came from, its pixels, and what was found, or why it could not be read."""

    source: ImageSource
    image: UInt8[np.ndarray, "h w 3"] | None
    result: Result | ImageError


class Detector:
    """RT-DETRv2 for images of any kind and size.

    Args:
        model: In its training form; the detector folds its own copy.
        preprocessing: How the checkpoint's images are prepared.
        max_batch: The most images that go through the network at once; 16, but 1 on a CPU, if none is given. A batch
            is filled up to a power of two, so that there is one program for each of these, compiled once and kept in
            the user's cache folder.
    """

    def __init__(
        self, model: RTDETRv2, preprocessing: Preprocessing | None = None, *, max_batch: int | None = None
    ) -> None:
        self.config: ModelConfig = model.config
        self.preprocessing = preprocessing or Preprocessing()
        self.max_batch = max_batch or (1 if jax.default_backend() == "cpu" else 16)
        if self.preprocessing.input_size:
            check_image_size(self.preprocessing.input_size, queries=self.config.decoder.queries)
        enable_persistent_cache()
        self._fused, self.run = _programs(model, self.preprocessing)

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        revision: str | None = None,
        max_batch: int | None = None,
    ) -> "Detector":
        """The detector of a checkpoint: a hub id, a Hugging Face folder, or a folder of ours.

        Args:
            source: Such as "PekingU/rtdetr_v2_r18vd", or a path.
            dtype: What the network computes in: "float32" is exact, "bfloat16" faster on accelerators.
            revision: A branch, tag or commit, where `source` is a hub id.
            max_batch: The most images that go through the network at once.

        Raises:
            SourceError: There is no such model, or it can't be fetched; the message says what can be done.
            ConfigError, WeightsError: It is there and is not an RT-DETRv2 that this library has.
        """
        model, preprocessing, _ = load_pretrained(source, dtype=jnp.dtype(dtype), revision=revision)
        return cls(model, preprocessing, max_batch=max_batch)

    @functools.cached_property
    def model(self) -> RTDETRv2:
        """The model in its inference form, with the numbers that `run` uses."""
        return self._fused()

    def __call__(
        self, images: ImageSource | list[ImageSource], *, threshold: Threshold = DEFAULT_THRESHOLD
    ) -> list[Result]:
        """What is in the images, one result for each; a single image gives a list of one.

        Args:
            images: Paths, URLs, bytes, Pillow images or RGB arrays, of any sizes, mixed.
            threshold: Detections with a higher score are kept; one for all classes, or one for each name.

        Raises:
            ImageError: An image can't be read; `stream` goes on where this stops.
        """
        sources = images if isinstance(images, list) else [images]
        results = []
        for found in self.stream(sources, threshold=threshold):
            if isinstance(found.result, ImageError):
                raise found.result
            results.append(found.result)
        return results

    def stream(self, sources: Iterable[ImageSource], *, threshold: Threshold = DEFAULT_THRESHOLD) -> Iterator[Found]:
        """What is in each image, in order, as soon as its batch is done; an image that can't be read does not stop it.

        Images are read ahead in threads while the network works. No more than a few batches are held in memory.
        """
        thresholds = self._thresholds(threshold)
        reading = _read_ahead(sources, self._read, count=2 * self.max_batch)
        while batch := list(itertools.islice(reading, self.max_batch)):
            readable = [read for _, read in batch if isinstance(read, Read)]
            results = iter(self._detect([read.prepared for read in readable]))
            for source, read in batch:
                if isinstance(read, ImageError):
                    yield Found(source, None, read)
                else:
                    yield Found(source, read.image, self._result(next(results), thresholds, size=read.image.shape[:2]))

    def _read(self, source: ImageSource) -> Read | ImageError:
        try:
            image = read_image(source)
            prepared = self.preprocessing.prepare(image)
            check_image_size(prepared.pixels.shape[:2], queries=self.config.decoder.queries)
        except ImageSizeError as error:
            return ImageError(f"{describe(source)}: {error}")
        except ImageError as error:
            return error
        return Read(image, prepared)

    def _detect(self, inputs: list[Prepared]) -> list[Detections]:
        """The detections of each input, whatever their sizes: those of one size go together."""
        results: list[Detections | None] = [None] * len(inputs)
        by_shape = sorted(range(len(inputs)), key=lambda index: inputs[index].pixels.shape)
        for _, group in itertools.groupby(by_shape, key=lambda index: inputs[index].pixels.shape):
            indices = list(group)
            bucket = 1 << (len(indices) - 1).bit_length()
            filled = [inputs[index] for index in indices] + [inputs[indices[0]]] * (bucket - len(indices))
            found = jax.device_get(
                self.run(
                    np.stack([item.pixels for item in filled]),
                    np.array([item.scale_size for item in filled], np.float32),
                    np.array([item.content_size for item in filled], np.int32),
                )
            )
            for row, index in enumerate(indices):
                results[index] = Detections(*(value[row : row + 1] for value in found))
        return [result for result in results if result is not None]

    def _result(self, found: Detections, thresholds: Float[np.ndarray, "k"], *, size: tuple[int, ...]) -> Result:
        scores, labels, boxes = (np.asarray(value[0]) for value in found)
        kept = scores > thresholds[labels]
        names = tuple(self.config.class_names[label] for label in labels[kept])
        return Result(scores[kept], labels[kept], names, boxes[kept], (size[0], size[1]))

    def _thresholds(self, threshold: Threshold) -> Float[np.ndarray, "k"]:
        """The threshold of each label."""
        if not isinstance(threshold, Mapping):
            return np.full(self.config.classes, threshold, np.float32)
        unknown = sorted(threshold.keys() - set(self.config.class_names))
        if unknown:
            raise ConfigError(
                f"thresholds name classes that the model does not have: {', '.join(unknown)}; "
                f"it has {', '.join(self.config.class_names)}"
            )
        return np.array([threshold.get(name, DEFAULT_THRESHOLD) for name in self.config.class_names], np.float32)


def _programs(model: RTDETRv2, preprocessing: Preprocessing) -> tuple[Callable[[], RTDETRv2], KeptProgram]:
    """The fused model, for whoever wants it, and `detect` for it, from images, sizes and content sizes.

    Both programs take and give flat lists of arrays: that costs less a call than a tree, and where both are kept, no
    one needs to know what the tree of the fused model is.
    """
    leaves, structure = jax.tree.flatten(model)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    # A model that someone changed may do anything: nothing that is kept is for it.
    changed = structure != jax.tree.structure(abstract_model(model.config, dtype=model.dtype))
    about = None if changed else f"{model.config} {model.dtype}"
    about_run = None if changed else f"{about} {preprocessing}"

    @functools.cache
    def fused_structure() -> Any:
        return jax.tree.structure(jax.eval_shape(fuse, abstract))

    def fold(leaves: list[Array]) -> list[Array]:
        return jax.tree.leaves(fuse(jax.tree.unflatten(structure, leaves)))

    def run(leaves: list[Array], images: Array, sizes: Array, content_sizes: Array) -> tuple[Array, ...]:
        model = jax.tree.unflatten(fused_structure(), leaves)
        with jax.default_matmul_precision("float32" if model.dtype == jnp.float32 else "default"):
            return tuple(detect(model, images, sizes, preprocessing=preprocessing, content_sizes=content_sizes))

    program = KeptProgram(run, KeptProgram(fold, leaves, about=about)(), about=about_run)
    return lambda: jax.tree.unflatten(fused_structure(), program.bound), program


def _read_ahead(
    sources: Iterable[ImageSource], read: Callable[[ImageSource], Read | ImageError], *, count: int
) -> Iterator[tuple[ImageSource, Read | ImageError]]:
    """Each source and what reading it gave, in order, with up to `count` of them read ahead."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-image") as pool:
        waiting: deque[tuple[ImageSource, Future[Read | ImageError]]] = deque()
        for source in sources:
            waiting.append((source, pool.submit(read, source)))
            if len(waiting) > count:
                source, future = waiting.popleft()
                yield source, future.result()
        while waiting:
            source, future = waiting.popleft()
            yield source, future.result()
