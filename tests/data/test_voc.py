from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import DataError, check_images, open_dataset


def obj(name: str, *corners: object) -> str:
    box = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def write(folder: Path, objects: dict[str, str], *, splits: dict[str, str]) -> Path:
    """Images of 40 by 20 pixels."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, inside in objects.items():
        Image.new("RGB", (40, 20)).save(folder / "JPEGImages" / f"{stem}.jpg")
        size = "<size><width>40</width><height>20</height><depth>3</depth></size>"
        text = f"<annotation><filename>{stem}.jpg</filename>{size}{inside}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    for split, content in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(content)
    return folder


OBJECTS = {"a": obj("dog", 1, 2, 3, 4) + obj("cat", 5, 6, 7, 8), "b": obj("ant", 0, 0, 40, 20), "c": ""}
SPLITS = {"train": "a 1\nc -1\n\n", "val": "b\n"}


def test_splits_agree_on_classes_whichever_occur_in_them(tmp_path: Path):
    write(tmp_path, OBJECTS, splits=SPLITS)
    train, val = open_dataset(tmp_path), open_dataset(tmp_path, split="val")
    assert train.class_names == val.class_names == ("ant", "cat", "dog")
    np.testing.assert_array_equal(train[0].labels, [2, 1])
    np.testing.assert_array_equal(train[0].boxes_xyxy_pixels, [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert [sample.image_id for sample in train] == ["a", "c"]


def test_the_split_all_needs_no_list(tmp_path: Path):
    assert len(open_dataset(write(tmp_path, OBJECTS, splits={}), split="all")) == 3
    with pytest.raises(DataError, match='split="all" takes all'):
        open_dataset(tmp_path)


@pytest.mark.parametrize("inside", ["VOC2012", "VOCdevkit/VOC2007"])
def test_a_folder_inside_the_folder_is_found(tmp_path: Path, inside: str):
    write(tmp_path / inside, OBJECTS, splits=SPLITS)
    assert len(open_dataset(tmp_path)) == 2


def test_annotations_beside_their_images_in_a_folder_for_the_split_are_found(tmp_path: Path):
    write(tmp_path / "x", OBJECTS, splits={})
    (tmp_path / "train").mkdir()
    for file in (*(tmp_path / "x" / "Annotations").iterdir(), *(tmp_path / "x" / "JPEGImages").iterdir()):
        file.rename(tmp_path / "train" / file.name)
    assert len(open_dataset(tmp_path)) == 3


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("box of zero area", obj("cat", 5, 6, 5, 8)),
        ("box inverted", obj("cat", 7, 6, 5, 8)),
        ("box not finite", obj("cat", "nan", 6, 5, 8)),
        ("unreadable annotation", obj("cat", "left", 6, 5, 8)),
        ("missing field", obj("", 1, 2, 3, 4)),
        ("missing field", "<object><name>cat</name></object>"),
    ],
)
def test_a_bad_object_is_left_out_and_named_by_its_number(tmp_path: Path, kind: str, inside: str):
    write(tmp_path, OBJECTS | {"a": obj("dog", 1, 2, 3, 4) + inside}, splits=SPLITS)
    dataset = open_dataset(tmp_path)
    assert [(fault.kind, fault.id) for fault in dataset.faults] == [(kind, 2)]
    assert dataset.faults[0].file.endswith("a.xml")
    np.testing.assert_array_equal(dataset[0].boxes_xyxy_pixels, [[1, 2, 3, 4]])


def test_broken_and_missing_annotations_leave_the_image_out(tmp_path: Path):
    write(tmp_path, OBJECTS, splits={"train": "a\nb\nghost\n"})
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation>")
    dataset = open_dataset(tmp_path)
    assert [(fault.id, fault.kind) for fault in dataset.faults] == [
        ("b", "unreadable annotation"),
        ("ghost", "missing annotation"),
    ]
    assert len(dataset) == 1


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_is_missing_or_zero_is_read_from_the_image(tmp_path: Path, size: str):
    write(tmp_path, OBJECTS, splits=SPLITS)
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{size}{obj('cat', 1, 2, 3, 4)}</annotation>")
    dataset = open_dataset(tmp_path)
    assert dataset[0].size == (20, 40)
    assert [fault.kind for fault in dataset.faults] == ["no image size"]


def test_an_image_of_any_suffix_is_found_by_the_name_of_its_annotation(tmp_path: Path):
    write(tmp_path, OBJECTS, splits=SPLITS)
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "a.PNG")
    image = open_dataset(tmp_path)[0].image
    assert isinstance(image, Path)
    assert image.name == "a.PNG"


@pytest.mark.parametrize(
    ("split", "images", "name"), [("train", 205, "BloodImage_00343"), ("val", 87, "BloodImage_00338")]
)
def test_real_blood_cells_are_read_and_the_box_without_area_is_named(shared: Path, split: str, images: int, name: str):
    dataset = open_dataset(shared / "data" / "BCCD", split=split)
    assert len(dataset) == images
    assert dataset.class_names == ("Platelets", "RBC", "WBC")
    assert [(fault.kind, Path(fault.file).stem) for fault in dataset.faults] == [("box of zero area", name)]
    assert check_images(dataset) == ()
    for sample in dataset:
        assert (sample.boxes_xyxy_pixels[:, 2:] > sample.boxes_xyxy_pixels[:, :2]).all()
        assert sample.size == (480, 640)
