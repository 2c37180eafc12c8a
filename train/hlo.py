"""A compiled program's HLO text, taken apart: its computations, their instructions, and the source line of each."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|branch_computations|called_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b(?P<kind>pred|token|[a-z]+(?P<bits>\d+)\w*)\[(?P<sides>[\d,]*)\]")


class Instruction(NamedTuple):
    """A line of a computation. `shape` is without the layout; `rest` is all that follows the opcode."""

    name: str
    opcode: str
    shape: str
    rest: str


class Module(NamedTuple):
    """A program: its computations by name, which one is run, and the source line that each frame number stands for."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    frames: dict[str, str]


class Step(NamedTuple):
    """An instruction that the device runs on its own, not inside a fusion; and the innermost loop around it."""

    instruction: Instruction
    loop: Instruction | None


def parse(text: str) -> Module:
    """The program that a text describes, as `Compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            shape, rest = _cut(found["rest"])
            opcode, _, rest = rest.partition("(")
            current.append(Instruction(found["name"], opcode, shape, rest))
    return Module(entry, {name: tuple(lines) for name, lines in computations.items()}, _frames(text))


def steps(module: Module, computation: str | None = None, *, loop: Instruction | None = None) -> Iterator[Step]:
    """All steps of a computation, or of the whole program, with what its loops and branches run."""
    for instruction in module.computations.get(computation or module.entry, ()):
        yield Step(instruction, loop)
        if instruction.opcode in ("while", "conditional", "call", "async-start"):
            inner = instruction if instruction.opcode == "while" else loop
            for name in _called(instruction):
                yield from steps(module, name, loop=inner)


def inside(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """Everything in the computations that an instruction calls: those of a fusion, a loop, a reduction."""
    waiting, known = _called(instruction), set()
    while waiting:
        name = waiting.pop(0)
        if name in known:
            continue
        known.add(name)
        for each in module.computations.get(name, ()):
            yield each
            waiting += _called(each)


def cycles(instruction: Instruction) -> int | None:
    """The compiler's estimate of an instruction, where it gives one."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return int(found[1]) if found else None


def operands(instruction: Instruction) -> list[str]:
    """The names of what an instruction takes."""
    depth = 1
    for end, letter in enumerate(instruction.rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return re.findall(r"%([\w.-]+)", instruction.rest[:end])
    return []


def size_in_bytes(shape: str) -> int:
    """The bytes of all arrays in a shape, without the padding of their layouts."""
    total = 0
    for array in _ARRAY.finditer(shape):
        sides = [int(side) for side in array["sides"].split(",") if side]
        total += math.ceil(math.prod(sides) * int(array["bits"] or 8) / 8) * (array["kind"] != "token")
    return total


def arrays(shape: str) -> list[str]:
    """The arrays that a shape, perhaps a tuple's, is made of."""
    return [array[0] for array in _ARRAY.finditer(shape)]


def operation(instruction: Instruction) -> str:
    """The primitive of JAX that an instruction is of, as "dot_general" or "scatter"."""
    named = re.search(r'op_name="[^"]*/([^"/]*)"', instruction.rest)
    return named[1].removesuffix("-add") if named else ""


def source(module: Module, instruction: Instruction) -> str:
    """Forward or backward pass, primitive, line and function."""
    named = re.search(r'op_name="([^"]*)"', instruction.rest)
    path = named[1] if named else ""
    direction = "backward" if "transpose(jvp" in path else "forward" if "jvp(" in path else ""
    frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    line = module.frames.get(frame[1], "") if frame else ""
    return " ".join(filter(None, (direction, operation(instruction), line))) or "what the compiler added"


def _cut(text: str) -> tuple[str, str]:
    """The shape that a text begins with, without layouts and comments, and what follows it."""
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and not depth:
            return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text[:end]), text[end + 1 :]
    return text, ""


def _called(instruction: Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in re.findall(r"[\w.-]+", group)]


def _frames(text: str) -> dict[str, str]:
    """The line of source and the function of each stack frame; for a package's frame, those of its caller."""
    files, functions, places, frames = (
        dict(re.findall(r"^(\d+) (.*)$", text.partition(f"\n{title}\n")[2].partition("\n\n")[0], re.MULTILINE))
        for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    )
    # The first frame is nobody's child: whatever number it gives its parent is how far these numbers are off.
    offset = int(_number("parent_frame_id", frames.get("1", "")) or 0)
    found = {}
    for name in frames:
        frame, file, place = name, "", ""
        for _ in frames:
            place = places[_number("file_location_id", frames[frame])]
            file = files[_number("file_name_id", place)].strip('"')
            parent = str(int(_number("parent_frame_id", frames[frame])) - offset)
            if "site-packages" not in file or parent not in frames:
                break
            frame = parent
        function = functions[_number("function_name_id", place)].strip('"')
        found[name] = f"{Path(file).name}:{_number('line', place)} {function}"
    return found


def _number(name: str, text: str) -> str:
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else ""
