"""Detections drawn into their image: boxes and names that read on any background, at any size.

A line in the colour of its class runs between two thin lines of black or white, whichever stands out from it, so that
one of the three differs from whatever lies behind. Names stand on tags of the same colour, each where it covers the
least of other tags and of small objects.
"""

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Array, Float, Int, Real, UInt8
from PIL import Image, ImageDraw, ImageFont

from rtdetrv2_jax.palette import Colour, class_colour, ink_on


class Frame(NamedTuple):
    """The drawn outline of a box: the pixels from `left` up to but without `right`, `line` of them wide in colour."""

    left: int
    top: int
    right: int
    bottom: int
    line: int
    edge: int


class Tag(NamedTuple):
    """A name on its ground: the pixels from `left` up to but without `right`, and the text written there."""

    left: int
    top: int
    right: int
    bottom: int
    text: str


def draw_detections(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    boxes_xyxy_pixels: Real[Array | np.ndarray, "q 4"],
    labels: Int[Array | np.ndarray, " q"],
    names: Sequence[str],
    scores: Float[Array | np.ndarray, " q"] | None = None,
    font: str | Path | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """A copy of an image with boxes and their names in it, the best scores on top.

    Boxes are clipped to the image; those outside of it, or not finite, are left out. Names that find
    no room, as happens among hundreds, are left out too, the lowest scores first. A name that the font can't write
    loses its accents, and if that does not help gives way to "#" and its label.

    Args:
        image: RGB.
        boxes_xyxy_pixels: Left, top, right and bottom, in pixels of the image.
        labels: What the colours follow: a label has the same one in every image.
        names: What to write at each box.
        scores: Written behind the names; without them the order of the boxes decides, first on top.
        font: A TrueType or OpenType file, for scripts other than ASCII; Pillow's own font where it is None.

    Raises:
        ValueError: There are not as many labels, names or scores as boxes.
        OSError: The font can't be read.
    """
    counts = {"boxes": len(boxes_xyxy_pixels), "labels": len(labels), "names": len(names)}
    counts |= {} if scores is None else {"scores": len(scores)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected one label, name and score for each box, got {counts}: pass lists of one length.")
    height, width = image.shape[:2]
    letters = load_font(text_size(height, width), font)
    name_of = functools.cache(functools.partial(writable, font=letters))
    boxes = np.asarray(boxes_xyxy_pixels, np.float64)
    sureness = None if scores is None else np.asarray(scores, np.float64)
    order = range(len(boxes)) if sureness is None else np.argsort(-sureness, kind="stable").tolist()
    order = [index for index in order if is_visible(boxes[index], height=height, width=width)]
    frames = [frame_of(boxes[index], height=height, width=width) for index in order]
    colours = [class_colour(int(labels[index])) for index in order]
    texts = [name_of(names[index], label=int(labels[index])) for index in order]
    if sureness is not None:
        texts = [f"{text} {sureness[index]:.2f}" for text, index in zip(texts, order, strict=True)]
    tags = place_tags(texts, frames, font=letters, height=height, width=width)

    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    drawn = list(zip(tags, frames, colours, strict=True))[::-1]
    for _, frame, colour in drawn:
        _draw_frame(draw, frame, colour)
    for tag, frame, colour in drawn:
        if tag is not None:
            _draw_tie(draw, tag, frame, colour)
    for tag, _, colour in drawn:
        if tag is not None:
            _draw_tag(draw, tag, colour, font=letters)
    return np.array(canvas)


def text_size(height: int, width: int) -> int:
    """The pixels of a line of text in an image: legible in thumbnails, and a smaller share of larger images."""
    return max(10, round(13 * (height * width / (480 * 640)) ** 0.38))


def load_font(size: int, file: str | Path | None = None) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    font = ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    return cast(ImageFont.FreeTypeFont, font)  # what load_default gives whenever it is asked for a size


def writable(name: str, *, label: int, font: ImageFont.FreeTypeFont) -> str:
    """A name as one line of glyphs that the font has."""
    line = " ".join(name.split())[:100]
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", line) if not unicodedata.combining(letter))
    return next((text for text in (line, plain) if text and not _lacks(font, text)), f"#{label}")


def is_visible(box: Float[np.ndarray, "4"], *, height: int, width: int) -> bool:
    """Whether some of a box lies in the image; nothing does of one whose sides are swapped or not finite."""
    left, top, right, bottom = box
    return bool(np.isfinite(box).all() and max(left, 0) <= min(right, width) and max(top, 0) <= min(bottom, height))


def frame_of(box: Float[np.ndarray, "4"], *, height: int, width: int) -> Frame:
    """The outline of a visible box: its coloured line is centred on the box's edges, and thinner round small boxes."""
    left, top, right, bottom = np.clip(box, 0, (width, height, width, height))
    widest = max(1, round(text_size(height, width) / 5))
    line = int(np.clip(round(min(right - left, bottom - top) / 8), 1, widest))
    edge = max(1, round(line / 3))
    reach = line / 2 + edge
    return Frame(
        left=max(0, round(left - reach)),
        top=max(0, round(top - reach)),
        right=min(width, round(right + reach)),
        bottom=min(height, round(bottom + reach)),
        line=line,
        edge=edge,
    )


def place_tags(
    texts: Sequence[str], frames: Sequence[Frame], *, font: ImageFont.FreeTypeFont, height: int, width: int
) -> list[Tag | None]:
    """A place for each text within the image, at its frame or near; None where there is no room for it.

    The first choose first. Each takes the place that hides the least of the tags before it and of frames that are
    small, and among equals the most usual: on top of its box at the left. A tag that would still hide much of others,
    or that comes when half of the image is under tags, is left out: names on top of names tell nothing.
    """
    corners = np.array([frame[:4] for frame in frames], np.float32).reshape(-1, 4)
    areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    taken = np.zeros((0, 4), np.float32)
    room = height * width / 2
    tags: list[Tag | None] = []
    for number, frame in enumerate(frames):
        tags.append(None)
        text, size = _fitted(texts[number], font=font, height=height, width=width)
        area = size[0] * size[1]
        if not text or area > room:
            continue
        places = np.clip(_places(frame, *size), 0, (width - size[0], height - size[1]))
        grounds = np.concatenate([places, places + size], axis=1).astype(np.float32)
        hidden_tags = _overlaps(grounds, taken).sum(axis=1) / area
        hidden_frames = _overlaps(grounds, corners) / np.maximum(areas, 4 * area)
        hidden_frames[:, number] = 0
        cost = 4 * hidden_tags + hidden_frames.sum(axis=1) + 0.01 * np.arange(len(places))
        best = int(cost.argmin())
        if hidden_tags[best] > 0.08:
            continue
        room -= area
        taken = np.concatenate([taken, grounds[best, None]])
        tags[-1] = Tag(*map(int, grounds[best]), text=text)
    return tags


def _places(frame: Frame, width: int, height: int) -> list[tuple[int, int]]:
    """Left and top of a tag of a size at a frame, the most usual first: outside, inside, along the edges, near it."""
    far_x, far_y = frame.right - width, frame.bottom - height
    above, below = frame.top - height, frame.bottom
    places = [(frame.left, above), (frame.left, frame.top), (far_x, above), (frame.left, below), (far_x, below)]
    places += [(far_x, frame.top), (frame.left, far_y), (far_x, far_y)]
    places += [(x, y) for y in (frame.top, far_y) for x in (frame.right, frame.left - width)]
    for share in (0.25, 0.5, 0.75):
        x, y = round(frame.left + share * (far_x - frame.left)), round(frame.top + share * (far_y - frame.top))
        places += [(x, above), (x, frame.top), (frame.left, y), (far_x, y), (x, below), (x, far_y)]
    for rows in (1, 2, 3):
        across, down = rows * width // 2, rows * (height + 2)
        for x in (frame.left, far_x, frame.left - across, far_x + across):
            places += [(x, above - down), (x, below + down)]
    return places


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Pixels that each box has in common with each of the others."""
    left, top, right, bottom = boxes.T[:, :, None]
    wide = np.minimum(right, others[:, 2]) - np.maximum(left, others[:, 0])
    tall = np.minimum(bottom, others[:, 3]) - np.maximum(top, others[:, 1])
    return np.maximum(wide, 0) * np.maximum(tall, 0)


def _padding(font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    line = sum(font.getmetrics())
    return max(2, round(line / 5)), max(1, round(line / 12))


def _fitted(text: str, *, font: ImageFont.FreeTypeFont, height: int, width: int) -> tuple[str, tuple[int, int]]:
    """As much of a text as the image is wide, and the size of its tag; nothing where none of it fits."""
    across, down = _padding(font)
    tall = sum(font.getmetrics()) + 2 * down
    for end in range(len(text), 0, -1):
        part = text if end == len(text) else f"{text[:end].rstrip()}…"
        wide = int(np.ceil(font.getlength(part))) + 2 * across
        if wide <= width and tall <= height:
            return part, (wide, tall)
    return "", (0, 0)


def _lacks(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font would draw its sign for a missing letter somewhere in a text."""
    missing = _drawn("\uffff", font)
    return any(not letter.isprintable() or _drawn(letter, font) == missing for letter in set(text) - {" "})


def _drawn(letter: str, font: ImageFont.FreeTypeFont) -> bytes:
    canvas = Image.new("L", (2 * round(font.size), 2 * round(font.size)))
    ImageDraw.Draw(canvas).text((0, 0), letter, fill=255, font=font)
    return canvas.tobytes()


def _draw_frame(draw: ImageDraw.ImageDraw, frame: Frame, colour: Colour) -> None:
    edge = frame.edge
    inner = (frame.left + edge, frame.top + edge, frame.right - edge, frame.bottom - edge)
    _draw_outline(draw, frame[:4], ink_on(colour), width=frame.line + 2 * edge)
    _draw_outline(draw, inner, colour, width=frame.line)


def _draw_outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour, *, width: int) -> None:
    """A band along the inside of a box; Pillow alone would go beyond one that is narrower than two bands."""
    left, top, right, bottom = box
    shorter = min(right - left, bottom - top)
    if shorter > 0:
        solid = colour if shorter <= 2 * width else None
        draw.rectangle((left, top, right - 1, bottom - 1), fill=solid, outline=colour, width=0 if solid else width)


def _draw_tie(draw: ImageDraw.ImageDraw, tag: Tag, frame: Frame, colour: Colour) -> None:
    """A line between a tag and a frame that it does not touch."""
    start, end = [], []
    for near, far, other_near, other_far in zip(tag[:2], tag[2:4], frame[:2], frame[2:4], strict=True):
        middle = min(max((other_near + other_far) // 2, near), far - 1)
        start.append(middle)
        end.append(min(max(middle, other_near), other_far - 1))
    if max(abs(start[0] - end[0]), abs(start[1] - end[1])) > 1:
        draw.line((*start, *end), fill=ink_on(colour), width=frame.line + 2 * frame.edge)
        draw.line((*start, *end), fill=colour, width=frame.line)


def _draw_tag(draw: ImageDraw.ImageDraw, tag: Tag, colour: Colour, *, font: ImageFont.FreeTypeFont) -> None:
    across, down = _padding(font)
    draw.rectangle((tag.left, tag.top, tag.right - 1, tag.bottom - 1), fill=colour, outline=ink_on(colour))
    baseline = tag.top + down + font.getmetrics()[0]
    draw.text((tag.left + across, baseline), tag.text, fill=ink_on(colour), font=font, anchor="ls")
