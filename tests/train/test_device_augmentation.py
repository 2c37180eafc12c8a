import colorsys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.sharding import along_data, data_mesh
from train.augmentation import NO_AUGMENTATION, Augmentation, MultiScale, PhotometricDistortion
from train.batch import Batch
from train.device_augmentation import (
    COLOUR_DRAWS,
    PERMUTATIONS,
    Distortion,
    augment_batch,
    distort,
    drawn_distortion,
    flip,
    resize,
)

SIDE = 64
IMAGES = 8
LEVEL = 1 / 255
WHOLE = jnp.array([0, 0, SIDE, SIDE], jnp.int32)
DRAWS = 4000

apply = jax.jit(distort)
augment = jax.jit(augment_batch, static_argnums=2, static_argnames="augmentation")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def distortion(**changes: float) -> Distortion:
    neutral = {"brightness": 1.0, "early_contrast": 1.0, "saturation": 1.0, "hue": 0.0, "late_contrast": 1.0}
    permutation = jnp.asarray(changes.pop("permutation", 0), jnp.int32)
    return Distortion(**{k: jnp.float32(v) for k, v in (neutral | changes).items()}, permutation=permutation)


def photograph() -> np.ndarray:
    return np.asarray(Image.fromarray(noise(6, 6, 3)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def distorted(pixels: np.ndarray, content: jax.Array = WHOLE, **changes: float) -> np.ndarray:
    return np.asarray(apply(jnp.asarray(pixels, jnp.float32) / 255.0, distortion(**changes), content))


def batch(*, active: bool = True, images: int = IMAGES) -> Batch:
    rng = np.random.default_rng(1)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (images, 5, 2)), rng.uniform(0.1, 0.5, (images, 5, 2))], axis=-1)
    mask = rng.random((images, 5)) < 0.6
    return Batch(
        images=jnp.asarray(noise(images, SIDE, SIDE, 3)),
        targets=Targets(
            labels=jnp.asarray(rng.integers(0, 9, (images, 5)), jnp.int32),
            boxes=jnp.asarray(boxes * mask[..., None], jnp.float32),
            mask=jnp.asarray(mask),
        ),
        image_ids=jnp.asarray(rng.permutation(1000)[:images], jnp.int32),
        content_xyxy_pixels=jnp.tile(WHOLE, (images, 1)),
        distort_colours=jnp.full(images, active),
    )


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_neutral_distortion_changes_no_bit():
    pixels = noise(SIDE, SIDE, 3)
    np.testing.assert_array_equal(distorted(pixels), np.asarray(jnp.asarray(pixels, jnp.float32) / 255.0))


def test_without_augmentation_images_are_only_scaled_and_targets_stay():
    given = batch()
    images, targets = augment(given, jax.random.key(0), (SIDE, SIDE), augmentation=NO_AUGMENTATION)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images, np.asarray(given.images) / 255, atol=1e-7)
    assert_same(targets, given.targets)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.875, 1.3, 2.0])
@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("early_contrast", ImageEnhance.Contrast),
        ("late_contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colours_change_as_in_pillow(name: str, enhancer, factor: float):
    pixels = photograph()
    expected = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor)) / 255
    np.testing.assert_allclose(distorted(pixels, **{name: factor}), expected, atol=(1 + factor) * LEVEL)


@pytest.mark.parametrize("shift", [-0.5, -0.05, 0.03, 0.25])
def test_hue_turns_as_in_colorsys(shift: float):
    pixels = noise(SIDE, SIDE, 3)
    pixels[0], pixels[1], pixels[2, :, 0] = 0, 255, 255
    found = distorted(pixels, hue=shift)
    for row, column in np.ndindex(6, SIDE):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[row, column] / 255))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        np.testing.assert_allclose(found[row, column], expected, atol=1e-5)


@pytest.mark.parametrize("permutation", range(6))
def test_channels_are_permuted_to_the_bit(permutation: int):
    pixels = noise(SIDE, SIDE, 3)
    expected = distorted(pixels)[..., list(PERMUTATIONS[permutation])]
    np.testing.assert_array_equal(distorted(pixels, permutation=permutation), expected)


