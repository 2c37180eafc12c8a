import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import DataError, check_images, fault_table, open_dataset


def annotation(number: int, bbox: Any, **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 7, "category_id": 1, "bbox": bbox, "area": 5, "iscrowd": 0} | fields


def write(
    folder: Path,
    annotations: list[Any],
    *,
    images: list[Any] | None = None,
    categories: list[Any] | None = None,
    name: str = "train.json",
) -> Path:
    """A file about one image of 40 by 20 pixels, or about what is given."""
    folder.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (40, 20)).save(folder / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 40}] if images is None else images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}] if categories is None else categories,
    }
    (folder / name).write_text(json.dumps(content))
    return folder


GOOD = annotation(1, [1, 2, 3, 4])

FAULTS: dict[str, tuple[str, Any]] = {
    "nan": ("box not finite", annotation(2, [math.nan, 2, 3, 4])),
    "infinite": ("box not finite", annotation(2, [1, 2, math.inf, 4])),
    "beyond float32": ("box not finite", annotation(2, [1, 2, 1e300, 4])),
    "inverted": ("box inverted", annotation(2, [10, 2, -3, 4])),
    "flat": ("box of zero area", annotation(2, [1, 2, 3, 0])),
    "outside": ("box outside the image", annotation(2, [45, 2, 3, 4])),
    "above": ("box outside the image", annotation(2, [1, -10, 3, 10])),
    "class": ("unknown class", annotation(2, [1, 2, 3, 4], category_id=2)),
    "image": ("unknown image", annotation(2, [1, 2, 3, 4], image_id=8)),
    "no box": ("missing field", annotation(2, None)),
    "id": ("missing field", annotation(2, [1, 2, 3, 4], image_id=[7])),
    "no object": ("missing field", "nonsense"),
    "three numbers": ("unreadable annotation", annotation(2, [1, 2, 3])),
    "text": ("unreadable annotation", annotation(2, [1, 2, 3, "wide"])),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_annotation_is_left_out_named_and_refused_if_so_wished(tmp_path: Path, case: str):
    kind, bad = FAULTS[case]
    write(tmp_path, [GOOD, bad, annotation(3, [5, 6, 7, 8])])
    dataset = open_dataset(tmp_path)
    assert [fault.kind for fault in dataset.faults] == [kind]
    assert dataset.faults[0].file == str(tmp_path / "train.json")
    np.testing.assert_array_equal(dataset[0].boxes_xyxy_pixels, [[1, 2, 4, 6], [5, 6, 12, 14]])
    with pytest.raises(DataError, match=kind):
        open_dataset(tmp_path, on_bad_data="refuse")


def test_all_faults_are_told_at_once(tmp_path: Path):
    write(tmp_path, [GOOD, *(bad for _, bad in FAULTS.values())])
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, on_bad_data="refuse")
    for kind, count in Counter(kind for kind, _ in FAULTS.values()).items():
        assert f"{count}  {kind} (left out)" in str(caught.value)


def test_a_table_of_faults_counts_all_and_shows_some(tmp_path: Path):
    faults = open_dataset(write(tmp_path, [GOOD] + [annotation(n, [1, 2, 0, 3]) for n in range(20, 30)])).faults
    table = fault_table(faults, examples=1)
    assert "10  box of zero area (left out)" in table
    assert "20: [1, 2, 1, 5] in a.png (40×20)" in table
    assert len(table.splitlines()) == 2


def test_a_box_partly_outside_is_clipped_and_counted_unless_by_a_pixel_only(tmp_path: Path):
    dataset = open_dataset(write(tmp_path, [annotation(1, [-0.5, 0, 41, 20.5]), annotation(2, [30, 10, 20, 5])]))
    np.testing.assert_array_equal(dataset[0].boxes_xyxy_pixels, [[0, 0, 40, 20], [30, 10, 40, 15]])
    assert [(fault.id, fault.kind) for fault in dataset.faults] == [(2, "box partly outside the image")]


def test_crowds_are_kept_apart(tmp_path: Path):
    sample = open_dataset(write(tmp_path, [annotation(1, [1, 2, 3, 4], iscrowd=1, category_id=3), GOOD]))[0]
    np.testing.assert_array_equal(sample.boxes_xyxy_pixels, [[1, 2, 4, 6]])
    np.testing.assert_array_equal(sample.labels, [0])
    np.testing.assert_array_equal(sample.crowd_labels, [1])
    np.testing.assert_array_equal(sample.crowd_boxes_xyxy_pixels, [[1, 2, 4, 6]])


def test_an_area_is_the_annotations_or_else_the_boxes(tmp_path: Path):
    sample = open_dataset(write(tmp_path, [GOOD, annotation(2, [1, 2, 3, 4], area=None)]))[0]
    np.testing.assert_array_equal(sample.areas, [5, 12])


