"""Runtimes in processes of their own, run in turns."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["device", "whole"]

PAUSE_SECONDS = 0.3
"""Before each run: threads of the runtime before spin on for a while, and would take the next one's processors."""


class BenchmarkError(RuntimeError):
    """A runtime that could not be measured."""


class Measured(NamedTuple):
    """One runtime at one batch size: seconds to be ready (load and compile), and of each run."""

    runtime: str
    version: str
    batch: int
    ready: float
    device: list[float]
    whole: list[float]
    largest_score_difference: float

    def summary(self) -> dict[str, Any]:
        """What of this is worth keeping: medians and ninetieth percentiles in milliseconds."""
        return {
            "runtime": self.runtime,
            "version": self.version,
            "batch": self.batch,
            "ready_s": round(self.ready, 2),
            "device_p50_ms": _milliseconds(self.device, 50),
            "device_p90_ms": _milliseconds(self.device, 90),
            "whole_p50_ms": _milliseconds(self.whole, 50),
            "whole_p90_ms": _milliseconds(self.whole, 90),
            "images_per_second": round(self.batch / statistics.median(self.device), 2),
            "runs": len(self.device),
            "largest_score_difference": self.largest_score_difference,
        }


def _milliseconds(seconds: Sequence[float], percentile: int) -> float:
    return round(1000 * float(np.percentile(seconds, percentile)), 2)


class Runtime:
    """One runtime's process, which answers in lines of JSON. Use as a context: the process ends with it."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> dict[str, Any]:
        """The process's next answer.

        Raises:
            BenchmarkError: It ended instead; its last words are in the message.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            words = self.process.communicate()[1].strip().splitlines()[-3:]
            raise BenchmarkError(f"{self.name} ended early: {' / '.join(words) or 'it said nothing'}")
        return json.loads(line)

    def run(self, kind: str) -> float:
        """The seconds of one run."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]


def measure(runtimes: Sequence[str], folder: Path, *, dtype: str, batch: int, rounds: int) -> list[Measured]:
    """Each runtime's times over some rounds in which all take turns; the first is the one the others are held against.

    Raises:
        BenchmarkError: A runtime failed.
    """
    processes = []
    try:
        ready = []
        for name in runtimes:  # one after the other: what one takes to be ready must not depend on the others
            command = [sys.executable, "-m", "rtdetrv2_jax.benchmark.runtimes", name, str(folder)]
            processes.append(Runtime(name, [*command, "--dtype", dtype, "--batch", str(batch)]))
            ready.append(processes[-1].answer())
        times: list[dict[Kind, list[float]]] = [{"device": [], "whole": []} for _ in processes]
        kinds: tuple[Kind, ...] = ("device", "whole")
        for _ in range(rounds):
            for kind in kinds:
                for process, taken in zip(processes, times, strict=True):
                    time.sleep(PAUSE_SECONDS)
                    taken[kind].append(process.run(kind))
    finally:
        for process in processes:
            process.__exit__()
    first = np.array(ready[0]["scores"])
    return [
        Measured(
            runtime=process.name,
            version=said["version"],
            batch=batch,
            ready=said["ready"],
            device=taken["device"],
            whole=taken["whole"],
            largest_score_difference=float(np.abs(np.array(said["scores"]) - first).max()),
        )
        for process, said, taken in zip(processes, ready, times, strict=True)
    ]
