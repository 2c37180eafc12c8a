"""The other runtimes that are measured: Hugging Face's model, eager, compiled, or carried over to another engine.

The one place of the library that imports torch, transformers, ONNX Runtime and OpenVINO, each only in its own process.
Where PyTorch has a GPU, the network and its input lie there, and a run ends when the GPU has.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rtdetrv2_jax.benchmark.loaded import SIDE, Loaded, LoadingError, best_scores, channels_first, picture, version

CXX, CUDA_CC = ("g++", "clang++"), ("gcc", "clang", "cc")


def load_transformers(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The model as it comes, eager."""
    import torch

    name = f"transformers {version('transformers')}, eager"
    return _torch_loaded(folder, dtype, batch, name, lambda model: model, torch.inference_mode)


def load_torch_compile(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The model through `torch.compile`; on a GPU in the mode that tries kernels out ("max-autotune").

    Raises:
        LoadingError: What it compiles with is not there.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    compilers = ((os.environ.get("CC"), *CUDA_CC), (os.environ.get("CXX"), *CXX))[not on_gpu]
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise LoadingError(f"torch.compile needs a C{'' if on_gpu else '++'} compiler; none is there: install g++")
    mode = "max-autotune" if on_gpu else "default"
    return _torch_loaded(
        folder,
        dtype,
        batch,
        f"torch.compile {torch.__version__.partition('+')[0]}, {mode}",
        lambda model: torch.compile(model, mode=mode, dynamic=False),
        torch.no_grad,
    )


def load_onnxruntime(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The model exported by torch and run by ONNX Runtime; where there is a GPU, on the GPU or not at all.

    Raises:
        LoadingError: Another dtype than float32; a GPU that it has no provider for.
    """
    import onnxruntime
    import torch

    if dtype != "float32":
        raise LoadingError("ONNX Runtime is measured in float32 alone: NumPy, which it is fed by, has no bfloat16")
    provider = "CUDAExecutionProvider" if torch.cuda.is_available() else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise LoadingError("ONNX Runtime has no CUDA provider here: install onnxruntime-gpu")
    inputs = channels_first([picture()] * batch)
    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary) / "model.onnx")
        answer = _answering(_torch_model(folder, "float32"))
        torch.onnx.export(answer, (torch.from_numpy(inputs),), path, dynamo=False, opset_version=17, input_names=["x"])
        session = onnxruntime.InferenceSession(path, providers=[provider])
    bound = session.io_binding()
    where = "cuda" if provider.startswith("CUDA") else "cpu"
    bound.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(inputs, where, 0))
    for output in session.get_outputs():
        bound.bind_output(output.name, where)

    def device() -> Any:
        session.run_with_iobinding(bound)
        bound.synchronize_outputs()

    return _array_loaded(
        device, lambda x: session.run(None, {"x": x}), inputs, f"ONNX Runtime {onnxruntime.__version__}"
    )


def load_openvino(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The model exported by torch, converted and run by OpenVINO on the processor, with inputs of one fixed shape.

    Raises:
        LoadingError: There is a GPU, which it would not use.
    """
    import openvino
    import torch

    if torch.cuda.is_available():
        raise LoadingError("OpenVINO runs on the processor, which would be no race beside a GPU")
    inputs = channels_first([picture()] * batch)
    with torch.no_grad():
        exported = torch.export.export(_answering(_torch_model(folder, "float32")), (torch.from_numpy(inputs),))
        converted = openvino.convert_model(exported)
    converted.reshape([batch, 3, SIDE, SIDE])
    # Without the hint it would choose by the processor, and compute in bfloat16 where that is faster.
    precision = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[dtype]
    compiled = openvino.Core().compile_model(
        converted, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )

    def run(x: Any) -> list[Any]:
        answer = compiled(x)
        return [answer[0], answer[1]]

    return _array_loaded(lambda: run(inputs), run, inputs, f"OpenVINO {version('openvino')}")


def _torch_loaded(
    folder: Path, dtype: str, batch: int, name: str, prepare: Callable[[Any], Any], without_gradients: Callable[[], Any]
) -> Loaded:
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = _torch_model(folder, dtype).to(where)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    prepared, kind = prepare(model), model.dtype
    encoded = [picture()] * batch
    inputs = torch.from_numpy(channels_first(encoded)).to(where, kind)

    def device() -> Any:
        with without_gradients():
            logits = prepared(pixel_values=inputs).logits
        if where == "cuda":
            torch.cuda.synchronize()
        return logits

    def whole() -> Any:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
        with without_gradients():
            outputs = prepared(
                pixel_values=processor(images=images, return_tensors="pt")["pixel_values"].to(where, kind)
            )
        found = processor.post_process_object_detection(outputs, target_sizes=[(480, 640)] * batch)
        return [{key: value.cpu() for key, value in one.items()} for one in found]

    return Loaded(device, whole, best_scores(device().float().cpu().numpy()), name)


def _array_loaded(device: Callable[[], Any], run: Callable[[Any], Any], inputs: Any, name: str) -> Loaded:
    """An engine that takes arrays and gives logits and boxes; the rest of the way is done in NumPy."""
    encoded = [picture()] * len(inputs)

    def whole() -> Any:
        logits, boxes = (np.asarray(each) for each in run(channels_first(encoded)))
        scores = 1 / (1 + np.exp(-logits.reshape(len(logits), -1)))
        best = np.argsort(-scores, axis=1)[:, : logits.shape[1]]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(boxes, best[..., None] // logits.shape[2], 1)

    return Loaded(device, whole, best_scores(np.asarray(run(inputs)[0])), name)


def _torch_model(folder: Path, dtype: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForObjectDetection.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def _answering(model: Any) -> Any:
    """The model as what can be exported: from pixels to logits and boxes."""
    import torch

    class Answering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            output = self.model(pixel_values=pixel_values)
            return output.logits, output.pred_boxes

    return Answering().eval()
