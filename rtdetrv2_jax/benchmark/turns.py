"""Runtimes in processes of their own, run in turns."""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rtdetrv2_jax.benchmark.loaded import SIDE

Kind = Literal["device", "whole"]
KINDS: tuple[Kind, ...] = ("device", "whole")

PAUSE_SECONDS = 0.3
"""Before each run: threads of the runtime before spin on for a while, and would take the next one's processors."""
PATIENCE_SECONDS = 1800.0
"""A process that says nothing for so long has failed, if no time is given."""
GRACE_SECONDS = 30.0
"""A run that has begun before the time is over may take so long."""


class BenchmarkError(RuntimeError):
    """A runtime that could not be measured."""


class Failed(NamedTuple):
    """A runtime that could not be measured at one batch size, and why."""

    runtime: str
    batch: int
    reason: str


class Measured(NamedTuple):
    """One runtime at one batch size: seconds to be ready (load and compile), and of each run.

    `cost` is (FLOPs, bytes) of a run of the network, as its compiler counts them, where it does.
    """

    runtime: str
    version: str
    batch: int
    ready: float
    device: list[float]
    whole: list[float]
    largest_score_difference: float
    cost: tuple[float, float] | None = None

    def summary(self) -> dict[str, Any]:
        """What of this is worth keeping: medians and ninetieth percentiles in milliseconds."""
        figures = {
            "runtime": self.runtime,
            "version": self.version,
            "batch": self.batch,
            "side": SIDE,
            "ready_s": round(self.ready, 2),
            "device_p50_ms": _milliseconds(self.device, 50),
            "device_p90_ms": _milliseconds(self.device, 90),
            "whole_p50_ms": _milliseconds(self.whole, 50),
            "whole_p90_ms": _milliseconds(self.whole, 90),
            "images_per_second": round(self.batch / statistics.median(self.device), 2),
            "whole_images_per_second": round(self.batch / statistics.median(self.whole), 2),
            "runs": len(self.device),
            "largest_score_difference": self.largest_score_difference,
        }
        return figures | roofline(self.cost, seconds=statistics.median(self.device))


def roofline(cost: Sequence[float] | None, *, seconds: float) -> dict[str, float]:
    """How much a program computes and moves, and how fast it did; nothing where its compiler does not tell."""
    if cost is None:
        return {}
    flops, moved = cost
    return {
        "gflop": round(flops / 1e9, 2),
        "gbyte": round(moved / 1e9, 3),
        "tflop_per_second": round(flops / 1e12 / seconds, 4),
        "tbyte_per_second": round(moved / 1e12 / seconds, 4),
    }


def _milliseconds(seconds: Sequence[float], percentile: int) -> float:
    return round(1000 * float(np.percentile(seconds, percentile)), 3)


class Runtime:
    """One runtime's process, which answers in lines of JSON. Use as a context: the process ends with it.

    What it says besides goes to a file: compilers say so much that they would fill a pipe, and stop. Where a time is
    given, `until`, by `time.monotonic`, it has failed if it is not ready by then.
    """

    def __init__(self, name: str, command: Sequence[str], *, until: float | None = None) -> None:
        self.name = name
        self.until = until
        self.words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
        )

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()

    def answer(self) -> dict[str, Any]:
        """The process's next answer.

        Raises:
            BenchmarkError: It ended instead, or said nothing for too long; its last words are in the message.
        """
        assert self.process.stdout is not None
        began = time.monotonic()
        patience = PATIENCE_SECONDS if self.until is None else max(GRACE_SECONDS, self.until - began)
        watch = threading.Timer(patience, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if line:
            return json.loads(line)
        if time.monotonic() - began >= patience:
            raise BenchmarkError(f"{self.name} said nothing for {patience:.0f} s")
        self.process.wait()
        self.words.seek(0)
        words = self.words.read().strip().splitlines()[-3:]
        raise BenchmarkError(f"{self.name} ended early: {' / '.join(words) or 'it said nothing'}")

    def run(self, kind: str, runs: int = 1) -> list[float]:
        """The seconds of some runs, one after another.

        Raises:
            BenchmarkError: As for an answer.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{kind} {runs}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and `answer` says why
        return self.answer()["seconds"]


class _Taking(NamedTuple):
    """A process that takes its turns: what it said when it was ready, and its times so far."""

    process: Runtime
    said: dict[str, Any]
    times: dict[Kind, list[float]]


def measure(
    runtimes: Sequence[str],
    folder: Path,
    *,
    dtype: str,
    batch: int,
    rounds: int,
    runs: int = 1,
    until: float | None = None,
) -> tuple[list[Measured], list[Failed]]:
    """Each runtime's times over some rounds in which all take turns of some runs; the first is the one to compare with.

    A runtime that fails is told of, and the others go on. No round begins after `until`, by `time.monotonic`, but for
    the first.
    """
    taking: list[_Taking] = []
    failed: list[Failed] = []
    processes: list[Runtime] = []
    try:
        for name in runtimes:  # one after the other: what one takes to be ready must not depend on the others
            command = [sys.executable, "-m", "rtdetrv2_jax.benchmark.runtimes", name, str(folder)]
            processes.append(Runtime(name, [*command, "--dtype", dtype, "--batch", str(batch)], until=until))
            try:
                taking.append(_Taking(processes[-1], processes[-1].answer(), {"device": [], "whole": []}))
            except BenchmarkError as error:
                failed.append(Failed(name, batch, str(error)))
        for turn in range(rounds):
            if turn and is_over(until):
                break
            for kind in KINDS:
                for one in list(taking):
                    time.sleep(PAUSE_SECONDS)
                    try:
                        one.times[kind].extend(one.process.run(kind, runs))
                    except BenchmarkError as error:
                        failed.append(Failed(one.process.name, batch, str(error)))
                        taking.remove(one)
    finally:
        for process in processes:
            process.__exit__()
    return _measured(taking, batch=batch), failed


def is_over(until: float | None) -> bool:
    """Whether the time is over, if there is one."""
    return until is not None and time.monotonic() > until


def _measured(taking: Sequence[_Taking], *, batch: int) -> list[Measured]:
    if not taking:
        return []
    first = np.array(taking[0].said["scores"])
    return [
        Measured(
            runtime=process.name,
            version=said["version"],
            batch=batch,
            ready=said["ready"],
            device=times["device"],
            whole=times["whole"],
            largest_score_difference=float(np.abs(np.array(said["scores"]) - first).max()),
            cost=said["cost"],
        )
        for process, said, times in taking
    ]
