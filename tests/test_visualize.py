import inspect
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax.palette import class_colour, ink_on
from rtdetrv2_jax.visualize import (
    draw_detections,
    frame_of,
    is_visible,
    load_font,
    place_tags,
    text_size,
    writable,
)

NAMES = ("person", "traffic light", "tv", "baseball glove", "hot dog", "kite")
SIZES = [(480, 640), (80, 100), (1080, 1920), (30, 400), (400, 30), (1, 1), (12, 700)]


def photo(height=480, width=640):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(count, height=480, width=640, seed=0):
    """Boxes of all sizes, some partly outside."""
    random = np.random.default_rng(seed)
    centres = random.uniform(-0.05, 1.05, (count, 2)) * (width, height)
    sizes = random.uniform(0, 0.4, (count, 2)) ** 2 * 2.5 * (width, height)
    labels = random.integers(0, len(NAMES), count)
    return {
        "boxes_xyxy_pixels": np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1),
        "labels": labels,
        "names": [NAMES[label] for label in labels],
        "scores": random.permutation(np.linspace(0.3, 0.99, count)),
    }


def one(box, label=0, name="person", score=0.5):
    boxes = np.array([box], np.float32)
    return {"boxes_xyxy_pixels": boxes, "labels": np.array([label]), "names": [name], "scores": np.array([score])}


def places(boxes, names, height, width):
    """The frames of boxes, best first, and the tags at them."""
    font = load_font(text_size(height, width))
    frames = [frame_of(box, height=height, width=width) for box in boxes if is_visible(box, height=height, width=width)]
    return frames, place_tags(names[: len(frames)], frames, font=font, height=height, width=width)


# Laws


def test_no_detection_changes_nothing():
    image = photo()
    drawn = draw_detections(image, **detections(0))
    np.testing.assert_array_equal(drawn, image)
    assert not np.shares_memory(drawn, image)


def test_the_image_given_is_left_as_it_was():
    image = photo()
    draw_detections(image, **detections(20))
    np.testing.assert_array_equal(image, photo())


def test_the_order_of_detections_changes_nothing():
    given = detections(30)
    order = np.random.default_rng(1).permutation(30)
    shuffled = {
        name: [values[i] for i in order] if name == "names" else values[order] for name, values in given.items()
    }
    np.testing.assert_array_equal(draw_detections(photo(), **given), draw_detections(photo(), **shuffled))


def test_arrays_of_the_device_draw_the_same():
    given = detections(5)
    given["scores"] = given["scores"].astype(np.float32)
    given["boxes_xyxy_pixels"] = given["boxes_xyxy_pixels"].astype(np.float32)
    on_device = {name: values if name == "names" else jnp.asarray(values) for name, values in given.items()}
    np.testing.assert_array_equal(draw_detections(photo(), **given), draw_detections(photo(), **on_device))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("count", [1, 4, 40])
def test_only_frames_tags_and_the_lines_between_them_are_drawn(height, width, count):
    given = detections(count, height, width)
    order = np.argsort(-given["scores"])
    boxes = [given["boxes_xyxy_pixels"][index] for index in order]
    names = [
        f"{given['names'][index]} {given['scores'][index]:.2f}"
        for index in order
        if is_visible(given["boxes_xyxy_pixels"][index], height=height, width=width)
    ]
    frames, tags = places(boxes, names, height, width)
    allowed = np.zeros((height, width), bool)
    for frame, tag in zip(frames, tags, strict=True):
        band = frame.line + 2 * frame.edge
        allowed[frame.top : frame.bottom, frame.left : frame.left + band] = True
        allowed[frame.top : frame.bottom, max(0, frame.right - band) : frame.right] = True
        allowed[frame.top : frame.top + band, frame.left : frame.right] = True
        allowed[max(0, frame.bottom - band) : frame.bottom, frame.left : frame.right] = True
        if tag is not None:
            allowed[tag.top : tag.bottom, tag.left : tag.right] = True
            if not touches(tag, frame):
                left, top = min(tag.left, frame.left) - band, min(tag.top, frame.top) - band
                right, bottom = max(tag.right, frame.right) + band, max(tag.bottom, frame.bottom) + band
                allowed[max(0, top) : bottom, max(0, left) : right] = True
    drawn = draw_detections(photo(height, width), **given)
    np.testing.assert_array_equal(drawn[~allowed], photo(height, width)[~allowed])
    assert (drawn != photo(height, width)).any() == bool(frames)


def touches(tag, frame):
    return not (tag.left > frame.right or frame.left > tag.right or tag.top > frame.bottom or frame.top > tag.bottom)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_frames_and_tags_stay_inside_the_image(height, width):
    for seed in range(5):
        boxes = detections(30, height, width, seed)["boxes_xyxy_pixels"]
        frames, tags = places(boxes, ["traffic light 0.87"] * 30, height, width)
        for part in [*frames, *(tag for tag in tags if tag is not None)]:
            assert 0 <= part.left < part.right <= width
            assert 0 <= part.top < part.bottom <= height


@pytest.mark.parametrize("count", [10, 40, 200])
def test_no_name_is_written_on_another_and_the_best_ones_are_written(count):
    boxes = detections(count)["boxes_xyxy_pixels"]
    frames, tags = places(boxes, ["handbag 0.87"] * count, 480, 640)
    written = [tag for tag in tags if tag is not None]
    for first, later in itertools.combinations(written, 2):
        wide = min(first.right, later.right) - max(first.left, later.left)
        tall = min(first.bottom, later.bottom) - max(first.top, later.top)
        area = (later.right - later.left) * (later.bottom - later.top)
        assert max(wide, 0) * max(tall, 0) <= 0.08 * area
    assert None not in tags[:10]
    assert len(frames) == len(tags)
    assert sum((tag.right - tag.left) * (tag.bottom - tag.top) for tag in written) <= 480 * 640 / 2


