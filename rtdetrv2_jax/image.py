"""Reading images: whatever holds a picture becomes an upright RGB array, or an error that names it and its fault.

Decoding is safe to run in threads: it touches no global of Pillow, no warning filter, and leaves no file open.
"""

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rtdetrv2_jax.sources import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from rtdetrv2_jax.sources import HasArray, ImageError, ImageSource, describe, download, is_url

PIXEL_LIMIT = 178_956_970
"""Files that claim more pixels than this are refused before they are decoded. Pillow's limit of the same value can be
moved by anyone in the process; this one is ours."""

_ARRAYS = "RGB arrays are (h, w, 3), (h, w, 4), (h, w, 1) or (h, w): integers 0 to 255, or floats 0 to 1"
_OTHERWISE = "decode it yourself and give the array"
_SOURCES = "Give a path, an http(s) URL, the bytes of an image file, a PIL image, or an array"

# What Pillow's decoders raise on damaged files, as feeding them damaged files shows; they promise no smaller set.
# `Warning` is for programs that turn warnings into errors.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError, Warning),
)

# Its decoder hands the file to Ghostscript, an interpreter, which no picture should start.
_REFUSED_FORMATS = frozenset({"EPS"})

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: ImageSource) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of an image, in memory of their own.

    Files, bytes and PIL images are turned as their EXIF orientation says and converted as Pillow's `convert("RGB")`
    does: alpha and palette transparency are dropped, the colours under them stay. Two deliberate differences: 16-bit
    grey (`I;16`, `I`) is scaled from 0..65535 to 0..255 where Pillow clips, and so is float grey (`F`) from 0..1,
    unless its values go on to 255. Of an animation the first frame is read, of a PIL image the current one.

    Args:
        source: A path, an http(s) URL, the bytes of an image file, a PIL image, or an array in RGB order: (h, w, 3),
            (h, w, 4) whose alpha is dropped, (h, w, 1) or (h, w); integers 0 to 255 or floats 0 to 1.

    Raises:
        ImageError: The source is missing, damaged, too large, or holds no picture.
    """
    name = describe(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes):
        return _decode_stream(io.BytesIO(source), name)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return _decode_stream(io.BytesIO(download(path)), name) if is_url(path) else _decode_file(Path(path), name)
    if isinstance(source, HasArray):
        return _array_to_rgb(source, name)
    raise ImageError(f"{name}: not an image. {_SOURCES}. {_ARRAYS}.")


def _decode_file(path: Path, name: str) -> np.ndarray:
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{name}: {what}. Give image files; find_images lists those of a folder.")
        stream = path.open("rb")
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ImageError(f"{name}: no such file{where}. Check the path.") from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied. Make the file readable for this user.") from error
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}. {_SOURCES}.") from error
    with stream:
        return _decode_stream(stream, name)


def _decode_stream(stream: io.BufferedIOBase, name: str) -> np.ndarray:
    if not stream.read(1):
        raise ImageError(f"{name}: empty, 0 bytes. Download or export it again, or leave it out.")
    try:
        image = _identify(stream)
    except _DECODING_ERRORS as error:
        raise _damaged(name, error) from error
    if image is None:
        raise ImageError(
            f"{name}: not an image of a known format, or its header is damaged. Convert it to PNG or JPEG, download or "
            "export it again, or leave it out."
        )
    if image.width * image.height > PIXEL_LIMIT:
        raise _too_large(name, f"{image.width} x {image.height} pixels")
    return _decode(image, name)


def _identify(stream: io.BufferedIOBase) -> Image.Image | None:
    """The image in a stream, its header read and its pixels not, or None where no format knows it.

    This is Pillow's own search, walked here because `Image.open` measures against limits that any code in the process
    can move, and warns between two of them; a warning can be held back only for all threads at once.
    """
    stream.seek(0)
    prefix = stream.read(16)
    tried = set(_REFUSED_FORMATS)
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for name in [name for name in Image.ID if name not in tried]:
            tried.add(name)
            factory, accepts = Image.OPEN[name]
            try:
                answer = accepts is None or accepts(prefix)
                if not answer or isinstance(answer, str):  # a string says what Pillow was built without
                    continue
                stream.seek(0)
                return factory(cast(IO[bytes], stream), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # how a plugin says that the file is of another format
    return None


def _decode(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        if 0 in image.size:
            raise ImageError(f"{name}: no pixels, {image.width} wide and {image.height} high. Leave it out.")
        turn = _UPRIGHT.get(_orientation(image))
        return _to_rgb(image if turn is None else image.transpose(turn), name)
    except ImageError:
        raise
    except _DECODING_ERRORS as error:
        raise _damaged(name, error) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; a picture whose EXIF block is damaged is still a picture, so 1 for it."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODING_ERRORS:
        return 1


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_levels(np.asarray(image), name)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in image.info:
        image = image.copy()  # the caller's image keeps its transparency; with it, Pillow's conversion may warn
        del image.info["transparency"]
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    return np.array(image.convert("RGB"))


def _grey_levels(values: np.ndarray, name: str) -> np.ndarray:
    """Levels 0 to 255 of Pillow's wide grey modes, which say how many bits they have but not which are used."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if low >= 0 and high <= 255:
            return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
        expected = "0 to 1, or 0 to 255"
    else:
        if low >= 0 and high <= 65535:
            return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
        expected = "0 to 65535"
    raise ImageError(f"{name}: grey values from {low} to {high}, expected {expected}. Scale them and give an array.")


