"""Several processes as one run: joined by what the environment says, and left together."""

import contextlib
import glob
import importlib.util
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its store of keys and values has no public name
from jax.experimental import multihost_utils

from dollar_jax.files import first_line
from dollar_jax.signals import SignalFlag

# After so long without a sign of life a process counts as dead, and all others end.
HEARTBEAT_SECONDS = 60


def share_cpu(devices: int) -> None:
    """For virtual devices of one CPU, before the first is used: a collective holds one of their threads until all have
    come to it. All come where no two loops of a program run side by side, taken by each device in its own order, and
    where there are more threads than collectives under way. One may be late beside other work."""
    os.environ.setdefault("PJRT_NPROC", str(4 * devices))
    order, late = "enable_concurrency_optimized_scheduler=false", "collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"--xla_cpu_{order} --xla_cpu_{late} {os.environ.get('XLA_FLAGS', '')}".strip()


@contextlib.contextmanager
def joined(address: str | None, count: int | None, index: int | None, report: Callable[..., int]) -> Iterator[None]:
    """Within it, jax's devices are those of all processes; enter it before the first use of a device. With none of the
    three given, Cloud TPU VMs, GKE and SLURM start several processes, anything else is one. When a process of several
    fails, it ends at once with the exit code that `report` gives: the others would wait for ever. Raises ValueError."""
    several, over = _start(address, count, index), threading.Event()
    if several:
        threading.Thread(target=_watch, args=(lambda: _end(report(ProcessLost())), over), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not several:
            raise
        _end(report(ProcessLost() if _is_lost(error) else error))
    if several:
        over.set()
        jax.distributed.shutdown()  # waits for the others


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving in an orderly way would wait for the others, who wait for this one.
    os._exit(code)


def _watch(lost: Callable[[], NoReturn], over: threading.Event) -> None:
    """Calls `lost` when a process has given no sign of life for HEARTBEAT_SECONDS, or process 0, which keeps them, is
    gone. JAX's own check, later, ends this process without a sentence."""
    client, me = distributed.global_state.client, distributed.global_state.process_id
    assert client is not None
    seen: dict[str, tuple[bytes, float]] = {}  # the last sign of each process, and when it came
    for beat in itertools.count():
        try:
            client.key_value_set_bytes(f"alive/{me}", b"%d" % beat, allow_overwrite=True)
            signs = client.key_value_dir_get_bytes("alive/")
        except jax.errors.JaxRuntimeError:
            return None if over.is_set() else lost()
        now = time.monotonic()
        seen = {name: seen[name] if name in seen and seen[name][0] == sign else (sign, now) for name, sign in signs}
        if any(now - when > HEARTBEAT_SECONDS for _, when in seen.values()):
            lost()
        time.sleep(HEARTBEAT_SECONDS / 6)


class ProcessLost(ConnectionError):
    exit_code = 7

    def __str__(self) -> str:
        return "another process of this run died; start all of them again: the run goes on from its last checkpoint"


# How those that are left see that one died.
_LOST = r"Gloo .* failed|Connection (closed|reset) by peer|heartbeat|[Cc]oordination service|unhealthy"


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, as a save's that others had a part in, says that a process died."""
    if error is None:
        return False
    said = isinstance(error, jax.errors.JaxRuntimeError) and re.search(_LOST, str(error))
    return bool(said) or _is_lost(error.__cause__ or error.__context__)


class Preempted(KeyboardInterrupt):
    """An interruption by whoever runs the machine, after which nothing is lost."""

    exit_code, said = 128 + signal.SIGTERM, "terminated"


class Interrupted(Preempted):
    """An interruption by Ctrl-C, after which nothing is lost."""

    exit_code, said = 128 + signal.SIGINT, "interrupted"


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], type[Preempted] | None]]:
    """Gives a function of the step: what has come of SIGTERM, the cloud's notice, and Ctrl-C, of which a second one
    ends the process at once. Every process must ask once for every step; all are told at the same one."""
    several = jax.process_count() > 1  # for whom JAX listens to SIGTERM
    terminate = contextlib.nullcontext() if several else SignalFlag(signal.SIGTERM)
    with SignalFlag(signal.SIGINT, once="ending after this step; Ctrl-C again ends at once") as interrupt, terminate:
        kind = Preempted

        def noticed(step: int) -> type[Preempted] | None:
            nonlocal kind
            if interrupted := interrupt.take():
                kind = Interrupted
                if several:
                    signal.raise_signal(signal.SIGTERM)
            if isinstance(terminate, SignalFlag):
                return kind if terminate.take() or interrupted else None
            return kind if multihost_utils.reached_preemption_sync_point(step) else None

        yield noticed


def _start(address: str | None, count: int | None, index: int | None) -> bool:
    given = (address, count, index)
    if address is None or count is None or index is None:
        if given != (None, None, None):
            names = "--coordinator_address, --num_processes and --process_id"
            raise ValueError(f"{names} go together: give all three or none")
        if not in_cluster(os.environ):
            return False
    else:
        if not 0 <= index < count:
            raise ValueError(f"--process_id={index} is not among 0 to {count - 1}")
        if not address.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator_address={address} has no port; it is HOST:PORT of process 0")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=2 * HEARTBEAT_SECONDS)
    except RuntimeError as error:
        raise ValueError(f"the processes could not find each other: {first_line(error)}") from error
    return True


def in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether these variables, or TPU chips in the machine, say that JAX can find its fellow processes."""
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_LOCALID" in environ:
        return True
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


_gathered = itertools.count()
_LONGEST_WAIT = 24 * 3600 * 1000  # ms; a process that died is noticed long before


def gather(value: bytes) -> list[bytes]:
    """Every process's value, in the order of processes, through the hosts: no step is waited for; call it in all."""
    if jax.process_count() == 1:
        return [value]
    client: Any = distributed.global_state.client
    me, number = jax.process_index(), next(_gathered)
    client.key_value_set_bytes(f"gather/{number}/{me}", value)
    if number > 1:  # whoever has set the last one has read all before it
        client.key_value_delete(f"gather/{number - 2}/{me}")
    each = range(jax.process_count())
    return [client.blocking_key_value_get_bytes(f"gather/{number}/{i}", _LONGEST_WAIT) for i in each]


def wait_for(path: Path, what: str) -> None:
    """Returns once `path`, which process 0 writes, is there; all processes must see the same folder."""
    waited = 0
    while not path.exists():
        if waited % 60 == 10:
            print(f"process {jax.process_index()} waits for process 0 to write {what}, {path}", flush=True)
        time.sleep(1)
        waited += 1