def test_changes_come_one_after_another_and_stay_in_range():
    pixels, changes = photograph(), {"brightness": 1.125, "saturation": 1.5, "hue": 0.05, "late_contrast": 0.5}
    step = distorted(pixels)
    for name, value in changes.items():
        step = np.asarray(apply(jnp.asarray(step), distortion(**{name: value}), WHOLE))
    np.testing.assert_allclose(distorted(pixels, **changes), step, atol=1e-6)
    extreme = distorted(noise(SIDE, SIDE, 3), brightness=1.125, early_contrast=1.5, saturation=1.5, hue=-0.05)
    assert extreme.min() == 0
    assert extreme.max() == 1


def test_black_around_the_content_stays_black_and_does_not_count_as_its_grey():
    pixels, content = np.zeros((SIDE, SIDE, 3), np.uint8), jnp.array([8, 16, 56, 40], jnp.int32)
    pixels[16:40, 8:56] = photograph()[16:40, 8:56]
    found = distorted(pixels, content, early_contrast=0.5, hue=0.05, saturation=1.4)
    alone = apply(
        jnp.asarray(pixels[16:40, 8:56], jnp.float32) / 255.0,
        distortion(early_contrast=0.5, hue=0.05, saturation=1.4),
        jnp.array([0, 0, 48, 24], jnp.int32),
    )
    np.testing.assert_allclose(found[16:40, 8:56], alone, atol=1e-6)
    around = np.ones((SIDE, SIDE), np.bool_)
    around[16:40, 8:56] = False
    assert not found[around].any()


def test_distortions_are_drawn_as_published():
    settings = PhotometricDistortion()
    uniform = jnp.asarray(np.random.default_rng(0).random((DRAWS, COLOUR_DRAWS)), jnp.float32)
    drawn = Distortion(*map(np.asarray, drawn_distortion(settings, uniform, active=jnp.full(DRAWS, True))))
    contrast = drawn.early_contrast * drawn.late_contrast
    ranges = ((drawn.brightness, 1, settings.brightness), (contrast, 1, settings.contrast))
    ranges += ((drawn.saturation, 1, settings.saturation), (drawn.hue, 0, settings.hue))
    for values, neutral, (low, high) in ranges:
        changed = values[values != neutral]
        assert abs(len(changed) / DRAWS - 0.5) < 0.03
        assert low <= changed.min() < changed.max() <= high
        assert abs(changed.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert ((drawn.early_contrast == 1) | (drawn.late_contrast == 1)).all()
    assert abs(np.mean(drawn.early_contrast != 1) - 0.25) < 0.03
    shares = np.bincount(drawn.permutation, minlength=6) / DRAWS
    np.testing.assert_allclose(shares, np.array([7, 1, 1, 1, 1, 1]) / 12, atol=0.03)
    coins = [drawn.brightness != 1, contrast != 1, drawn.saturation != 1, drawn.hue != 0, drawn.permutation != 0]
    assert np.abs(np.corrcoef(coins) - np.eye(5)).max() < 0.07


def test_a_distortion_that_is_not_active_is_neutral():
    drawn = drawn_distortion(PhotometricDistortion(), jnp.zeros((50, COLOUR_DRAWS)), active=jnp.full(50, False))
    assert_same(drawn, jax.tree.map(lambda leaf: jnp.full(50, leaf), distortion()))


def test_flipping_twice_changes_nothing():
    given = batch()
    images = given.images.astype(jnp.float32)
    flipped = jnp.arange(IMAGES) % 2 == 0
    once = flip(images, given.targets, flipped=flipped)
    twice = flip(*once, flipped=flipped)
    np.testing.assert_array_equal(twice[0], images)
    np.testing.assert_allclose(twice[1].boxes, given.targets.boxes, atol=1e-7)
    np.testing.assert_array_equal(once[0][1::2], images[1::2])
    np.testing.assert_array_equal(once[0][::2], images[::2, :, ::-1])


def test_a_flipped_box_is_where_its_pixels_are_and_padding_stays_zero():
    image = np.zeros((1, SIDE, SIDE, 3), np.float32)
    image[0, 10:30, 5:21] = 1
    boxes = np.array([[[13 / SIDE, 20 / SIDE, 16 / SIDE, 20 / SIDE], [0, 0, 0, 0]]], np.float32)
    targets = Targets(jnp.zeros((1, 2), jnp.int32), jnp.asarray(boxes), jnp.array([[True, False]]))
    images, flipped = flip(jnp.asarray(image), targets, flipped=jnp.array([True]))
    columns = np.flatnonzero(np.asarray(images)[0, 15, :, 0])
    x, _, width, _ = np.asarray(flipped.boxes)[0, 0] * SIDE
    assert (x - width / 2, x + width / 2) == (columns[0], columns[-1] + 1)
    assert not np.asarray(flipped.boxes)[0, 1].any()


def test_half_of_the_images_are_flipped():
    augmentation = Augmentation(photometric=None, multi_scale=None)
    given = batch(images=1)
    given = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :8, :8] if leaf.ndim == 4 else leaf, 1000, 0), given)
    given = given._replace(image_ids=jnp.arange(1000, dtype=jnp.int32))
    images, _ = augment(given, jax.random.key(3), (8, 8), augmentation=augmentation)
    same = (np.abs(np.asarray(images) - np.asarray(given.images) / 255) < 1e-6).all(axis=(1, 2, 3))
    assert abs(same.mean() - 0.5) < 0.06


