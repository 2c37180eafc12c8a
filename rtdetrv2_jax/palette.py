"""A colour for every class, and the ink that reads on it."""

import functools

import numpy as np

Colour = tuple[int, int, int]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
COLOURS = 128
"""After so many labels the colours come round again."""

# Source of the matrices: Björn Ottosson, A perceptual color space for image processing (Oklab), 2020.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def class_colour(label: int) -> Colour:
    """The colour of a label, as different from those of all lower labels as can be."""
    return _palette()[label % COLOURS]


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has more contrast on a colour: at least 4.5 on any.

    Source: W3C, Web Content Accessibility Guidelines 2.1, relative luminance and contrast ratio.
    """
    luminance = float(_linear_light(np.array(colour)) @ (0.2126, 0.7152, 0.0722))
    return BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else WHITE


def _linear_light(colours: np.ndarray) -> np.ndarray:
    """Levels of sRGB, 0 to 255, as shares of light, 0 to 1."""
    values = np.asarray(colours) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@functools.cache
def _palette() -> tuple[Colour, ...]:
    """Bright colours, each the farthest from all before it, in a space where distance is how different they look."""
    levels = np.arange(0, 256, 17)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    cones = _linear_light(colours) @ _TO_CONES.T
    places = np.cbrt(cones) @ _TO_OKLAB.T
    lightness, chroma = places[:, 0], np.hypot(places[:, 1], places[:, 2])
    bright = (lightness > 0.5) & (lightness < 0.93) & (chroma > 0.07)
    colours, places = colours[bright], places[bright]
    chosen = [int(np.abs(colours - (255, 85, 51)).sum(axis=1).argmin())]
    distances = np.full(len(places), np.inf)
    while len(chosen) < COLOURS:
        distances = np.minimum(distances, np.linalg.norm(places - places[chosen[-1]], axis=1))
        chosen.append(int(distances.argmax()))
    return tuple((int(red), int(green), int(blue)) for red, green, blue in colours[chosen])
