"""The other runtimes that are measured: Hugging Face's model, eager, compiled, or carried over to another engine.

The one place of the library that imports torch and transformers, each only in its own process. Where PyTorch has a
GPU, the network and its input lie there, and a run ends when the GPU has.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from rtdetrv2_jax.benchmark.engines import INPUT, check_onnxruntime, check_openvino, in_onnxruntime, in_openvino
from rtdetrv2_jax.benchmark.loaded import Loaded, LoadingError, best_scores, channels_first, picture, version

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
    import torch

    on_gpu = torch.cuda.is_available()
    check_onnxruntime(dtype=dtype, on_gpu=on_gpu)
    inputs = channels_first([picture()] * batch)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        answer = _answering(_torch_model(folder, "float32"))
        torch.onnx.export(
            answer, (torch.from_numpy(inputs),), str(path), dynamo=False, opset_version=17, input_names=[INPUT]
        )
        return in_onnxruntime(path, inputs, on_gpu=on_gpu)


def load_openvino(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """The model exported by torch, converted and run by OpenVINO on the processor, with inputs of one fixed shape.

    Raises:
        LoadingError: There is a GPU, which it would not use.
    """
    import torch

    check_openvino(on_gpu=torch.cuda.is_available())
    inputs = channels_first([picture()] * batch)
    with torch.no_grad():
        exported = torch.export.export(_answering(_torch_model(folder, "float32")), (torch.from_numpy(inputs),))
    return in_openvino(exported, inputs, dtype=dtype)


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
