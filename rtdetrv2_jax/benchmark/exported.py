"""This library's own export, run by other engines."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from rtdetrv2_jax.benchmark.engines import INPUT, check_onnxruntime, check_openvino, in_onnxruntime, in_openvino
from rtdetrv2_jax.benchmark.loaded import SIDE, Loaded, channels_first, picture
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.weights.load import load_pretrained

MAKER = "this library's export, "


def load_exported_onnxruntime(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """Our graph in ONNX Runtime, as `peers.load_onnxruntime`."""
    check_onnxruntime(dtype=dtype, on_gpu=_on_gpu())
    with tempfile.TemporaryDirectory() as temporary:
        path = _export(folder, Path(temporary))
        return in_onnxruntime(path, channels_first([picture()] * batch), on_gpu=_on_gpu(), maker=MAKER)


def load_exported_openvino(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """Our graph in OpenVINO, as `peers.load_openvino`."""
    check_openvino(on_gpu=_on_gpu())
    with tempfile.TemporaryDirectory() as temporary:
        path = _export(folder, Path(temporary))
        return in_openvino(path, channels_first([picture()] * batch), dtype=dtype, maker=MAKER)


def _export(folder: Path, temporary: Path) -> Path:
    """The network alone, from pixels to logits and boxes, which is what is measured of the others."""
    from spox import Tensor, argument, build

    from rtdetrv2_jax.export.onnx_network import network

    x = argument(Tensor(np.float32, (None, 3, SIDE, SIDE)))
    graph = build({INPUT: x}, network(fuse(load_pretrained(folder).model, convolving="direct"), x)._asdict())
    path = temporary / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"
