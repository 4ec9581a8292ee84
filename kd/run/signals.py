"""Signals that ask a run to stop."""

import signal
import time
from types import FrameType

from kd.run.distributed import say


class StopSignal:
    """Records SIGINT (Ctrl-C) and SIGTERM so that the step can finish and be saved.

    A second signal ends the process at once if it comes at least a second later. Within that second it may be
    torchrun's copy of a Ctrl-C that the terminal has already sent to every process.

    Attributes:
        number: of the signal received, 0 before.
    """

    def __init__(self):
        self.number = 0
        self._time = 0.0
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._time > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self._time = number, time.monotonic()
            say("\nstopping after this step or evaluation; send the signal again to stop now")

    def release(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Make a data loading process ignore both signals; its parent ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
