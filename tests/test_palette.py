import itertools

import numpy as np

from rtdetrv2_jax.palette import BLACK, COLOURS, WHITE, class_colour, ink_on


def contrast(one, other):
    values = np.array([one, other]) / 255
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return (light.max() + 0.05) / (light.min() + 0.05)


def test_every_label_has_one_colour_and_eighty_classes_have_eighty():
    assert [class_colour(label) for label in range(80)] == [class_colour(label) for label in range(80)]
    assert len({class_colour(label) for label in range(COLOURS)}) == COLOURS
    assert class_colour(COLOURS + 3) == class_colour(3)


def test_colours_are_well_apart_and_the_first_the_most():
    def nearest(count):
        pairs = itertools.combinations(np.array([class_colour(label) for label in range(count)]), 2)
        return min(np.linalg.norm(one - other) for one, other in pairs)

    assert nearest(80) >= 30
    assert nearest(10) >= 80


def test_ink_reads_on_every_colour():
    for colour in itertools.product(range(0, 256, 15), repeat=3):
        assert ink_on(colour) in (BLACK, WHITE)
        assert contrast(colour, ink_on(colour)) >= 4.5