def test_a_category_that_only_groups_others_is_no_class_and_a_notice_says_so(tmp_path: Path):
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "unseen", "supercategory": "animals"},
    ]
    dataset = open_dataset(write(tmp_path / "a", [GOOD], categories=categories))
    assert (dataset.class_names, dataset.category_ids) == (("cat", "unseen"), (1, 2))
    assert "'animals'" in dataset.notices[0]
    assert "classes without an object: unseen" in dataset.summary()
    used = open_dataset(
        write(tmp_path / "b", [GOOD, annotation(2, [1, 2, 3, 4], category_id=0)], categories=categories)
    )
    assert used.class_names == ("animals", "cat", "unseen")


def test_an_image_with_the_id_of_another_is_left_out(tmp_path: Path):
    entry = {"id": 7, "file_name": "a.png", "height": 20, "width": 40}
    dataset = open_dataset(write(tmp_path, [GOOD], images=[entry, entry]))
    assert len(dataset) == 1
    assert [fault.kind for fault in dataset.faults] == ["duplicate image id"]


def test_a_size_that_is_not_given_is_read_from_the_image(tmp_path: Path):
    dataset = open_dataset(write(tmp_path, [GOOD], images=[{"id": 7, "file_name": "a.png"}]))
    assert dataset[0].size == (20, 40)
    assert [fault.kind for fault in dataset.faults] == ["no image size"]


def test_an_image_of_unknown_size_that_cannot_be_read_is_left_out_with_its_boxes(tmp_path: Path):
    images = [{"id": 7, "file_name": "bad.png"}, {"id": 8, "file_name": "a.png", "height": 20, "width": 40}]
    write(tmp_path, [GOOD, annotation(2, [5, 6, 7, 8], image_id=8)], images=images)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    dataset = open_dataset(tmp_path)
    assert [sample.image_id for sample in dataset] == [8]
    np.testing.assert_array_equal(dataset[0].boxes_xyxy_pixels, [[5, 6, 12, 14]])
    assert [fault.kind for fault in dataset.faults] == ["unreadable image"]


def test_image_entries_without_a_name_are_faults(tmp_path: Path):
    images = [{"id": 7, "file_name": "a.png", "height": 20, "width": 40}, {"id": 8}, 9]
    assert [fault.kind for fault in open_dataset(write(tmp_path, [GOOD], images=images)).faults] == [
        "missing field"
    ] * 2


def test_text_ids_are_given_back(tmp_path: Path):
    images = [{"id": "seven", "file_name": "a.png", "height": 20, "width": 40}]
    sample = open_dataset(write(tmp_path, [annotation(1, [1, 2, 3, 4], image_id="seven")], images=images))[0]
    assert sample.image_id == "seven"
    assert len(sample.labels) == 1


@pytest.mark.parametrize(
    "name", ["a/train/_annotations.coco.json", "annotations/train.json", "instances_train2019.json"]
)
def test_the_usual_places_are_found(tmp_path: Path, name: str):
    file = tmp_path / name
    write(file.parent, [GOOD], name=file.name)
    root = tmp_path / "a" if name.startswith("a/") else tmp_path
    assert len(open_dataset(root)) == 1
    assert len(open_dataset(file, split="whatever")) == 1


def test_files_for_other_tasks_are_passed_over(tmp_path: Path):
    write(tmp_path, [GOOD], name="instances_train.json")
    for name in ("captions_train.json", "person_keypoints_train.json", "instances_val.json"):
        (tmp_path / name).write_text("{}")
    assert len(open_dataset(tmp_path)) == 1


def test_two_files_that_fit_are_an_error_that_names_both(tmp_path: Path):
    write(tmp_path, [GOOD], name="instances_train2014.json")
    write(tmp_path, [GOOD], name="instances_train2017.json")
    with pytest.raises(DataError, match=r"train2014.*train2017.*Give the path of one"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, split="train2017")) == 1


def test_files_that_are_not_cocos_are_refused_with_the_reason(tmp_path: Path):
    file = tmp_path / "train.json"
    file.write_text("{")
    with pytest.raises(DataError, match="no JSON file that can be read"):
        open_dataset(tmp_path)
    file.write_text('{"images": []}')
    with pytest.raises(DataError, match="without annotations, categories"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"no image of it is there.*Looked in"):
        open_dataset(write(tmp_path, [GOOD], images=[{"id": 1, "file_name": "nowhere.png"}]))
    with pytest.raises(DataError, match="several categories have the name cat"):
        open_dataset(write(tmp_path, [GOOD], categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]))


def test_real_coco_has_eighty_classes_without_a_gap(shared: Path):
    val = open_dataset(shared / "data" / "coco", split="val", on_bad_data="refuse")
    train = open_dataset(shared / "data" / "coco", split="train", on_bad_data="refuse")
    content = json.loads((shared / "data" / "coco" / "annotations" / "instances_val2017.json").read_text())
    assert (len(val), len(train)) == (103, 120)
    assert val.class_names == train.class_names
    assert val.category_ids == tuple(sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
    assert len(val.labels) == len(content["annotations"])
    assert val.crowd.sum() == sum(entry["iscrowd"] for entry in content["annotations"]) == 12
    assert Counter(val.category_ids[label] for label in val.labels) == Counter(
        entry["category_id"] for entry in content["annotations"]
    )
    assert [sample.image_id for sample in val] == [entry["id"] for entry in content["images"]]
    assert check_images(val) == ()
