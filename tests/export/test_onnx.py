"""An exported detector finds what the library finds, through an engine that shares no code with it."""

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import spox
from flax import nnx

from rtdetrv2_jax import Detector, Preprocessing, fuse
from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.cli import main
from rtdetrv2_jax.commands import export
from rtdetrv2_jax.config import RELEASED, ConfigError
from rtdetrv2_jax.export.onnx_check import Agreement, agreement, compare
from rtdetrv2_jax.export.onnx_detector import onnx_detector
from rtdetrv2_jax.export.onnx_network import network
from rtdetrv2_jax.weights.untrained import untrained_model

SIZE = (128, 160)


def changed(config, *, batch_norm="live", block="basic", **fields):
    """The small network with some of its settings changed: those of a part by the part's name."""
    parts = {name: dataclasses.replace(getattr(config, name), **value) for name, value in fields.items()}
    backbone = dataclasses.replace(config.backbone, batch_norm=batch_norm, block=block)
    return dataclasses.replace(config, backbone=backbone, **parts)


OTHERWISE = {
    "block": "bottleneck",
    "batch_norm": "frozen",
    "encoder": {"expansion": 1.0, "attention_levels": (1, 2), "layers": 2},
    "decoder": {"sampling": "discrete", "inference_layers": 1},
}
"""All that a network can have and the small one has not."""


def answers(model, size, *, batch=1):
    """The network's logits and boxes for noise, from the library and from ONNX Runtime."""
    images = np.random.default_rng(0).random((batch, *size, 3), np.float32)
    x = spox.argument(spox.Tensor(np.float32, (None, 3, *size)))
    graph = spox.build({"x": x}, network(fuse(model, convolving="direct"), x)._asdict())
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
    ours = nnx.jit(lambda model, images: model(images))(model, images)
    return (ours.logits, ours.boxes), theirs


def test_the_network_answers_the_same(tiny_config):
    model = untrained_model(changed(tiny_config, **OTHERWISE))
    for ours, theirs in zip(*answers(model, SIZE, batch=2), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18vd_sp1", "r50vd_m", "r50vd_dsp"])
def test_released_networks_answer_the_same(name):
    """To each query, in whatever order: two tokens of nearly one score may be selected in either.

    Discrete sampling jumps where a point is on the border of two cells, and rounding puts a few of them on the other
    side; nine queries of ten have to agree there.
    """
    (logits, boxes), (their_logits, their_boxes) = answers(untrained_model(RELEASED[name]), (640, 640))
    apart = np.abs(np.asarray(logits)[0, :, None] - their_logits[0]).max(-1)
    partner = apart.argmin(1)
    good = (apart.min(1) < 1e-3) & (np.abs(np.asarray(boxes)[0] - their_boxes[0, partner]).max(-1) < 1e-4)
    assert np.mean(good) >= (1.0 if RELEASED[name].decoder.sampling == "bilinear" else 0.9)
    assert len(set(partner[good])) == np.sum(good)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(size=SIZE, rescale_factor=None, mean=(120.0, 110.0, 100.0), std=(60.0, 50.0, 40.0)),
        Preprocessing(resize="fit_inside", size=(96, 96), pad="size", pad_size=SIZE),
    ],
    ids=["normalised", "padded"],
)
def test_a_batch_of_any_size_gives_what_the_detector_gives(tiny_model, preprocessing):
    graph = onnx_detector(tiny_model, preprocessing)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = [np.random.default_rng(seed).integers(0, 256, (90, 70 + 20 * seed, 3), np.uint8) for seed in range(3)]
    prepared = [preprocessing.prepare(image) for image in images]
    scores, labels, boxes = session.run(
        None,
        {
            "images": np.stack([each.pixels for each in prepared]),
            "sizes": np.array([each.scale_size for each in prepared], np.float32),
        },
    )
    for row, expected in enumerate(Detector(tiny_model, preprocessing)(images, threshold=0.0)):
        np.testing.assert_array_equal(labels[row], expected.labels)
        np.testing.assert_allclose(scores[row], expected.scores, atol=1e-5)
        np.testing.assert_allclose(boxes[row], expected.boxes, atol=1e-3)


