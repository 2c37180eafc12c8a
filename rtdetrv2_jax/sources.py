"""Where images come from: files, folders, globs and addresses; what each is called in a message.

Nothing here looks at pixels: `rtdetrv2_jax.image` turns a source into them.
"""

import glob
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Which files of a folder or glob `find_images` takes for images; reading looks at the content alone."""

URL_BYTES_LIMIT = 128 * 1024 * 1024
URL_SECONDS = 30.0


class ImageError(ValueError):
    """An image that cannot be read. The message names it, the cause, and what to do."""


@runtime_checkable
class HasArray(Protocol):
    """Anything that NumPy can view: its own arrays, those of JAX, CPU tensors of PyTorch."""

    def __array__(self) -> np.ndarray:
        """Returns the values as a NumPy array."""
        ...


ImageSource = str | os.PathLike | bytes | Image.Image | HasArray
"""What `read_image` reads."""


def describe(source: object) -> str:
    """A short printable name of a source: its path, its URL without query and password, or what it is in memory."""
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        if is_url(name):
            scheme, _, rest = name.partition("://")
            host, slash, path = rest.partition("/")
            name = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0].partition("#")[0]
        name = "".join(letter if letter.isprintable() else "�" for letter in name)
        return name if len(name) <= 160 else f"{name[:60]}...{name[-97:]}"
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return describe(filename) if filename else f"<PIL image {source.height}x{source.width}>"
    shape = getattr(source, "shape", None)
    if not isinstance(shape, tuple):
        return f"<{type(source).__name__}>"
    sides = shape[:2] if len(shape) == 3 and shape[2] in (1, 3, 4) else shape
    return f"<array {'x'.join(map(str, sides))}>"


def is_url(text: str) -> bool:
    """Whether a string is an address to download from rather than a path."""
    return text.lower().startswith(("http://", "https://"))


def find_images(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of the images that patterns name, in the order of the patterns, each once.

    Args:
        patterns: Files and URLs, kept as they are; folders, whose own images are taken in the order of their names;
            globs, where `**` means any depth. Folders and globs give the files with one of `IMAGE_SUFFIXES`.

    Raises:
        ImageError: Some patterns find nothing; all of them are named.
    """
    found: list[str] = []
    faults: list[str] = []
    for pattern in patterns:
        try:
            found += [pattern] if is_url(pattern) else _matches(pattern)
        except (ImageError, OSError) as error:
            faults.append(f"{describe(pattern)}: {getattr(error, 'strerror', None) or error}")
    if faults:
        raise ImageError("\n".join([*faults, "Give image files, folders of images, globs in quotes, or http(s) URLs."]))
    return list(dict.fromkeys(found))


def download(url: str) -> bytes:
    """What an address answers, at most `URL_BYTES_LIMIT` bytes within `URL_SECONDS`.

    Raises:
        ImageError: It does not answer, not in time, or with something that is no file.
    """
    name = describe(url)
    deadline = time.monotonic() + URL_SECONDS
    try:
        address = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(address, headers={"User-Agent": "rtdetrv2_jax"})
        with urllib.request.urlopen(request, timeout=URL_SECONDS) as response:
            if response.headers.get_content_type() == "text/html":
                raise ImageError(f"{name}: a web page, not an image. Give the address of the image file itself.")
            return b"".join(_chunks(response, name=name, deadline=deadline))
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{name}: the server answered {error.code} {error.reason}. Check the address.") from error
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error or type(error).__name__
        raise ImageError(f"{name}: not downloaded: {cause}. Check the address and the connection.") from error


def _matches(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file():  # before globs: a name may hold brackets
        return [str(path)]
    if path.is_dir():
        found, what = [str(file) for file in path.iterdir()], "a folder that holds"
    elif glob.has_magic(pattern):
        found, what = glob.glob(str(path), recursive=True), "matches"  # noqa: PTH207 (Path.glob: no absolute pattern)
    else:
        raise ImageError("no such file or folder")
    images = sorted(name for name in found if _looks_like_image(Path(name)))
    if not images:
        files = [name for name in found if Path(name).is_file()]
        deeper = f"; for those in its folders, give '{pattern}/**'" if path.is_dir() and len(found) > len(files) else ""
        raise ImageError(f"{what} {len(files)} files, none of them an image ({' '.join(IMAGE_SUFFIXES)}){deeper}")
    return images


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _chunks(response: http.client.HTTPResponse, *, name: str, deadline: float) -> Iterator[bytes]:
    total = 0
    while chunk := response.read1(1 << 16):
        total += len(chunk)
        if total > URL_BYTES_LIMIT:
            raise ImageError(f"{name}: more than {URL_BYTES_LIMIT} bytes. Download it yourself and give its path.")
        if time.monotonic() > deadline:
            raise ImageError(f"{name}: not there after {URL_SECONDS:g} s. Download it yourself and give its path.")
        yield chunk
