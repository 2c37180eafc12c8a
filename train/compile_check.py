"""`python -m train compile-check`: compiles a recipe's step for TPUs that need not be there; tells what it takes."""

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from rtdetrv2_jax.arrays import Targets
from rtdetrv2_jax.benchmark.record import record
from rtdetrv2_jax.sharding import data_mesh
from rtdetrv2_jax.weights.files import write_json

from .batch import Batch
from .hlo_report import Report, lines_of, report, warnings_of
from .recipe import Recipe, RecipeError
from .recipes import build
from .step import Program, init_state, jitted_step, program

GIB = 2**30
MEMORY_OF = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 15.25,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
}
"""GiB that the compiler lets the programs of a device have, of each kind; somewhat less than is built in."""

IMAGES = 100_000
"""A training set's size, for recipes that want to know it: it decides numbers of the program, not its shape."""

# What libtpu says, though nothing is wrong, where there is no TPU; and that another process may use it meanwhile.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class TopologyError(ValueError):
    """Devices that cannot be compiled for: libtpu is missing, or knows none of that name."""


class Memory(NamedTuple):
    """What a program takes of a device's memory, in bytes; `aliased` outputs lie where arguments were.

    `limit` is None for devices of a kind that we do not know.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    limit: int | None

    @property
    def needed(self) -> int:
        """All of it together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Compiled(NamedTuple):
    """A program compiled for TPUs. `flops` and `bytes_accessed` are a device's, as the compiler counts."""

    seconds: float
    memory: Memory
    flops: float
    bytes_accessed: float
    report: Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m train compile-check`."""
    parser.add_argument("--recipe", required=True, metavar="NAME", help="whose step to compile, such as coco_r50")
    parser.add_argument(
        "--topology",
        default="v5e:2x2",
        metavar="NAME",
        help="kind and grid of chips, as v6e:4x4 (default: %(default)s)",
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
    # Nothing is computed here: a TPU that is there, and perhaps busy, is left alone.
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


def topology_mesh(name: str) -> Mesh:
    """A mesh of devices to compile for, which need not be there; libtpu must.

    Raises:
        TopologyError: libtpu is missing, or knows no such devices.
    """
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return data_mesh(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"no devices are called {name!r}: give a kind and a grid of chips, such as v5e:2x2, v6e:4x4 or v5p:2x2x1 "
            f"({error})"
        ) from error
    except RuntimeError as error:
        raise TopologyError(f"compiling for a TPU takes libtpu: pip install -e '.[tpu]' ({error})") from error


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


def compile_lowered(lowered: jax.stages.Lowered, *, kind: str) -> Compiled:
    """A program, compiled for devices of this kind.

    Raises:
        jax.errors.JaxRuntimeError: It cannot be compiled; RESOURCE_EXHAUSTED where it needs too much memory.
    """
    start = time.monotonic()
    program = lowered.compile()
    seconds = time.monotonic() - start
    costs = program.cost_analysis() or {}
    return Compiled(
        seconds=seconds,
        memory=memory_of(program, kind=kind),
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        report=report(program.as_text() or ""),
    )


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


def memory_of(compiled: jax.stages.Compiled, *, kind: str) -> Memory:
    """What a compiled program takes of a device of this kind."""
    sizes = compiled.memory_analysis()
    assert sizes is not None  # TPUs' programs always say
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        limit=int(MEMORY_OF[kind] * GIB) if kind in MEMORY_OF else None,
    )


def faults_of(compiled: Compiled) -> list[str]:
    """Why a run could not, or should not, be made with this program."""
    memory, found = compiled.memory, []
    if memory.limit is not None and memory.needed > memory.limit:
        found.append(f"it needs {_gib(memory.needed)} of memory, and a chip has {_gib(memory.limit)}")
    found += [f"the step waits for the host: {call}" for call in compiled.report.host_calls]
    return found


def show(console: Console, compiled: Compiled) -> None:
    """Prints what a program takes, and where its time goes."""
    memory, found = compiled.memory, compiled.report
    facts = {
        "memory a chip": f"{_gib(memory.needed)} of {'?' if memory.limit is None else _gib(memory.limit)}: arguments "
        f"{_gib(memory.arguments)}, outputs {_gib(memory.outputs)} ({_gib(memory.aliased)} in place of arguments), "
        f"temporaries {_gib(memory.temporaries)}, code {_gib(memory.code)}",
        "work a chip": f"{compiled.flops / 1e12:.3g} TFLOP, {compiled.bytes_accessed / 1e9:,.1f} GB accessed, "
        f"{found.cycles / 1e6:,.1f} million cycles estimated (loops once; no scatter, gather, sort or kernel of ours), "
        f"{found.product_cycles / 1e6:,.1f} of them with convolutions and matrix products",
        "collectives": "; ".join(
            f"{each.times} {each.kind}{' in loops' * each.in_loop}, {each.bytes:,} bytes" for each in found.collectives
        ),
        "loops": "; ".join(f"{loop.times} with {loop.largest}: {loop.source}" for loop in found.loops),
        "compiling took": f"{compiled.seconds:.0f} s",
    }
    for about, what in facts.items():
        console.print(f"  {about:<16}{escape(what or 'none')}")
    console.print("  most cycles, estimated by the compiler; and what it has no estimate for:")
    for line in lines_of(found.slowest + found.not_estimated, cycles=found.cycles):
        console.print(f"  {escape(line)}")
    for warning in warnings_of(found):
        console.print(f"  [yellow]slow[/]: {escape(warning)}")


def figure(compiled: Compiled) -> dict[str, Any]:
    """What a program takes of each chip, as JSON has it."""
    found = compiled.report
    return {
        "memory": compiled.memory.needed,
        "memory_limit": compiled.memory.limit,
        "flops": compiled.flops,
        "bytes_accessed": compiled.bytes_accessed,
        "cycles": found.cycles,
        "product_cycles": found.product_cycles,
        "collectives": [each._asdict() for each in found.collectives],
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
