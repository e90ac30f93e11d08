"""Signals as flags that a loop asks for when it has time for them."""

import signal
import sys
import threading
from typing import Self


class SignalFlag:
    """Whether a signal has come while used as a context, in the main thread of Python; in any other it is never set.
    With `once` the first one sets it, and says so in these words; the next one does what the system does."""

    def __init__(self, number: signal.Signals, once: str = ""):
        self.number, self.once, self._set = number, once, False

    def __enter__(self) -> Self:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(self.number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(self.number, self._before)

    def _on_signal(self, *_: object) -> None:
        self._set = True
        if self.once:
            signal.signal(self.number, signal.SIG_DFL)
            print(f"\n{self.once}", file=sys.stderr)

    def take(self) -> bool:
        """Whether the signal has come, once or more, since this was last asked."""
        was_set, self._set = self._set, False
        return was_set
