"""`rtdetrv2 benchmark`: how fast the network is here, beside other runtimes where they are installed.

Every runtime has a process of its own and takes its turn in every round, so that ratios hold on a noisy machine.
"device" is the network alone on an input that is there already; "whole" is the way from JPEG bytes to boxes. A runtime
that fails is told of; the others are measured all the same, and the exit status is 1.
"""

import argparse
import datetime
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtdetrv2_jax.benchmark.ours import write_checkpoint
from rtdetrv2_jax.benchmark.record import leave_memory_to_others, machine, record
from rtdetrv2_jax.benchmark.runtimes import LOADERS, measurable
from rtdetrv2_jax.benchmark.turns import measure
from rtdetrv2_jax.weights.files import write_json

Figures = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 benchmark`."""
    parser.add_argument(
        "--model", nargs="+", default=["r18vd"], help="released sizes (random weights) or checkpoints (default: r18vd)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, help="runs in a turn; on a GPU, 20 or more let it warm up (default: %(default)s)"
    )
    parser.add_argument(
        "--runtimes", nargs="+", choices=tuple(LOADERS), help="default: jax, and all others that are installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table for each model, and gives the exit status."""
    leave_memory_to_others()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    runtimes = arguments.runtimes or [name for name in LOADERS if measurable(name, dtype=arguments.dtype)]
    figures: Figures = []
    failed: Figures = []
    for model in arguments.model:
        found, missed = _measure(model, runtimes, arguments)
        console.print(f"{model}, {arguments.dtype}, 640x640; {machine()}; {datetime.date.today().isoformat()}")
        console.print(_table(found))
        for one in missed:
            console.print(f"[red]failed:[/red] batch {one['batch']}: {escape(one['reason'])}")
        figures += found
        failed += missed
    console.print("[dim]ratio: the first runtime's median over this one's; under 1, the first is faster[/dim]")
    absent = [name for name in LOADERS if name not in runtimes]
    if absent:
        console.print(f"[dim]not measured: {', '.join(absent)} (not installed, or not asked for)[/dim]")
    if arguments.json:
        write_json(arguments.json, record("network", figures, program="rtdetrv2", failed=failed))
    return 1 if failed else 0


def _measure(model: str, runtimes: list[str], arguments: argparse.Namespace) -> tuple[Figures, Figures]:
    """The figures of one model at all batch sizes, and what failed."""
    about = {"model": model, "dtype": arguments.dtype}
    figures: Figures = []
    failed: Figures = []
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status(f"preparing {model}") as status:
        checkpoint = Path(folder) / "model"
        write_checkpoint(model, checkpoint)
        for batch in arguments.batch:
            status.update(f"{model}, batch {batch}: {', '.join(runtimes)}, {arguments.rounds} rounds")
            measured, missed = measure(
                runtimes,
                checkpoint,
                dtype=arguments.dtype,
                batch=batch,
                rounds=arguments.rounds,
                runs=arguments.runs,
            )
            figures += [about | one.summary() for one in measured]
            failed += [about | one._asdict() for one in missed]
    return figures, failed


def _table(figures: Figures) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("runtime", no_wrap=True)
    for title in (
        "batch",
        "ready\ns",
        "device\np50 ms",
        "\np90 ms",
        "\nratio",
        "whole\np50 ms",
        "\np90 ms",
        "\nratio",
        "images\n/s",
        "TFLOP\n/s",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one in figures:
        base = next(other for other in figures if other["batch"] == one["batch"])
        table.add_row(
            one["version"],
            str(one["batch"]),
            f"{one['ready_s']:.1f}",
            f"{one['device_p50_ms']:.1f}",
            f"{one['device_p90_ms']:.1f}",
            f"{base['device_p50_ms'] / one['device_p50_ms']:.2f}",
            f"{one['whole_p50_ms']:.1f}",
            f"{one['whole_p90_ms']:.1f}",
            f"{base['whole_p50_ms'] / one['whole_p50_ms']:.2f}",
            f"{one['images_per_second']:.1f}",
            f"{one['tflop_per_second']:.2f}" if "tflop_per_second" in one else "",
        )
    return table
