"""The runtimes beside ours: they compute what ours does, and say what they lack."""

import shutil

import numpy as np
import pytest

from rtdetrv2_jax import save_model
from rtdetrv2_jax.benchmark.exported import load_exported_onnxruntime
from rtdetrv2_jax.benchmark.loaded import LoadingError
from rtdetrv2_jax.benchmark.ours import load_jax
from rtdetrv2_jax.benchmark.peers import load_onnxruntime, load_torch_compile, load_transformers
from rtdetrv2_jax.weights.untrained import untrained_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")


def test_transformers_is_measured_on_the_same_network(tiny_config, tmp_path):
    points = tiny_config.decoder.points[:1] * 3  # Hugging Face's form has one number for all levels
    decoder = type(tiny_config.decoder)(**{**vars(tiny_config.decoder), "points": points})
    config = type(tiny_config)(**{**vars(tiny_config), "decoder": decoder})
    save_model(untrained_model(config), tmp_path / "model", to="hf")
    ours, theirs = (load(tmp_path / "model", dtype="float32", batch=2) for load in (load_jax, load_transformers))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    for loaded in (ours, theirs):
        loaded.device()
        assert len(loaded.whole()) == 2
    cost = ours.cost()
    assert cost is not None
    assert cost.flops > 1e8


def test_engines_are_measured_on_the_same_network(tiny_config, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("spox", reason="needs the export extra")
    save_model(untrained_model(tiny_config), tmp_path / "model")
    ours, theirs = (
        load(tmp_path / "model", dtype="float32", batch=2) for load in (load_jax, load_exported_onnxruntime)
    )
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    theirs.device()
    assert len(theirs.whole()[0]) == 2


def test_compiling_without_a_compiler_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoadingError, match="install g"):
        load_torch_compile(tmp_path, dtype="float32", batch=1)


def test_onnx_runtime_in_half_precision_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, which is measured beside ours")
    with pytest.raises(LoadingError, match="float32 alone"):
        load_onnxruntime(tmp_path, dtype="bfloat16", batch=1)
