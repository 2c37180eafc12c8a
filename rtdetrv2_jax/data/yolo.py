"""Annotations in YOLO's form: a YAML file with places and names, a text file for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rtdetrv2_jax.data.dataset import Classes
from rtdetrv2_jax.data.faults import DataError
from rtdetrv2_jax.data.headers import upright_sizes
from rtdetrv2_jax.data.records import Records
from rtdetrv2_jax.image import IMAGE_SUFFIXES, ImageError

BOX_FIELDS = 5
POLYGON_FIELDS = 7
"""Fewest numbers of a polygon's line: a class and three points."""


class YoloSplit(NamedTuple):
    """Where a split is: the YAML file, and the split's key in it."""

    file: Path
    key: str


def find_yolo(path: Path, *, split_names: Sequence[str]) -> tuple[YoloSplit | None, str]:
    """The YAML file that names a split, and what was seen on the way to it; `path` is that file or its folder.

    Raises:
        DataError: several files would do.
    """
    files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    found, seen = [], []
    for file in files:
        content = _load(file)
        keys = [name for name in split_names if content.get(name)] if "names" in content else []
        found += [YoloSplit(file, key) for key in keys[:1]]
        seen.append(f"{file.name} with {', '.join(map(str, content)) or 'nothing in it'}")
    if len(found) > 1:
        raise DataError(
            f"several YAML files fit: {', '.join(str(split.file) for split in found)}. Give the path of one."
        )
    if found:
        return found[0], str(found[0].file)
    return None, f"a YAML file with names and {split_names[0]}: found {'; '.join(seen) or 'no YAML file'}"


def _load(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no YAML file that can be read: {error}") from error
    return content if isinstance(content, dict) else {}


def read_yolo(split: YoloSplit) -> Records:
    """What the label files of a split say.

    A line is a class and a box (centre, width, height in units of the upright image), or a class and a polygon, which
    counts by the box around it. An image without a label file is background, and a notice counts these. Boxes have no
    meaning without the images' sizes, so the header of every image is read.

    Raises:
        DataError: the YAML file's names or places make no sense, or no image has a label file.
    """
    content = _load(split.file)
    classes = _read_classes(split.file, content)
    root = _root(split.file, content)
    images = _images(split, content[split.key], root=root)
    records = Records(root, classes)
    labelled = [(image, _label_file(image)) for image in images]
    without = sum(not label.is_file() for _, label in labelled)
    if without == len(labelled):
        raise DataError(f"{split.file}: none of {without} images has a label file, such as {labelled[0][1]}")
    if without:
        records.notices.append(f"{without} images have no label file and are background")
    for (image, label), size in zip(labelled, upright_sizes(images), strict=True):
        name = str(image.relative_to(root)) if image.is_relative_to(root) else str(image)
        if isinstance(size, ImageError):
            kind = "unreadable image" if image.is_file() else "missing image"
            records.fault(str(label), name, kind, str(size))
            continue
        row = records.add_image(name, image_id=name, size=size, source=str(label))
        if row is not None and label.is_file():
            _add_lines(records, label, row=row)
    return records


def _read_classes(file: Path, content: dict[Any, Any]) -> Classes:
    names = content["names"]
    pairs = (
        list(names.items()) if isinstance(names, dict) else list(enumerate(names if isinstance(names, list) else ()))
    )
    if not pairs or not all(isinstance(number, int) for number, _ in pairs):
        raise DataError(f"{file}: names must be a list, or a map from numbers to names, not {names!r}")
    pairs = sorted((number, str(name)) for number, name in pairs)
    texts = tuple(name for _, name in pairs)
    if len(set(texts)) < len(texts):
        raise DataError(f"{file}: names must differ, and they are {', '.join(texts)}")
    if content.get("nc") not in (None, len(texts)):
        raise DataError(f"{file}: nc is {content['nc']}, but there are {len(texts)} names: {', '.join(texts)}")
    return Classes(texts, tuple(number for number, _ in pairs))


def _root(file: Path, content: dict[Any, Any]) -> Path:
    root = file.parent / str(content.get("path") or "")
    return root if root.is_dir() else file.parent


def _images(split: YoloSplit, places: Any, *, root: Path) -> list[Path]:
    """The images of folders and of lists of images, in order."""
    images: list[Path] = []
    for name in map(str, places if isinstance(places, list) else [places]):
        # Roboflow's files say ../train/images and mean train/images.
        candidates = [root / name, *([root / name[3:]] if name.startswith("../") else [])]
        place = next((place for place in candidates if place.exists()), None)
        if place is None:
            raise DataError(
                f"{split.file}: {split.key} is {name}, but there is no {' and no '.join(map(str, candidates))}"
            )
        if place.is_dir():
            images += sorted(file for file in place.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            lines = place.read_text(encoding="utf-8").splitlines()
            images += [place.parent / line.strip() for line in lines if line.strip()]
    if not images:
        raise DataError(f"{split.file}: {split.key} is {places}, and there is no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _label_file(image: Path) -> Path:
    """The last folder called images becomes labels; without one, the file lies beside the image."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _add_lines(records: Records, file: Path, *, row: int) -> None:
    height, width = records.sizes[row]
    positions = {number: position for position, number in enumerate(records.classes.category_ids)}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            category, *values = map(float, line.split())
        except ValueError:
            values, category = [], -1.0
        fields = 1 + len(values)
        if fields != BOX_FIELDS and (fields < POLYGON_FIELDS or fields % 2 == 0):
            records.fault(
                str(file), f"line {number}", "unreadable annotation", f"{line[:80]!r} is no box and no polygon"
            )
        elif category not in positions:
            records.fault(str(file), f"line {number}", "unknown class", f"no class has the number {category:g}")
        else:
            left, top, right, bottom = _corners(values)
            records.add_box(
                row,
                box_xyxy_pixels=(left * width, top * height, right * width, bottom * height),
                category=positions[int(category)],
                box_id=f"line {number}",
            )


def _corners(values: Sequence[float]) -> tuple[float, float, float, float]:
    if len(values) == BOX_FIELDS - 1:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
