"""Colours, textures and backgrounds of the synthetic scenes."""

import colorsys
import math
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from rtdetrv2_jax.data.dice import Dice

Colour = tuple[int, int, int]
LEAST_CONTRAST = 75.0
"""Least distance of an object's colours from what lies under it, in levels of a channel."""
COLOUR_TRIES = 12
GLOW = Image.radial_gradient("L")
"""0 in the middle, 255 from the middle of the sides outwards; 256 pixels each way."""
LINE_SCALE = 2
"""Lines are drawn this much finer than pixels, so that they are smooth."""


def colour(dice: Dice, *, saturation: tuple[float, float], brightness: tuple[float, float]) -> Colour:
    """A colour of any hue."""
    red, green, blue = colorsys.hsv_to_rgb(dice.between(0, 1), dice.between(*saturation), dice.between(*brightness))
    return round(red * 255), round(green * 255), round(blue * 255)


def shade(base: Colour, factor: float) -> Colour:
    """The colour made darker (factor below 1), or brought nearer to white (above 1)."""
    red, green, blue = (round(level * factor if factor < 1 else level + (255 - level) * (factor - 1)) for level in base)
    return red, green, blue


def distance(one: Colour, other: Colour) -> float:
    """How different two colours look, in levels of a channel; green counts most, as for the eye."""
    weighted = zip(one, other, (0.3, 0.5, 0.2), strict=True)
    return math.sqrt(sum(weight * (a - b) ** 2 for a, b, weight in weighted))


def object_paint(dice: Dice, size: tuple[int, int], *, under: Colour) -> Image.Image:
    """A picture to cut an object out of: textured, its colours away from the one that lies under it.

    Args:
        dice: draws.
        size: (width, height).
        under: the mean colour of the place.
    """
    pairs = [_two_colours(dice) for _ in range(COLOUR_TRIES)]
    contrasts = {pair: min(distance(one, under) for one in pair) for pair in pairs}
    clear = [pair for pair in pairs if contrasts[pair] >= LEAST_CONTRAST]
    one, other = clear[0] if clear else max(pairs, key=contrasts.__getitem__)
    if dice.chance(0.3):
        return Image.new("RGB", size, one)
    return two_tone(one, other, texture(dice, size))


def _two_colours(dice: Dice) -> tuple[Colour, Colour]:
    one = colour(dice, saturation=(0.25, 1.0), brightness=(0.15, 1.0))
    return one, shade(one, dice.pick((0.55, 0.7, 1.3, 1.5)))


def two_tone(one: Colour, other: Colour, mask: Image.Image) -> Image.Image:
    """One colour where the mask is 255, the other where it is 0, mixtures between."""
    return Image.composite(Image.new("RGB", mask.size, one), Image.new("RGB", mask.size, other), mask)


def texture(dice: Dice, size: tuple[int, int]) -> Image.Image:
    """A grey pattern of 0 to 255; `size` is (width, height)."""
    patterns: tuple[Callable[[Dice, tuple[int, int]], Image.Image], ...] = (_gradient, _glow, _stripes, _dots, _clouds)
    return dice.pick(patterns)(dice, size)


def _gradient(dice: Dice, size: tuple[int, int]) -> Image.Image:
    corners = Image.fromarray(dice.bytes(2, 2))
    return corners.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _glow(dice: Dice, size: tuple[int, int]) -> Image.Image:
    left, top = dice.between(0, 100), dice.between(0, 100)
    return GLOW.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + 150, top + 150))


def _stripes(dice: Dice, size: tuple[int, int]) -> Image.Image:
    width, height = (extent * LINE_SCALE for extent in size)
    period = max(6.0, dice.between(0.12, 0.3) * min(size)) * LINE_SCALE
    angle = dice.between(0, math.pi)
    cos, sin, reach = math.cos(angle), math.sin(angle), (width + height) / 2
    fine = Image.new("L", (width, height))
    draw = ImageDraw.Draw(fine)
    for step in range(-math.ceil(reach / period), math.ceil(reach / period) + 1):
        x, y = width / 2 - step * period * sin, height / 2 + step * period * cos
        ends = [(round(x + along * cos), round(y + along * sin)) for along in (-reach, reach)]
        draw.line(ends, fill=255, width=round(period / 2))
    return fine.reduce(LINE_SCALE)


def _dots(dice: Dice, size: tuple[int, int]) -> Image.Image:
    width, height = (extent * LINE_SCALE for extent in size)
    period = max(7.0, dice.between(0.12, 0.3) * min(size)) * LINE_SCALE
    radius = round(period * dice.between(0.22, 0.36))
    fine = Image.new("L", (width, height))
    draw = ImageDraw.Draw(fine)
    for row in range(math.ceil(height / period) + 1):
        for column in range(math.ceil(width / period) + 1):
            x, y = round((column + row % 2 / 2) * period), round(row * period)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return fine.reduce(LINE_SCALE)


def _clouds(dice: Dice, size: tuple[int, int]) -> Image.Image:
    cells = dice.integer(3, 9)
    return Image.fromarray(dice.bytes(cells, cells)).resize(size, Image.Resampling.BICUBIC)


