"""From an upright RGB image to the network's input, as a checkpoint's `preprocessor_config.json` says.

The resize runs on the host in Pillow, since detections shift with its rounding; scaling and normalisation run on the
device, so that pixels travel as bytes. The published checkpoints squash to 640 x 640, bilinear, divide by 255 and do
not normalise: the mean and the standard deviation in their files are unused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.image import ImageError
from rtdetrv2_jax.preprocessor_json import (
    FILE_NAME,
    Pad,
    Resample,
    Resize,
    Steps,
    fields_from_steps,
    read_fields,
    steps_from_fields,
)

MULTIPLE = 32
"""What the sides of the network's input divide by: the stride of its coarsest feature map."""


class Prepared(NamedTuple):
    """One image, ready for the network.

    `pixels` is the input, 0 to 255. `scale_size` is the (height, width) in pixels of the original image that the whole
    input spans: the original's own size, or more where the input is padded. Normalised boxes times
    (width, height, width, height) of it are pixels of the original. `content_size` is the (height, width) of the input
    that shows the image; the rest is padding.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    scale_size: tuple[float, float]
    content_size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become network inputs; hashable, so that a compiled program can be keyed on it.

    Source: transformers, models/rt_detr/image_processing_pil_rt_detr.py, RTDetrImageProcessorPil.

    Args:
        resize: "stretch" to exactly `size`; "shortest_edge" keeps the aspect and brings the shorter side to `size[0]`
            unless the longer one would pass `size[1]`; "fit_inside" keeps the aspect and fills `size` along one side;
            "none" leaves the image as it is.
        size: (height, width), but (shortest, longest) for "shortest_edge"; unused for "none".
        pad: Zeros below and to the right: "size" up to `pad_size`; "multiple" up to multiples of 32. The latter is
            `do_pad` without `pad_size`, where the reference pads to the largest image of the batch: here an image's
            input, and so its detections, do not depend on its neighbours.
        pad_size: (height, width) for pad="size".
        resample: Pillow's filter.
        rescale_factor: What levels 0 to 255 are multiplied by, None for 1.
        mean: Subtracted from each channel after scaling, None not to normalise.
        std: What each channel is divided by then.

    Raises:
        ConfigError: Fields contradict each other, or no image could ever give sides that are multiples of 32.
    """

    resize: Resize = "stretch"
    size: tuple[int, int] = (640, 640)
    pad: Pad = "none"
    pad_size: tuple[int, int] | None = None
    resample: Resample = "bilinear"
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self):
        faults = _faults(self)
        if faults:
            raise ConfigError("\n".join(["Preprocessing that cannot work:", *faults]))

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that a `preprocessor_config.json` describes; fields left out or null are as published.

        Raises:
            ConfigError: Fields that cannot be respected, all of them named, each with what to set.
        """
        return cls(**steps_from_fields(fields)._asdict())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Preprocessing":
        """The preprocessing of a checkpoint's folder; as published where it has no `preprocessor_config.json`.

        Raises:
            FileNotFoundError: There is no such folder.
            ConfigError: The file is not JSON, or says what cannot be respected.
        """
        path = Path(folder) / FILE_NAME
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. Give the folder of a checkpoint.")
        if not path.exists():
            return cls()
        try:
            return cls.from_hugging_face(read_fields(path))
        except ValueError as error:  # of JSON and of Unicode too
            raise ConfigError(f"{path}: {error}") from error

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that transformers loads and `from_hugging_face` reads back."""
        return fields_from_steps(Steps(**vars(self)))

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of every network input, or None where it depends on the image."""
        if self.pad == "size":
            return self.pad_size
        return self.size if self.resize == "stretch" and self.pad == "none" else None

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """Resizes and pads one RGB image, to the last bit as Pillow does.

        Raises:
            ImageError: The image does not fit into `pad_size`, or its input would have sides that are no multiples of
                32, or none at all.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ImageError(
                f"expected uint8 (h, w, 3), got {image.dtype} {image.shape}. read_image gives such arrays."
            )
        height, width = image.shape[:2]
        content = self._content_size(height, width)
        if 0 in content:
            raise ImageError(
                f"{height} x {width} is too long: resized to {content}. Crop it, or resize with 'stretch'."
            )
        padded = self._padded_size(*content)
        if padded[0] < content[0] or padded[1] < content[1]:
            raise ImageError(f"{height} x {width} is resized to {content}, over pad_size {padded}. Raise pad_size.")
        if padded[0] % MULTIPLE or padded[1] % MULTIPLE:
            raise ImageError(
                f"{height} x {width} gives an input of {padded}; its sides must be multiples of {MULTIPLE}. Set do_pad "
                'to true (pad="multiple"), or a size of height and width (resize="stretch").'
            )
        if content != (height, width):
            code = get_args(Resample).index(self.resample)
            image = np.asarray(Image.fromarray(image).resize((content[1], content[0]), Image.Resampling(code)))
        pixels = np.zeros((*padded, 3), np.uint8)
        pixels[: content[0], : content[1]] = image
        return Prepared(pixels, (height * padded[0] / content[0], width * padded[1] / content[1]), content)

    def normalise(
        self,
        pixels: UInt8[Array | np.ndarray, "b h w 3"],
        *,
        content_sizes: Int[Array | np.ndarray, "b 2"] | None = None,
    ) -> Float[Array, "b h w 3"]:
        """Float32 network input from the `pixels` of a batch; in [0, 1] unless a mean and a std are set.

        Args:
            pixels: Levels 0 to 255.
            content_sizes: `Prepared.content_size` of every image. Needed where the input is both padded and
                normalised, since padding is zero after normalisation, as in the reference; ignored elsewhere.
        """
        values = jnp.asarray(pixels).astype(jnp.float32)
        if self.rescale_factor is not None:
            values = values * jnp.float32(self.rescale_factor)
        if self.mean is None or self.std is None:
            return values
        values = (values - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)
        if self.pad == "none":
            return values
        if content_sizes is None:
            raise ValueError(
                "This preprocessing pads and normalises, so normalise has to know where padding begins. Pass "
                "content_sizes, the content_size of every prepared image."
            )
        heights, widths = content_sizes[:, 0, None], content_sizes[:, 1, None]
        rows = jnp.arange(values.shape[1], dtype=content_sizes.dtype) < heights
        columns = jnp.arange(values.shape[2], dtype=content_sizes.dtype) < widths
        return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], values, 0.0)

    def _content_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image once resized, with the reference's own rounding."""
        if self.resize == "none":
            return height, width
        if self.resize == "stretch":
            return self.size
        if self.resize == "fit_inside":
            scale = min(self.size[0] / height, self.size[1] / width)
            return int(height * scale), int(width * scale)
        shortest, longest = self.size
        exact: float = shortest
        if max(height, width) / min(height, width) * shortest > longest:
            exact = longest * min(height, width) / max(height, width)
        if min(height, width) == round(exact):
            return height, width
        if width < height:
            return int(exact * height / width), round(exact)
        return round(exact), int(exact * width / height)

    def _padded_size(self, height: int, width: int) -> tuple[int, int]:
        if self.pad_size is not None:
            return self.pad_size
        if self.pad == "multiple":
            return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE
        return height, width


