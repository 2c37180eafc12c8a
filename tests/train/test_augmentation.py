from dataclasses import replace

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from PIL import Image

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.preprocessing import Preprocessing
from train.augmentation import (
    NO_AUGMENTATION,
    PUBLISHED_SIDES,
    Augmentation,
    IoUCrop,
    MultiScale,
    PhotometricDistortion,
    ZoomOut,
    draws,
    is_active,
    size_of_step,
)
from train.geometry import AugmentedImage, Window, augment_image, boxes_in, cropped, resample, zoomed_out

WIDTH, HEIGHT = 150, 110
SIZE = (96, 128)
GEOMETRY = Augmentation(photometric=None, multi_scale=None)
BOXES = np.array([[10, 20, 60, 70], [80, 5, 140, 100], [30, 60, 50, 90]], np.float32)
RED, BLUE = (255, 0, 0), (0, 0, 255)
DRAWS = 2000
EXPECTED_SIZES = [736, 768, 544, 576, 640, 704, 704, 672]


def augmented(pixels: np.ndarray, boxes: np.ndarray, *, augmentation=GEOMETRY, epoch=0, index=0, size=SIZE):
    return augment_image(
        pixels,
        boxes_xyxy_pixels=boxes.astype(np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int32),
        size=size,
        augmentation=augmentation,
        epoch=epoch,
        dice=draws("geometry", seed=3, epoch=epoch, index=index),
    )


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def painted(box: np.ndarray, *, background=BLUE) -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 3), background, np.uint8)
    left, top, right, bottom = box.astype(int)
    pixels[top:bottom, left:right] = RED
    return pixels


def extent(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def corners(boxes: np.ndarray, *, size=SIZE) -> np.ndarray:
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    return np.concatenate([low, high], axis=1) * np.tile(size[::-1], 2)


def assert_same(one: AugmentedImage, other: AugmentedImage) -> None:
    for part, other_part in zip(one, other, strict=True):
        np.testing.assert_array_equal(part, other_part)


def test_without_augmentation_pixels_are_those_of_inference_to_the_bit():
    pixels = noise(HEIGHT, WIDTH)
    result = augmented(pixels, BOXES, augmentation=NO_AUGMENTATION)
    np.testing.assert_array_equal(result.pixels, Preprocessing(size=SIZE).prepare(pixels).pixels)
    np.testing.assert_allclose(corners(result.boxes), BOXES * np.tile((128 / 150, 96 / 110), 2), atol=1e-4)
    assert result.labels.tolist() == [0, 1, 2]
    assert result.content_xyxy_pixels.tolist() == [0, 0, 128, 96]


@pytest.mark.parametrize("index", range(60))
def test_a_box_in_the_result_is_where_its_pixels_are(index: int):
    box = BOXES[index % len(BOXES)]
    result = augmented(painted(box), box[None], index=index)
    mask = result.pixels[..., 0] > 127
    if len(result.boxes):
        np.testing.assert_allclose(corners(result.boxes)[0], extent(mask), atol=1)
    assert result.pixels.shape == (*SIZE, 3)
    assert result.pixels.dtype == np.uint8


@pytest.mark.parametrize("index", range(30))
def test_what_zoom_out_leaves_is_black_and_the_rest_is_told(index: int):
    result = augmented(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), BOXES, index=index)
    shown = np.zeros(SIZE, np.bool_)
    left, top, right, bottom = result.content_xyxy_pixels
    shown[top:bottom, left:right] = True
    np.testing.assert_array_equal(result.pixels, np.repeat(shown[..., None] * np.uint8(255), 3, axis=-1))


@pytest.mark.parametrize("index", range(40))
def test_one_resample_equals_canvas_then_crop_then_resize(index: int):
    pixels = np.asarray(Image.fromarray(noise(12, 16)).resize((WIDTH, HEIGHT)))
    dice = draws("geometry", seed=5, index=index)
    window = zoomed_out(Window(0, 0, WIDTH, HEIGHT), ZoomOut(probability=0.7), dice=dice)
    window = cropped(window, IoUCrop(), boxes_xyxy_pixels=BOXES, dice=dice)
    canvas = np.zeros((window.height, window.width, 3), np.uint8)
    left, top = max(0, window.left), max(0, window.top)
    visible = pixels[top : max(0, window.bottom), left : max(0, window.right)]
    rows, columns = visible.shape[:2]
    canvas[top - window.top : top - window.top + rows, left - window.left : left - window.left + columns] = visible
    expected = np.asarray(Image.fromarray(canvas).resize(SIZE[::-1], Image.Resampling.BILINEAR)).astype(int)
    found, content = resample(pixels, window, size=SIZE)
    left, top, right, bottom = content
    margin = 1 + int(np.ceil(max(SIZE[1] / window.width, SIZE[0] / window.height)))
    inner = (slice(top + margin, bottom - margin), slice(left + margin, right - margin))
    assert np.abs(found.astype(int) - expected)[inner].max() <= 2
    assert (found.astype(int)[:top] == 0).all()
    assert (found.astype(int)[bottom:] == 0).all()


