"""Training steps that can be measured, each kind in a process of its own: `python -m train.benchmark_steps`.

Such a process makes a model of random numbers and a batch, says that it is ready, and then makes one step (forward,
losses, backward, clipping, AdamW) for each line that it reads, answering with the seconds it took. The one place of
the training program that imports torch and transformers, each only in its own process.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rtdetrv2_jax.benchmark.loaded import Cost
from rtdetrv2_jax.compilation import enable_persistent_cache, keep_freed_memory
from rtdetrv2_jax.config import named

OBJECTS = 8
"""In each image: near COCO's average of seven."""
CLIP_NORM, RATE, DECAY = 0.1, 1e-4, 1e-4
NEEDS = {"jax": ("jax",), "transformers": ("torch", "transformers", "scipy")}


class Scene(NamedTuple):
    """A batch of random images, each with as many random objects."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


class Stepping(NamedTuple):
    """A program that is ready: `step` makes a step and gives its loss; `cost` is what the compiler says it takes."""

    step: Callable[[], float]
    version: str
    cost: Cost | None = None


def scene(*, batch: int, side: int, classes: int) -> Scene:
    """The same for all programs."""
    dice = np.random.default_rng(0)
    centres, sides = dice.uniform(0.3, 0.7, (batch, OBJECTS, 2)), dice.uniform(0.05, 0.5, (batch, OBJECTS, 2))
    return Scene(
        dice.integers(0, 256, (batch, side, side, 3), dtype=np.uint8),
        dice.integers(0, classes, (batch, OBJECTS)).astype(np.int32),
        np.concatenate([centres, sides], axis=-1).astype(np.float32),
    )


def prepare_jax(model: str, *, batch: int, side: int, dtype: str) -> Stepping:
    """This program's step, the average of the model and denoising queries included."""
    import jax
    import jax.numpy as jnp

    from rtdetrv2_jax.arrays import Targets
    from rtdetrv2_jax.benchmark.ours import cost_of
    from rtdetrv2_jax.sharding import data_mesh, put_global_batch, replicate
    from rtdetrv2_jax.weights.untrained import untrained_model

    from .augmentation import NO_AUGMENTATION
    from .batch import Batch
    from .recipe import Batches, Optimisation, Recipe
    from .recipes import parameter_groups
    from .step import init_state, jitted_step, program

    enable_persistent_cache()
    recipe = Recipe(
        name="benchmark",
        model=named(model),
        optimisation=Optimisation(RATE, RATE, parameter_groups(), weight_decay=DECAY, clip_norm=CLIP_NORM),
        augmentation=NO_AUGMENTATION,
        batches=Batches(size=batch, epochs=1, side=side, denoising_together=None),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
    )
    images, labels, boxes = scene(batch=batch, side=side, classes=recipe.model.classes)
    mesh, made = data_mesh(jax.devices()[:1]), program(recipe, steps_per_epoch=1000)
    state = replicate(mesh, init_state(made, untrained_model(recipe.model)))
    batch_of_all = Batch(
        images=jnp.asarray(images),
        targets=Targets(jnp.asarray(labels), jnp.asarray(boxes), jnp.ones(labels.shape, bool)),
        image_ids=jnp.arange(batch, dtype=jnp.int32),
        content_xyxy_pixels=jnp.tile(jnp.array([0, 0, side, side], jnp.int32), (batch, 1)),
        distort_colours=jnp.zeros(batch, bool),
    )
    on_devices = put_global_batch(mesh, batch_of_all)
    compiled = jitted_step(made, mesh).lower(state, on_devices, (side, side)).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, on_devices)
        jax.block_until_ready(state)
        return float(metrics.losses.total)

    return Stepping(step, f"jax {jax.__version__}", cost_of(compiled))


def prepare_transformers(model: str, *, batch: int, side: int, dtype: str) -> Stepping:
    """Hugging Face's model and losses, with denoising queries, eager."""
    import torch
    import transformers

    from rtdetrv2_jax.weights.load import save_model
    from rtdetrv2_jax.weights.untrained import untrained_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        save_model(untrained_model(named(model)), Path(folder) / "model", to="hf")
        reference = transformers.AutoModelForObjectDetection.from_pretrained(Path(folder) / "model")
    reference = reference.train().to(device)
    images, labels, boxes = scene(batch=batch, side=side, classes=reference.config.num_labels)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / 255).to(device)
    targets = [
        {"class_labels": torch.from_numpy(label).long().to(device), "boxes": torch.from_numpy(box).to(device)}
        for label, box in zip(labels, boxes, strict=True)
    ]
    optimizer = torch.optim.AdamW(reference.parameters(), lr=RATE, weight_decay=DECAY)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = reference(pixel_values=pixels, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), CLIP_NORM)
        optimizer.step()
        return float(loss.detach())

    return Stepping(step, f"transformers {importlib.metadata.version('transformers')}, eager")


KINDS = {"jax": prepare_jax, "transformers": prepare_transformers}


def main() -> None:
    """Serves steps on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    if arguments.kind == "jax":
        keep_freed_memory()
    began = time.perf_counter()
    prepare = KINDS[arguments.kind]
    stepping = prepare(arguments.model, batch=arguments.batch, side=arguments.side, dtype=arguments.dtype)
    stepping.step()
    answer(ready=time.perf_counter() - began, version=stepping.version, cost=stepping.cost)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line.split()[1])):
            began = time.perf_counter()
            losses.append(stepping.step())
            seconds.append(time.perf_counter() - began)
        answer(seconds=seconds, losses=losses)


if __name__ == "__main__":
    main()
