"""`preprocessor_config.json` in Hugging Face's form, both ways: what it asks to be done to an image.

The form has many ways of saying the same, and words that mean nothing to this model. `Steps` are what is left of it.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rtdetrv2_jax.config import ConfigError

FILE_NAME = "preprocessor_config.json"

Resize = Literal["stretch", "shortest_edge", "fit_inside", "none"]
Pad = Literal["none", "size", "multiple"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # Pillow's codes 0 to 5, in order

# The content of the published files, which is also what the format means by a field left out or null.
_PUBLISHED: dict[str, Any] = {
    "do_convert_annotations": True,
    "do_normalize": False,
    "do_pad": False,
    "do_rescale": True,
    "do_resize": True,
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "RTDetrImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "pad_size": None,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 640, "width": 640},
}
_PROCESSORS = ("RTDetrImageProcessor", "RTDetrImageProcessorFast", "RTDetrImageProcessorPil")
_SIZE_KEYS: dict[Resize, tuple[str, str]] = {
    "stretch": ("height", "width"),
    "shortest_edge": ("shortest_edge", "longest_edge"),
    "fit_inside": ("max_height", "max_width"),
}


class Steps(NamedTuple):
    """What is done to an image: the arguments of `Preprocessing`, which explains them and checks that they can work."""

    resize: Resize
    size: tuple[int, int]
    pad: Pad
    pad_size: tuple[int, int] | None
    resample: Resample
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


def read_fields(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ValueError: It is not text, not JSON, or not a JSON object.
    """
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ConfigError(f"expected a JSON object, got {type(fields).__name__}. Write {{}} for the defaults.")
    return fields


def steps_from_fields(fields: Mapping[str, Any]) -> Steps:
    """The steps that the content of the file asks for; fields left out or null are as published.

    Raises:
        ConfigError: Fields that cannot be respected, all of them named, each with what to set.
    """
    faults = _unknown_fields(fields)
    given = {**_PUBLISHED, **{name: value for name, value in fields.items() if value is not None}}
    for name in ("do_resize", "do_pad", "do_rescale", "do_normalize"):
        if not isinstance(given[name], bool):
            faults.append(f"{name}: expected true or false, got {given[name]!r}.")
    resize, size = _size_from(given["size"], name="size", faults=faults)
    pad_size = None
    if given["do_pad"] and given["pad_size"] is not None:
        form, pad_size = _size_from(given["pad_size"], name="pad_size", faults=faults)
        if form != "stretch":
            faults.append(f"pad_size: expected height and width, got {given['pad_size']!r}.")
    if not given["do_resize"]:
        resize, size = "none", size if resize == "stretch" else (640, 640)
    code = given["resample"]
    if type(code) is not int or code not in range(6):
        faults.append(f"resample: expected one of Pillow's filters 0 to 5 (2 is bilinear), got {code!r}.")
    if type(given["rescale_factor"]) not in (int, float):
        faults.append(f"rescale_factor: expected a number, got {given['rescale_factor']!r}.")
    mean = _three(given["image_mean"], name="image_mean", faults=faults)
    std = _three(given["image_std"], name="image_std", faults=faults)
    if faults:
        raise ConfigError("\n".join([f"Fields of {FILE_NAME} that cannot be respected:", *faults]))
    return Steps(
        resize=resize,
        size=size,
        pad="none" if not given["do_pad"] else "multiple" if pad_size is None else "size",
        pad_size=pad_size,
        resample=get_args(Resample)[code],
        rescale_factor=float(given["rescale_factor"]) if given["do_rescale"] else None,
        mean=mean if given["do_normalize"] else None,
        std=std if given["do_normalize"] else None,
    )


def fields_from_steps(steps: Steps) -> dict[str, Any]:
    """The content of a file that asks for these steps, in full, as transformers writes it."""
    keys = _SIZE_KEYS["stretch" if steps.resize == "none" else steps.resize]
    return _PUBLISHED | {
        "do_normalize": steps.mean is not None,
        "do_pad": steps.pad != "none",
        "do_rescale": steps.rescale_factor is not None,
        "do_resize": steps.resize != "none",
        "image_mean": list(steps.mean or _PUBLISHED["image_mean"]),
        "image_std": list(steps.std or _PUBLISHED["image_std"]),
        "pad_size": steps.pad_size and dict(zip(("height", "width"), steps.pad_size, strict=True)),
        "resample": get_args(Resample).index(steps.resample),
        "rescale_factor": steps.rescale_factor or _PUBLISHED["rescale_factor"],
        "size": dict(zip(keys, steps.size, strict=True)),
    }


def _unknown_fields(fields: Mapping[str, Any]) -> list[str]:
    """Fields that ask for what is not done here. Others that are unknown say nothing of pixels: transformers' notes."""
    faults = []
    processor = fields.get("image_processor_type")
    if processor not in (None, *_PROCESSORS):
        faults.append(f"image_processor_type: expected {_PROCESSORS[0]}, got {processor!r}, whose defaults differ.")
    if fields.get("do_center_crop"):
        faults.append("do_center_crop: crops are not supported, and the reference ignores this field. Set it to false.")
    for name in fields.keys() - _PUBLISHED.keys() - {"do_center_crop", "crop_size", "do_convert_rgb", "data_format"}:
        meant = difflib.get_close_matches(name, _PUBLISHED, n=1, cutoff=0.85)
        if meant:
            faults.append(f"{name}: unknown. Did you mean {meant[0]}?")
    return sorted(faults)


def _size_from(value: Any, *, name: str, faults: list[str]) -> tuple[Resize, tuple[int, int]]:
    """The kind of resize that a size in Hugging Face's form asks for, and its two numbers."""
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(("height", "width"), value, strict=True))
    elif type(value) is int and name == "pad_size":
        value = {"height": value, "width": value}
    for resize, keys in _SIZE_KEYS.items():
        if isinstance(value, Mapping) and value.keys() == set(keys):
            first, second = (value[key] for key in keys)
            if type(first) is int and type(second) is int:
                return resize, (first, second)
    forms = "; ".join("{" + ", ".join(keys) + "}" for keys in _SIZE_KEYS.values())
    faults.append(
        f"{name}: expected whole numbers as one of {forms}, got {value!r}. As published: height and width 640."
    )
    return "stretch", (640, 640)


def _three(value: Any, *, name: str, faults: list[str]) -> tuple[float, float, float]:
    """Three numbers from one number or a list of three."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        faults.append(f"{name}: expected a number or three of them, got {value!r}.")
        return 1.0, 1.0, 1.0
    first, second, third = map(float, numbers)
    return first, second, third
