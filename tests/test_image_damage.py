import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from rtdetrv2_jax import image as image_module
from rtdetrv2_jax.image import PIXEL_LIMIT, ImageError, read_image


def scene():
    return np.random.default_rng(1).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks):
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def png_header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    path = tmp_path / "cut.img"
    for length in (1, 2, 10, 40, len(data) // 4, len(data) // 2, len(data) * 4 // 5):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut\.img: .+\. (Convert|Download)"):
            read_image(path)


def test_damaged_bytes_give_a_picture_or_an_image_error():
    random = np.random.default_rng(0)
    files = [np.frombuffer(encoded(scene(), kind), np.uint8) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "ICO")]
    for number in range(300):
        data = files[number % len(files)].copy()
        data[random.integers(0, min(len(data), 200), 4)] = random.integers(0, 256, 4)
        with contextlib.suppress(ImageError):
            read_image(data.tobytes())


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty, 0 bytes"),
        (b"\0", "not an image"),
        (b"<html>Not found</html>", "not an image"),
        (bytes(range(256)) * 20, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
        (png(png_header(0, 5), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")), "no(t an image| pixels)"),
    ],
)
def test_bytes_that_are_no_image_are_an_error(tmp_path, data, cause):
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"file\.jpg: .*{cause}"):
        read_image(path)
    with pytest.raises(ImageError, match=f"<{len(data)} bytes>: .*{cause}"):
        read_image(data)


def test_a_picture_without_pixels_is_an_error():
    with pytest.raises(ImageError, match="no pixels"):
        read_image(Image.new("RGB", (0, 5)))


def test_a_file_that_claims_too_many_pixels_is_refused_before_it_is_decoded():
    for width, height in ((100_000, 100_000), (PIXEL_LIMIT + 1, 1)):
        bomb = png(png_header(width, height), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
        with pytest.raises(ImageError, match=f"{width} x {height} pixels, over the limit of {PIXEL_LIMIT}"):
            read_image(bomb)


def test_the_pixel_limit_is_ours_and_pillow_keeps_silent(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # it would warn of 864 pixels, and does so where it is asked
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(encoded(scene()))).close()
    np.testing.assert_array_equal(read_image(encoded(scene())), scene())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(image_module, "PIXEL_LIMIT", scene()[:, :, 0].size - 1)
    with pytest.raises(ImageError, match="36 x 24 pixels, over the limit of 863"):
        read_image(encoded(scene()))


def test_a_text_chunk_that_explodes_is_an_error():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(ImageError, match="too large"):
        read_image(encoded(scene(), pnginfo=text))


def test_what_is_not_a_readable_file_is_an_error_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.png").write_bytes(encoded(scene()))
    monkeypatch.chdir(tmp_path)
    for source, cause in [
        ("street.jpg", rf"^street\.jpg: no such file in {tmp_path}\. Check the path"),
        (tmp_path / "street.jpg", r"street\.jpg: no such file\. Check the path"),
        ("folder", "^folder: a folder. .*find_images"),
        ("pipe", "^pipe: not a regular file"),
        ("", "a folder"),
        ("x" * 5000, r"^x{60}\.\.\.x{97}: File name too long"),
    ]:
        with pytest.raises(ImageError, match=cause):
            read_image(source)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"^secret\.png: permission denied\. Make the file readable"):
        read_image("secret.png")


def test_an_image_error_survives_pickling():
    with pytest.raises(ImageError) as caught:
        read_image(b"")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("limit", [300, 500])
def test_what_pillow_measures_again_is_an_error_that_tells_its_limit_from_ours(monkeypatch, limit):
    """Pillow's TIFF decoder refuses what is over twice its own limit, and warns of what is over the limit."""
    data = encoded(scene(), "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    said = {300: "limit of 600", 500: "limit of 500 where it warns, and this program turns warnings into errors"}
    with pytest.raises(ImageError, match=rf"864 pixels, over Pillow's {said[limit]}\. Raise PIL\.Image\.MAX_IMAGE_PIX"):
        read_image(data)
    if limit == 500:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            np.testing.assert_array_equal(read_image(data), scene())
        assert [type(one.message) for one in caught] == [Image.DecompressionBombWarning]