def background(dice: Dice, size: tuple[int, int]) -> Image.Image:
    """Texture upon texture, soft spots, strokes and puddles, but no object; `size` is (width, height)."""
    one, other = (colour(dice, saturation=(0.0, 0.6), brightness=(0.15, 0.95)) for _ in range(2))
    canvas = two_tone(one, other, dice.pick((_clouds, _gradient, _glow))(dice, size))
    if dice.chance(0.6):
        amount = dice.integer(15, 60)
        mask = texture(dice, size).point([level * amount // 255 for level in range(256)])
        canvas.paste(colour(dice, saturation=(0.0, 0.7), brightness=(0.1, 1.0)), (0, 0), mask)
    for _ in range(dice.integer(0, 3)):
        _soft_spot(dice, canvas)
    for _ in range(dice.integer(0, 4)):
        ink = colour(dice, saturation=(0.0, 0.9), brightness=(0.0, 1.0))
        canvas.paste(ink, (0, 0), _strokes(dice, size))
    return canvas


def _soft_spot(dice: Dice, canvas: Image.Image) -> None:
    """A spot that fades out, so that nobody can say where it ends."""
    extent = round(dice.between(0.15, 0.6) * min(canvas.size))
    fading = [max(0, 150 - level) * 2 // 3 for level in range(256)]
    spot = GLOW.point(fading).resize((extent, round(extent * dice.between(0.5, 1))), Image.Resampling.BILINEAR)
    corner = (round(dice.between(-0.2, 0.9) * canvas.width), round(dice.between(-0.2, 0.9) * canvas.height))
    canvas.paste(colour(dice, saturation=(0.0, 0.8), brightness=(0.0, 1.0)), corner, spot)


def _strokes(dice: Dice, size: tuple[int, int]) -> Image.Image:
    """Where ink is: long lines, a wandering curve, scribble that looks like writing, or a puddle."""
    width, height = (extent * LINE_SCALE for extent in size)
    fine = Image.new("L", (width, height))
    draw = ImageDraw.Draw(fine)
    ink, thickness = dice.integer(120, 255), dice.integer(1, 3) * LINE_SCALE
    kind = dice.pick(("lines", "curve", "writing", "puddle"))
    if kind == "lines":
        for _ in range(dice.integer(1, 4)):
            ends = [(round(dice.between(0, width)), round(dice.between(0, height))) for _ in range(2)]
            draw.line(ends, fill=ink, width=thickness)
    elif kind == "curve":
        draw.line(_wander(dice, (width, height)), fill=ink, width=thickness, joint="curve")
    elif kind == "puddle":
        draw.polygon(_puddle(dice, (width, height)), fill=ink // 2)
    else:
        _write(dice, draw, (width, height), ink=ink)
    return fine.reduce(LINE_SCALE)


def _wander(dice: Dice, size: tuple[int, int]) -> list[tuple[int, int]]:
    x, y, heading = dice.between(0, size[0]), dice.between(0, size[1]), dice.between(0, 2 * math.pi)
    step, points = min(size) / 25, [(round(x), round(y))]
    for _ in range(dice.integer(12, 40)):
        heading += dice.between(-0.6, 0.6)
        x, y = x + step * math.cos(heading), y + step * math.sin(heading)
        points.append((round(x), round(y)))
    return points


def _puddle(dice: Dice, size: tuple[int, int]) -> list[tuple[int, int]]:
    """An outline with random bays, unlike any of the shapes."""
    x, y, radius = dice.between(0, size[0]), dice.between(0, size[1]), dice.between_logs(0.04, 0.25) * min(size)
    waves = [(turns, dice.between(0.18, 0.3), dice.between(0, 2 * math.pi)) for turns in (2, 3, 4)]
    points = []
    for step in range(60):
        angle = 2 * math.pi * step / 60
        reach = radius * (1 + sum(height * math.sin(turns * angle + phase) for turns, height, phase in waves))
        points.append((round(x + reach * math.cos(angle)), round(y + reach * math.sin(angle))))
    return points


def _write(dice: Dice, draw: ImageDraw.ImageDraw, size: tuple[int, int], *, ink: int) -> None:
    letter = dice.between(0.018, 0.04) * min(size)
    left, top = dice.between(0, 0.7) * size[0], dice.between(0, 0.9) * size[1]
    for line in range(dice.integer(1, 4)):
        x = left
        for _ in range(dice.integer(2, 6)):
            word = []
            for _ in range(dice.integer(4, 12)):
                word.append((round(x), round(top + line * letter * 2.4 + dice.between(-0.6, 0.6) * letter)))
                x += letter * dice.between(0.25, 0.6)
            draw.line(word, fill=ink, width=LINE_SCALE)
            x += letter


def rim(mask: Image.Image, *, width: float) -> Image.Image:
    """The part of a shape that is near its edge."""
    margin = math.ceil(width) + 1  # a blur takes what is beyond its image for more of the same
    blurred = ImageOps.expand(mask, margin).filter(ImageFilter.BoxBlur(width))
    inner = blurred.point([min(255, max(0, level - 200) * 8) for level in range(256)])
    inner = inner.crop((margin, margin, margin + mask.width, margin + mask.height))
    return ImageChops.darker(mask, ImageChops.invert(inner))