def test_the_same_seed_epoch_and_index_give_the_same_and_others_do_not():
    pixels = noise(HEIGHT, WIDTH)
    first = [augmented(pixels, BOXES, index=index) for index in range(5)]
    for index in reversed(range(5)):
        assert_same(augmented(pixels, BOXES, index=index), first[index])
    results = [augmented(pixels, BOXES, index=index, epoch=epoch) for index in range(4) for epoch in range(4)]
    assert len({result.pixels.tobytes() for result in results}) > 8


def test_zoom_out_draws_as_published():
    windows = [
        zoomed_out(Window(0, 0, 1000, 500), ZoomOut(), dice=draws("geometry", seed=0, index=index))
        for index in range(DRAWS)
    ]
    grown = np.array([window for window in windows if window != (0, 0, 1000, 500)])
    assert abs(len(grown) / DRAWS - 0.5) < 0.04
    ratios = (grown[:, 2] - grown[:, 0]) / 1000
    np.testing.assert_allclose((grown[:, 3] - grown[:, 1]) / 500, ratios, atol=3e-3)
    assert ratios.min() >= 1
    assert ratios.max() < 4
    assert abs(ratios.mean() - 2.5) < 0.1
    places = -grown[:, :2] / (np.array([1000, 500]) * (ratios - 1)[:, None] + 1e-9)
    assert np.abs(places[ratios > 1.1].mean(axis=0) - 0.5).max() < 0.04
    assert abs(np.corrcoef(places[ratios > 1.1].T)[0, 1]) < 0.1


def reference_crop(rng: np.random.Generator, boxes: np.ndarray, width: int, height: int) -> tuple[int, ...]:
    """The published search, word for word: one trial after another, a draw for everything."""
    if rng.random() >= 0.8:
        return 0, 0, width, height
    while True:
        least = rng.choice([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
        if least >= 1:
            return 0, 0, width, height
        for _ in range(40):
            wide, tall = int(width * rng.uniform(0.3, 1)), int(height * rng.uniform(0.3, 1))
            if not 0.5 <= wide / tall <= 2:
                continue
            left, top = int((width - wide) * rng.random()), int((height - tall) * rng.random())
            best = -1.0
            for x0, y0, x1, y1 in boxes:
                if left < (x0 + x1) / 2 < left + wide and top < (y0 + y1) / 2 < top + tall:
                    across = max(0, min(x1, left + wide) - max(x0, left))
                    down = max(0, min(y1, top + tall) - max(y0, top))
                    union = wide * tall + (x1 - x0) * (y1 - y0) - across * down
                    best = max(best, across * down / union)
            if best >= 0 and best >= least:
                return left, top, left + wide, top + tall


def test_crops_are_distributed_as_by_the_published_search():
    rng, whole = np.random.default_rng(0), Window(0, 0, WIDTH, HEIGHT)
    expected = np.array([reference_crop(rng, BOXES, WIDTH, HEIGHT) for _ in range(DRAWS)], float)
    found = np.array(
        [
            cropped(whole, IoUCrop(), boxes_xyxy_pixels=BOXES, dice=draws("geometry", seed=1, index=index))
            for index in range(DRAWS)
        ],
        float,
    )
    for measured in (lambda w: w, np.square, lambda w: (w == whole).all(axis=1), lambda w: (w[:, 2:] - w[:, :2]) ** 2):
        one, other = measured(found), measured(expected)
        error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / DRAWS) + 1e-9
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 4 * error).all()


def test_a_crop_holds_the_centre_of_a_box_and_keeps_its_aspect():
    whole, centres = Window(-40, -30, 400, 270), (BOXES[:, :2] + BOXES[:, 2:]) / 2
    for index in range(200):
        dice = draws("geometry", seed=2, index=index)
        window = cropped(whole, IoUCrop(probability=1.0), boxes_xyxy_pixels=BOXES, dice=dice)
        assert ((window[:2] < centres) & (centres < window[2:])).all(axis=1).any()
        assert whole.left <= window.left < window.right <= whole.right
        assert whole.top <= window.top < window.bottom <= whole.bottom
        assert window == whole or 0.5 <= window.width / window.height <= 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 2), (3, 5)])
