import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.config import ConfigError
from rtdetrv2_jax.image import ImageError, read_image
from rtdetrv2_jax.preprocessing import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERY_FORM = [
    Preprocessing(),
    Preprocessing(size=(480, 640), resample="bicubic"),
    Preprocessing(resize="shortest_edge", size=(480, 640), pad="multiple"),
    Preprocessing(resize="shortest_edge", size=(480, 640), pad="size", pad_size=(640, 640), resample="nearest"),
    Preprocessing(resize="fit_inside", size=(320, 640), pad="size", pad_size=(320, 640), resample="lanczos"),
    Preprocessing(resize="fit_inside", size=(320, 320), pad="multiple", **IMAGENET),
    Preprocessing(resize="none", pad="multiple", rescale_factor=None),
    Preprocessing(resize="none", pad="size", pad_size=(1312, 1344), size=(64, 32)),
    Preprocessing(rescale_factor=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(0.5, 1.0, 2.0), resample="hamming"),
]
SIZES = [  # (height, width), up and down, along one side and both
    (480, 640), (427, 640), (640, 427), (640, 640), (333, 500), (500, 333), (100, 80), (1, 1), (1, 700), (700, 1),
    (32, 32), (31, 33), (1080, 1920), (639, 641), (641, 639), (900, 1300), (17, 1999), (64, 1280), (1280, 64), (3, 4),
]  # fmt: skip


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Laws


@pytest.mark.parametrize("height_width", SIZES)
def test_the_resize_is_pillows_to_the_last_bit(height_width):
    image = noise(*height_width)
    prepared = Preprocessing().prepare(image)
    expected = np.asarray(Image.fromarray(image).resize((640, 640), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepared.pixels, expected)


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_is_pillows(resample):
    image = noise(50, 70)
    expected = Image.fromarray(image).resize((96, 32), Image.Resampling[resample.upper()])
    np.testing.assert_array_equal(Preprocessing(size=(32, 96), resample=resample).prepare(image).pixels, expected)


@pytest.mark.parametrize("this", EVERY_FORM)
@pytest.mark.parametrize("height_width", [(480, 640), (427, 640), (640, 427), (100, 80), (600, 1300)])
def test_the_corners_of_the_content_are_the_corners_of_the_original(this, height_width):
    prepared = this.prepare(noise(*height_width))
    input_size = np.array(prepared.pixels.shape[:2])
    assert not (input_size % 32).any()
    assert this.input_size in (None, tuple(input_size))
    far_corner = np.array(prepared.content_size) / input_size
    np.testing.assert_allclose(far_corner * prepared.scale_size, height_width, rtol=1e-15)
    if this.pad == "none":
        assert prepared.scale_size == height_width
        assert prepared.content_size == tuple(input_size)


@pytest.mark.parametrize("this", [form for form in EVERY_FORM if form.pad != "none"])
def test_padding_is_zero_and_changes_nothing_of_the_content(this):
    image = noise(270, 400)
    prepared = this.prepare(image)
    height, width = prepared.content_size
    filter_ = Image.Resampling[this.resample.upper()]
    expected = np.asarray(Image.fromarray(image).resize((width, height), filter_))
    np.testing.assert_array_equal(prepared.pixels[:height, :width], expected)
    assert not prepared.pixels[height:].any()
    assert not prepared.pixels[:, width:].any()


def test_equal_preprocessings_are_one_key():
    assert len({Preprocessing(**IMAGENET), Preprocessing(**IMAGENET), Preprocessing()}) == 2


def test_preparing_leaves_the_image_as_it_was_and_shares_no_memory():
    image = noise(640, 640)
    prepared = Preprocessing().prepare(image)
    np.testing.assert_array_equal(prepared.pixels, image)
    assert not np.shares_memory(prepared.pixels, image)
    backwards = image[::-1, ::-1]
    np.testing.assert_array_equal(Preprocessing().prepare(backwards).pixels, backwards)


def test_an_input_needs_no_multiple_of_32_before_it_is_padded():
    this = Preprocessing(resize="none", pad="multiple")
    assert this.prepare(noise(33, 64)).pixels.shape == (64, 64, 3)
    assert this.prepare(noise(33, 65)).scale_size == (64.0, 96.0)


@pytest.mark.parametrize(
    ("resize", "size", "original", "expected"),
    [
        ("shortest_edge", (480, 640), (480, 600), (480, 600)),  # already there
        ("shortest_edge", (480, 640), (400, 500), (480, 600)),
        ("shortest_edge", (480, 640), (500, 400), (600, 480)),
        ("shortest_edge", (480, 640), (300, 900), (213, 640)),  # the longer side decides
        ("shortest_edge", (480, 640), (427, 640), (427, 640)),
        ("fit_inside", (320, 640), (100, 100), (320, 320)),
        ("fit_inside", (320, 640), (100, 400), (160, 640)),
        ("fit_inside", (640, 640), (480, 500), (614, 640)),
        ("none", (640, 640), (7, 9), (7, 9)),
        ("stretch", (320, 640), (7, 9), (320, 640)),
    ],
)
def test_kept_aspects_give_the_sizes_that_the_format_means(resize, size, original, expected):
    this = Preprocessing(resize=resize, size=size, pad="multiple")
    assert this.prepare(np.zeros((*original, 3), np.uint8)).content_size == expected


# Scaling


def test_levels_are_scaled_to_0_to_1_and_nothing_more():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    values = Preprocessing().normalise(levels)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, levels.astype(np.float32) * np.float32(1 / 255))
    assert (values.min(), values.max()) == (0, 1)


