"""Positional codes and anchors against numbers of the reference."""

import numpy as np
import pytest

from rtdetrv2_jax.ops.positions import INVALID_ANCHOR, anchors, sine_positions


def pyramid(side):
    return tuple((side // stride, side // stride) for stride in (8, 16, 32))


def test_the_code_of_a_small_square_map():
    code = sine_positions((2, 2), 8, temperature=10000.0)
    np.testing.assert_allclose(code[0], [0, 0, 1, 1, 0, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(code[1], [0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995], atol=1e-6)
    np.testing.assert_allclose(code[2], [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1], atol=1e-6)


def test_the_code_of_the_published_size_sums_up():
    code = sine_positions((20, 20), 256, temperature=10000.0)
    assert code.sum(dtype=np.float64) == pytest.approx(45218.707, abs=0.01)
    assert np.abs(code).sum(dtype=np.float64) == pytest.approx(57928.125, abs=0.01)


def test_on_maps_that_are_not_square_token_and_code_keep_together():
    code = sine_positions((2, 3), 4, temperature=10000.0).reshape(2, 3, 4)
    np.testing.assert_allclose(code[1, 2], [np.sin(1), np.cos(1), np.sin(2), np.cos(2)], atol=1e-6)


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (81, (-3.957633, -3.957633, -2.944439, -2.944439)),
        (3240, (0.025001, 0.025001, -2.944439, -2.944439)),
        (6401, (-3.245193, -4.369448, -2.197225, -2.197225)),
        (8399, (3.663562, 3.663562, -1.386294, -1.386294)),
    ],
)
def test_anchors_of_the_published_size(index, wanted):
    logits, valid = anchors(pyramid(640))
    assert valid[index]
    np.testing.assert_allclose(logits[index], wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("side", "count"), [(480, 4489), (512, 5124), (640, 8084), (672, 8929), (736, 10745), (768, 11716), (800, 12533)]
)
def test_as_many_anchors_are_valid_as_in_the_reference(side, count):
    logits, valid = anchors(pyramid(side))
    assert valid.sum() == count
    assert np.all(logits[~valid] == INVALID_ANCHOR)
    assert np.all(np.isfinite(logits))


def test_anchors_lie_at_the_centres_of_their_cells():
    logits, valid = anchors(((2, 3), (1, 2), (1, 1)))
    boxes = 1 / (1 + np.exp(-logits[valid].astype(np.float64)))
    wanted = [(1 / 6, 0.25, 0.05, 0.05), (0.5, 0.25, 0.05, 0.05), (5 / 6, 0.25, 0.05, 0.05)]
    np.testing.assert_allclose(boxes[:3], wanted, atol=1e-6)
    np.testing.assert_allclose(
        boxes[6:], [(0.25, 0.5, 0.1, 0.1), (0.75, 0.5, 0.1, 0.1), (0.5, 0.5, 0.2, 0.2)], atol=1e-6
    )
