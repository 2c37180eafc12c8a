"""`python -m train benchmark`: how fast a training step is here, beside transformers' where it is installed.

Each has a process of its own and takes its turn in every round, so that the ratio holds on a noisy machine.
"""

import argparse
import datetime
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rtdetrv2_jax.benchmark.turns import BenchmarkError, Runtime
from rtdetrv2_jax.commands.benchmark import machine
from rtdetrv2_jax.config import RELEASED
from rtdetrv2_jax.weights.files import write_json

from .benchmark_steps import KINDS, NEEDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m train benchmark`."""
    parser.add_argument("--model", choices=tuple(RELEASED), default="r18vd", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="images in a step (default: %(default)s)")
    parser.add_argument("--side", type=int, default=640, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), help="default: jax, and transformers if installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and gives the exit status."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    kinds = arguments.kinds or [kind for kind in KINDS if all(map(importlib.util.find_spec, NEEDS[kind]))]
    with Console(stderr=True).status(f"{', '.join(kinds)}: compiling, then {arguments.rounds} rounds"):
        try:
            figures = measure(kinds, arguments)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    what = f"a training step of {arguments.model}, {arguments.dtype}, {arguments.side}x{arguments.side}"
    console.print(f"{what}, batch {arguments.batch}; {machine()}; {datetime.date.today().isoformat()}")
    console.print(_table(figures))
    console.print("[dim]ratio: the first one's median over this one's; under 1, the first is faster[/dim]")
    if arguments.json:
        about = {name: getattr(arguments, name) for name in ("model", "batch", "side", "dtype")}
        when = {"machine": machine(), "date": datetime.date.today().isoformat()}
        command = " ".join(["python -m train", *sys.argv[1:]])
        write_json(arguments.json, about | when | {"command": command, "figures": figures})
    return 0


def measure(kinds: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The seconds of each kind's steps over some rounds in which all take turns.

    Raises:
        BenchmarkError: One of them failed.
    """
    options = [
        word for name in ("model", "batch", "side", "dtype") for word in (f"--{name}", str(vars(arguments)[name]))
    ]
    processes: list[Runtime] = []
    seconds: list[list[float]] = [[] for _ in kinds]
    try:
        ready = []
        for kind in kinds:
            processes.append(Runtime(kind, [sys.executable, "-m", "train.benchmark_steps", kind, *options]))
            ready.append(processes[-1].answer())
        for _ in range(arguments.rounds):
            for process, taken in zip(processes, seconds, strict=True):
                taken.append(process.run("step"))
    finally:
        for process in processes:
            process.__exit__()
    return [
        {
            "kind": kind,
            "version": said["version"],
            "ready_s": round(said["ready"], 1),
            "step_p50_s": round(statistics.median(taken), 4),
            "images_per_second": round(arguments.batch / statistics.median(taken), 3),
            "steps_s": [round(each, 4) for each in taken],
        }
        for kind, said, taken in zip(kinds, ready, seconds, strict=True)
    ]


def _table(figures: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("program", no_wrap=True)
    for title in ("ready s", "step p50 s", "ratio", "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in figures:
        ratio = figures[0]["step_p50_s"] / each["step_p50_s"]
        cells = (f"{each['ready_s']:.1f}", f"{each['step_p50_s']:.3f}", f"{ratio:.2f}")
        table.add_row(each["version"], *cells, f"{each['images_per_second']:.2f}")
    return table
