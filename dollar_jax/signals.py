"""Signals as flags that a loop asks for when it has time for them."""

from __future__ import annotations

import signal
import threading


class Heard:
    """Whether a signal has come; listens while used as a context.

    Python lets its main thread alone listen; in another nothing is ever heard.
    """

    def __init__(self, number: signal.Signals):
        self.number, self._told = number, False

    def __enter__(self) -> Heard:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(self.number, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(self.number, self._before)

    def _tell(self, *_: object) -> None:
        self._told = True

    def take(self) -> bool:
        """True once for every time it has come since it was asked last."""
        told, self._told = self._told, False
        return told
