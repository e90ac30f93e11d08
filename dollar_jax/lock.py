"""One owner of a run's folder: a file that names it, which it locks, and touches for as long as it lives."""

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

LOCK = ".lock"
BEAT = 15.0  # seconds between two signs of life
DEAD_AFTER = 120.0  # seconds without one


class InUse(OSError):
    """Another run owns the folder."""

    exit_code = 5


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[Callable[[], None]]:
    """Within it the folder, which is made if need be, belongs to this run; gives a function that raises InUse when
    another has taken it over. What a dead owner on this host left is taken over at once; as not all file systems pass
    locks on, another host's is dead after DEAD_AFTER seconds without a sign of life. Raises InUse for a living one."""
    if jax.process_index() > 0:
        yield lambda: None
        return
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    path, file = workdir / LOCK, -1
    host = f" on {socket.gethostname()}"
    own = f"process {os.getpid()}, begun {time.strftime('%F %T')}{host}"
    while file < 0:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InUse(f"{workdir} is in use by {_read(file)}: wait for its end, or choose another workdir") from None
        except OSError:
            pass  # a file system without locks
        if not os.fstat(file).st_nlink:  # its owner has just ended
            os.close(file)
            file = -1
    if owner := _read(file):
        if not owner.endswith(host):
            _watch(file, workdir)
        print(f"{workdir} was left by {owner}, which has ended; it is taken over", file=sys.stderr)
    os.ftruncate(file, 0)
    os.pwrite(file, own.encode(), 0)
    ended = threading.Event()

    def check() -> None:
        if (found := _read(file)) != own:
            raise InUse(f"{workdir} was taken over by {found or 'another run'}: this one ends, and saves nothing more")

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                check()
                os.utime(file)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join(BEAT)
        if _read(file) == own:
            path.unlink(missing_ok=True)
        os.close(file)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                workdir.rmdir()


def _watch(file: int, workdir: Path) -> None:
    """Returns when another host's owner has given no sign of life for long enough; raises InUse when it does."""
    owner, beat = _read(file), os.fstat(file).st_mtime_ns
    print(f"{workdir} belongs to {owner}: waiting {DEAD_AFTER:g} s for a sign of life", file=sys.stderr)
    end = time.monotonic() + DEAD_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, DEAD_AFTER / 10))
        if os.fstat(file).st_mtime_ns != beat and _read(file):
            raise InUse(f"{workdir} is in use by {_read(file)}: wait for its end, or choose another workdir")


def _read(file: int) -> str:
    return os.pread(file, 1000, 0).decode(errors="replace")
