"""What a detection takes of a TPU chip, as its compiler counts it, without a chip: `python -m benchmarks.tpu`.

It needs libtpu. The program is `rtdetrv2_jax.detect`, from resized images to boxes, of a released size.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from rtdetrv2_jax.arrays import Detections
from rtdetrv2_jax.benchmark.record import record
from rtdetrv2_jax.compilation import compiler_options
from rtdetrv2_jax.config import named
from rtdetrv2_jax.detector import detect
from rtdetrv2_jax.model.fuse import fuse
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2, abstract_model
from rtdetrv2_jax.preprocessing import Preprocessing
from rtdetrv2_jax.sharding import data_mesh, replicated, traced_for
from rtdetrv2_jax.weights.files import write_json
from train.compile_check import Compiled, compile_lowered, figure, show, topology_mesh

SIDE = 640


def compile_detection(model: str, topology: str, *, batch: int, dtype: str) -> Compiled:
    """Detection in a batch of images on one chip of a topology.

    Raises:
        TopologyError: libtpu is missing, or knows no such chips.
        ConfigError: There is no such model.
    """
    chip = topology_mesh(topology).devices.flat[0]
    mesh = data_mesh([chip])

    def run(model: RTDETRv2, images: jax.Array, sizes: jax.Array) -> Detections:
        return detect(model, images, sizes, preprocessing=Preprocessing(size=(SIDE, SIDE)))

    fused = jax.eval_shape(partial(fuse, convolving="direct"), abstract_model(named(model), dtype=jnp.dtype(dtype)))
    images = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), jnp.uint8)
    sizes = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
    program = jax.jit(
        traced_for(mesh, run), in_shardings=replicated(mesh), compiler_options=compiler_options(chip.platform)
    )
    return compile_lowered(program.lower(fused, images, sizes), kind=chip.device_kind)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, shows what each program takes, and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["r18vd"], help="default: r18vd")
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"], help="default: v5e:2x2; one of its chips is used")
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
                figures.append(about | figure(found))
    if arguments.json:
        write_json(arguments.json, record("compiled detection", figures, program="python -m benchmarks.tpu"))


if __name__ == "__main__":
    sys.exit(main())
