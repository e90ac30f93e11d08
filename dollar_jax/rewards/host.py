"""Runs a host reward beside the training, whatever it does: raises, hangs, or answers nonsense. Every call has a thread
of its own that may be left behind, for a thread cannot be killed: a scorer that hangs costs its timeout, not the run.
Calls that fail are tried again, then their samples are skipped."""

import collections
import os
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from dollar_jax.rewards.reward import LARGEST, AnyReward, WrongShape


class HostScorer:
    """One reward's calls: `submit` frames, go on, `collect` the rewards later. Neither ever raises. Well-behaved
    rewards come back whatever the timing, so that a run can be repeated exactly. After a call that took longer than
    `timeout` seconds the reward is left out for 1, then 2, 4, … rounds, so that waiting for it costs a long run next to
    nothing. `faults` counts what went wrong by kind; the first of each kind is a warning, unless `quiet`."""

    def __init__(self, name: str, reward: AnyReward, timeout: float, retries: int, quiet: bool = False):
        self.name, self.reward, self.quiet = name, reward, quiet
        self.timeout, self.retries = timeout, retries
        self.faults: collections.Counter[str] = collections.Counter()
        self._call: _Call | None = None
        self._rows = 0
        self._pause, self._next_pause = 0, 1
        os._exit = _exit_of_a_call

    def submit(self, frames: ArrayLike, prompts: Sequence[str]) -> None:
        """Starts scoring frames [b t h w 3], which the devices may still be computing."""
        self._rows, self._call = len(prompts), None
        if self._pause:
            self._pause -= 1
        else:
            self._call = _Call(self.reward, frames, prompts)

    def collect(self) -> np.ndarray:
        """Float32 [b]: the rewards of what was submitted, NaN where there is none."""
        call, failed = self._call, np.full((self._rows,), np.nan, np.float32)
        self._call = None
        if call is None:
            self._fault("skipped", "is left out for a while, having been too slow") if self._rows else None
            return failed
        for attempt in range(1 + self.retries):
            if attempt:
                call = _Call(self.reward, call.frames, call.prompts)
            call.ready.wait()
            if not call.done.wait(self.timeout):
                self._fault("timed out", f"took longer than {self.timeout:g} s")
            elif isinstance(call.error, WrongShape):
                self._fault("wrong shape", f"answered wrongly: {call.error}")
            elif call.error is not None:
                self._fault("raised", f"raised {type(call.error).__name__}: {call.error}")
            else:
                self._next_pause = 1
                good = np.abs(call.rewards) <= LARGEST
                if count := int(np.sum(~good)):
                    self._fault("not finite", f"gave a reward that is not finite or beyond ±{LARGEST:g}", count)
                return np.where(good, call.rewards, np.nan)
        if not call.done.is_set():
            self._pause, self._next_pause = self._next_pause, 2 * self._next_pause
        return failed

    def _fault(self, kind: str, what: str, count: int = 1) -> None:
        if not self.faults[kind] and not self.quiet:
            message = f"the reward {self.name!r} {what}; such samples are not learned from, and this is said once"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        self.faults[kind] += count


_exit, _process = os._exit, os.getpid()


def _exit_of_a_call(code: int) -> NoReturn:
    """In place of `os._exit`: a reward that ends its process has failed, and the run goes on."""
    if isinstance(threading.current_thread(), _Call) and os.getpid() == _process:
        raise SystemExit(code)
    _exit(code)


class _Call(threading.Thread):
    """One call; `ready` when the frames have come from the devices and the reward's own time begins."""

    def __init__(self, reward: AnyReward, frames: ArrayLike, prompts: Sequence[str]):
        super().__init__(name="reward", daemon=True)
        self.reward, self.frames, self.prompts = reward, frames, list(prompts)
        self.ready, self.done = threading.Event(), threading.Event()
        self.rewards = np.empty(0, np.float32)
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            # A copy of its own: what a reward writes into its frames harms nobody.
            frames = np.array(self.frames, np.float32)
            self.ready.set()
            self.rewards = self.reward(frames, self.prompts)
        except BaseException as error:  # a thread must always end by saying so
            self.error = error
        finally:
            self.ready.set()
            self.done.set()
