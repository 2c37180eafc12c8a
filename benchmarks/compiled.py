"""What a detection takes of a chip, as its compiler counts it, without a chip: `python -m benchmarks.compiled`.

It needs libtpu for TPUs, and JAX's CUDA plugin for GPUs. The program is `rtdetrv2_jax.detect`, from resized images to
boxes, of a released size. For a GPU, `full_speed_ms` is what the program computes at the full speed of the matrix
units, or moves at that of the memory, whichever takes longer. It is no bound: small maps come out of the cache.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from rich.console import Console

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.benchmark.record import record
from rtdetrv2_jax.compilation import compiler_options
from rtdetrv2_jax.config import named
from rtdetrv2_jax.detector import detect
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import abstract_model
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import data_mesh, replicated, traced_for
from rtdetrv2_jax.weights.files import write_json
from train.compiled import Compiled, compile_lowered, figure, show
from train.topology import GPUS, topology_mesh

SIDE = 640
PRODUCTS_PER_SECOND = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
"""FLOPs of dense bfloat16 products that a GPU can do. Source: NVIDIA's data sheets."""


def compile_detection(model: str, topology: str, *, batch: int, dtype: str) -> Compiled:
    """Detection in a batch of images on one chip of a topology, with weights laid out as its compiler wants them.

    Raises:
        TopologyError: What compiles for such chips is missing, or there are none.
        ConfigError: There is no such model.
    """
    chip = topology_mesh(topology).devices.flat[0]
    mesh = data_mesh([chip])
    run, weights, *others = _detection(model, batch=batch, dtype=dtype)
    whole = replicated(mesh)
    program = jax.jit(
        traced_for(mesh, run),
        in_shardings=(Format(Layout.AUTO, whole), whole, whole),
        compiler_options=compiler_options(chip.platform),
    )
    found = compile_lowered(program.lower(weights, *others), kind=chip.device_kind)
    if found.flops is None:  # a GPU's compiler does not count them; the plain program's are all but the same
        counted = jax.jit(run).lower(weights, *others).cost_analysis() or {}
        found = found._replace(flops=counted.get("flops"))
    return found


def _detection(model: str, *, batch: int, dtype: str) -> tuple[Callable[..., Detections], Any, Any, Any]:
    """Detection as a function of a list of weights, of images and of sizes, and what it takes, without numbers."""
    fused = jax.eval_shape(partial(fuse, convolving="direct"), abstract_model(named(model), dtype=jnp.dtype(dtype)))
    weights, structure = jax.tree.flatten(fused)

    def run(weights: list[jax.Array], images: jax.Array, sizes: jax.Array) -> Detections:
        model = jax.tree.unflatten(structure, weights)
        return detect(model, images, sizes, preprocessing=Preprocessing(size=(SIDE, SIDE)))

    images = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), jnp.uint8)
    return run, weights, images, jax.ShapeDtypeStruct((batch, 2), jnp.float32)


def full_speed_ms(found: Compiled, topology: str) -> dict[str, float]:
    """The time of a run on a GPU at the speeds of its data sheet, if nothing is cached; nothing for other chips."""
    kind = topology.partition(":")[0]
    if kind not in GPUS or found.flops is None:
        return {}
    computing = found.flops / PRODUCTS_PER_SECOND[kind]
    moving = found.bytes_accessed / GPUS[kind].bandwidth
    return {"full_speed_ms": round(1000 * max(computing, moving), 4)}


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, shows what each program takes, and writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["r18vd"], help="default: r18vd")
    parser.add_argument(
        "--topology", nargs="+", default=["v5e:2x2"], help="such as v5e:2x2, of which one chip is used, or h200"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    console = Console(highlight=False, soft_wrap=True)
    figures: list[dict[str, Any]] = []
    for model in arguments.model:
        for topology in arguments.topology:
            for batch in arguments.batch:
                about = {"model": model, "dtype": arguments.dtype, "topology": topology, "batch": batch, "side": SIDE}
                console.print(f"[bold]{model} on one chip of {topology}[/]: {batch} images, {arguments.dtype}")
                found = compile_detection(model, topology, batch=batch, dtype=arguments.dtype)
                show(console, found)
                console.print()
                figures.append(about | figure(found) | full_speed_ms(found, topology))
                if arguments.json:
                    made = record("compiled detection", figures, program="python -m benchmarks.compiled")
                    write_json(arguments.json, made)


if __name__ == "__main__":
    sys.exit(main())
