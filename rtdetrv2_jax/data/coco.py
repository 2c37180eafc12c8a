"""Annotations in COCO's form: one JSON file for a split."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetrv2_jax.data.dataset import Classes
from rtdetrv2_jax.data.faults import DataError
from rtdetrv2_jax.data.records import UNKNOWN_SIZE, Records

FOLDERS = (".", "annotations", "{split}", "{split}/annotations", "annotations/{split}")
OTHER_TASKS = frozenset({"captions", "keypoints", "panoptic", "stuff", "info"})
NAMES_LOOKED_AT = 50
"""So many images of a file are looked for in a folder before it is taken for the wrong one."""


def find_coco(folder: Path, *, split_names: Sequence[str]) -> tuple[Path | None, str]:
    """The annotation file of a split, and what was seen on the way to it.

    Found by its name: `instances_val2017.json`, `val.json`, or `valid/_annotations.coco.json` as Roboflow has it.

    Raises:
        DataError: several files would do.
    """
    places = dict.fromkeys(folder / place.format(split=split) for split in split_names for place in FOLDERS)
    files = [file for place in places if place.is_dir() for file in sorted(place.glob("*.json"))]
    fitting = list(dict.fromkeys(file for file in files if _is_of_split(file, split_names)))
    for prefix in ("instances", "_annotations.coco", ""):
        chosen = [file for file in fitting if file.name.startswith(prefix)]
        if len(chosen) == 1:
            return chosen[0], f"{chosen[0]}"
        if len(chosen) > 1:
            raise DataError(
                f"several annotation files fit: {', '.join(map(str, chosen))}. Give the path of one of them."
            )
    found = ", ".join(str(file.relative_to(folder)) for file in files) or "no JSON file"
    return None, f"a JSON file named after the split, in it or in annotations/ or {split_names[0]}/: found {found}"


def _is_of_split(file: Path, split_names: Sequence[str]) -> bool:
    words = re.split(r"[^a-z0-9]+", file.stem.lower())
    words += [word.rstrip("0123456789") for word in words]
    if file.parent.name in split_names:
        words.append(file.parent.name)
    return bool(set(split_names) & set(words)) and not OTHER_TASKS & set(words)


def read_coco(file: Path) -> Records:
    """What a COCO annotation file says.

    Labels are the ranks of category ids. A category without annotations that is named as the supercategory of others
    and has none itself is no class (Roboflow's exports begin with one), and a notice says so.

    Raises:
        DataError: it is no such file, its images are not found, or two categories have one name.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON file that can be read: {error}") from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if missing:
        raise DataError(f"{file} is not in COCO's form: expected lists {', '.join(keys)}; without {', '.join(missing)}")
    classes, notices = _read_classes(file, content["categories"], content["annotations"])
    records = Records(_image_folder(file, content["images"]), classes, notices=notices)
    for position, entry in enumerate(content["images"]):
        _add_image(records, entry, position=position, source=str(file))
    positions = {category_id: position for position, category_id in enumerate(classes.category_ids)}
    for position, entry in enumerate(content["annotations"]):
        _add_annotation(records, entry, position=position, source=str(file), positions=positions)
    return records


def _read_classes(file: Path, entries: list[Any], annotations: list[Any]) -> tuple[Classes, list[str]]:
    faulty = [entry for entry in entries if not (isinstance(entry, dict) and isinstance(entry.get("id"), int))]
    faulty += [entry for entry in entries if entry not in faulty and not isinstance(entry.get("name"), str)]
    if faulty:
        raise DataError(f"{file}: every category needs an integer id and a name, and these lack one: {faulty[:5]}")
    entries = sorted(entries, key=lambda entry: entry["id"])
    used = {entry.get("category_id") for entry in annotations if isinstance(entry, dict)}
    parents = {entry.get("supercategory") for entry in entries if entry.get("supercategory") != entry["name"]}
    grouping = [
        entry
        for entry in entries
        if entry["name"] in parents and entry["id"] not in used and entry.get("supercategory") in (None, "", "none")
    ]
    notices = [
        f"category {entry['id']} ({entry['name']!r}) only groups others and has no annotation: it is no class"
        for entry in grouping
    ]
    entries = [entry for entry in entries if entry not in grouping]
    for key in ("id", "name"):
        values = [entry[key] for entry in entries]
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise DataError(f"{file}: several categories have the {key} {', '.join(twice)}. Make them one, or rename.")
    return Classes(tuple(entry["name"] for entry in entries), tuple(entry["id"] for entry in entries)), notices


def _image_folder(file: Path, images: list[Any]) -> Path:
    """The folder that file names start from: the first of the usual ones that has one of the images."""
    names = [entry["file_name"] for entry in images if isinstance(entry, dict) and entry.get("file_name")]
    names = names[:NAMES_LOOKED_AT]
    split = re.sub(r"^(instances|annotations)_", "", file.stem)
    root = file.parent.parent
    places = [file.parent, file.parent / "images", root, *(root / name / split for name in ("", "images", "data"))]
    places += [root / "images", file.parent / split, root / split.rstrip("0123456789")]
    for place in dict.fromkeys(places):
        if any((place / name).is_file() for name in names):
            return place
    looked = ", ".join(map(str, dict.fromkeys(places)))
    raise DataError(
        f"{file}: no image of it is there, such as {names[:1]}. Looked in {looked}. Put them in one of these."
    )


def _lacking(entry: object, keys: Iterable[str]) -> str:
    if not isinstance(entry, dict):
        return f"an object was expected, not {entry!r}"
    missing = [key for key in keys if entry.get(key) is None]
    if missing:
        return f"without {', '.join(missing)}"
    strange = [key for key in keys if key.endswith("id") and not isinstance(entry[key], int | str)]
    return f"{', '.join(f'{key} {entry[key]!r}' for key in strange)}: neither a number nor a text" if strange else ""


def _add_image(records: Records, entry: Any, *, position: int, source: str) -> None:
    if lacking := _lacking(entry, ("id", "file_name")):
        records.fault(source, f"image at position {position}", "missing field", lacking)
        return
    height, width = entry.get("height"), entry.get("width")
    known = isinstance(height, int) and isinstance(width, int)
    size = (height, width) if known else UNKNOWN_SIZE
    records.add_image(str(entry["file_name"]), image_id=entry["id"], size=size, source=source)


def _add_annotation(records: Records, entry: Any, *, position: int, source: str, positions: Mapping[int, int]) -> None:
    if lacking := _lacking(entry, ("image_id", "category_id", "bbox")):
        records.fault(source, f"annotation at position {position}", "missing field", lacking)
        return
    box_id, image_id = entry.get("id", position), entry["image_id"]
    if image_id not in records.rows:
        records.fault(source, box_id, "unknown image", f"no image has the id {image_id!r}")
        return
    row = records.rows[image_id]
    if row is None:
        return  # its image is at fault already
    category = positions.get(entry["category_id"])
    if category is None:
        records.fault(source, box_id, "unknown class", f"no category has the id {entry['category_id']!r}")
        return
    try:
        left, top, width, height = map(float, entry["bbox"])
        area = float(entry.get("area") or math.nan)
    except (TypeError, ValueError):
        records.fault(source, box_id, "unreadable annotation", f"bbox {entry['bbox']!r} is not [x, y, width, height]")
        return
    records.add_box(
        row,
        box_xyxy_pixels=(left, top, left + width, top + height),
        category=category,
        box_id=box_id,
        area=area,
        crowd=bool(entry.get("iscrowd")),
    )
