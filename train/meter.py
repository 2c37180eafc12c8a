"""The figures of the steps, read two steps late, so that the devices never wait for whoever reads them."""

import time
from collections import deque
from typing import NamedTuple

import jax

from rtdetrv2_jax.data import Dataset

from .batches import LoadedBatch
from .journal import StepRecord
from .recipe import Recipe
from .step import Metrics

LATE = 2
MOST_SKIPPED = 5
"""So many steps one after another may be skipped since they are not finite."""


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class _Waiting(NamedTuple):
    """A step whose figures are still to be read."""

    loaded: LoadedBatch
    metrics: Metrics
    side: int


class Meter:
    """Collects the figures of steps, makes a record of them every so often, and sounds the alarm.

    Attributes:
        alarmed: whether too many steps in a row have been skipped.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset, self.alarmed = recipe, dataset, False
        self._waiting: deque[_Waiting] = deque()
        self._skipped: list[LoadedBatch] = []
        self._waited, self._steps = 0.0, 0
        self._began = time.perf_counter()

    def after(self, loaded: LoadedBatch, metrics: Metrics, *, side: int, last: bool = False) -> list[StepRecord]:
        """Takes a step, and gives the records that have become due; of the last step there is one in any case.

        Raises:
            TrainingError: Too many steps one after another were not finite.
        """
        self._waiting.append(_Waiting(loaded, metrics, side))
        self._waited, self._steps = self._waited + loaded.wait_seconds, self._steps + 1
        return self._records(late=0 if last else LATE, last=last)

    def flush(self) -> list[StepRecord]:
        """Waits for all steps taken so far, and gives the records that have become due.

        Raises:
            TrainingError: Too many steps one after another were not finite.
        """
        return self._records(late=0)

    def restart_clock(self) -> None:
        """Leaves out of the images a second what went before: an evaluation, say."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def _records(self, *, late: int, last: bool = False) -> list[StepRecord]:
        """Looks at all steps but the `late` latest. Records that come together share what was measured since others."""
        due = []
        while len(self._waiting) > late:
            step = self._waiting.popleft()
            if self._look(step) or (last and not self._waiting):
                due.append(step)
        records = [self._record(step) for step in due]
        if records:
            self.restart_clock()
        return records

    def _look(self, step: _Waiting) -> bool:
        """Reads a step's figures; tells whether a record of it is due."""
        if bool(step.metrics.finite):
            self._skipped.clear()
        else:
            self._skipped.append(step.loaded)
        if len(self._skipped) >= MOST_SKIPPED:
            self.alarmed = True
            raise TrainingError(self._what_happened())
        made = step.loaded.step + 1
        return made == 1 or made % self.recipe.keeping.report_steps == 0

    def _record(self, step: _Waiting) -> StepRecord:
        loaded, metrics, side = step
        losses, norm, rate, boxes, _, skipped = jax.device_get(metrics)
        now, steps = time.perf_counter(), max(1, self._steps)
        return StepRecord(
            step=loaded.step + 1,
            epoch=loaded.epoch,
            losses={name: float(term) for name, term in losses.named(self.recipe.loss).items()},
            total=float(losses.total),
            gradient_norm=float(norm),
            learning_rate=float(rate),
            boxes=int(boxes),
            skipped=int(skipped),
            images_per_second=self._steps * self.recipe.batches.size / max(1e-9, now - self._began),
            wait_seconds=self._waited / steps,
            side=side,
            memory_bytes=_memory_bytes(),
        )

    def _what_happened(self) -> str:
        lines = []
        for loaded in self._skipped:
            positions = [
                int(position) for shard in loaded.batch.image_ids.addressable_shards for position in shard.data
            ]
            names = ", ".join(str(self.dataset[position].image_id) for position in positions)
            lines.append(f"  step {loaded.step + 1}: images {names}")
        return (
            f"{len(self._skipped)} steps one after another had a loss or a gradient that is not finite, and were left "
            "out:\n" + "\n".join(lines) + "\nLook at these images (--show-batch) and their boxes; else a lower "
            "--optimisation.learning_rate, a longer --optimisation.warmup_steps or --dtype float32 may help. The last "
            "sound state is saved: --resume goes on from it."
        )


def _memory_bytes() -> int | None:
    """The most memory that a device of this process has had in use, if it tells."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((int(each) for each in used if each), default=None)
