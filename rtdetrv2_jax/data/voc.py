"""Annotations in Pascal VOC's form: an XML file for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from rtdetrv2_jax.data.dataset import Classes
from rtdetrv2_jax.data.records import UNKNOWN_SIZE, Records
from rtdetrv2_jax.image import IMAGE_SUFFIXES

ALL = "all"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocSplit(NamedTuple):
    """Where a split is: its annotations, its images, and the list of its names (None: all of them)."""

    annotations: Path
    images: Path
    names: Path | None


def find_voc(folder: Path, *, split_names: Sequence[str]) -> tuple[VocSplit | None, str]:
    """Where a split is, and what was seen on the way to it.

    Either `Annotations`, `JPEGImages` (or `images`) and `ImageSets/Main/<split>.txt`, in the folder or in one inside
    it (as `VOCdevkit/VOC2012`), or a folder for the split, which has those two or XML files beside their images. The
    split "all" takes every annotation, listed or not.
    """
    roots = [folder, *sorted(place for place in folder.glob("VOC*") if place.is_dir())]
    roots += sorted(place for place in folder.glob("VOCdevkit/*") if place.is_dir())
    seen = []
    for root in roots:
        annotations, images = root / "Annotations", _images_beside(root)
        if not annotations.is_dir():
            seen.append(f"no {annotations}")
            continue
        if split_names == (ALL,):
            return VocSplit(annotations, images, None), str(annotations)
        lists = root / "ImageSets" / "Main"
        for name in split_names:
            if (lists / f"{name}.txt").is_file():
                return VocSplit(annotations, images, lists / f"{name}.txt"), str(lists / f"{name}.txt")
        found = ", ".join(sorted(file.name for file in lists.glob("*.txt"))) or "no list"
        seen.append(f'{annotations}, but in {lists} {found} (split="{ALL}" takes all without a list)')
    for place in (folder / name for name in split_names):
        if (place / "Annotations").is_dir():
            return VocSplit(place / "Annotations", _images_beside(place), None), str(place / "Annotations")
        if any(place.glob("*.xml")):
            return VocSplit(place, place, None), str(place)
        seen.append(f"no XML file in {place}" if place.is_dir() else f"no {place}")
    return None, "; ".join(seen)


def _images_beside(root: Path) -> Path:
    places = [root / name for name in ("JPEGImages", "images", "Images")]
    return next((place for place in places if place.is_dir()), places[0])


def read_voc(split: VocSplit) -> Records:
    """What the XML files of a split say.

    Coordinates are taken for the edges of boxes, as today's programs write them; VOC's own data counts pixels from 1
    to the last one, so that its boxes come out narrower by a pixel at the left and at the top. An object marked
    difficult is an object like others. The classes are those of all annotations in alphabetical order, whatever the
    split, so that all splits agree.
    """
    files = sorted(split.annotations.glob("*.xml"))
    if split.names is None:
        stems = [file.stem for file in files]
    else:
        stems = [line.split()[0] for line in split.names.read_text(encoding="utf-8").splitlines() if line.strip()]
    trees = {file.stem: _parse(file) for file in files}
    names = sorted(
        {
            name
            for tree in trees.values()
            if not isinstance(tree, str)
            for node in tree.iter("object")
            if (name := _text(node, "name"))
        }
    )
    records = Records(split.images, Classes(tuple(names), tuple(range(len(names)))))
    suffixes = _suffixes(split.images)
    positions = {name: position for position, name in enumerate(names)}
    for stem in dict.fromkeys(stems):
        tree, source = trees.get(stem), str(split.annotations / f"{stem}.xml")
        if tree is None:
            records.fault(source, stem, "missing annotation", f"{split.names} lists it, but there is no XML file")
        elif isinstance(tree, str):
            records.fault(source, stem, "unreadable annotation", tree)
        else:
            named = Path(_text(tree, "filename") or f"{stem}.jpg").name
            file = stem + suffixes[stem] if stem in suffixes else named
            row = records.add_image(file, image_id=stem, size=_size(tree), source=source)
            for number, node in enumerate(tree.findall("object"), start=1):
                if row is not None:
                    _add_object(records, node, row=row, number=number, source=source, positions=positions)
    return records


def _parse(file: Path) -> ElementTree.Element | str:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return f"no XML that can be read: {error}"


def _suffixes(folder: Path) -> dict[str, str]:
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.stem: file.suffix for file in files if file.suffix.lower() in IMAGE_SUFFIXES}


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _size(tree: ElementTree.Element) -> tuple[int, int]:
    try:
        return int(_text(tree, "size/height")), int(_text(tree, "size/width"))
    except ValueError:
        return UNKNOWN_SIZE


def _add_object(
    records: Records, node: ElementTree.Element, *, row: int, number: int, source: str, positions: dict[str, int]
) -> None:
    fields = {key: _text(node, key if key == "name" else f"bndbox/{key}") for key in ("name", *CORNERS)}
    missing = [key for key, text in fields.items() if not text]
    if missing:
        records.fault(source, number, "missing field", f"object without {', '.join(missing)}")
        return
    try:
        box = [float(fields[key]) for key in CORNERS]
    except ValueError:
        records.fault(source, number, "unreadable annotation", f"corners {[fields[key] for key in CORNERS]}")
        return
    records.add_box(row, box_xyxy_pixels=box, category=positions[fields["name"]], box_id=number)
