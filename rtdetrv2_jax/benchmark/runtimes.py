"""The runtimes that can be measured, each in a process of its own: `python -m rtdetrv2_jax.benchmark.runtimes`.

Such a process loads a Hugging Face folder, says that it is ready, and then runs the network once for each line that it
reads, answering with the seconds it took. This is the one place of the library that imports torch, transformers or
ONNX Runtime, each only in its own process.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rtdetrv2_jax.compilation import keep_freed_memory

SIDE = 640
NEEDS = {
    "jax": ("jax",),
    "transformers": ("torch", "transformers"),
    "onnxruntime": ("torch", "transformers", "onnx", "onnxruntime"),
}
"""The packages that each runtime needs; it is measured where they are all installed."""


class Loaded(NamedTuple):
    """A runtime with a model in it: `device` runs the network on a resident input, `whole` goes from JPEG to boxes.

    `scores` are the best class scores of every query of the first image, sorted, for telling that all runtimes do the
    same.
    """

    device: Callable[[], Any]
    whole: Callable[[], Any]
    scores: np.ndarray
    version: str


def installed(runtime: str) -> bool:
    """Whether all that a runtime needs is there."""
    return all(importlib.util.find_spec(name) for name in NEEDS[runtime])


def picture() -> bytes:
    """A JPEG of 640x480 with content at all scales, the same everywhere."""
    generator = np.random.default_rng(0)
    layers = [
        np.asarray(Image.fromarray(generator.integers(0, 256, (size * 3, size * 4, 3), np.uint8)).resize((640, 480)))
        for size in (2, 8, 32, 160)
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def load_jax(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """This library."""
    import jax
    import jax.numpy as jnp

    from rtdetrv2_jax.detector import Detector

    detector = Detector.from_pretrained(folder, dtype="bfloat16" if dtype == "bfloat16" else "float32", max_batch=batch)
    images = [picture()] * batch
    inputs = jax.device_put(
        (
            np.stack([_pixels(data) for data in images]),
            np.tile(np.array([480, 640], np.float32), (batch, 1)),
            np.full((batch, 2), SIDE, np.int32),
        )
    )
    logits = jax.jit(lambda model, x: model(x).logits)(
        detector.model, jnp.asarray(_pixels(images[0])[None]) / jnp.float32(255)
    )
    return Loaded(
        device=lambda: jax.block_until_ready(detector.run(*inputs)),
        whole=lambda: detector(list(images)),
        scores=_best_scores(np.asarray(logits)),
        version=f"jax {jax.__version__}",
    )


def load_transformers(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """Hugging Face's model, eager."""
    import torch

    model, processor = _torch_model(folder, dtype)
    inputs = torch.from_numpy(_channels_first([picture()] * batch)).to(model.dtype)

    def whole() -> Any:
        images = [Image.open(io.BytesIO(picture_bytes)).convert("RGB") for picture_bytes in encoded]
        with torch.inference_mode():
            outputs = model(**processor(images=images, return_tensors="pt").to(model.dtype))
        return processor.post_process_object_detection(outputs, target_sizes=[(480, 640)] * batch)

    def device() -> Any:
        with torch.inference_mode():
            return model(pixel_values=inputs).logits

    encoded = [picture()] * batch
    return Loaded(
        device,
        whole,
        _best_scores(device().float().numpy()),
        f"transformers {_version('transformers')}",
    )


def load_onnxruntime(folder: Path, *, dtype: str, batch: int) -> Loaded:
    """Hugging Face's model, exported by torch and run by ONNX Runtime."""
    import onnxruntime
    import torch

    model, _ = _torch_model(folder, dtype)
    inputs = _channels_first([picture()] * batch)

    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            output = self.model(pixel_values=pixel_values)
            return output.logits, output.pred_boxes

    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary) / "model.onnx")
        torch.onnx.export(
            Answer(), (torch.from_numpy(inputs),), path, dynamo=False, opset_version=17, input_names=["x"]
        )
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    encoded = [picture()] * batch

    def whole() -> Any:
        logits, boxes = map(np.asarray, session.run(None, {"x": _channels_first(encoded)}))
        scores = 1 / (1 + np.exp(-logits.reshape(batch, -1)))
        best = np.argsort(-scores, axis=1)[:, : logits.shape[1]]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(boxes, best[..., None] // logits.shape[2], 1)

    logits = session.run(None, {"x": inputs})[0]
    return Loaded(
        lambda: session.run(None, {"x": inputs}),
        whole,
        _best_scores(np.asarray(logits)),
        f"onnxruntime {_version('onnxruntime')}",
    )


LOADERS = {"jax": load_jax, "transformers": load_transformers, "onnxruntime": load_onnxruntime}


def main() -> None:
    """Serves runs on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=LOADERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    if arguments.runtime == "jax":
        keep_freed_memory()
    began = time.perf_counter()
    loaded = LOADERS[arguments.runtime](arguments.folder, dtype=arguments.dtype, batch=arguments.batch)
    loaded.device()
    ready = time.perf_counter() - began
    loaded.whole()
    answer(ready=ready, version=loaded.version, scores=loaded.scores.tolist())
    for line in sys.stdin:
        began = time.perf_counter()
        getattr(loaded, line.strip())()
        answer(seconds=time.perf_counter() - began)


def _torch_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model, transformers.AutoImageProcessor.from_pretrained(folder)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _channels_first(images: list[bytes]) -> np.ndarray:
    pixels = np.stack([_pixels(data) for data in images])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def _best_scores(logits: np.ndarray) -> np.ndarray:
    return np.sort(1 / (1 + np.exp(-logits[0].astype(np.float64).max(-1))))[::-1]


def _version(package: str) -> str:
    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