def test_the_file_says_what_a_program_has_to_know(tiny_model):
    preprocessing = Preprocessing(size=SIZE)
    graph = onnx_detector(tiny_model, preprocessing, batch=2)
    about = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert about["class_names"] == ["ant", "bee", "cat", "dog", "eel"]
    assert Preprocessing.from_hugging_face(about["preprocessing"]) == preprocessing
    images, sizes = graph.graph.input
    assert [side.dim_value for side in images.type.tensor_type.shape.dim] == [2, *SIZE, 3]
    assert [side.dim_value for side in sizes.type.tensor_type.shape.dim] == [2, 2]
    assert [output.name for output in graph.graph.output] == ["scores", "labels", "boxes"]


@pytest.mark.parametrize(
    ("preprocessing", "said"),
    [
        (Preprocessing(resize="fit_inside", pad="multiple"), "images of one size"),
        (
            Preprocessing(size=SIZE, pad="size", pad_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            "pads and normalises",
        ),
    ],
)
def test_what_a_graph_can_not_say_is_refused(tiny_model, preprocessing, said):
    with pytest.raises(ConfigError, match=said):
        onnx_detector(tiny_model, preprocessing)


def test_a_model_in_its_training_form_is_no_network_to_export(tiny_model):
    x = spox.argument(spox.Tensor(np.float32, (None, 3, *SIZE)))
    with pytest.raises(TypeError, match="fuse"):
        network(tiny_model, x)


def test_the_check_finds_another_model_out(tiny_config, tiny_model):
    preprocessing, images = Preprocessing(size=SIZE), [np.full((90, 70, 3), 128, np.uint8)]
    same = agreement(onnx_detector(tiny_model, preprocessing, batch=2), tiny_model, preprocessing, images)
    assert (same.found, same.total, same.good) == (20, 20, True)
    assert same.score < 1e-5
    assert same.pixels < 1e-3
    other = onnx_detector(untrained_model(tiny_config, seed=1), preprocessing)
    assert not agreement(other, tiny_model, preprocessing, images).good


def test_partners_have_one_label_and_are_near_in_score_and_place():
    def detections(*rows):
        scores, labels, left = (np.array(column) for column in zip(*rows, strict=True))
        return Detections(scores, labels, np.stack([left, left, left + 10.0, left + 10.0], axis=-1))

    ours = detections((0.9, 1, 0.0), (0.8, 1, 50.0), (0.7, 2, 0.0), (0.6, 3, 0.0))
    theirs = detections((0.8, 1, 50.02), (0.9005, 1, 0.0), (0.7, 1, 0.0), (0.602, 3, 0.0))
    found = compare(ours, theirs, side=100)
    assert (found.found, found.total, found.good) == (2, 4, False)
    assert found.score == pytest.approx(0.0005)
    assert found.pixels == pytest.approx(0.02)


def test_the_command_writes_a_checked_file(tmp_path, capsys):
    file = tmp_path / "new" / "detector.onnx"
    assert main(["export", str(file), "--model", "rtdetrv2-demo"]) == 0
    assert "180 of 180 detections" in capsys.readouterr().err
    onnx.checker.check_model(onnx.load(file))


def test_the_command_keeps_what_was_there_if_the_check_fails(tmp_path, capsys, monkeypatch):
    file = tmp_path / "detector.onnx"
    file.write_text("old")
    monkeypatch.setattr("rtdetrv2_jax.export.onnx_check.agreement", lambda *_: Agreement(10, 180, 0.0, 0.0))
    assert main(["export", str(file), "--model", "rtdetrv2-demo"]) == 1
    assert "only 10 of 180" in capsys.readouterr().err
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["detector.pt"], "name ends in .onnx"), (["detector.onnx", "--batch", "0"], "at least one image")],
)
def test_the_command_refuses_what_it_can_not_write(words, said, capsys):
    assert main(["export", *words]) == 1
    assert said in capsys.readouterr().err


def test_the_command_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "spox" else object())
    assert main(["export", "detector.onnx"]) == 1
    assert "export takes spox: pip install" in capsys.readouterr().err