def _faults(this: Preprocessing) -> list[str]:
    """What keeps a preprocessing from ever working, one line a fault, in the names of the fields."""
    faults = []
    for name, choices in (("resize", Resize), ("pad", Pad), ("resample", Resample)):
        if getattr(this, name) not in get_args(choices):
            faults.append(f"{name}: expected one of {', '.join(get_args(choices))}, got {getattr(this, name)!r}.")
    if (this.pad == "size") != (this.pad_size is not None):
        faults.append(f"pad_size: goes with pad='size' and nothing else, got {this.pad_size} with pad={this.pad!r}.")
    for name, sides in (("size", this.size), ("pad_size", this.pad_size or (MULTIPLE, MULTIPLE))):
        if min(sides) < 1:
            faults.append(f"{name}: expected two positive numbers, got {sides}.")
    if this.pad_size is not None:
        faults += _not_multiples("pad_size", this.pad_size)
        if this.resize == "stretch" and (this.size[0] > this.pad_size[0] or this.size[1] > this.pad_size[1]):
            faults.append(f"pad_size: {this.pad_size} does not hold the resized {this.size}. Raise it, or lower size.")
    elif this.resize == "stretch" and this.pad == "none":
        faults += _not_multiples("size", this.size)
    elif this.resize != "none" and this.pad == "none" and all(side % MULTIPLE for side in this.size):
        faults.append(
            f"size: {this.size} brings no side to a multiple of {MULTIPLE}, as the network needs. Set do_pad true."
        )
    if this.rescale_factor is not None and not (0 < this.rescale_factor < math.inf):
        faults.append(f"rescale_factor: expected a positive number, got {this.rescale_factor}.")
    if (this.mean is None) != (this.std is None):
        faults.append("mean, std: set both to normalise, or neither.")
    if not all(map(math.isfinite, this.mean or ())):
        faults.append(f"mean: expected three numbers, got {this.mean}.")
    if not all(0 < value < math.inf for value in this.std or ()):
        faults.append(f"std: expected three positive numbers, got {this.std}.")
    return faults


def _not_multiples(name: str, sides: tuple[int, int]) -> list[str]:
    if not any(side % MULTIPLE for side in sides):
        return []
    near = tuple(max(1, round(side / MULTIPLE)) * MULTIPLE for side in sides)
    return [f"{name}: the network needs sides that are multiples of {MULTIPLE}, got {sides}. Set {near}."]
