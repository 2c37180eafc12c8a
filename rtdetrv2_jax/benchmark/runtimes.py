"""The runtimes that can be measured, each in a process of its own: `python -m rtdetrv2_jax.benchmark.runtimes`.

Such a process loads a Hugging Face folder, says that it is ready, and then answers each line that it reads, "device 5"
for instance, with the seconds that each of so many runs took.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtdetrv2_jax.benchmark.exported import load_exported_onnxruntime, load_exported_openvino
from rtdetrv2_jax.benchmark.loaded import Loaded, LoadingError
from rtdetrv2_jax.benchmark.ours import load_jax
from rtdetrv2_jax.benchmark.peers import load_onnxruntime, load_openvino, load_torch_compile, load_transformers
from rtdetrv2_jax.compilation import keep_freed_memory

LOADERS: dict[str, Callable[..., Loaded]] = {
    "jax": load_jax,
    "transformers": load_transformers,
    "torch.compile": load_torch_compile,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "export+onnxruntime": load_exported_onnxruntime,
    "export+openvino": load_exported_openvino,
}
NEEDS = {
    "jax": ("jax",),
    "transformers": ("torch", "transformers"),
    "torch.compile": ("torch", "transformers"),
    "onnxruntime": ("torch", "transformers", "onnx", "onnxruntime"),
    "openvino": ("torch", "transformers", "openvino"),
    "export+onnxruntime": ("spox", "onnxruntime"),
    "export+openvino": ("spox", "openvino"),
}
"""The packages that each runtime needs; it is measured where they are all installed."""
TURN_SECONDS = 2.0
"""A turn of several runs ends after so long, whatever is left of it."""
FLOAT32_ALONE = ("onnxruntime", "export+onnxruntime")


def measurable(runtime: str, *, dtype: str) -> bool:
    """Whether all that a runtime needs is there, and it can compute in a dtype."""
    there = all(importlib.util.find_spec(name) for name in NEEDS[runtime])
    return there and (dtype == "float32" or runtime not in FLOAT32_ALONE)


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
    try:
        loaded = LOADERS[arguments.runtime](arguments.folder, dtype=arguments.dtype, batch=arguments.batch)
    except LoadingError as error:
        sys.exit(str(error))
    loaded.device()
    ready = time.perf_counter() - began
    loaded.whole()
    answer(ready=ready, version=loaded.version, scores=loaded.scores.tolist(), cost=loaded.cost())
    for line in sys.stdin:
        kind, runs = line.split()
        answer(seconds=seconds_of(getattr(loaded, kind), runs=int(runs)))


def seconds_of(run: Callable[[], Any], *, runs: int) -> list[float]:
    """The seconds of so many runs, or of fewer where they take longer than a turn may."""
    taken: list[float] = []
    while len(taken) < runs and sum(taken) < TURN_SECONDS:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    main()
