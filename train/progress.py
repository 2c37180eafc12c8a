"""How a run is doing, in the terminal: a live bar with figures, or now and then a line where nobody looks on."""

import math
from time import monotonic, strftime
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .journal import StepRecord

LINE_SECONDS = 30.0
"""Without a terminal, so much time lies between two lines about steps."""
INERTIA = 0.9
"""How much of a smoothed figure stays with each record."""


class Progress:
    """How a run is doing, to be closed, or used in `with`.

    Args:
        steps: of the whole run.
        at_step: where it starts or goes on.
        steps_per_epoch: batches that the data make.
        console: where to; standard error where it is None.
    """

    def __init__(self, *, steps: int, at_step: int, steps_per_epoch: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.steps, self.at_step = steps, at_step
        self.epochs = -(-steps // steps_per_epoch)
        self.record: StepRecord | None = None
        self.loss: float | None = None
        self.waiting: float | None = None
        self.score = self.last = ""
        self._first = self._latest = (at_step, monotonic())
        self._line_due = 0.0
        self._live: Live | None = None
        if self.console.is_interactive:
            self._live = Live(get_renderable=self.picture, console=self.console, refresh_per_second=4)
            self._live.start()

    def step(self, record: StepRecord) -> None:
        """Shows how the run stands after a step; not every step has to be told."""
        now = monotonic()
        steps, seconds = record.step - self._latest[0], now - self._latest[1]
        if self.record is None:
            self._first = (record.step, now)  # what came before was compilation
        elif seconds > 0:
            self.waiting = _smoothed(self.waiting, min(1.0, steps * record.wait_seconds / seconds))
        self.loss = _smoothed(self.loss, record.total)
        self.record, self._latest = record, (record.step, now)
        if self._live is None and (now >= self._line_due or record.step >= self.steps):
            self._line_due = now + LINE_SECONDS
            said = [f"step {record.step}/{self.steps}", *self.figures(), self.time_left()]
            self._print(" · ".join(filter(None, said)))

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Says the precisions among the figures of an evaluation (as `Journal.evaluation` takes them), and shows AP."""
        said = [
            f"{name.replace('ap', 'AP', 1).replace('_', ' ')} {value:.1%}"
            for name, value in figures.items()
            if name.startswith("ap") and math.isfinite(value)
        ]
        self.score = said[0] if said else ""
        self._print(f"step {step}: " + (", ".join(said) or "nothing to be found in the data"))

    def say(self, text: str) -> None:
        """Says what has been done, and at what time; it stays in sight until the next is."""
        self.last = " ".join(text.split())
        self._print(text)

    def close(self) -> None:
        """Ends the bar; a second time, does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def picture(self) -> Group:
        """The bar, the figures, and what was found and done last: lines of the terminal's width."""
        step = self.record.step if self.record else self.at_step
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        for _ in range(3):
            row.add_column(no_wrap=True)
        bar = ProgressBar(total=self.steps, completed=step)
        share = f"{100 * step // max(1, self.steps)}%"
        row.add_row(bar, f"{step}/{self.steps}", share, self.time_left() if self.record else "compiling")
        said = [" · ".join(self.figures()), " · ".join(filter(None, [self.score, self.last]))]
        lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in said if line]
        for line in lines:
            line.highlight_regex(r"loss not finite|\d+ skipped", "not dim bold red")
        return Group(row, *lines)

    def figures(self) -> list[str]:
        """What there is to say about the last steps, the most telling first."""
        if self.record is None:
            return []
        said = [f"epoch {min(self.record.epoch + 1, self.epochs)}/{self.epochs}"]
        finite = self.loss is not None and math.isfinite(self.record.total)
        said.append(f"loss {self.loss:.4g}" if finite else "loss not finite")
        if self.record.skipped:
            said.append(f"{self.record.skipped} skipped")
        said.append(f"{self.record.images_per_second:.3g} images/s")
        if self.waiting is not None:
            said.append(f"input wait {self.waiting:.0%}")
        if self.record.memory_bytes is not None:
            said.append(f"{self.record.memory_bytes / 1e9:.1f} GB")
        return said

    def time_left(self) -> str:
        """How long at the speed so far, evaluations included; nothing before the second record."""
        (first, began), (step, now) = self._first, self._latest
        return f"{duration((self.steps - step) * (now - began) / (step - first))} left" if step > first else ""

    def _print(self, text: str) -> None:
        self.console.print(f"{strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 d 3 h`, `1 h 05 min`, `12 min`, `40 s`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _smoothed(before: float | None, value: float) -> float | None:
    """The running mean with one more value; one that is not finite tells nothing of the others."""
    if before is None or not math.isfinite(value):
        return value if math.isfinite(value) else before
    return INERTIA * before + (1 - INERTIA) * value
