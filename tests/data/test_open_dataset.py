import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import DataError, FileDataset, Sample, SyntheticDataset, check_images, open_dataset
from rtdetrv2_jax.data.synthetic import CLASS_NAMES

ALPHABETICAL = sorted(CLASS_NAMES)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    drawn = SyntheticDataset(12, seed=2, sizes=((48, 96), (80, 64)))
    return [drawn[index] for index in range(len(drawn))]


def save_images(samples: list[Sample], folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    for sample in samples:
        Image.fromarray(sample.read()).save(folder / f"{sample.image_id:02}.png")
    return [f"{sample.image_id:02}.png" for sample in samples]


def write_coco(samples: list[Sample], folder: Path) -> None:
    """Ids are sparse and begin at 1, labels in reverse, crowds left out, annotations not in the order of images."""
    files = save_images(samples, folder / "val2017")
    ids = {label: 90 - 7 * label for label in range(len(CLASS_NAMES))}
    annotations = [
        {
            "id": 1000 * int(sample.image_id) + number,
            "image_id": sample.image_id,
            "category_id": ids[label],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "iscrowd": 0,
        }
        for number in range(12)
        for sample in samples
        for label, box in list(zip(sample.labels.tolist(), sample.boxes_xyxy_pixels.tolist(), strict=True))[
            number : number + 1
        ]
    ]
    images = [
        {"id": sample.image_id, "file_name": file, "height": sample.size[0], "width": sample.size[1]}
        for sample, file in zip(samples, files, strict=True)
    ]
    categories = [{"id": ids[label], "name": name} for label, name in enumerate(CLASS_NAMES)]
    (folder / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def write_voc(samples: list[Sample], folder: Path) -> None:
    files = save_images(samples, folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("".join(f"{Path(file).stem}\n" for file in files))
    for sample, file in zip(samples, files, strict=True):
        root = ElementTree.Element("annotation")
        size = ElementTree.SubElement(root, "size")
        ElementTree.SubElement(size, "height").text, ElementTree.SubElement(size, "width").text = map(str, sample.size)
        for label, box in zip(sample.labels, sample.boxes_xyxy_pixels, strict=True):
            node = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(node, "name").text = CLASS_NAMES[label]
            corners = ElementTree.SubElement(node, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(corners, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / "Annotations" / f"{Path(file).stem}.xml")


def write_yolo(samples: list[Sample], folder: Path) -> None:
    save_images(samples, folder / "images" / "val")
    (folder / "labels" / "val").mkdir(parents=True)
    for sample in samples:
        height, width = sample.size
        lines = [
            f"{label} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height} {(x1 - x0) / width} {(y1 - y0) / height}\n"
            for label, (x0, y0, x1, y1) in zip(sample.labels.tolist(), sample.boxes_xyxy_pixels.tolist(), strict=True)
        ]
        (folder / "labels" / "val" / f"{sample.image_id:02}.txt").write_text("".join(lines))
    names = "".join(f"  {label}: {name}\n" for label, name in enumerate(CLASS_NAMES))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/val\nval: images/val\nnames:\n{names}")


Writer = Callable[[list[Sample], Path], None]
formats = pytest.mark.parametrize("write", [write_coco, write_voc, write_yolo])


@pytest.fixture
def folder(tmp_path: Path, write: Writer, samples: list[Sample]) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    write(samples, folder)
    return folder


def assert_same(dataset: FileDataset, samples: list[Sample]) -> None:
    """Names and not labels are compared, since the order of classes is the format's."""
    assert len(dataset) == len(samples)
    for found, expected in zip([dataset[index] for index in range(len(dataset))], samples, strict=True):
        assert found.size == expected.size
        assert int(Path(str(found.image_id)).stem) == expected.image_id
        np.testing.assert_allclose(found.boxes_xyxy_pixels, expected.boxes_xyxy_pixels, atol=1e-4)
        np.testing.assert_allclose(found.areas, expected.areas, rtol=1e-4)
        names = [dataset.class_names[label] for label in found.labels]
        assert names == [CLASS_NAMES[label] for label in expected.labels]
        assert len(found.crowd_labels) == 0
        np.testing.assert_array_equal(found.read(), expected.read())


@formats
def test_what_is_written_in_any_format_is_read_back(folder: Path, samples: list[Sample]):
    dataset = open_dataset(folder, split="val", on_bad_data="refuse")
    assert_same(dataset, samples)
    assert dataset.faults == ()
    assert sorted(dataset.class_names) == ALPHABETICAL
    assert check_images(dataset) == check_images(dataset, read="pixels") == ()


@formats
def test_given_class_names_decide_what_labels_mean(folder: Path, samples: list[Sample]):
    dataset = open_dataset(folder, split="val", classes=CLASS_NAMES, on_bad_data="refuse")
    assert_same(dataset, samples)
    assert dataset.class_names == CLASS_NAMES
    for index, expected in enumerate(samples):
        np.testing.assert_array_equal(dataset[index].labels, expected.labels)


@formats
def test_original_ids_do_not_depend_on_the_given_order_of_classes(folder: Path):
    own = open_dataset(folder, split="val")
    turned = open_dataset(folder, split="val", classes=("unheard of", *own.class_names[::-1]))
    assert turned.category_ids == (-1, *own.category_ids[::-1])


@formats
def test_objects_of_a_class_that_is_not_given_are_faults(folder: Path, samples: list[Sample]):
    dataset = open_dataset(folder, split="val", classes=[name for name in CLASS_NAMES if name != "fish"] + ["Fish"])
    fish = sum(int((sample.labels == CLASS_NAMES.index("fish")).sum()) for sample in samples)
    assert [fault.kind for fault in dataset.faults] == ["unknown class"] * fish
    assert fish > 0
    assert "'fish' is not a given class; is it 'Fish'?" in dataset.faults[0].what
    assert len(dataset) == len(samples)


@formats
def test_classes_of_which_none_is_there_are_refused(folder: Path):
    with pytest.raises(DataError, match=r"Given: cat, dog\. Found: .*circle"):
        open_dataset(folder, split="val", classes=("cat", "dog"))


@formats
def test_a_data_set_survives_the_way_to_a_worker(folder: Path, samples: list[Sample]):
    assert_same(pickle.loads(pickle.dumps(open_dataset(folder, split="val"))), samples)


@formats
def test_samples_can_be_had_in_any_order_and_iteration_ends(folder: Path, samples: list[Sample]):
    dataset = open_dataset(folder, split="val")
    assert [sample.image_id for sample in dataset] == [dataset[index].image_id for index in range(len(samples))]
    assert dataset[-1].image_id == dataset[np.int64(len(samples) - 1)].image_id
    with pytest.raises(IndexError):
        dataset[len(samples)]


@formats
def test_images_without_objects_stay_as_background(folder: Path, samples: list[Sample]):
    empty = sum(len(sample.labels) == 0 for sample in samples)
    assert empty > 0
    dataset = open_dataset(folder, split="val")
    assert sum(len(sample.labels) == 0 for sample in dataset) == empty
    assert f"{len(samples)} images, {empty} of them without objects" in dataset.summary()


@formats
@pytest.mark.parametrize("name", ["valid", "validation"])
def test_names_of_the_same_split_are_the_same(folder: Path, name: str, samples: list[Sample]):
    assert_same(open_dataset(folder, split=name), samples)


@formats
def test_an_image_that_is_not_there_is_left_out_and_named(folder: Path, write: Writer, samples: list[Sample]):
    next(folder.rglob("03.png")).unlink()
    dataset = open_dataset(folder, split="val")
    if write is not write_yolo:  # which takes the images that are there for the list of images
        assert [fault.kind for fault in dataset.faults] == ["missing image"]
        assert f"{'03.jpg' if write is write_voc else '03.png'} is not there" in dataset.faults[0].what
    assert_same(dataset, [sample for sample in samples if sample.image_id != 3])


@formats
def test_an_image_of_another_size_is_found_by_the_check_and_refused_when_read(folder: Path, write: Writer):
    dataset = open_dataset(folder, split="val")
    file = next(folder.rglob("02.png"))
    Image.fromarray(np.zeros((96, 48, 3), np.uint8)).save(file)
    (fault,) = check_images(dataset)
    assert (fault.kind, fault.file) == ("image of another size", str(file))
    assert "EXIF" in fault.what
    assert [found.kind for found in check_images(dataset, read="pixels")] == [fault.kind]
    with pytest.raises(DataError, match="48×96 pixels once upright, but its annotation says 96×48"):
        dataset[2].read()


def test_a_broken_image_is_found_by_the_check(tmp_path: Path, samples: list[Sample]):
    write_coco(samples, tmp_path)
    dataset = open_dataset(tmp_path, split="val")
    whole = (tmp_path / "val2017" / "01.png").read_bytes()
    (tmp_path / "val2017" / "00.png").write_bytes(b"no image")
    (tmp_path / "val2017" / "01.png").write_bytes(whole[: len(whole) // 2])
    assert [fault.id for fault in check_images(dataset)] == [0]
    assert [fault.id for fault in check_images(dataset, read="pixels")] == [0, 1]


def test_a_rotation_in_the_file_counts_for_the_size(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.25 1 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [thing]\n")
    sample = open_dataset(tmp_path)[0]
    assert sample.size == (40, 20) == sample.read().shape[:2]
    np.testing.assert_array_equal(sample.boxes_xyxy_pixels, [[0, 0, 20, 20]])


def test_a_split_that_is_not_there_is_an_error_that_tells_what_was_looked_for(tmp_path: Path, samples: list[Sample]):
    write_voc(samples, tmp_path)
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, split="test")
    for part in ("COCO: a JSON file", "YOLO: a YAML file", "Pascal VOC", "val.txt", "It has: Annotations"):
        assert part in str(caught.value)


def test_a_folder_that_is_not_there_is_an_error_with_a_suggestion(tmp_path: Path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(DataError, match=r"is it .*cells\?"):
        open_dataset(tmp_path / "cell")


def test_faults_are_logged(tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture):
    write_coco(samples, tmp_path)
    (tmp_path / "val2017" / "03.png").unlink()
    with caplog.at_level(logging.WARNING):
        open_dataset(tmp_path, split="val")
    assert "1  missing image (image left out)" in caplog.text
