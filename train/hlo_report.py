"""What a compiled program's HLO text tells: where its time goes, its loops, its collectives, its calls to the host."""

import re
from typing import NamedTuple

from .hlo import Instruction, Module, arrays, cycles, inside, operands, operation, parse, size_in_bytes, source, steps

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
NOT_ESTIMATED = ("scatter", "gather", "sort")
"""What a TPU's compiler says no cycles for."""
NOTHING_DONE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call", "async-start", "after-all"),
)
"""Steps that move nothing themselves."""
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
    """Steps that are alike: how many, what they do, the shape that comes out, whence.

    `cycles` are of all together, 0 where the compiler has no estimate; `bytes` what all read and write.
    """

    times: int
    what: str
    shape: str
    source: str
    cycles: int
    bytes: int


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

    All sums are with one turn of each loop. `cycles` are a TPU's compiler's estimates, `product_cycles` those of
    convolutions and matrix products with what is fused to them; both are 0 for other devices. `launches` are the steps
    that do something, on a GPU kernels; `bytes` is what they read and write, without regard for caches.
    """

    cycles: int
    product_cycles: int
    launches: int
    bytes: int
    slowest: tuple[Work, ...]
    not_estimated: tuple[Work, ...]
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    host_calls: tuple[str, ...]


def report(text: str, *, most: int = 10) -> Report:
    """The report on the text of a compiled program, with at most so many rows of slow steps.

    The slowest are those of most cycles; where the compiler estimates none, those that move most.
    """
    module = parse(text)
    works = alike(module)
    estimated = sorted((work for work in works if work.cycles), key=lambda work: -work.cycles)
    moving = sorted((work for work in works if work.bytes), key=lambda work: -work.bytes)
    silent = [work for work in works if not work.cycles and set(_kinds(work)) & set(NOT_ESTIMATED)]
    silent.sort(key=lambda work: -work.times * size_in_bytes(work.shape))
    return Report(
        cycles=sum(work.cycles for work in works),
        product_cycles=sum(work.cycles for work in works if set(_kinds(work)) & set(PRODUCTS)),
        launches=sum(work.times for work in moving),
        bytes=sum(work.bytes for work in moving),
        slowest=tuple((estimated or moving)[:most]),
        not_estimated=tuple(silent[:most]) if estimated else (),
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


def lines_of(found: Report) -> list[str]:
    """The slowest steps as lines to print in columns, each with its share of all cycles, or else of all bytes."""
    lines = []
    for work in found.slowest + found.not_estimated:
        if found.cycles:
            estimate = f"{work.cycles:,}  {work.cycles / found.cycles:5.1%}" if work.cycles else "?"
        else:
            estimate = f"{work.bytes / 1e6:,.0f} MB  {work.bytes / found.bytes:5.1%}"
        lines.append(f"{estimate:>20}  {work.times:>3} times  {work.what:<28}  {work.shape:<26}  {work.source}")
    return lines


def alike(module: Module) -> list[Work]:
    """All steps, those together that do the same to the same shape for the same line of the source."""
    sizes = {each.name: size_in_bytes(each.shape) for lines in module.computations.values() for each in lines}
    found: dict[tuple[str, str, str], list[int]] = {}
    for instruction, _ in steps(module):
        key = _what(module, instruction), instruction.shape, source(module, instruction)
        moved = 0 if instruction.opcode in NOTHING_DONE else sum(sizes.get(name, 0) for name in _touched(instruction))
        sums = found.setdefault(key, [0, 0, 0])
        for place, number in enumerate((1, cycles(instruction) or 0, moved)):
            sums[place] += number
    return [Work(count, *key, total, moved) for key, (count, total, moved) in found.items()]


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
        called = "callback" in _target(instruction)
        sent = instruction.opcode in ("send", "recv") and "is_host_transfer=true" in instruction.rest
        if called or sent or instruction.opcode in ("infeed", "outfeed"):
            found.append(f"{instruction.opcode} of {instruction.shape} for {source(module, instruction)}")
    return tuple(found)


def _touched(instruction: Instruction) -> list[str]:
    """The arrays that a step reads, and the one that it writes."""
    return [instruction.name, *operands(instruction)]


def _collective(instruction: Instruction) -> str | None:
    """The kind of an exchange. One that is started and ended apart counts where it ends: there stands its result."""
    kind = instruction.opcode.removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _kinds(work: Work) -> list[str]:
    return re.split("[:,] ", work.what)


def _target(instruction: Instruction) -> str:
    """What a custom call calls; nothing for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found[1] if found and instruction.opcode == "custom-call" else ""


def _what(module: Module, instruction: Instruction) -> str:
    if target := _target(instruction):
        return f"{instruction.opcode}: {target.strip('_').replace('$', ' ')}"
    if instruction.opcode != "fusion":
        return instruction.opcode
    held = {each.opcode for each in inside(module, instruction)}
    telling = [opcode for opcode in TELLING if opcode in held]
    return f"fusion: {', '.join(telling[:2]) or 'elementwise'}"
