"""All that is measured on a lent GPU, in parts that each fit into a few minutes: `python -m benchmarks.gpu PART`.

It takes JAX, Flax, Optax, Orbax, PyTorch and transformers, and what these bring; nothing else needs to be installed.
Every figure is written as soon as it is there, so that a run that is cut off leaves what it has; when the time that it
was given is over, what is left is named as failed, and comes in another call. `python -m benchmarks.merge` puts the
files of several calls together.

PARTS
  network     latency and throughput at batches 1, 8, 32 and 128, the network alone and whole, beside transformers,
              eager and through torch.compile, which takes minutes to try its kernels out: a call for each model
  training    a training step of r18vd and r50vd at batches 16 and 64, beside transformers; the share of matching in it
  assignment  64 problems of 300 queries by 10, 30 and 100 targets, beside optax and SciPy
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import assignment
from benchmarks.matching import matching_milliseconds
from rtdetrv2_jax.benchmark.ours import write_checkpoint
from rtdetrv2_jax.benchmark.record import leave_memory_to_others, record
from rtdetrv2_jax.benchmark.turns import measure
from rtdetrv2_jax.config import RELEASED
from rtdetrv2_jax.weights.files import write_json
from train.benchmark import measure as measure_steps

RUNTIMES = ("jax", "transformers", "torch.compile")
MODELS = {"network": ("r18vd", "r50vd", "r101vd"), "training": ("r18vd", "r50vd")}
BATCHES = {"network": (1, 8, 32, 128), "training": (16, 64)}
TARGETS = (10, 30, 100)
LEAST_SECONDS = 30.0
"""With less time left nothing is begun."""


class Taking:
    """A part under way: its figures so far, in their file, and the time it has left."""

    def __init__(self, what: str, file: Path, *, seconds: float) -> None:
        self.what = what
        self.file = file
        self.end = time.monotonic() + seconds
        self.figures: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, figures: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> None:
        """Keeps what was measured, and says it."""
        self.figures += figures
        self.failed += failed
        for one in (*figures, *failed):
            print(f"{self.left:5.0f} s left  {one}", flush=True)
        write_json(self.file, record(self.what, self.figures, program="python -m benchmarks.gpu", failed=self.failed))

    def begins(self, about: dict[str, Any]) -> bool:
        """Whether there is time for one more; if not, that one is kept as failed."""
        if self.left > LEAST_SECONDS:
            return True
        self.add([], [about | {"reason": "no time left"}])
        return False


def network(taking: Taking, arguments: argparse.Namespace) -> None:
    """Latency and throughput."""
    for model in arguments.models or MODELS["network"]:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(model, Path(folder) / "model")
            for batch in arguments.batch or BATCHES["network"]:
                about = {"model": model, "dtype": arguments.dtype}
                if not taking.begins(about | {"batch": batch}):
                    continue
                measured, failed = measure(
                    arguments.runtimes or RUNTIMES,
                    Path(folder) / "model",
                    dtype=arguments.dtype,
                    batch=batch,
                    rounds=arguments.rounds,
                    runs=arguments.runs,
                    until=taking.end,
                )
                taking.add([about | one.summary() for one in measured], [about | one._asdict() for one in failed])


def training(taking: Taking, arguments: argparse.Namespace) -> None:
    """Training steps, and how much of ours is matching."""
    kinds = [kind for kind in ("jax", "transformers") if kind in (arguments.runtimes or RUNTIMES)]
    for model in arguments.models or MODELS["training"]:
        for batch in arguments.batch or BATCHES["training"]:
            about = {"model": model, "dtype": arguments.dtype, "batch": batch, "side": arguments.side}
            if not taking.begins(about):
                continue
            figures, failed = measure_steps(kinds, **about, rounds=arguments.rounds, until=taking.end)
            for one in figures:
                if one["kind"] == "jax":
                    spent = matching_milliseconds(model, batch=batch, rounds=arguments.rounds)
                    one |= {"matching_ms": spent, "matching_share": round(spent / 1000 / one["step_p50_s"], 4)}
            taking.add(figures, failed)


def assignments(taking: Taking, arguments: argparse.Namespace) -> None:
    """Solvers of assignment problems."""
    for costs in ("random", "crowded"):
        for targets in arguments.targets:
            if taking.begins({"targets": targets, "costs": costs}):
                taking.add(assignment.measure(64, 300, targets, costs=costs, rounds=arguments.rounds))


PARTS = {"network": network, "training": training, "assignment": assignments}
WHAT = {"network": "network", "training": "training step", "assignment": "assignment"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures some parts, and gives the exit status: 1 if anything is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS), metavar="PART", help="one or more of the above")
    out = os.environ.get("OUT", "out")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write to (default: $OUT, or out)")
    parser.add_argument("--models", nargs="+", choices=tuple(RELEASED), help="default: those of the part")
    parser.add_argument("--batch", type=int, nargs="+", help="default: those of the part")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all of them")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="default: 10 30 100")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--side", type=int, default=640, help="of training images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=30, help="runs of the network in a turn (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the least of everything, to see that it works")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.batch, arguments.targets = arguments.models or ["r18vd"], [2], [10]
        arguments.side, arguments.rounds, arguments.runs = 128, 1, 1
        arguments.runtimes = arguments.runtimes or ["jax", "transformers"]
    leave_memory_to_others()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, missing = time.monotonic(), False
    for part in arguments.parts:
        left = arguments.seconds - (time.monotonic() - began)
        chosen = [*(arguments.models or ()), *map(str, arguments.batch or ())] if part in MODELS else []
        name = "-".join([part, *chosen])
        taking = Taking(WHAT[part], arguments.out / f"{name}.json", seconds=left)
        PARTS[part](taking, arguments)
        missing |= bool(taking.failed)
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
