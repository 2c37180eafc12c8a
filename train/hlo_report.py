"""What a compiled program's HLO text tells: where its time goes, its loops, its collectives, its calls to the host."""

import re
from typing import NamedTuple

from .hlo import Instruction, Module, arrays, cycles, inside, operation, parse, size_in_bytes, source, steps

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
NOT_ESTIMATED = ("scatter", "gather", "sort")
"""What a TPU's compiler says no cycles for."""
PRODUCTS = ("convolution", "dot")
TELLING = (
    *PRODUCTS,
    *NOT_ESTIMATED,
    "select-and-scatter",
    "reduce-window",
    "dynamic-update-slice",
    "reduce",
)
"""Of all that a fusion holds, what tells most about it, first things first."""


class Work(NamedTuple):
    """Steps that are alike: how many, what they do, the shape that comes out, whence, and cycles of all together."""

    times: int
    what: str
    shape: str
    source: str
    cycles: int


class Loop(NamedTuple):
    """Loops that are alike: how many, whence, what the largest array in each is, and what each turn runs."""

    times: int
    source: str
    largest: str
    scatters: int
    collectives: int


class Collective(NamedTuple):
    """Exchanges between devices, of one kind; `bytes` are those of all results, once around each loop."""

    kind: str
    in_loop: bool
    times: int
    bytes: int


class Report(NamedTuple):
    """What there is to know of a program.

    `cycles` are estimates, summed, with one turn of each loop; `product_cycles` are those of convolutions and matrix
    products, with what is fused to them.
    """

    cycles: int
    product_cycles: int
    slowest: tuple[Work, ...]
    not_estimated: tuple[Work, ...]
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    host_calls: tuple[str, ...]


def report(text: str, *, most: int = 10) -> Report:
    """The report on the text of a compiled program, with at most so many rows of slow steps."""
    module = parse(text)
    works = alike(module)
    estimated = sorted((work for work in works if work.cycles), key=lambda work: -work.cycles)
    silent = [work for work in works if not work.cycles and set(_kinds(work)) & set(NOT_ESTIMATED)]
    silent.sort(key=lambda work: -work.times * size_in_bytes(work.shape))
    return Report(
        cycles=sum(work.cycles for work in works),
        product_cycles=sum(work.cycles for work in works if set(_kinds(work)) & set(PRODUCTS)),
        slowest=tuple(estimated[:most]),
        not_estimated=tuple(silent[:most]),
        loops=loops(module),
        collectives=collectives(module),
        host_calls=host_calls(module),
    )


def warnings_of(found: Report) -> list[str]:
    """What can be run, and will be slow."""
    scatters = [
        f"{loop.times} loops around a scatter: {loop.source}, {loop.largest}" for loop in found.loops if loop.scatters
    ]
    waits = [f"a loop in whose every turn all chips wait: {loop.source}" for loop in found.loops if loop.collectives]
    return scatters + waits


def lines_of(works: tuple[Work, ...], *, cycles: int) -> list[str]:
    """Steps as lines to print in columns, those with an estimate with their share of so many cycles."""
    lines = []
    for work in works:
        estimate = f"{work.cycles:,}  {work.cycles / cycles:5.1%}" if work.cycles else "?"
        lines.append(f"{estimate:>20}  {work.times:>3} times  {work.what:<28}  {work.shape:<26}  {work.source}")
    return lines


def alike(module: Module) -> list[Work]:
    """All steps, those together that do the same to the same shape for the same line of the source."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for step in steps(module):
        key = _what(module, step.instruction), step.instruction.shape, source(module, step.instruction)
        count, total = found.get(key, (0, 0))
        found[key] = count + 1, total + (cycles(step.instruction) or 0)
    return [Work(count, *key, total) for key, (count, total) in found.items()]


def loops(module: Module) -> tuple[Loop, ...]:
    """The program's loops. A scatter that the compiler itself made into a loop counts as one around it."""
    found: dict[tuple[str, str, int, int], int] = {}
    for instruction, _ in steps(module):
        if instruction.opcode == "while":
            turn = list(inside(module, instruction))
            scatters = sum(each.opcode == "scatter" for each in turn) or int(operation(instruction) == "scatter")
            exchanges = sum(_collective(each) is not None for each in turn)
            largest = max(arrays(instruction.shape), key=size_in_bytes, default="")
            key = source(module, instruction), largest, scatters, exchanges
            found[key] = found.get(key, 0) + 1
    return tuple(Loop(count, *key) for key, count in found.items())


def collectives(module: Module) -> tuple[Collective, ...]:
    """The exchanges between devices, by kind, those in loops apart."""
    found: dict[tuple[str, bool], tuple[int, int]] = {}
    for instruction, loop in steps(module):
        fused = inside(module, instruction) if instruction.opcode == "fusion" else ()
        for each in (instruction, *fused):
            if kind := _collective(each):
                count, total = found.get((kind, loop is not None), (0, 0))
                found[kind, loop is not None] = count + 1, total + size_in_bytes(each.shape)
    return tuple(Collective(*key, *numbers) for key, numbers in sorted(found.items()))


def host_calls(module: Module) -> tuple[str, ...]:
    """Where the device waits for the host, or the host for it: callbacks, infeeds, sends and receives."""
    found = []
    for instruction in (each for lines in module.computations.values() for each in lines):
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        called = instruction.opcode == "custom-call" and target is not None and "callback" in target[1]
        sent = instruction.opcode in ("send", "recv") and "is_host_transfer=true" in instruction.rest
        if called or sent or instruction.opcode in ("infeed", "outfeed"):
            found.append(f"{instruction.opcode} of {instruction.shape} for {source(module, instruction)}")
    return tuple(found)


def _collective(instruction: Instruction) -> str | None:
    """The kind of an exchange. One that is started and ended apart counts where it ends: there stands its result."""
    kind = instruction.opcode.removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _kinds(work: Work) -> list[str]:
    return re.split("[:,] ", work.what)


def _what(module: Module, instruction: Instruction) -> str:
    if instruction.opcode != "fusion":
        return instruction.opcode
    held = {each.opcode for each in inside(module, instruction)}
    telling = [opcode for opcode in TELLING if opcode in held]
    return f"fusion: {', '.join(telling[:2]) or 'elementwise'}"