def test_images_of_any_shape_go_through(shape: tuple[int, int]):
    boxes = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    for index in range(30):
        result = augmented(noise(*shape), boxes, index=index)
        assert (result.boxes >= 0).all()
        assert (corners(result.boxes) <= np.tile(SIZE[::-1], 2) + 1e-3).all()


def test_images_without_boxes_are_zoomed_but_not_cropped():
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    results = [augmented(pixels, np.zeros((0, 4)), index=index) for index in range(40)]
    assert all(result.boxes.shape == (0, 4) for result in results)
    whole = [result for result in results if (result.pixels == 255).all()]
    assert 8 < len(whole) < 32


def test_boxes_too_small_to_be_seen_are_dropped_in_the_image_or_at_the_base_size():
    boxes = np.array([[0, 0, 100, 50], [5, 5, 5.9, 20], [5, 5, 6, 20], [500, 500, 504, 600]], np.float32)
    window = Window(0, 0, 1000, 1000)
    assert boxes_in(window, boxes, size=(1000, 1000), least_side=1.0)[1].tolist() == [True, False, True, True]
    assert boxes_in(window, boxes, size=(100, 100), least_side=1.0)[1].tolist() == [True, False, False, False]
    assert boxes_in(window, boxes, size=(250, 250), least_side=1.0)[1].tolist() == [True, False, False, True]


def test_boxes_are_clipped_to_the_window_and_leave_with_their_centre():
    boxes = np.array([[0, 0, 40, 40], [15, 15, 45, 45]], np.float32)
    found, kept = boxes_in(Window(20, 20, 60, 60), boxes, size=(40, 40), least_side=1.0)
    assert kept.tolist() == [False, True]
    np.testing.assert_allclose(corners(found, size=(40, 40)), [[0, 0, 25, 25]], atol=1e-5)


def test_operations_stop_with_their_epoch():
    stopped = GEOMETRY.stopping_at(2)
    pixels = noise(HEIGHT, WIDTH)
    plain = augmented(pixels, BOXES, augmentation=NO_AUGMENTATION)
    for index in range(20):
        for epoch in (2, 3):
            assert_same(augmented(pixels, BOXES, augmentation=stopped, epoch=epoch, index=index), plain)
        assert_same(
            augmented(pixels, BOXES, augmentation=stopped, epoch=1, index=index),
            augmented(pixels, BOXES, epoch=1, index=index),
        )


def test_stopping_reaches_all_that_can_stop():
    stopped = Augmentation().stopping_at(71)
    for operation in (stopped.photometric, stopped.zoom_out, stopped.crop, stopped.multi_scale):
        assert is_active(operation, epoch=70)
        assert not is_active(operation, epoch=71)
    assert stopped.stopping_at(None) == Augmentation()
    assert stopped.sides(640, epoch=70) == PUBLISHED_SIDES
    assert stopped.sides(640, epoch=71) == (640,)
    assert NO_AUGMENTATION.stopping_at(3) == NO_AUGMENTATION


def test_settings_that_cannot_work_are_told_all_at_once():
    with pytest.raises(ConfigError) as raised:
        Augmentation(
            photometric=PhotometricDistortion(probability=1.5, hue=(-0.6, 0.0)),
            zoom_out=ZoomOut(side=(0.5, 2.0)),
            crop=IoUCrop(least_ious=(0.5,), trials=0),
            flip_probability=-1.0,
            multi_scale=MultiScale(sides=()),
        )
    told = str(raised.value)
    for name in ("photometric.probability", "hue", "zoom_out.side", "least_ious", "trials", "flip", "sides"):
        assert name in told
    with pytest.raises((ConfigError, TypeCheckError), match="cubic"):
        Augmentation(multi_scale=replace(MultiScale(), resample="cubic"))  # pyright: ignore[reportArgumentType]


def test_sizes_of_steps_are_the_same_for_ever_and_come_as_often_as_they_are_listed():
    assert [size_of_step(PUBLISHED_SIDES, seed=0, step=step) for step in range(8)] == EXPECTED_SIZES
    sizes = [size_of_step(PUBLISHED_SIDES, seed=1, step=step) for step in range(3000)]
    assert set(sizes) == set(PUBLISHED_SIDES)
    assert abs(sizes.count(640) / 3000 - 3 / 13) < 0.03
    assert abs(sizes.count(800) / 3000 - 1 / 13) < 0.02
    assert size_of_step((512,), seed=4, step=9) == 512


def test_purposes_epochs_and_indices_have_draws_of_their_own():
    keys = [("size", 0, 0), ("order", 0, 0), ("geometry", 0, 0), ("geometry", 1, 0), ("geometry", 0, 1)]
    words = {draws(purpose, seed=0, epoch=epoch, index=index).bits.random_raw() for purpose, epoch, index in keys}
    assert len(words) == len(keys)
