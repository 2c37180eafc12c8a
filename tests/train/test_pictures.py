import logging

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.data import Sample, SyntheticDataset
from rtdetrv2_jax.palette import class_colour
from train import pictures
from train.pictures import LEAST_PIXELS, MOST_IMAGES, MOST_PIXELS, WIDTH, save_predictions

SCENES = SyntheticDataset(20, sizes=((80, 120), (120, 80)))
NOTHING = (np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))


class Greys:
    """Grey images of some sizes, each with one object in its middle; a file in place of a size is read."""

    class_names = ("ant", "bee", "cat")
    category_ids = (0, 1, 2)

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index, /):
        image = self.images[index]
        size = image if isinstance(image, tuple) else (40, 40)
        height, width = size
        return Sample(
            image=np.full((*size, 3), 128, np.uint8) if image is size else image,
            image_id=index,
            size=size,
            boxes_xyxy_pixels=np.array([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], np.float32),
            labels=np.array([2], np.int32),
            areas=np.array([width * height / 4], np.float32),
            crowd_boxes_xyxy_pixels=np.zeros((0, 4), np.float32),
            crowd_labels=np.zeros(0, np.int32),
        )


def found(*detections):
    """Detections from (score, label, box)."""
    scores, labels, boxes = zip(*detections, strict=True)
    return np.array(scores, np.float32), np.array(labels, np.int32), np.array(boxes, np.float32)


def read(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def where(picture, label):
    """The columns and rows of a class's colour: left, right, top and bottom."""
    rows, columns = np.nonzero((picture == class_colour(label)).all(axis=2))
    return (columns.min(), columns.max(), rows.min(), rows.max()) if len(rows) else None


def test_truth_is_at_left_and_what_was_found_at_right(tmp_path):
    detections = found((0.9, 0, (20, 20, 60, 40)), (0.39, 1, (5, 5, 30, 30)))
    save_predictions(tmp_path / "all.png", Greys((60, 80)), [0], [detections])
    picture = read(tmp_path / "all.png")
    middle = picture.shape[1] / 2
    truth, seen = where(picture, 2), where(picture, 0)
    assert truth[1] < middle < seen[0]
    assert where(picture, 1) is None
    assert truth[0] == pytest.approx(MOST_PIXELS / 4, abs=15)
    assert seen[0] - middle == pytest.approx(MOST_PIXELS / 4, abs=15)


def test_the_threshold_decides_what_is_found(tmp_path):
    detections = found((0.9, 0, (20, 20, 60, 40)), (0.2, 1, (5, 5, 30, 30)))
    save_predictions(tmp_path / "low.png", Greys((60, 80)), [0], [detections], threshold=0.2)
    save_predictions(tmp_path / "high.png", Greys((60, 80)), [0], [detections], threshold=0.95)
    assert where(read(tmp_path / "low.png"), 0)
    assert where(read(tmp_path / "low.png"), 1)
    assert where(read(tmp_path / "high.png"), 0) is None


def test_images_are_brought_to_one_width_whatever_their_size(tmp_path):
    sizes = [(30, 40), (3000, 4000)]
    for number, size in enumerate(sizes):
        save_predictions(tmp_path / f"{number}.png", Greys(size), [0], [NOTHING])
    small, large = (read(tmp_path / f"{number}.png") for number in range(2))
    assert small.shape == large.shape
    assert np.abs(np.subtract(where(small, 2), where(large, 2))).max() <= 2


@pytest.mark.parametrize("count", [1, 2, 5, 9, 20])
def test_a_picture_is_never_wider_than_a_screen_or_two(tmp_path, count):
    save_predictions(tmp_path / "all.jpg", SCENES, range(count), [NOTHING] * count)
    height, width, _ = read(tmp_path / "all.jpg").shape
    assert 2 * LEAST_PIXELS < width < 1.1 * WIDTH
    assert height < WIDTH
    assert [path.name for path in tmp_path.iterdir()] == ["all.jpg"]


def test_no_more_images_are_shown_than_can_be_told_apart(tmp_path):
    save_predictions(tmp_path / "some.png", SCENES, range(MOST_IMAGES), [NOTHING] * MOST_IMAGES)
    save_predictions(tmp_path / "all.png", SCENES, range(20), [NOTHING] * 20)
    np.testing.assert_array_equal(read(tmp_path / "some.png"), read(tmp_path / "all.png"))


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 3)])
def test_images_of_any_shape_have_a_place(tmp_path, size):
    save_predictions(tmp_path / "all.png", Greys(size, (60, 80)), [0, 1], [NOTHING] * 2)
    assert (read(tmp_path / "all.png") == 128).all(axis=2).any()


def test_an_image_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with caplog.at_level(logging.WARNING):
        save_predictions(tmp_path / "all.png", Greys(broken, (60, 80)), [0, 1], [NOTHING] * 2)
        save_predictions(tmp_path / "one.png", Greys((60, 80), (60, 80)), [1], [NOTHING])
        save_predictions(tmp_path / "none.png", Greys(broken), [0], [NOTHING])
    assert caplog.text.count("broken.png") == 2
    assert where(read(tmp_path / "all.png"), 2)
    assert not (tmp_path / "none.png").exists()


def test_a_picture_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "all.png"
    save_predictions(file, SCENES, [0], [NOTHING])
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_predictions(file, SCENES, [1], [NOTHING])
    assert file.read_bytes() == before


def test_captions_name_files_in_letters_that_can_be_written(tmp_path):
    sample = SCENES[3]
    assert pictures._name(sample, position=3) == f"image {sample.image_id}"
    assert pictures._name(sample._replace(image=tmp_path / "street.jpg"), position=3) == "street.jpg"
    assert pictures._name(sample._replace(image=tmp_path / "自転車.jpg"), position=3) == "#3"


def test_lists_of_different_lengths_are_an_error_that_counts_them(tmp_path):
    with pytest.raises(ValueError, match="2 images, got that of 1"):
        save_predictions(tmp_path / "all.png", SCENES, [0, 1], [NOTHING])
