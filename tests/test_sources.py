import functools
import http.server
import io
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rtdetrv2_jax import sources
from rtdetrv2_jax.image import read_image
from rtdetrv2_jax.sources import ImageError, describe, find_images


def scene():
    return np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# Names


def test_a_source_has_a_short_printable_name():
    assert describe("photos/street.jpg") == describe(Path("photos/street.jpg")) == "photos/street.jpg"
    assert describe("https://me:secret@host.org/a/b.jpg?token=secret#top") == "https://host.org/a/b.jpg"
    assert describe("a\nb\udcff") == "a�b�"
    assert len(describe("y" * 10_000)) == 160
    assert describe(b"12345") == "<5 bytes>"
    assert describe(scene()) == describe(jnp.asarray(scene())) == describe(scene()[:, :, 0]) == "<array 24x36>"
    assert describe(Image.fromarray(scene())) == "<PIL image 24x36>"


def test_an_opened_pil_image_is_named_by_its_file(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(scene()))
    with Image.open(tmp_path / "cat.png") as opened:
        assert describe(opened) == str(tmp_path / "cat.png")


# Patterns


def test_files_folders_globs_and_addresses_are_found_in_order_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos/deep").mkdir(parents=True)
    names = ["photos/b.JPG", "photos/a.png", "photos/deep/c.webp", "photos/notes.txt", "photos/.hidden.png", "a[1].png"]
    for name in names:
        Path(name).touch()
    address = "https://host.org/x.png?size=2"
    assert find_images(["photos"]) == ["photos/a.png", "photos/b.JPG"]
    assert find_images(["photos/**/*"]) == ["photos/a.png", "photos/b.JPG", "photos/deep/c.webp"]
    assert find_images([f"{tmp_path}/*/*.png"]) == [f"{tmp_path}/photos/a.png"]
    assert find_images([address, "photos/b.JPG", "a[1].png", "photos"]) == [
        address,
        "photos/b.JPG",
        "a[1].png",
        "photos/a.png",
    ]
    assert find_images([]) == []


def test_a_folder_of_folders_alone_gets_the_pattern_that_reaches_into_them(tmp_path):
    inner = tmp_path / "data" / "images"
    inner.mkdir(parents=True)
    (inner / "a.png").touch()
    with pytest.raises(ImageError, match=r"holds 0 files.*; for those in its folders, give '(.*)'") as caught:
        find_images([str(tmp_path / "data")])
    pattern = str(caught.value).partition("give '")[2].partition("'")[0]
    assert find_images([pattern]) == [str(inner / "a.png")]


def test_patterns_that_find_nothing_are_all_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").touch()
    with pytest.raises(ImageError) as caught:
        find_images(["gone.jpg", "empty", "*.jpg", "*.txt", "x" * 5000])
    lines = str(caught.value).splitlines()
    assert lines[0] == "gone.jpg: no such file or folder"
    assert lines[1].startswith("empty: a folder that holds 0 files, none of them an image (.avif")
    assert lines[2].startswith("*.jpg: matches 0 files, none of them an image")
    assert lines[3].startswith("*.txt: matches 1 files, none of them an image")
    assert lines[4].endswith("File name too long")
    assert lines[5].startswith("Give image files")


# Addresses


@pytest.fixture
def server(tmp_path):
    """The address of a server that hands out the files of `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_address_is_downloaded(server, tmp_path, monkeypatch):
    (tmp_path / "grüner platz.png").write_bytes(encoded(scene()))
    np.testing.assert_array_equal(read_image(f"{server}/grüner platz.png?token=secret"), scene())
    (tmp_path / "page.html").write_text("<html></html>")
    with pytest.raises(ImageError, match=r"page\.html: a web page, not an image"):
        read_image(f"{server}/page.html")
    with pytest.raises(ImageError, match=r"/gone\.png: the server answered 404 File not found\. Check"):
        read_image(f"{server}/gone.png?token=secret")
    monkeypatch.setattr(sources, "URL_BYTES_LIMIT", 10)
    with pytest.raises(ImageError, match="more than 10 bytes"):
        read_image(f"{server}/grüner platz.png")
    monkeypatch.setattr(sources, "URL_BYTES_LIMIT", 10_000)
    monkeypatch.setattr(sources, "URL_SECONDS", 0.0)
    with pytest.raises(ImageError, match=r"not (there after|downloaded)"):
        read_image(f"{server}/grüner platz.png")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x.png", "http://[broken/x.png", "http://", "https://h:x/y"])
def test_an_address_that_does_not_answer_is_an_error(address):
    with pytest.raises(ImageError, match=r"not downloaded: .+\. Check the address"):
        read_image(address)
