"""The shapes of the synthetic scenes: outlines, and what of a pixel grid they cover."""

import math
from typing import NamedTuple

from PIL import Image, ImageDraw

Point = tuple[float, float]
SUBPIXELS = 4
"""Shapes are drawn this much finer than pixels, each way, so that edges are smooth and coverage is known."""


class Part(NamedTuple):
    """A polygon that is added to a shape, or cut out of what is there so far."""

    points: tuple[Point, ...]
    cuts: bool = False


def _ellipse(x: float, y: float, x_radius: float, y_radius: float) -> tuple[Point, ...]:
    angles = [2 * math.pi * step / 72 for step in range(72)]
    return tuple((x + x_radius * math.cos(angle), y + y_radius * math.sin(angle)) for angle in angles)


def _around(*radii: float, corners: int) -> tuple[Point, ...]:
    """A polygon around the origin with the given radii in turn, starting upwards."""
    steps = corners * len(radii)
    turns = [(2 * math.pi * step / steps, radii[step % len(radii)]) for step in range(steps)]
    return tuple((radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in turns)


def _heart() -> tuple[Point, ...]:
    angles = [2 * math.pi * step / 72 for step in range(72)]
    across = [16 * math.sin(angle) ** 3 for angle in angles]
    up = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return tuple((x / 17, -(y + 2.5) / 17) for x, y in zip(across, up, strict=True))


_ARM = 0.3
_QUARTER = ((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM))
_CROSS = tuple(
    point
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1))
    for point in ((x * cos - y * sin, x * sin + y * cos) for x, y in _QUARTER)
)

SHAPES: dict[str, tuple[Part, ...]] = {
    "circle": (Part(_ellipse(0.0, 0.0, 1.0, 1.0)),),
    "square": (Part(((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))),),
    "triangle": (Part(_around(1.0, corners=3)),),
    "star": (Part(_around(1.0, 0.44, corners=5)),),
    "ring": (Part(_ellipse(0.0, 0.0, 1.0, 1.0)), Part(_ellipse(0.0, 0.0, 0.56, 0.56), cuts=True)),
    "cross": (Part(_CROSS),),
    "heart": (Part(_heart()),),
    "arrow": (Part(((1.0, 0.0), (0.2, -0.8), (0.2, -0.28), (-1.0, -0.28), (-1.0, 0.28), (0.2, 0.28), (0.2, 0.8))),),
    "moon": (Part(_ellipse(0.2, 0.0, 1.0, 1.0)), Part(_ellipse(0.72, 0.0, 0.86, 0.86), cuts=True)),
    "fish": (
        Part(((0.3, 0.0), (-1.0, -0.62), (-0.78, 0.0), (-1.0, 0.62))),
        Part(_ellipse(0.25, 0.0, 0.75, 0.5)),
        Part(_ellipse(0.62, -0.12, 0.1, 0.1), cuts=True),
    ),
}
"""Every shape in a frame of about -1 to 1, x to the right and y down. No shape is another one turned."""


def coverage(name: str, *, radius: float, aspect: float, angle: float) -> Image.Image:
    """How much of each pixel a shape covers, 0 to 255, in an image that just holds it.

    Args:
        name: one of `SHAPES`.
        radius: pixels from the middle to an edge of the shape's frame.
        aspect: width by height, before the turn; the area stays.
        angle: the turn in radians, clockwise.
    """
    stretch = math.sqrt(aspect)
    cos, sin = radius * math.cos(angle) * SUBPIXELS, radius * math.sin(angle) * SUBPIXELS
    parts = [
        ([(x * stretch * cos - y / stretch * sin, x * stretch * sin + y / stretch * cos) for x, y in part.points], part)
        for part in SHAPES[name]
    ]
    added = [point for points, part in parts if not part.cuts for point in points]
    left, top = min(x for x, _ in added), min(y for _, y in added)
    right, bottom = max(x for x, _ in added), max(y for _, y in added)
    width, height = (math.ceil(extent / SUBPIXELS) + 1 for extent in (right - left, bottom - top))
    fine = Image.new("L", (width * SUBPIXELS, height * SUBPIXELS))
    draw = ImageDraw.Draw(fine)
    for points, part in parts:
        draw.polygon([(round(x - left), round(y - top)) for x, y in points], fill=0 if part.cuts else 255)
    return fine.reduce(SUBPIXELS)
