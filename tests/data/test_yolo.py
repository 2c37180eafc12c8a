from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import DataError, open_dataset

LABELS = {"a": "0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.2 0.2\n", "b": ""}


def write(folder: Path, yaml: str, *, labels: dict[str, str | None] | None = None, place: str = "images/train") -> Path:
    """Images of 40 by 20 pixels; None is an image without a label file."""
    images = folder / place
    texts = folder / place.replace("images", "labels")
    images.mkdir(parents=True)
    texts.mkdir(parents=True, exist_ok=True)
    for stem, text in (LABELS if labels is None else labels).items():
        Image.new("RGB", (40, 20)).save(images / f"{stem}.png")
        if text is not None:
            (texts / f"{stem}.txt").write_text(text)
    (folder / "data.yaml").write_text(yaml)
    return folder


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}"])
def test_names_may_be_a_list_or_a_map(tmp_path: Path, names: str):
    dataset = open_dataset(write(tmp_path, f"train: images/train\nnames: {names}\n"))
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_allclose(dataset[0].boxes_xyxy_pixels, [[10, 5, 30, 15], [0, 0, 8, 4]], atol=1e-5)
    np.testing.assert_array_equal(dataset[0].labels, [0, 1])
    assert len(dataset[1].labels) == 0
    assert dataset.faults == dataset.notices == ()


def test_numbers_with_gaps_become_labels_without_and_are_given_back(tmp_path: Path):
    dataset = open_dataset(
        write(tmp_path, "train: images/train\nnames: {0: cat, 4: dog}\n", labels={"a": "4 .5 .5 1 1"})
    )
    assert dataset.category_ids == (0, 4)
    np.testing.assert_array_equal(dataset[0].labels, [1])


@pytest.mark.parametrize(
    ("yaml", "place"),
    [
        ("path: .\ntrain: images/train", "images/train"),
        ("path: ../elsewhere\ntrain: images/train", "images/train"),
        ("train: ../train/images", "train/images"),
        ("train: [images/train]", "images/train"),
        ("train: together", "together"),
    ],
)
def test_the_usual_places_are_found(tmp_path: Path, yaml: str, place: str):
    folder = write(tmp_path / "set", f"{yaml}\nnames: [cat, dog]\n", place=place)
    assert len(open_dataset(folder)) == 2
    assert len(open_dataset(folder / "data.yaml")) == 2


def test_a_list_of_images_is_followed_and_what_it_misses_is_named(tmp_path: Path):
    write(tmp_path, "train: train.txt\nnames: [cat, dog]\n")
    (tmp_path / "train.txt").write_text("./images/train/a.png\n./images/train/ghost.png\n")
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 1
    assert [fault.kind for fault in dataset.faults] == ["missing image"]


def test_an_image_without_a_label_file_is_background_and_a_notice_counts_it(tmp_path: Path):
    dataset = open_dataset(write(tmp_path, "train: images/train\nnames: [cat, dog]\n", labels=LABELS | {"c": None}))
    assert len(dataset) == 3
    assert dataset.notices == ("1 images have no label file and are background",)


def test_a_polygon_counts_by_the_box_around_it(tmp_path: Path):
    write(tmp_path, "train: images/train\nnames: [cat]\n", labels={"a": "0 0.25 0.5 0.5 0.1 0.75 0.5 0.5 0.9"})
    np.testing.assert_allclose(open_dataset(tmp_path)[0].boxes_xyxy_pixels, [[10, 2, 30, 18]], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("unknown class", "7 0.5 0.5 0.5 0.5"),
        ("unknown class", "0.5 0.5 0.5 0.5 0.5"),
        ("unreadable annotation", "0 0.5 0.5 0.5"),
        ("unreadable annotation", "0 0.5 0.5 0.5 0.5 0.9"),
        ("unreadable annotation", "cat 0.5 0.5 0.5 0.5"),
        ("box not finite", "0 nan 0.5 0.5 0.5"),
        ("box outside the image", "0 60 50 10 10"),
        ("box inverted", "0 0.5 0.5 -0.5 0.5"),
        ("box of zero area", "0 0.5 0.5 0 0.5"),
    ],
)
def test_a_bad_line_is_left_out_and_named(tmp_path: Path, kind: str, line: str):
    write(tmp_path, "train: images/train\nnames: [cat, dog]\n", labels={"a": f"0 0.5 0.5 0.5 0.5\n{line}\n"})
    dataset = open_dataset(tmp_path)
    assert [(fault.kind, fault.id) for fault in dataset.faults] == [(kind, "line 2")]
    assert len(dataset[0].labels) == 1


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\nnames: 3\n", "names must be a list, or a map"),
        ("train: images/train\nnames: [cat, cat]\n", "names must differ"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3\n", "nc is 3, but there are 2 names"),
        ("train: nowhere\nnames: [cat]\n", "there is no .*nowhere"),
        ("train: labels\nnames: [cat]\n", "there is no image"),
        ("train: [\nnames: [cat]\n", "no YAML file that can be read"),
        ("val: images/train\nnames: [cat]\n", "data.yaml with val, names"),
    ],
)
def test_a_yaml_file_that_makes_no_sense_is_refused_with_the_reason(tmp_path: Path, yaml: str, message: str):
    with pytest.raises(DataError, match=message):
        open_dataset(write(tmp_path, yaml))


def test_a_split_without_any_label_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none of 1 images has a label file, such as .*labels.train.a\.txt"):
        open_dataset(write(tmp_path, "train: images/train\nnames: [cat]\n", labels={"a": None}))
