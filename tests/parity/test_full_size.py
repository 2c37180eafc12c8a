"""Every published size at its published input, against transformers, through files that transformers wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdetrv2_jax.config import named
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.weights.load import load_model, save_model
from rtdetrv2_jax.weights.untrained import untrained_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = {"r18vd": 1e-4, "r34vd": 1e-4, "r50vd": 1e-4, "r101vd": 3e-4}


def published(name):
    """The size as it was published: Hugging Face's files all have frozen statistics in the backbone."""
    config = named(name)
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, batch_norm="frozen"))


def pixels():
    generator = np.random.default_rng(0)
    coarse = generator.random((1, 20, 20, 3), np.float32).repeat(32, axis=1).repeat(32, axis=2)
    return (0.5 * coarse + 0.5 * generator.random((1, 640, 640, 3), np.float32)).astype(np.float32)


@pytest.mark.parametrize("name", TOLERANCE)
def test_logits_and_boxes_are_those_of_transformers_in_either_naming(name, tmp_path):
    save_model(untrained_model(published(name)), tmp_path / "ours", to="hf")
    theirs, loading = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[kind]
    with torch.inference_mode():
        output = theirs.eval()(pixel_values=torch.from_numpy(pixels().transpose(0, 3, 1, 2)))
    logits, boxes = output.logits.numpy(), output.pred_boxes.numpy()
    # Queries are aligned by what the encoder gave each: a token's own logits.
    encoder = output.enc_topk_logits.numpy()[0]

    theirs.save_pretrained(tmp_path / "published_names")
    theirs.save_pretrained(tmp_path / "new_names", save_original_format=False)
    forward = jax.jit(lambda model, images: model(images))
    for folder in ("published_names", "new_names"):
        model, config = load_model(tmp_path / folder)
        assert config == published(name)
        ours = forward(fuse(model), jnp.asarray(pixels()))
        order = [int(np.argmin(np.abs(ours.encoder.logits[0] - row).sum(-1))) for row in encoder]
        assert len(set(order)) == config.decoder.queries
        np.testing.assert_allclose(ours.logits[0][jnp.array(order)], logits[0], atol=TOLERANCE[name], rtol=0)
        np.testing.assert_allclose(ours.boxes[0][jnp.array(order)], boxes[0], atol=TOLERANCE[name], rtol=0)
