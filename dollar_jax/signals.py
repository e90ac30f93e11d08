"""Signals as flags that a loop asks for when it has time for them."""

from __future__ import annotations

import signal
import threading


class SignalFlag:
    """Whether a signal has come; listens while used as a context.

    Only the main thread of Python may listen; in any other thread the flag is never set.
    """

    def __init__(self, number: signal.Signals):
        self.number, self._set = number, False

    def __enter__(self) -> SignalFlag:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(self.number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(self.number, self._before)

    def _on_signal(self, *_: object) -> None:
        self._set = True

    def take(self) -> bool:
        """Whether the signal has come, once or more, since this was last asked."""
        was_set, self._set = self._set, False
        return was_set
