"""The published checkpoints themselves. These tests download them: run them with `pytest -m network`."""

import io
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax import Detector, load_model
from rtdetrv2_jax.image import read_image
from rtdetrv2_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.network

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"

# logits[0, :3, :3] and boxes[0, :3, :3] (centre x, centre y, width), from transformers' conversion script.
EXPECTED = {
    "PekingU/rtdetr_v2_r18vd": (
        [[-3.7045, -5.1913, -6.1787], [-4.0106, -9.3450, -5.2043], [-4.1287, -4.7463, -5.8634]],
        [[0.2582, 0.5497, 0.4764], [0.1684, 0.1985, 0.2120], [0.7665, 0.4146, 0.4669]],
    ),
    "PekingU/rtdetr_v2_r34vd": (
        [[-4.6108, -5.9453, -3.8505], [-3.8702, -6.1136, -5.5677], [-3.7790, -6.4538, -5.9449]],
        [[0.1691, 0.1984, 0.2118], [0.2594, 0.5506, 0.4736], [0.7669, 0.4136, 0.4654]],
    ),
    "PekingU/rtdetr_v2_r50vd": (
        [[-4.7881, -4.6754, -6.1624], [-5.4441, -6.6486, -4.3840], [-3.5455, -4.9318, -6.3544]],
        [[0.2588, 0.5487, 0.4747], [0.5497, 0.2760, 0.0573], [0.7688, 0.4133, 0.4634]],
    ),
    "PekingU/rtdetr_v2_r101vd": (
        [[-4.6162, -4.9189, -4.6656], [-4.4701, -4.4997, -4.9659], [-5.6641, -7.9000, -5.0725]],
        [[0.7707, 0.4124, 0.4585], [0.2589, 0.5492, 0.4735], [0.1688, 0.1993, 0.2108]],
    ),
}


@pytest.fixture(scope="module")
def cats():
    with urllib.request.urlopen(CATS, timeout=60) as response:
        return read_image(io.BytesIO(response.read()).getvalue())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_checkpoint_gives_its_published_values(name, cats):
    model, _ = load_model(name)
    pixels = Preprocessing().prepare(cats).pixels
    output = model(Preprocessing().normalise(jnp.asarray(pixels)[None]))
    logits, boxes = EXPECTED[name]
    np.testing.assert_allclose(output.logits[0, :3, :3], logits, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(output.boxes[0, :3, :3], boxes, atol=1e-3)


def test_the_smallest_model_finds_the_cats_the_remotes_and_the_sofa(cats):
    (result,) = Detector.from_pretrained("PekingU/rtdetr_v2_r18vd")(cats, threshold=0.5)
    assert result.names == ("cat", "cat", "remote", "sofa", "sofa", "remote")
    np.testing.assert_allclose(result.scores[:4], [0.9652, 0.9599, 0.9462, 0.8613], atol=1e-3)
    expected = [
        [341.14, 25.111, 639.98, 372.89],
        [12.780, 56.346, 317.67, 471.34],
        [39.959, 73.117, 175.65, 117.44],
        [-0.10521, 2.9717, 639.89, 473.62],
    ]
    np.testing.assert_allclose(result.boxes[:4], expected, atol=0.05)
