"""The network against tensors that the authors' code computed."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdetrv2_jax.arrays import Output
from rtdetrv2_jax.config import ModelConfig
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.weights.infer import infer_config
from rtdetrv2_jax.weights.load import load_model
from rtdetrv2_jax.weights.transfer import from_tensors

CASES = ("r18", "r50", "points", "discrete", "evalidx", "nonsquare")
HUGGING_FACE_CASES = ("r18", "r50", "discrete", "evalidx", "nonsquare")
# By default both kinds of blocks, both forms, and maps that are not square.
AT_ONCE = (("r18", "training"), ("r50", "inference"), ("nonsquare", "training"))
FORMS = [
    pytest.param(*both, marks=() if both in AT_ONCE else pytest.mark.slow)
    for both in itertools.product(CASES, ("training", "inference"))
]
# Three times the float32 noise of the reference, as measured over all its variants.
LOGITS, BOXES = 6e-4, 2e-5


def configuration(tensors: dict[str, np.ndarray], said: dict) -> ModelConfig:
    """What the tensors tell, completed by what only the reference's own configuration says."""
    config, _ = infer_config(tensors)
    decoder = dataclasses.replace(
        config.decoder,
        queries=said["decoder"]["num_queries"],
        sampling={"default": "bilinear", "discrete": "discrete"}[said["decoder"]["cross_attn_method"]],
        inference_layers=(said["decoder"]["eval_idx"] % said["decoder"]["num_layers"]) + 1,
    )
    return dataclasses.replace(config, decoder=decoder)


def reference_model(golden: Path, case: str, overlay: dict[str, np.ndarray] | None = None) -> RTDETRv2:
    tensors = load_file(golden / f"model_{case}.weights.safetensors") | (overlay or {})
    said = json.loads((golden / f"model_{case}.json").read_text())["config"]
    return from_tensors(tensors, configuration(tensors, said)).model


forward = jax.jit(lambda model, images: model(images))


def run(model: RTDETRv2, pixel_values: np.ndarray) -> Output:
    return forward(model, jnp.asarray(pixel_values.transpose(0, 2, 3, 1)))


def aligned(output: Output, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and boxes in the reference's order of queries: near ties in the encoder's scores may swap."""
    ours = np.asarray(output.tokens)
    np.testing.assert_array_equal(np.sort(ours), np.sort(tokens))
    order = np.array(
        [np.argsort(row)[np.argsort(np.argsort(wanted))] for row, wanted in zip(ours, tokens, strict=True)]
    )
    return tuple(np.take_along_axis(np.asarray(x), order[..., None], axis=1) for x in (output.logits, output.boxes))


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_logits_and_boxes_are_the_authors(shared, case, form):
    golden = shared / "golden"
    acts = load_file(golden / f"model_{case}.acts.safetensors")
    model = reference_model(golden, case)
    output = run(fuse(model) if form == "inference" else model, acts["pixel_values"])
    # On maps that are not square the positional code is the corrected one: see `sine_positions`.
    prefix = "rowmajor." if case == "nonsquare" else ""
    logits, boxes = aligned(output, acts[f"{prefix}topk_index"])
    np.testing.assert_allclose(logits, acts[f"{prefix}pred_logits"], atol=LOGITS, rtol=0)
    np.testing.assert_allclose(boxes, acts[f"{prefix}pred_boxes"], atol=BOXES, rtol=0)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "r18" else pytest.mark.slow) for case in CASES if case != "nonsquare"],
)
def test_we_are_as_close_to_float64_as_the_authors_float32_is(shared, case):
    acts = load_file(shared / "golden" / f"model_{case}.acts.safetensors")
    output = run(reference_model(shared / "golden", case), acts["pixel_values"])
    for ours, name in zip(aligned(output, acts["topk_index"]), ("pred_logits", "pred_boxes"), strict=True):
        exact = acts[f"f64.{name}"]
        assert np.abs(ours - exact).max() <= 2 * np.abs(acts[name] - exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("case", HUGGING_FACE_CASES)
def test_the_hugging_face_folder_gives_the_same_model(shared, case):
    golden = shared / "golden"
    acts = load_file(golden / f"model_{case}.acts.safetensors")
    model, config = load_model(golden / f"model_{case}.hf")
    assert config.classes == acts["pred_logits"].shape[-1]
    prefix = "rowmajor." if case == "nonsquare" else ""
    logits, boxes = aligned(run(model, acts["pixel_values"]), acts[f"{prefix}topk_index"])
    np.testing.assert_allclose(logits, acts[f"{prefix}pred_logits"], atol=LOGITS, rtol=0)
    np.testing.assert_allclose(boxes, acts[f"{prefix}pred_boxes"], atol=BOXES, rtol=0)


def test_invalid_anchors_among_the_selected_tokens_keep_everything_finite_and_equal(shared):
    golden = shared / "golden"
    case = load_file(golden / "model_r18_invalidtopk.safetensors")
    overlay = {key.removeprefix("overlay."): value for key, value in case.items() if key.startswith("overlay.")}
    output = run(
        reference_model(golden, "r18", overlay), load_file(golden / "model_r18.acts.safetensors")["pixel_values"]
    )
    # Queries of invalid anchors are all alike: compare as sets, by sorting the rows.
    for ours, wanted, tolerance in (
        (output.logits, case["eval.pred_logits"], LOGITS),
        (output.boxes, case["eval.pred_boxes"], BOXES),
    ):
        assert np.isfinite(np.asarray(ours)).all()
        np.testing.assert_allclose(np.sort(np.asarray(ours), axis=1), np.sort(wanted, axis=1), atol=tolerance, rtol=0)
