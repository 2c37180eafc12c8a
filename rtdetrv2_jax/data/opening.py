"""Opens a data set by looking at what is there."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rtdetrv2_jax.data.coco import find_coco, read_coco
from rtdetrv2_jax.data.dataset import FileDataset
from rtdetrv2_jax.data.faults import DataError
from rtdetrv2_jax.data.records import Records
from rtdetrv2_jax.data.voc import find_voc, read_voc
from rtdetrv2_jax.data.yolo import find_yolo, read_yolo

SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
"""Names of one and the same split."""


def open_dataset(
    path: str | Path,
    *,
    split: str = "train",
    classes: Sequence[str] | None = None,
    on_bad_data: Literal["skip", "refuse"] = "skip",
) -> FileDataset:
    """One split of a data set in COCO's, YOLO's or Pascal VOC's form, whichever is found, in this order.

    Labels index classes without a gap whatever the original ids are; `category_ids` gives those back. Images without
    objects stay, as background. Faulty annotations are left out or repaired, counted in `faults`, and logged.

    Args:
        path: the folder of the data set; or its COCO JSON file, which is a split by itself; or its YOLO YAML file.
        split: "train", "val" ("valid"), "test", or any name that the data set has. "all" takes everything of a VOC
            folder.
        classes: the names that labels shall index. Open a validation set with `classes=train.class_names`: objects
            of any other class are faults then, and the same label means the same in both.
        on_bad_data: "skip" goes on without what is at fault, "refuse" raises an error that lists it.

    Raises:
        DataError: nothing is found, which the message explains; the data set contradicts itself; or it has faults
            that are to be refused.
    """
    path = Path(path).expanduser()
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = (
            f"is it {path.parent / close[0]}?" if close else "give the folder of a data set, or its JSON or YAML file."
        )
        raise DataError(f"{path} does not exist: {hint}")
    return _read(path, split=split).build(classes=classes, on_bad_data=on_bad_data)


def _read(path: Path, *, split: str) -> Records:
    if path.suffix.lower() == ".json":
        return read_coco(path)
    split_names = next((names for names in SPLIT_NAMES if split in names), (split,))
    split_names = tuple(dict.fromkeys((split, *split_names)))
    coco, coco_seen = find_coco(path, split_names=split_names)
    if coco:
        return read_coco(coco)
    yolo, yolo_seen = find_yolo(path, split_names=split_names)
    if yolo:
        return read_yolo(yolo)
    voc, voc_seen = find_voc(path, split_names=split_names)
    if voc:
        return read_voc(voc)
    content = sorted(entry.name for entry in path.iterdir())[:20] if path.is_dir() else ["not a folder"]
    raise DataError(
        f"{path} has no split {' or '.join(map(repr, split_names))} that could be found. Looked for\n"
        f"  COCO: {coco_seen}\n  YOLO: {yolo_seen}\n  Pascal VOC: {voc_seen}\n"
        f"It has: {', '.join(content)}. Give another split, or the path of the JSON or YAML file itself."
    )
