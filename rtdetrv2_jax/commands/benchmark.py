"""`rtdetrv2 benchmark`: how fast the network is here, beside other runtimes where they are installed.

Every runtime has a process of its own and takes its turn in every round, so that ratios hold on a noisy machine.
"device" is the network alone on an input that is there already; "whole" is the way from JPEG bytes to boxes.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rtdetrv2_jax.benchmark.runtimes import LOADERS, installed
from rtdetrv2_jax.benchmark.turns import BenchmarkError, Measured, measure
from rtdetrv2_jax.config import RELEASED, named
from rtdetrv2_jax.model.rtdetrv2 import RTDETRv2
from rtdetrv2_jax.weights.files import write_json
from rtdetrv2_jax.weights.load import inference_layers_only, load_pretrained, save_model
from rtdetrv2_jax.weights.untrained import untrained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rtdetrv2 benchmark`."""
    parser.add_argument(
        "--model", default="r18vd", help="a released size (random weights) or a checkpoint (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each (default: %(default)s)")
    parser.add_argument(
        "--runtimes", nargs="+", choices=tuple(LOADERS), help="default: jax, and all others that are installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with machine and versions")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table, and gives the exit status."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    runtimes = arguments.runtimes or [name for name in LOADERS if installed(name)]
    absent = [name for name in LOADERS if name not in runtimes]
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("preparing") as status:
        checkpoint = Path(folder) / "model"
        save_model(_model(arguments.model), checkpoint, to="hf")
        for batch in arguments.batch:
            status.update(f"batch {batch}: {', '.join(runtimes)}, {arguments.rounds} rounds")
            try:
                measured += measure(runtimes, checkpoint, dtype=arguments.dtype, batch=batch, rounds=arguments.rounds)
            except BenchmarkError as error:
                print(f"rtdetrv2: {error}", file=sys.stderr)
                return 1
    console.print(f"{arguments.model}, {arguments.dtype}, 640x640; {machine()}; {datetime.date.today().isoformat()}")
    console.print(_table(measured))
    console.print("[dim]ratio: the first runtime's median over this one's; under 1, the first is faster[/dim]")
    if absent:
        console.print(f"[dim]not measured: {', '.join(absent)} (not installed, or not asked for)[/dim]")
    if arguments.json:
        write_json(
            arguments.json,
            {
                "model": arguments.model,
                "dtype": arguments.dtype,
                "machine": machine(),
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["rtdetrv2", *sys.argv[1:]]),
                "figures": [one.summary() for one in measured],
            },
        )
    return 0


def machine() -> str:
    """The processor, as the system calls it, and how many of its cores there are; the accelerator, if there is one."""
    import jax

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{name}, {os.cpu_count()} cores{accelerator}"


def _model(name: str) -> RTDETRv2:
    if name in RELEASED:
        return inference_layers_only(untrained_model(named(name)))
    if not Path(name).exists() and "/" not in name:
        named(name)  # raises, and suggests a name
    return inference_layers_only(load_pretrained(name).model)


def _table(measured: list[Measured]) -> Table:
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
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one in measured:
        figures = one.summary()
        base = next(other for other in measured if other.batch == one.batch).summary()
        table.add_row(
            one.version,
            str(one.batch),
            f"{one.ready:.1f}",
            f"{figures['device_p50_ms']:.1f}",
            f"{figures['device_p90_ms']:.1f}",
            f"{base['device_p50_ms'] / figures['device_p50_ms']:.2f}",
            f"{figures['whole_p50_ms']:.1f}",
            f"{figures['whole_p90_ms']:.1f}",
            f"{base['whole_p50_ms'] / figures['whole_p50_ms']:.2f}",
            f"{figures['images_per_second']:.1f}",
        )
    return table
