"""Orbax checkpoints: one folder per step, one item per part of the state.

    checkpoints/120/student, ema, fake_score, reward_head, optimisers, progress, data, ..., XXH128SUMS

Items are restored by name, so that sampling reads the student alone. A step's folder appears under its name only when
it is whole, with the checksums of all its files, and what is not as it was written is not restored."""

import glob
import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import gpath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental import v1

from dollar_jax.files import XXH128, find_damage, first_line, sync, write_checksums

TRIES = 3  # of a save before the run ends
_DRAFT = ".orbax-checkpoint-tmp"

# A save that fails is told by SaveFailed; Orbax logs its traceback as well, and that what follows is another handler.
logging.getLogger("absl").addFilter(lambda r: not r.exc_info and "Type handler registry" not in r.getMessage())
# What all devices have is cut among them to be written, a program's call for each cut: not worth it below 1 MiB.
_HANDLER = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
ocp.type_handlers.register_type_handler(jax.Array, _HANDLER, override=True)


class SaveFailed(OSError):
    """A checkpoint could not be written."""

    exit_code = 3


class NothingWhole(FileNotFoundError):
    """There are checkpoints, and each of them is damaged or lacks what is asked for."""

    exit_code = 4


class Checkpoints:
    """The checkpoints of a folder. With `keep`, for the run that owns it, the newest `keep` stay, and a damaged one is
    moved aside to `STEP.damaged` once an older one has been restored. Without, nothing there is removed or moved."""

    def __init__(self, folder: str | Path, keep: int | None = None):
        self.folder, self.keep = Path(folder).absolute(), keep
        self.restored = 0  # the step that `restore` took
        self._failure: Exception | None = None
        commit = self._commit

        class Draft(ocp.path.atomicity.AtomicRenameTemporaryPath):
            async def finalize(self) -> None:
                commit(Path(self.get()), Path(self.get_final()))

        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler()
        self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options, temporary_path_class=Draft)

    def steps(self) -> list[int]:
        """The steps of the checkpoints there, newest first, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((int(p.name) for p in found if p.name.isascii() and p.name.isdigit()), reverse=True)

    def latest(self) -> int | None:
        """The newest step."""
        return next(iter(self.steps()), None)

    def save(self, step: int, items: Mapping[str, Any], wait: bool = False) -> None:
        """Saves pytrees of arrays, and Grain iterators, whose position is kept, in the background. If it is to `wait`,
        or an earlier save has failed, it is tried TRIES times before SaveFailed."""
        # Every process is at the same position, so that one file serves any number of processes.
        args = _by_kind(items, lambda data: ocp.args.JsonSave(data.get_state()), ocp.args.StandardSave)
        wait, path = wait or self.failed(), _Folder(self.folder / str(step))
        for attempt in range(TRIES if jax.process_count() == 1 else 1):  # several are not where this one is
            try:
                self._checkpointer.save(path, args=args, force=True, custom_metadata={"checksums": XXH128})
                if wait:
                    self._checkpointer.wait_until_finished()
                self._failure = None
                return
            except Exception as error:  # of the file system, through Orbax and TensorStore
                wait, self._failure = True, error
                told = f"saving step {step} failed, try {attempt + 1} of {TRIES}: {first_line(error)[:300]}"
                print(f"\n{told}", file=sys.stderr)
                time.sleep(1 + attempt)  # TensorStore's threads may still write what is deleted then
        self._give_up(f"step {step}")

    def failed(self) -> bool:
        """Whether a save in the background is known to have failed; never among several processes, which must agree."""
        if jax.process_count() == 1 and self._failure is None:
            try:
                self._checkpointer.check_for_errors()
            except Exception as error:
                self._failure = error
        return self._failure is not None

    def _give_up(self, what: str) -> None:
        failure, self._failure, good = self._failure, None, self.latest()
        left = f"the last good checkpoint is {self.folder / str(good)}" if good else "there is no checkpoint yet"
        mend = "make room, or make the folder writable, and run it again"
        raise SaveFailed(f"{what} could not be saved ({first_line(failure)[:300]}); {left}: {mend}") from failure

    def _commit(self, draft: Path, final: Path) -> None:
        """Ends a save, in process 0: the draft gets its checksums and its name, and what is not kept goes."""
        write_checksums(draft, _about(int(final.name)), sums=XXH128)
        draft.rename(final)
        sync(self.folder)
        if self.keep is not None:
            old = [self.folder / str(step) for step in self.steps()[self.keep :]]
            for path in (*old, *(p for p in self.folder.iterdir() if p.name.endswith(_DRAFT))):
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of the newest step in which they are whole; what is wrong with newer ones goes to stderr.
        `like` has arrays or `jax.ShapeDtypeStruct`s; a Grain iterator is moved to the saved position. Raises
        FileNotFoundError without a checkpoint, NothingWhole, or ValueError when it holds other networks than `like`."""
        faults: dict[int, str] = {}
        for step in self.steps():
            path = self.folder / str(step)
            if not self._agree(step, fault := self._fault(path, like)):
                faults[step] = fault or "is damaged, as another process says"
                continue
            try:
                items = self._read(path, like)
            except Exception as error:
                said = first_line(error)[:300]
                if (path / XXH128).exists() or jax.process_count() > 1:
                    raise ValueError(f"{path} cannot be restored into these networks: {said}") from error
                faults[step] = f"cannot be read: {said}"
                continue
            self._report(faults, path)
            self.restored = step
            return items
        if not faults:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        told = "; ".join(f"{self.folder / str(step)} {fault}" for step, fault in faults.items())
        raise NothingWhole(f"no checkpoint is whole: {told}")

    def _fault(self, path: Path, names: Iterable[str]) -> str:
        """What is wrong with the named items of a step, as far as this process looks; empty when nothing is."""
        if (path / XXH128).exists() or not _unsummed(path):
            return find_damage(path, names, _about(int(path.name)), (jax.process_index(), jax.process_count()), XXH128)
        if not (missing := [name for name in names if not (path / name).is_dir()]) and jax.process_index() == 0:
            print(f"{path} was saved by version 0.1.0, without checksums: it is not checked", file=sys.stderr)
        return f"has no {missing[0]}" if missing else ""

    def _agree(self, step: int, fault: str) -> bool:
        """Whether no process has found a fault in its share of a step; all must ask for the same one."""
        if jax.process_count() == 1:
            return not fault
        said = np.asarray(multihost_utils.process_allgather(np.array([step, bool(fault)])))
        if len(set(said[:, 0])) > 1:
            raise ValueError(f"the processes see other checkpoints in {self.folder}: it must be a folder they share")
        return not said[:, 1].any()

    def _read(self, path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
        args = _by_kind(
            like, lambda _: ocp.args.JsonRestore(), lambda item: ocp.args.StandardRestore(jax.tree.map(_abstract, item))
        )
        restored = dict(self._checkpointer.restore(_Folder(path), args=args))
        for name, item in like.items():
            if isinstance(item, grain.DatasetIterator):
                item.set_state(restored[name])
                restored[name] = item
        return restored

    def _report(self, faults: Mapping[int, str], used: Path) -> None:
        """Says what is damaged and what is used instead, and moves the former aside if the folder is this run's."""
        for step, fault in faults.items() if jax.process_index() == 0 else ():
            path, moved = self.folder / str(step), ""
            if self.keep is not None:
                names = (path.with_name(f"{step}.damaged{i or ''}") for i in itertools.count())
                path.rename(aside := next(name for name in names if not name.exists()))
                moved = f", and was moved to {aside.name}"
            print(f"{path} {fault}{moved}: {used} is used instead", file=sys.stderr)

    def close(self) -> None:
        """Waits for saves under way; raises SaveFailed when one fails."""
        try:
            self._checkpointer.close()
        except Exception as error:
            self._failure = error
        if self._failure is not None:
            self._give_up("the last checkpoint")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1:
            # A save under way waits for every process, and after an error one of them may be gone.
            try:
                self.close()
            except SaveFailed as failure:
                print(failure, file=sys.stderr)


class _Folder(gpath.PosixGPath):
    """A path as Orbax takes it, but that means itself where Orbax searches below it: `lr[1e-4]` is no pattern."""

    def glob(self, pattern: str) -> Iterator[Any]:
        return (self / path for path in glob.glob(pattern, root_dir=self))


def _by_kind(items: Mapping[str, Any], position: Callable[[Any], Any], arrays: Callable[[Any], Any]) -> Any:
    """Orbax's arguments for items that are Grain iterators, and for those that are trees of arrays."""
    kinds = {name: position if isinstance(item, grain.DatasetIterator) else arrays for name, item in items.items()}
    return ocp.args.Composite(**{name: kind(items[name]) for name, kind in kinds.items()})


def _about(step: int) -> str:
    return f"checkpoint of step {step}"


def _unsummed(path: Path) -> bool:
    """Whether a step was saved without checksums, by version 0.1.0."""
    try:
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        return "checksums" not in (metadata.get("custom_metadata") or {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def abstract(shapes: Any, places: Any) -> Any:
    """A tree of shapes with the shardings of a tree like it."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def on_host(shapes: Any) -> Any:
    """For each leaf the sharding that is this host's memory."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda _: host, shapes)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


_AT_ONCE = 2**28  # bytes of small arrays that are written together
_CHUNK = 2**26  # bytes on disk that are read together: a shard of a mesh needs few more than its own


def save_stream(folder: str | Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a tree as (path, array) pairs, "a/b/c", not held in memory; the folder appears when all are in it."""
    path, host = _Folder(Path(folder).absolute()), jax.local_devices(backend="cpu")[0]
    waiting: dict[str, Any] = {}
    size, context = 0, v1.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    with context:
        for name, array in arrays:
            # As JAX's, which Orbax writes from where they are; numpy's it would copy.
            waiting[name] = jax.device_put(array, host, may_alias=True)
            size += array.nbytes
            del array
            if size >= _AT_ONCE:
                v1.partial.save(path, unflatten_dict(waiting, sep="/"))
                waiting, size = {}, 0
        if waiting:
            v1.partial.save(path, unflatten_dict(waiting, sep="/"))
        v1.partial.finalize(path)


def restore_tree(folder: str | Path, shapes: Any, shardings: Any = None) -> Any:
    """The tree saved in a folder with the dtypes of `shapes`, straight into `shardings`, or as numpy arrays. Raises
    ValueError when the folder is damaged or holds another tree."""
    like = abstract(shapes, on_host(shapes) if shardings is None else shardings)
    try:
        tree = v1.load(_Folder(Path(folder).absolute()), like)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder} is damaged, or holds the weights of another network: {error}") from error
    return tree if shardings is not None else jax.tree.map(np.asarray, tree)