@pytest.mark.parametrize("label", range(0, 128, 9))
def test_a_tag_shows_its_name_in_ink_on_the_colour_of_its_class(label):
    box = (100, 100, 300, 200)
    drawn = draw_detections(photo(), **one(box, label=label, name="HHHH"))
    _, (tag,) = places(np.array([box], float), ["HHHH 0.50"], 480, 640)
    pixels = drawn[tag.top : tag.bottom, tag.left : tag.right].reshape(-1, 3).astype(float)
    ground, ink = np.array(class_colour(label), float), np.array(ink_on(class_colour(label)), float)
    share = (pixels - ground) @ (ink - ground) / ((ink - ground) @ (ink - ground))
    np.testing.assert_allclose(pixels, ground + share[:, None] * (ink - ground), atol=2)
    inner = drawn[tag.top + 1 : tag.bottom - 1, tag.left + 1 : tag.right - 1]
    assert 20 < (inner == ink).all(axis=2).sum() < (inner == ground).all(axis=2).sum()


@pytest.mark.parametrize("level", range(0, 256, 17))
def test_a_frame_stands_out_from_every_grey(level):
    image = np.full((100, 100, 3), level, np.uint8)
    for label in range(40):
        drawn = draw_detections(image, **one((20, 40, 80, 80), label=label))
        assert np.abs(drawn[75:, 45].astype(float) - level).max() > 80


# Places


def test_a_tag_stands_on_its_box_at_the_left_or_inside_where_there_is_no_room_above():
    boxes = np.array([(100, 100, 300, 200), (330, 2, 600, 300)], float)
    (low, high), (above, inside) = places(boxes, ["a", "b"], 480, 640)
    assert (above.left, above.bottom) == (low.left, low.top)
    assert (inside.left, inside.top) == (high.left, 0)
    assert high.top == 0


def test_tags_of_one_place_move_apart():
    _, tags = places(np.full((12, 4), (300, 200, 320, 230), float), ["person 0.87"] * 12, 480, 640)
    assert None not in tags
    assert len({tag[:4] for tag in tags}) == 12


def test_a_box_partly_outside_is_drawn_like_its_part_inside():
    outside = draw_detections(photo(), **one((-1e9, -30, 200, 1e30)))
    np.testing.assert_array_equal(outside, draw_detections(photo(), **one((0, 0, 200, 480))))


@pytest.mark.parametrize(
    "box", [(650, 10, 700, 50), (-50, 10, -1, 50), (np.nan, 10, 50, 50), (10, 10, np.inf, 50), (50, 10, 10, 50)]
)
def test_a_box_that_cannot_be_seen_is_left_out(box):
    np.testing.assert_array_equal(draw_detections(photo(), **one(box)), photo())


@pytest.mark.parametrize("box", [(10, 10, 10, 10), (10, 10, 11, 11), (0, 0, 640, 480), (639.9, 479.9, 650, 490)])
def test_the_smallest_and_the_largest_boxes_are_drawn(box):
    assert (draw_detections(photo(), **one(box)) != photo()).any()


@pytest.mark.parametrize("scores", [[0.9, 0.4], [0.4, 0.9], None])
def test_the_best_is_drawn_on_top(scores):
    boxes = np.full((2, 4), (100, 100, 300, 200), np.float32)
    scores = None if scores is None else np.array(scores)
    drawn = draw_detections(
        photo(), boxes_xyxy_pixels=boxes, labels=np.array([3, 7]), names=["cat", "dog"], scores=scores
    )
    best = 3 if scores is None else (3, 7)[scores.argmax()]
    assert tuple(drawn[150, 300]) == class_colour(best)


# Names


def test_text_is_legible_in_thumbnails_and_grows_with_the_image():
    sizes = [text_size(height, width) for height, width in ((1, 1), (80, 100), (480, 640), (1080, 1920), (2160, 3840))]
    assert sizes == sorted(sizes)
    assert sizes[0] == 10
    assert 12 <= sizes[2] < sizes[3] <= 32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traffic light", "traffic light"),
        (" two\nlines\t", "two lines"),
        ("café", "cafe"),
        ("自転車", "#7"),
        ("велосипед", "#7"),
        ("🚲", "#7"),
        ("a\0b", "#7"),
        ("\udcff", "#7"),
        ("", "#7"),
        ("x" * 10_000, "x" * 100),
    ],
)
def test_a_name_is_written_in_letters_that_the_font_has(name, expected):
    assert writable(name, label=7, font=load_font(13)) == expected
    assert (draw_detections(photo(), **one((100, 100, 300, 200), name=name)) != photo()).any()


def test_a_name_wider_than_the_image_is_cut_short():
    _, (tag,) = places(np.array([(10, 30, 40, 50)], float), ["a name of very many letters"], 80, 60)
    assert tag.text.startswith("a name")
    assert tag.text.endswith("…")


def test_lists_of_different_lengths_are_an_error_that_counts_them():
    unchecked = inspect.unwrap(draw_detections)  # without the tests' own type checks
    with pytest.raises(ValueError, match=r"'boxes': 1, 'labels': 1, 'names': 2, 'scores': 1"):
        unchecked(photo(), **{**one((1, 1, 9, 9)), "names": ["cat", "dog"]})


def test_a_font_that_is_not_there_is_an_error():
    with pytest.raises(OSError, match="resource"):
        draw_detections(photo(), **one((1, 1, 9, 9)), font="no-such-font.ttf")