def test_scaling_compiles_and_takes_device_arrays():
    this = Preprocessing(**IMAGENET)
    pixels = noise(32, 64)[None]
    compiled = jax.jit(this.normalise)(jnp.asarray(pixels))
    expected = (pixels / 255 - np.array(this.mean)) / np.array(this.std)
    np.testing.assert_allclose(compiled, expected, rtol=0, atol=1e-6)


def test_without_a_factor_the_levels_stay():
    pixels = noise(32, 32)[None]
    np.testing.assert_array_equal(Preprocessing(rescale_factor=None).normalise(pixels), pixels)


def test_padding_is_zero_after_normalisation_too():
    this = Preprocessing(resize="none", pad="size", pad_size=(64, 96), **IMAGENET)
    prepared = [this.prepare(noise(40, 96)), this.prepare(noise(64, 50))]
    pixels = np.stack([one.pixels for one in prepared])
    sizes = np.array([one.content_size for one in prepared], np.int32)
    values = jax.jit(lambda pixels, sizes: this.normalise(pixels, content_sizes=sizes))(pixels, sizes)
    unpadded = Preprocessing(**IMAGENET).normalise(pixels)
    np.testing.assert_allclose(values[0, :40], unpadded[0, :40], rtol=0, atol=1e-6)
    np.testing.assert_allclose(values[1, :, :50], unpadded[1, :, :50], rtol=0, atol=1e-6)
    assert not values[0, 40:].any()
    assert not values[1, :, 50:].any()
    with pytest.raises(ValueError, match=r"Pass content_sizes"):
        this.normalise(pixels)


# What does not fit


def test_a_preprocessing_that_cannot_work_cannot_be_made():
    for fields, cause in [
        ({"size": (600, 640)}, "multiples of 32"),
        ({"pad": "size"}, "pad_size: goes with"),
        ({"pad_size": (640, 640)}, "pad_size: goes with"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean, std: set both"),
    ]:
        with pytest.raises(ConfigError, match=cause):
            Preprocessing(**fields)


def test_an_image_whose_input_is_no_multiple_of_32_is_an_error_that_says_what_to_set():
    with pytest.raises(ImageError, match=r"33 x 64 gives an input of \(33, 64\).*Set do_pad to true"):
        Preprocessing(resize="none").prepare(noise(33, 64))


def test_an_image_over_pad_size_is_an_error():
    with pytest.raises(ImageError, match=r"65 x 20 is resized to \(65, 20\), over pad_size \(64, 64\)"):
        Preprocessing(resize="none", pad="size", pad_size=(64, 64)).prepare(noise(65, 20))


def test_an_image_too_long_to_keep_its_aspect_is_an_error():
    with pytest.raises(ImageError, match="1 x 2000 is too long"):
        Preprocessing(resize="fit_inside", pad="multiple").prepare(noise(1, 2000))


def test_what_read_image_does_not_give_is_an_error():
    unchecked = inspect.unwrap(Preprocessing.prepare)  # without the tests' own type checks
    for image in (noise(4, 4) / 255, noise(4, 4)[:, :, 0], noise(0, 4)):
        with pytest.raises(ImageError, match=r"expected uint8 \(h, w, 3\), got"):
            unchecked(Preprocessing(), image)


# Pictures from outside


def real_images(shared):
    files = sorted(Path(shared / "data/coco").rglob("*.jpg"))[:20] + sorted((shared / "data/BCCD").rglob("*.jpg"))[:2]
    assert len(files) == 22
    return files


def test_real_images_are_resized_as_pillow_does(shared):
    for file in real_images(shared):
        with Image.open(file) as opened:
            expected = np.asarray(opened.convert("RGB").resize((640, 640), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(Preprocessing().prepare(read_image(file)).pixels, expected)


def test_the_cats_give_the_published_values(shared):
    picture = read_image(shared / "data/coco_039769/000000039769.png")
    prepared = Preprocessing().prepare(picture)
    assert prepared.scale_size == (480, 640)
    values = Preprocessing().normalise(prepared.pixels[None])
    np.testing.assert_array_equal(prepared.pixels[0, :3, 0], [140, 144, 146])
    np.testing.assert_allclose(values[0, 0, :3, 0], [0.5490196, 0.5647059, 0.5725490], rtol=0, atol=1e-7)