def _array_to_rgb(source: HasArray, name: str) -> np.ndarray:
    try:
        values = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"{name}: NumPy cannot view it: {error}. {_ARRAYS}.") from error
    fault = _array_fault(values)
    if fault:
        raise ImageError(f"{name}: {fault}. {_ARRAYS}.")
    if values.dtype.kind == "f":
        values = np.rint(values.astype(np.promote_types(values.dtype, np.float32)) * 255)
    values = values.astype(np.uint8, copy=False).reshape(*values.shape[:2], -1)
    return np.array(np.broadcast_to(values[:, :, :3], (*values.shape[:2], 3)))


def _array_fault(values: np.ndarray) -> str | None:
    """What keeps an array from being an image, or None."""
    shape = values.shape
    if values.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        return f"an array of shape {shape} looks channel-first: transpose it with array.transpose(1, 2, 0)"
    if values.ndim == 4:
        return f"an array of shape {shape} looks like a batch: give its images one by one"
    if values.ndim not in (2, 3) or (values.ndim == 3 and shape[2] not in (1, 3, 4)):
        return f"an array of shape {shape}"
    if 0 in shape:
        return f"an array of shape {shape} has no pixels"
    if values.dtype.kind not in "uif":
        return f"an array of dtype {values.dtype}"
    low, high = values.min(), values.max()
    if values.dtype.kind in "ui" and not (low >= 0 and high <= 255):
        return f"integers from {low} to {high}: scale them to 0..255"
    if values.dtype.kind == "f" and not (np.rint(low * 255) >= 0 and np.rint(high * 255) <= 255):
        return "floats with NaN" if np.isnan(low) else f"floats from {low} to {high}: scale them to 0..1"
    return None


def _damaged(name: str, error: BaseException) -> ImageError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _over_pillows_limit(name, str(error), warned=isinstance(error, Warning))
    cause = str(error).rstrip(".") or type(error).__name__
    return ImageError(f"{name}: {cause}. Download or export it again, or leave it out.")


def _over_pillows_limit(name: str, text: str, *, warned: bool) -> ImageError:
    """What to say where a format measures once more while it decodes: TIFF does, for any image, and GIF."""
    pixels, limit = map(int, re.findall(r"\d+", text)[:2])
    if pixels > PIXEL_LIMIT:
        return _too_large(name, f"{pixels} pixels")
    consequence = " where it warns, and this program turns warnings into errors" if warned else ""
    return ImageError(
        f"{name}: {pixels} pixels, over Pillow's limit of {limit}{consequence}. Raise PIL.Image.MAX_IMAGE_PIXELS if "
        f"you trust the file, or {_OTHERWISE}."
    )


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name}: {size}, over the limit of {PIXEL_LIMIT} that guards against decompression bombs. Make it smaller, or "
        f"{_OTHERWISE}."
    )
