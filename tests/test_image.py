import inspect
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax.image import ImageError, read_image


def scene(height=24, width=36):
    """A picture that looks different from every side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 3] = (255, 30, 20)
    pixels[height // 3 :, width // 2 :, 1] = np.linspace(40, 250, width - width // 2).astype(np.uint8)
    pixels[:, :, 2] = np.linspace(0, 200, height).astype(np.uint8)[:, None]
    return pixels


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(stream, kind, **options)
    return stream.getvalue()


# Sources


def test_a_path_a_string_bytes_a_pil_image_and_an_array_give_the_same_picture(tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(encoded(scene()))
    sources = [path, str(path), path.read_bytes(), Image.open(path), scene(), jnp.asarray(scene()), scene() / 255]
    for source in sources:
        picture = read_image(source)
        np.testing.assert_array_equal(picture, scene())
        assert picture.dtype == np.uint8


def test_the_picture_has_memory_of_its_own():
    source = scene()
    picture = read_image(source)
    assert not np.shares_memory(picture, source)
    for other in (picture, read_image(encoded(source)), read_image(source[:, :, 0])):
        other[0, 0] = 7


def test_a_pil_image_is_left_as_it_was():
    source = Image.fromarray(scene()).quantize(16)
    source.info["transparency"] = 3
    read_image(source)
    assert source.info["transparency"] == 3
    assert source.mode == "P"


def test_no_file_stays_open(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("counts open files in /proc, which this system lacks")
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    good.write_bytes(encoded(scene(), "JPEG"))
    bad.write_bytes(good.read_bytes()[:300])
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        read_image(good)
        with pytest.raises(ImageError):
            read_image(bad)
    assert len(list(descriptors.iterdir())) == before


def test_threads_read_the_same_pictures_as_one(tmp_path):
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(encoded(np.roll(scene(), number, axis=1)))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(read_image, files))
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture, np.roll(scene(), number, axis=1))


# Orientation


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, 1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p, -1)),
        (0, lambda p: p),
        (9, lambda p: p),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_gives_the_upright_picture(tmp_path, orientation, stored, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    options = {"lossless": True} if kind == "WEBP" else {}
    path.write_bytes(encoded(np.ascontiguousarray(stored(scene())), kind, exif=exif, **options))
    with Image.open(path) as opened:
        for source in (path, path.read_bytes(), opened):
            np.testing.assert_array_equal(read_image(source), scene())


def test_a_damaged_exif_block_does_not_cost_the_picture():
    data = encoded(scene(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")
    np.testing.assert_array_equal(read_image(data), scene())


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX"])
def test_every_mode_becomes_what_pillow_makes_of_it(mode):
    source = Image.fromarray(scene()).convert("LA" if mode == "PA" else mode).convert(mode)
    np.testing.assert_array_equal(read_image(source), np.asarray(source.convert("RGB")))


def test_alpha_is_dropped_and_the_colours_under_it_stay():
    alpha = np.linspace(0, 255, scene()[:, :, 0].size).astype(np.uint8).reshape(scene().shape[:2])
    pixels = np.dstack([scene(), alpha])
    np.testing.assert_array_equal(read_image(encoded(pixels)), scene())
    np.testing.assert_array_equal(read_image(pixels), scene())


def test_colours_multiplied_by_alpha_are_divided_again():
    source = Image.fromarray(np.full((2, 2, 4), (200, 100, 40, 128), np.uint8)).convert("RGBa")
    np.testing.assert_allclose(read_image(source).astype(int), np.full((2, 2, 3), (200, 100, 40)), atol=2)
    np.testing.assert_array_equal(read_image(Image.new("La", (2, 2))), np.zeros((2, 2, 3)))


@pytest.mark.parametrize("transparency", [5, bytes(range(0, 160, 10))])
def test_a_transparent_palette_gives_its_colours_without_a_warning(transparency):
    source = Image.fromarray(scene()).quantize(16)
    data = encoded(source, transparency=transparency)
    np.testing.assert_array_equal(read_image(data), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    levels = np.array([[0, 127, 128, 129], [257, 32768, 65406, 65535]], np.uint16)
    expected = np.array([[0, 0, 0, 1], [1, 128, 254, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(encoded(levels, kind)), expected[:, :, None].repeat(3, 2))
    wide = Image.fromarray(levels.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(read_image(wide)[:, :, 1], expected)
    with pytest.raises(ImageError, match="grey values from 0 to 70000, expected 0 to 65535"):
        read_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_float_grey_is_taken_from_0_to_1_or_from_0_to_255():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    for values in (levels, levels / 255):
        np.testing.assert_array_equal(read_image(Image.fromarray(values))[:, :, 0], levels)
    for values in (levels - 1, levels * 2, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(ImageError, match="grey values"):
            read_image(Image.fromarray(values))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_image(data), np.full((8, 8, 3), 10))


# Arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_whole_numbers_from_0_to_255_are_levels(dtype):
    np.testing.assert_array_equal(read_image(scene().astype(dtype)), scene())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1_round_to_the_nearest_level(dtype):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read_image((levels / 255).astype(dtype))[:, :, 2], levels)
    assert read_image(np.full((1, 1), 1 + 1e-6, dtype)).max() == 255


def test_grey_arrays_have_one_channel_or_none():
    grey = scene()[:, :, 2]
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(read_image(array), grey[:, :, None].repeat(3, 2))


@pytest.mark.parametrize(
    ("array", "cause"),
    [
        (np.zeros((3, 48, 64), np.uint8), r"<array 3x48x64>: .*channel-first.*transpose\(1, 2, 0\)"),
        (np.zeros((2, 48, 64, 3), np.uint8), "looks like a batch"),
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.full((4, 5, 3), 256, np.int32), "integers from 256 to 256"),
        (np.full((4, 5, 3), -1, np.int8), "integers from -1 to -1"),
        (np.full((4, 5, 3), 200.0, np.float32), "floats from 200.0 to 200.0: scale them to 0..1"),
        (np.full((4, 5, 3), np.nan, np.float32), "NaN"),
        (np.full((4, 5, 3), np.inf, np.float32), "floats from inf"),
        (np.zeros((4, 5, 3), bool), "dtype bool"),
        (np.zeros((4, 5, 3), complex), "dtype complex128"),
    ],
)
def test_an_array_that_is_no_image_is_an_error_that_says_what_is_accepted(array, cause):
    with pytest.raises(ImageError, match=f"(?s){cause}.*integers 0 to 255, or floats 0 to 1"):
        read_image(array)


def test_what_is_no_source_is_an_error_that_says_what_is_accepted():
    unchecked = inspect.unwrap(read_image)  # without the tests' own type checks
    for source in (["street.jpg"], None, 7):
        with pytest.raises(ImageError, match=f"<{type(source).__name__}>: not an image. Give a path"):
            unchecked(source)
