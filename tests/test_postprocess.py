"""From logits to detections, against numbers by hand and the reference's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdetrv2_jax.postprocess import best_detections


def test_three_queries_by_hand():
    found = best_detections(
        jnp.array([[[2.0, 1.0], [0.0, 3.0], [-1.0, -2.0]]]),
        jnp.array([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1]]]),
        sizes=jnp.array([[480.0, 640.0]]),
    )
    np.testing.assert_array_equal(found.labels, [[1, 0, 1]])
    np.testing.assert_allclose(found.scores, [[0.952574, 0.880797, 0.731059]], rtol=1e-6)
    boxes = [[[0, 0, 320, 480], [256, 144, 384, 336], [256, 144, 384, 336]]]
    np.testing.assert_allclose(found.boxes_xyxy_pixels, boxes, atol=1e-4)


@pytest.mark.parametrize("name", ["coco", "few_classes"])
def test_labels_scores_and_boxes_are_the_references(shared, name):
    case = json.loads((shared / "golden" / f"postprocess_{name}.json").read_text())
    tensors = load_file(shared / "golden" / f"postprocess_{name}.safetensors")
    sizes = tensors["orig_target_sizes_wh"][:, ::-1].astype(np.float32)
    found = jax.jit(lambda *arrays: best_detections(*arrays[:2], sizes=arrays[2]))(
        tensors["logits"], tensors["boxes"], sizes
    )
    # The reference takes 300 always, we as many as there are queries, as transformers does: the same for 300 queries.
    count = min(found.scores.shape[1], case["num_top_queries"])
    tensors = {key: tensor[:, :count] for key, tensor in tensors.items()}
    np.testing.assert_array_equal(found.labels[:, :count], tensors["labels"])
    np.testing.assert_allclose(found.scores[:, :count], tensors["scores"], atol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy_pixels[:, :count], tensors["out_boxes_xyxy"], rtol=1e-4, atol=1e-3)


def test_images_of_a_batch_do_not_see_each_other():
    generator = np.random.default_rng(0)
    logits, boxes = (jnp.asarray(generator.random((3, 7, width)), jnp.float32) for width in (5, 4))
    sizes = jnp.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    together = best_detections(logits, boxes, sizes=sizes)
    alone = best_detections(logits[1:2], boxes[1:2], sizes=sizes[1:2])
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one[1:2], other)
