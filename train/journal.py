"""What a run writes down: `log.jsonl` in its folder, a JSON object a line, and TensorBoard's files if wanted."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rtdetrv2_jax.replacing import replaced_file

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
FLUSH_SECONDS = 10


class JournalError(ValueError):
    """A journal that cannot be kept as asked."""


class StepRecord(NamedTuple):
    """How a run stands after a step.

    Attributes:
        step: steps made, this one included.
        epoch: that the step belongs to, from 0.
        losses: the terms of the total, by name.
        total: loss.
        gradient_norm: before clipping.
        learning_rate: the detector's.
        boxes: in the batch.
        skipped: steps of the run so far that changed nothing, since something in them was not finite.
        images_per_second: since the last record.
        wait_seconds: how long a step stood still for its batch, on average since the last record.
        side: pixels of the images.
        memory_bytes: the most that a device has had in use, if it tells.
    """

    step: int
    epoch: int
    losses: dict[str, float]
    total: float
    gradient_norm: float
    learning_rate: float
    boxes: int
    skipped: int
    images_per_second: float
    wait_seconds: float
    side: int
    memory_bytes: int | None


class Journal:
    """The journal of a run, to be closed, or used in `with`. Each line is in the file before its method returns.

    Every line has a "kind" ("step", "evaluation" or "event"), a "step" (steps made so far), a "time" (seconds since
    1970) and the fields of its kind. A number that is not finite is null, which JSON has, unlike NaN.

    Args:
        folder: of the run; made if need be.
        at_step: where the run starts or goes on. Lines of later steps tell of what is about to be done again, and go.
        tensorboard: whether to write files for TensorBoard as well, below the folder.

    Raises:
        JournalError: TensorBoard's files are asked for, and the package that writes them is missing.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, *, at_step: int = 0, tensorboard: bool = False) -> None:
        self._board = _board(folder / TENSORBOARD, at_step=at_step) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        _drop_later(folder / LOG, at_step=at_step)
        # A name that is no Unicode is escaped, rather than the end of the run.
        self._log = (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace")

    def step(self, record: StepRecord) -> None:
        """Writes down a step."""
        self._write("step", **record._asdict())
        scalars = record._asdict()
        for name in ("step", "losses", "total"):
            del scalars[name]
        losses = {f"loss/{name}": value for name, value in {"total": record.total, **record.losses}.items()}
        self._show(losses | {f"run/{name}": value for name, value in scalars.items()}, step=record.step)

    def evaluation(
        self, step: int, *, epoch: int, figures: dict[str, float], per_class: dict[str, float], seconds: float
    ) -> None:
        """Writes down an evaluation.

        Args:
            step: steps made before it.
            epoch: of the last of them, from 0.
            figures: shares from 0 to 1 under the names of `rtdetrv2_jax.evaluation.Scores`: "ap", "ap50"...
            per_class: the average precision of each class, by name.
            seconds: that it took.
        """
        self._write("evaluation", step=step, epoch=epoch, figures=figures, per_class=per_class, seconds=seconds)
        classes = {f"ap_of_classes/{name}": value for name, value in per_class.items()}
        self._show({f"evaluation/{name}": value for name, value in figures.items()} | classes, step=step)

    def event(self, step: int, text: str, **facts: Any) -> None:
        """Writes down anything else, in words, and what belongs to it as "facts"."""
        self._write("event", step=step, text=text, **({"facts": facts} if facts else {}))

    def close(self) -> None:
        """Ends the journal; a second time, does nothing."""
        self._log.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, kind: str, *, step: int, **fields: Any) -> None:
        entry = {"kind": kind, "step": int(step), "time": round(time.time(), 3)} | fields
        self._log.write(json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n")
        self._log.flush()

    def _show(self, scalars: Mapping[str, float | None], *, step: int) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                if value is not None and math.isfinite(value):
                    self._board.add_scalar(name, float(value), int(step))


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's journal as they were written; none where there is none yet.

    A line that a kill or a power cut has torn is left out.
    """
    return [entry for _, entry in _entries(folder / LOG)]


def _entries(log: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line of a journal, and what it says."""
    if not log.exists():
        return []
    entries = []
    for line in log.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # of JSON, and of UTF-8
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry:
                entries.append((line, entry))
    return entries


def _drop_later(log: Path, *, at_step: int) -> None:
    """Takes torn lines and those of later steps out of a journal, at once or not at all."""
    kept = b"".join(line + b"\n" for line, entry in _entries(log) if entry["step"] <= at_step)
    if not log.exists() or kept == log.read_bytes():
        return
    with replaced_file(log) as partial:
        partial.write_bytes(kept)


def _plain(value: Any) -> Any:
    """A value as strict JSON can say it: arrays as lists, numbers that are not finite as null, all else as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _board(folder: Path, *, at_step: int) -> Any:
    """What writes files for TensorBoard, and tells it to forget later steps."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise JournalError(
            "TensorBoard's files are written by the package tensorboardX, which is missing: "
            "pip install -e '.[tensorboard]', or do without them; log.jsonl has the same numbers"
        ) from None
    return SummaryWriter(logdir=str(folder), purge_step=at_step + 1, flush_secs=FLUSH_SECONDS)
