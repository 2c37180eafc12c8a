"""Being asked to end: by Ctrl-C, or by the machine's owner with SIGTERM."""

import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

ASKING = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Notices a request to end, so that the loop can save first; used in `with`. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def asked(self, step: int) -> bool:
        """Whether to save and leave after this step. Processes that train together agree on the step."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM.name
            return True
        return False

    def __enter__(self) -> "Interruption":
        # Of several processes, JAX's own handler of SIGTERM tells all; Ctrl-C ends them as it ends any program.
        for number in ASKING if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
