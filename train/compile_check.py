"""`python -m train compile-check`: compiles a recipe's step for chips that need not be there; tells what it takes."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.benchmark.record import record
from rtdetrv2_jax.weights.files import write_json

from .batch import Batch
from .compiled import Compiled, compile_lowered, faults_of, figure, show
from .recipe import Recipe, RecipeError
from .recipes import build
from .step import Program, init_state, jitted_step, program
from .topology import topology_mesh

IMAGES = 100_000
"""A training set's size, for recipes that want to know it: it decides numbers of the program, not its shape."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m train compile-check`."""
    parser.add_argument("--recipe", required=True, metavar="NAME", help="whose step to compile, such as coco_r50")
    parser.add_argument(
        "--topology",
        default="v5e:2x2",
        metavar="NAME",
        help="kind and grid of chips, as v6e:4x4; or GPUs, as h200 or h100:8 (default: %(default)s)",
    )
    parser.add_argument("--batch-per-chip", type=int, default=16, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--slots", type=int, default=64, metavar="N", help="boxes that targets are padded to (default: %(default)s)"
    )
    parser.add_argument(
        "--side", type=int, nargs="+", metavar="N", help="compile only for images of these sides (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")


def run(arguments: argparse.Namespace) -> int:
    """Compiles for every size, prints what each takes, and gives the exit status: 1 where one cannot be run.

    Raises:
        TopologyError: There are no such devices to compile for.
        RecipeError: There is no such recipe, field or size.
        ShardingError: The chips cannot share out a batch as the recipe cuts it.
    """
    # Nothing is computed here: an accelerator that is there, and perhaps busy, is left alone.
    jax.config.update("jax_platforms", "cpu")
    console = Console(highlight=False, soft_wrap=True)
    mesh = topology_mesh(arguments.topology)
    recipe = recipe_of(arguments, devices=mesh.size)
    made = program(recipe, steps_per_epoch=recipe.batches.steps_per_epoch(IMAGES))
    faults, figures = [], []
    for side in sides_of(recipe, arguments.side):
        about = f"{recipe.name} at {side}x{side} on {arguments.topology}"
        console.print(f"[bold]{about}[/]: {arguments.batch_per_chip} images a chip, {arguments.slots} boxes an image")
        try:
            step = compile_step(made, mesh, side=side, slots=arguments.slots)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = [f"it does not fit into memory. The compiler says: {error}"]
        else:
            show(console, step)
            found = faults_of(step)
            what = {"recipe": recipe.name, "topology": arguments.topology, "batch_per_chip": arguments.batch_per_chip}
            figures.append(what | {"side": side} | figure(step))
        for fault in found:
            console.print(f"  [red]fails[/]: {escape(fault)}")
        console.print()
        faults += found
    if arguments.json:
        write_json(arguments.json, record("compiled step", figures, program="python -m train"))
    return 1 if faults else 0


def recipe_of(arguments: argparse.Namespace, *, devices: int) -> Recipe:
    """The recipe with its overrides, and with a batch of so many images for each of the devices.

    Raises:
        RecipeError: There is no such recipe or field, or the size of the batch is given twice.
    """
    overrides: dict[str, str] = dict(getattr(arguments, "overrides", {}))
    if "batches.size" in overrides:
        raise RecipeError("the batch is --batch-per-chip times the chips: leave out batches.size")
    overrides["batches.size"] = str(arguments.batch_per_chip * devices)
    return build(arguments.recipe, overrides, images=IMAGES)


def sides_of(recipe: Recipe, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The sides of images to compile for; `RecipeError` if one is wanted that no run of the recipe would meet."""
    sides = recipe.all_sides()
    if missing := sorted(set(wanted or ()) - set(sides)):
        raise RecipeError(
            f"{recipe.name} has no images of side {', '.join(map(str, missing))}: its sides are "
            f"{', '.join(map(str, sides))}"
        )
    return tuple(sorted(set(wanted or sides)))


def compile_step(made: Program, mesh: Mesh, *, side: int, slots: int) -> Compiled:
    """The step, compiled for the mesh and for images of one size.

    Raises:
        jax.errors.JaxRuntimeError: It cannot be compiled; RESOURCE_EXHAUSTED where it needs too much memory.
    """
    state = jax.eval_shape(partial(init_state, made), made.model)
    lowered = jitted_step(made, mesh).lower(state, batch_shapes(made.recipe, slots=slots), (side, side))
    return compile_lowered(lowered, kind=mesh.devices.flat[0].device_kind)


def batch_shapes(recipe: Recipe, *, slots: int) -> Batch:
    """A batch of the recipe without its numbers: shapes and types."""
    size, side = recipe.batches.size, recipe.batches.side

    def empty() -> Batch:
        targets = Targets(
            jnp.zeros((size, slots), jnp.int32), jnp.zeros((size, slots, 4)), jnp.zeros((size, slots), bool)
        )
        images, image_ids = jnp.zeros((size, side, side, 3), jnp.uint8), jnp.zeros(size, jnp.int32)
        return Batch(images, targets, image_ids, jnp.zeros((size, 4), jnp.int32), jnp.zeros(size, bool))

    return jax.eval_shape(empty)
