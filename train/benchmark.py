"""`python -m train benchmark`: how fast a training step is here, beside transformers' where it is installed.

Each has a process of its own and takes its turn in every round, so that the ratio holds on a noisy machine.
"""

import argparse
import datetime
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtdetrv2_jax.benchmark.record import leave_memory_to_others, machine, record
from rtdetrv2_jax.benchmark.turns import PAUSE_SECONDS, BenchmarkError, Runtime, is_over, roofline
from rtdetrv2_jax.config import RELEASED
from rtdetrv2_jax.weights.files import write_json

from .benchmark_steps import KINDS, NEEDS

Figures = list[dict[str, Any]]


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
    leave_memory_to_others()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    kinds = arguments.kinds or [kind for kind in KINDS if all(map(importlib.util.find_spec, NEEDS[kind]))]
    with Console(stderr=True).status(f"{', '.join(kinds)}: compiling, then {arguments.rounds} rounds"):
        figures, failed = measure(
            kinds,
            model=arguments.model,
            batch=arguments.batch,
            side=arguments.side,
            dtype=arguments.dtype,
            rounds=arguments.rounds,
        )
    what = f"a training step of {arguments.model}, {arguments.dtype}, {arguments.side}x{arguments.side}"
    console.print(f"{what}, batch {arguments.batch}; {machine()}; {datetime.date.today().isoformat()}")
    console.print(_table(figures))
    for one in failed:
        console.print(f"[red]failed:[/red] {escape(one['reason'])}")
    console.print("[dim]ratio: the first one's median over this one's; under 1, the first is faster[/dim]")
    if arguments.json:
        write_json(arguments.json, record("training step", figures, program="python -m train", failed=failed))
    return 1 if failed else 0


def measure(
    kinds: list[str],
    *,
    model: str,
    batch: int,
    side: int,
    dtype: str,
    rounds: int,
    until: float | None = None,
) -> tuple[Figures, Figures]:
    """The seconds of each kind's steps over some rounds in which all take turns; and what failed, the rest going on.

    No round begins after `until`, by `time.monotonic`, but for the first.
    """
    about = {"model": model, "dtype": dtype, "batch": batch, "side": side}
    options = [word for name, value in about.items() for word in (f"--{name}", str(value))]
    processes: list[Runtime] = []
    taking: list[tuple[Runtime, dict[str, Any], list[float]]] = []
    failed: Figures = []
    try:
        for kind in kinds:
            command = [sys.executable, "-m", "train.benchmark_steps", kind, *options]
            processes.append(Runtime(kind, command, until=until))
            try:
                taking.append((processes[-1], processes[-1].answer(), []))
            except BenchmarkError as error:
                failed.append(about | {"kind": kind, "reason": str(error)})
        for turn in range(rounds):
            if turn and is_over(until):
                break
            for one in list(taking):
                time.sleep(PAUSE_SECONDS)
                try:
                    one[2].extend(one[0].run("step"))
                except BenchmarkError as error:
                    failed.append(about | {"kind": one[0].name, "reason": str(error)})
                    taking.remove(one)
    finally:
        for process in processes:
            process.__exit__()
    return [about | _summary(process.name, said, seconds, batch=batch) for process, said, seconds in taking], failed


def _summary(kind: str, said: dict[str, Any], seconds: list[float], *, batch: int) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "kind": kind,
        "version": said["version"],
        "ready_s": round(said["ready"], 1),
        "step_p50_s": round(middle, 4),
        "images_per_second": round(batch / middle, 3),
        "steps_s": [round(each, 4) for each in seconds],
    } | roofline(said["cost"], seconds=middle)


def _table(figures: Figures) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("program", no_wrap=True)
    for title in ("ready s", "step p50 s", "ratio", "images/s", "TFLOP/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in figures:
        ratio = figures[0]["step_p50_s"] / each["step_p50_s"]
        cells = (f"{each['ready_s']:.1f}", f"{each['step_p50_s']:.3f}", f"{ratio:.2f}")
        reached = f"{each['tflop_per_second']:.2f}" if "tflop_per_second" in each else ""
        table.add_row(each["version"], *cells, f"{each['images_per_second']:.2f}", reached)
    return table
