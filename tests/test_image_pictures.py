"""Pictures that others stored: one of every oddity that a folder of photos may hold."""

import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.image import PIXEL_LIMIT, ImageError, read_image

ODD_PICTURES = {  # name: shape, and the colour of one pixel (row, column) that a wrong reading would miss
    "chi.gif": ((240, 320), (80, 80), (169, 200, 69)),
    "hopper_gray.jpg": ((128, 128), None, None),
    "hopper_orientation_3.jpg": ((128, 128), None, None),
    "hopper_orientation_6.jpg": ((128, 128), None, None),
    "hopper_orientation_8.webp": ((128, 128), None, None),
    "i_trns.png": ((64, 64), (0, 0), (0, 0, 0)),
    "iss634.webp": ((245, 245), None, None),
    "p_trns_single.png": ((64, 64), (32, 32), (0, 255, 64)),
    "pil123p.png": ((150, 162), (40, 70), None),
    "pil_sample_cmyk.jpg": ((100, 100), (2, 5), (255, 13, 25)),
    **{f"exif_landscape_{number}.jpg": ((1200, 1800), None, None) for number in range(9)},
}
ODD_ERRORS = {
    "broken.png": "not an image",
    "decompression_bomb.gif": f"4364696535 pixels.*limit of {PIXEL_LIMIT}",
    "png_decompression_dos.png": "too large",
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "LICENSE.exif": "not an image",
    "LICENSE.pillow": "not an image",
}


def test_every_odd_picture_is_either_read_or_named(shared):
    names = {path.name for path in (shared / "data" / "odd_images").iterdir()}
    assert names == ODD_PICTURES.keys() | ODD_ERRORS.keys()


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_an_odd_picture_is_read(shared, name):
    shape, at, colour = ODD_PICTURES[name]
    picture = read_image(shared / "data" / "odd_images" / name)
    assert picture.shape == (*shape, 3)
    if colour is not None:
        np.testing.assert_allclose(picture[at].astype(int), colour, atol=12)


@pytest.mark.parametrize("name", ODD_ERRORS)
def test_an_odd_picture_that_cannot_be_read_is_named(shared, name):
    with pytest.raises(ImageError, match=rf"{name}: .*{ODD_ERRORS[name]}"):
        read_image(shared / "data" / "odd_images" / name)


def test_the_same_scene_stored_nine_ways_is_the_same_picture(shared):
    pictures = [read_image(shared / f"data/odd_images/exif_landscape_{number}.jpg") for number in range(9)]
    small = [np.asarray(Image.fromarray(picture).resize((90, 60)), int) for picture in pictures]
    for other in small[1:]:
        difference = np.abs(other - small[0])
        difference[24:36, 36:54] = 0  # the number written in the middle
        assert difference.mean() < 3


def test_a_turned_portrait_is_the_same_picture_in_jpeg_and_webp(shared):
    folder = shared / "data" / "odd_images"
    names = ("hopper_orientation_3.jpg", "hopper_orientation_6.jpg", "hopper_orientation_8.webp")
    first, *others = (read_image(folder / name).astype(int) for name in names)
    for other in others:
        assert np.abs(other - first).mean() < 6
    grey = read_image(folder / "hopper_gray.jpg").astype(int)
    assert np.abs(grey.mean(2) - first @ (0.299, 0.587, 0.114)).mean() < 6


def test_the_cats_are_the_same_picture_in_jpeg_and_png(shared):
    folder = shared / "data" / "coco_039769"
    jpeg, png_picture = (read_image(folder / f"000000039769.{kind}") for kind in ("jpg", "png"))
    np.testing.assert_array_equal(jpeg, png_picture)
    assert jpeg.shape == (480, 640, 3)
