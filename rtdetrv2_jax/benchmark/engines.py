"""Engines that run a graph which something else made: ONNX Runtime and OpenVINO, each only in its own process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from rtdetrv2_jax.benchmark.loaded import SIDE, Loaded, LoadingError, best_scores, channels_first, picture, version

INPUT = "x"
"""What graphs call their one input; they give logits and boxes."""


def check_onnxruntime(*, dtype: str, on_gpu: bool) -> None:
    """Raises `LoadingError` for another dtype than float32, and for a GPU that ONNX Runtime has no provider for."""
    import onnxruntime

    if dtype != "float32":
        raise LoadingError("ONNX Runtime is measured in float32 alone: NumPy, which it is fed by, has no bfloat16")
    if on_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise LoadingError("ONNX Runtime has no CUDA provider here: install onnxruntime-gpu")


def in_onnxruntime(path: Path, inputs: Float32[np.ndarray, "b 3 h w"], *, on_gpu: bool, maker: str = "") -> Loaded:
    """A graph in a file, run by ONNX Runtime."""
    import onnxruntime

    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=[provider])
    bound, where = session.io_binding(), "cuda" if on_gpu else "cpu"
    bound.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(inputs, where, 0))
    for output in session.get_outputs():
        bound.bind_output(output.name, where)

    def device() -> None:
        session.run_with_iobinding(bound)
        bound.synchronize_outputs()

    name = f"{maker}ONNX Runtime {onnxruntime.__version__}"
    return _loaded(device, lambda x: session.run(None, {INPUT: x}), inputs, name)


def check_openvino(*, on_gpu: bool) -> None:
    """Raises `LoadingError` where there is a GPU, which OpenVINO would not use."""
    if on_gpu:
        raise LoadingError("OpenVINO runs on the processor, which would be no race beside a GPU")


def in_openvino(graph: Any, inputs: Float32[np.ndarray, "b 3 h w"], *, dtype: str, maker: str = "") -> Loaded:
    """What OpenVINO can convert, run by it on the processor, with inputs of one fixed shape."""
    import openvino

    converted = openvino.convert_model(graph)
    converted.reshape([len(inputs), 3, SIDE, SIDE])
    # Without the hint it would choose by the processor, and compute in bfloat16 where that is faster.
    precision = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[dtype]
    compiled = openvino.Core().compile_model(
        converted, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )

    def run(x: Any) -> list[Any]:
        answer = compiled(x)
        return [answer[0], answer[1]]

    return _loaded(lambda: run(inputs), run, inputs, f"{maker}OpenVINO {version('openvino')}")


def _loaded(device: Callable[[], Any], run: Callable[[Any], Any], inputs: Any, name: str) -> Loaded:
    """An engine that takes arrays and gives logits and boxes; the rest of the way is done in NumPy."""
    encoded = [picture()] * len(inputs)

    def whole() -> Any:
        logits, boxes = (np.asarray(each) for each in run(channels_first(encoded)))
        scores = 1 / (1 + np.exp(-logits.reshape(len(logits), -1)))
        best = np.argsort(-scores, axis=1)[:, : logits.shape[1]]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(boxes, best[..., None] // logits.shape[2], 1)

    return Loaded(device, whole, best_scores(np.asarray(run(inputs)[0])), name)
