import math
import pickle

import numpy as np
import pytest

from rtdetrv2_jax.data import SyntheticDataset
from rtdetrv2_jax.data.dice import Dice
from rtdetrv2_jax.data.synthetic import CLASS_NAMES, HALF, LEAST_SIDE, LEAST_VISIBLE, compose, scene
from rtdetrv2_jax.data.synthetic_shapes import coverage

SCENES = range(40)
SIZE = (120, 160)
EXPECTED_BITS = 8271799387826207682
EXPECTED_INTEGERS = [43, 41, 27, 82, 4, 9]
EXPECTED_BYTES = [[29, 44, 97], [83, 64, 219]]
EXPECTED_NAMES = ["triangle", "fish", "fish", "star", "star"]
EXPECTED_BOXES = [[0.0, 59.0, 56.0, 131.0], [61.0, 52.0, 117.0, 108.0], [49.0, 1.0, 93.0, 35.0]]
EXPECTED_MEAN = [135.14, 130.25, 115.98]


def test_a_scene_is_the_same_whatever_was_drawn_before():
    forwards = [scene(3, index, size=SIZE) for index in range(6)]
    backwards = [scene(3, index, size=SIZE) for index in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        for part, other_part in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, other_part)


def test_scenes_of_other_numbers_and_seeds_differ():
    images = [scene(seed, index, size=SIZE).image.tobytes() for seed in range(3) for index in range(3)]
    assert len(set(images)) == 9


@pytest.mark.parametrize("index", SCENES)
def test_every_side_of_a_box_touches_the_object_and_nothing_of_it_is_beyond(index: int):
    _, objects = compose(Dice(0, index), size=SIZE)
    _, boxes, labels = scene(0, index, size=SIZE)
    assert labels.tolist() == [placed.label for placed in objects]
    for placed, box in zip(objects, boxes, strict=True):
        owned = np.zeros(SIZE, np.bool_)
        height, width = placed.visible.shape
        owned[placed.top : placed.top + height, placed.left : placed.left + width] = placed.visible >= HALF
        left, top, right, bottom = box.astype(int)
        inside = owned[top:bottom, left:right]
        assert inside.sum() == owned.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


@pytest.mark.parametrize("index", SCENES)
def test_every_object_can_be_recognised_and_no_pixel_has_two(index: int):
    image, boxes, _ = scene(0, index, size=SIZE)
    _, objects = compose(Dice(0, index), size=SIZE)
    assert image.shape == (*SIZE, 3)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (SIZE[1], SIZE[0])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all()
    total = np.zeros(SIZE, np.int64)
    for placed in objects:
        height, width = placed.visible.shape
        total[placed.top : placed.top + height, placed.left : placed.left + width] += placed.visible
        assert placed.visible.sum() >= LEAST_VISIBLE * placed.whole
    assert total.max(initial=0) <= 255 + len(objects)  # a level of rounding for each object


def test_an_object_differs_from_what_is_around_it():
    """The mean colour inside the object's pixels, against that of the rest of its box."""
    differences = []
    for index in SCENES:
        image, objects = compose(Dice(1, index), size=SIZE)
        for placed in objects:
            height, width = placed.visible.shape
            region = image[placed.top : placed.top + height, placed.left : placed.left + width].astype(float)
            own, rest = placed.visible >= HALF, placed.visible < HALF
            if rest.any():
                differences.append(np.abs(region[own].mean(axis=0) - region[rest].mean(axis=0)).max())
    assert np.median(differences) > 50
    assert np.quantile(differences, 0.1) > 15


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4])
@pytest.mark.parametrize("radius", [7.0, 20.3, 64.0])
def test_shapes_cover_what_geometry_says(radius: float, angle: float):
    circle = np.asarray(coverage("circle", radius=radius, aspect=1.0, angle=angle)) / 255
    ring = np.asarray(coverage("ring", radius=radius, aspect=1.0, angle=angle)) / 255
    square = np.asarray(coverage("square", radius=radius, aspect=1.25, angle=angle)) / 255
    assert circle.sum() == pytest.approx(math.pi * radius**2, rel=0.35 / radius + 0.005)
    assert ring.sum() == pytest.approx(math.pi * radius**2 * (1 - 0.56**2), rel=0.7 / radius + 0.005)
    assert square.sum() == pytest.approx((1.6 * radius) ** 2, rel=0.6 / radius + 0.005)
    for extent in ((circle >= 0.5).any(axis=0).sum(), (circle >= 0.5).any(axis=1).sum()):
        assert extent == pytest.approx(2 * radius, abs=1.5)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_no_shape_is_cut_off_by_its_own_image(name: str):
    for turn in range(8):
        mask = np.asarray(coverage(name, radius=31.7, aspect=1.2, angle=turn * 0.8))
        assert mask.max() == 255
        assert mask[:, -1].max() < 255
        assert mask[-1].max() < 255


def test_there_are_scenes_with_none_and_with_many_objects_of_all_classes_and_sizes():
    dataset = SyntheticDataset(150, sizes=(SIZE,))
    samples = [dataset[index] for index in range(len(dataset))]
    counts = [len(sample.labels) for sample in samples]
    assert min(counts) == 0
    assert 10 <= max(counts) <= 12
    assert set(np.concatenate([sample.labels for sample in samples])) == set(range(len(CLASS_NAMES)))
    diameters = np.sqrt(np.concatenate([sample.areas for sample in samples]))
    assert diameters.min() < 0.12 * min(SIZE)
    assert diameters.max() > 0.5 * min(SIZE)


def test_the_data_set_gives_the_scenes_at_its_sizes_in_turn():
    dataset = SyntheticDataset(4, seed=2, sizes=((64, 96), (80, 48)))
    assert dataset.class_names == CLASS_NAMES
    assert len(dataset) == len(dataset.category_ids) - 6 == 4
    for index in range(4):
        sample = dataset[index]
        image, boxes, labels = scene(2, index, size=((64, 96), (80, 48))[index % 2])
        assert (sample.image_id, sample.size) == (index, image.shape[:2])
        np.testing.assert_array_equal(sample.read(), image)
        np.testing.assert_array_equal(sample.boxes_xyxy_pixels, boxes)
        np.testing.assert_array_equal(sample.labels, labels)
    assert dataset[-1].image_id == 3
    with pytest.raises(IndexError):
        dataset[4]


def test_a_sample_survives_the_way_between_processes():
    sample = pickle.loads(pickle.dumps(SyntheticDataset(2)))[1]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(sample)).read(), sample.read())


def test_dice_fall_as_they_always_did():
    """The numbers of this machine must be those of any other."""
    dice = Dice(1, 2)
    assert dice.bits.random_raw() == EXPECTED_BITS
    assert [dice.integer(0, 99) for _ in range(6)] == EXPECTED_INTEGERS
    assert dice.bytes(2, 3).tolist() == EXPECTED_BYTES


def test_a_scene_is_what_it_was_on_the_machine_where_this_was_written():
    image, boxes, labels = scene(0, 2)
    assert [CLASS_NAMES[label] for label in labels] == EXPECTED_NAMES
    np.testing.assert_allclose(boxes[:3], EXPECTED_BOXES, atol=1)
    np.testing.assert_allclose(image.mean(axis=(0, 1)), EXPECTED_MEAN, atol=0.5)
