"""Programs compiled for chips that are not here: what they take of one, for people to read and as figures."""

import time
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape

from .hlo_report import Report, lines_of, report, warnings_of

GIB = 2**30
MEMORY_OF = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 15.25,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
    "NVIDIA A100": 79.0,
    "NVIDIA H100": 79.0,
    "NVIDIA H200": 139.0,
}
"""GiB that programs can have of a device of each kind; somewhat less than is built in. JAX itself gives them three
quarters of a GPU unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says more."""


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
    """A program, and what the compiler tells of it.

    `flops` and `bytes_accessed` are a device's. For GPUs the compiler counts neither: the first is None, and the bytes
    are what the program's steps read and write.
    """

    seconds: float
    memory: Memory
    flops: float | None
    bytes_accessed: float
    report: Report


def compile_lowered(lowered: jax.stages.Lowered, *, kind: str) -> Compiled:
    """A program, compiled for devices of this kind.

    Raises:
        jax.errors.JaxRuntimeError: It cannot be compiled; RESOURCE_EXHAUSTED where it needs too much memory.
    """
    start = time.monotonic()
    program = lowered.compile()
    seconds = time.monotonic() - start
    costs, found = program.cost_analysis() or {}, report(program.as_text() or "")
    return Compiled(
        seconds=seconds,
        memory=memory_of(program, kind=kind),
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed", float(found.bytes)),
        report=found,
    )


def memory_of(compiled: jax.stages.Compiled, *, kind: str) -> Memory:
    """What a compiled program takes of a device of this kind."""
    sizes = compiled.memory_analysis()
    assert sizes is not None  # programs of TPUs and GPUs always say
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
        "work a chip": ", ".join(_work(compiled)),
        "collectives": "; ".join(
            f"{each.times} {each.kind}{' in loops' * each.in_loop}, {each.bytes:,} bytes" for each in found.collectives
        ),
        "loops": "; ".join(f"{loop.times} with {loop.largest}: {loop.source}" for loop in found.loops),
        "compiling took": f"{compiled.seconds:.0f} s",
    }
    for about, what in facts.items():
        console.print(f"  {about:<16}{escape(what or 'none')}")
    most = "most cycles, estimated by the compiler; and what it has no estimate for" if found.cycles else "moves most"
    console.print(f"  {most}:")
    for line in lines_of(found):
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
        "launches": found.launches,
        "collectives": [each._asdict() for each in found.collectives],
    }


def _work(compiled: Compiled) -> list[str]:
    found = compiled.report
    flops = [] if compiled.flops is None else [f"{compiled.flops / 1e12:.3g} TFLOP"]
    moved = f"{compiled.bytes_accessed / 1e9:,.1f} GB accessed"
    if not found.cycles:
        return [*flops, f"{moved} by {found.launches:,} kernels (loops once)"]
    cycles = (
        f"{found.cycles / 1e6:,.1f} million cycles estimated (loops once; no scatter, gather, sort or kernel of ours)"
    )
    return [*flops, moved, cycles, f"{found.product_cycles / 1e6:,.1f} of them with convolutions and matrix products"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