@pytest.mark.parametrize(
    ("side", "to", "first"),
    [
        (4, 3, [0, 1, 2]),
        (4, 6, [0, 0, 1, 2, 2, 3]),
        (640, 480, [0, 1, 2, 4, 5, 6]),
        (640, 800, [0, 0, 1, 2, 3, 4, 4, 5]),
    ],
)
def test_nearest_takes_the_pixels_that_the_reference_takes(side: int, to: int, first: list[int]):
    ramp = jnp.broadcast_to(jnp.arange(side, dtype=jnp.float32)[None, None, :, None], (1, 2, side, 3))
    assert resize(ramp, size=(2, to), resample="nearest")[0, 0, : len(first), 0].tolist() == first


@pytest.mark.parametrize("size", [(48, 48), (80, 80), (33, 90), (SIDE, 40)])
def test_bilinear_is_the_filter_of_inference(size: tuple[int, int]):
    pixels = noise(SIDE, SIDE, 3)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)) / 255
    found = resize(jnp.asarray(pixels, jnp.float32)[None] / 255.0, size=size, resample="bilinear")[0]
    np.testing.assert_allclose(found, expected, atol=1.01 * LEVEL)


@pytest.mark.parametrize("resample", ["bilinear", "nearest"])
def test_another_size_changes_pixels_and_not_boxes(resample):
    given = batch()
    augmentation = Augmentation(photometric=None, flip_probability=0.0, multi_scale=MultiScale(resample=resample))
    images, targets = augment(given, jax.random.key(0), (96, 96), augmentation=augmentation)
    assert images.shape == (IMAGES, 96, 96, 3)
    assert_same(targets, given.targets)


def test_an_image_is_augmented_alike_wherever_it_lies_in_the_batch():
    given, order = batch(), jnp.array([5, 2, 7, 0, 1, 6, 3, 4])
    results = augment(given, jax.random.key(2), (48, 48), augmentation=Augmentation())
    shuffled = augment(
        jax.tree.map(lambda leaf: leaf[order], given), jax.random.key(2), (48, 48), augmentation=Augmentation()
    )
    assert_same(jax.tree.map(lambda leaf: leaf[order], results), shuffled)


def test_sharded_equals_unsharded_but_for_rounding():
    given = batch()
    shared_out = jax.device_put(given, along_data(data_mesh()))
    results = [augment(each, jax.random.key(2), (48, 48), augmentation=Augmentation()) for each in (given, shared_out)]
    (images, targets), (shared_images, shared_targets) = results
    assert len(shared_images.sharding.device_set) == 8
    np.testing.assert_allclose(images, shared_images, atol=1e-6)
    assert_same(targets, shared_targets)


def test_other_steps_and_other_images_have_other_draws():
    given = batch()._replace(images=jnp.broadcast_to(jnp.asarray(noise(SIDE, SIDE, 3)), (IMAGES, SIDE, SIDE, 3)))
    results = [augment(given, jax.random.key(step), (48, 48), augmentation=Augmentation())[0] for step in range(2)]
    assert len({np.asarray(image).tobytes() for result in results for image in result}) > IMAGES


def test_the_end_of_distortion_needs_no_other_program():
    program = jax.jit(partial(augment_batch, augmentation=Augmentation(flip_probability=0.0)), static_argnums=2)
    active, _ = program(batch(), jax.random.key(0), (SIDE, SIDE))
    still, _ = program(batch(active=False), jax.random.key(0), (SIDE, SIDE))
    assert program._cache_size() == 1
    np.testing.assert_allclose(still, np.asarray(batch().images) / 255, atol=1e-7)
    assert np.abs(np.asarray(active) - np.asarray(still)).max() > 0.05
