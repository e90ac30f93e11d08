"""Orbax checkpoints: one folder per step, one item per part of the state.

    checkpoints/120/student, ema, fake_score, reward_head, optimisers, progress, data, ...

Items are restored by name, so that sampling reads the student alone. A step's folder appears under its
name only when it is whole: a killed save leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1


class Checkpoints:
    """The checkpoints of a folder; the newest `keep` stay. Saves run in the background until `close`."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Saves the items: pytrees of arrays, or a Grain iterator, whose position is kept."""
        args = {
            # Every process is at the same position, so that one file serves any number of processes.
            name: ocp.args.JsonSave(item.get_state())  # type: ignore[call-arg]
            if isinstance(item, grain.DatasetIterator)
            else ocp.args.StandardSave(item)  # type: ignore[call-arg]
            for name, item in items.items()
        }
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Returns once every save is on disk."""
        self._manager.wait_until_finished()

    def restore(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of the newest step.

        `like` gives each item's structure, shapes, dtypes and shardings, as arrays or
        `jax.ShapeDtypeStruct`s; a Grain iterator is moved to the saved position.

        Raises FileNotFoundError when there is no checkpoint or it lacks an item.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        for name in like:
            if not (self.folder / str(step) / name).exists():
                raise FileNotFoundError(f"the checkpoint {self.folder / str(step)} has no {name}")
        args = {
            name: ocp.args.JsonRestore()  # type: ignore[call-arg]
            if isinstance(item, grain.DatasetIterator)
            else ocp.args.StandardRestore(jax.tree.map(_abstract, item))  # type: ignore[call-arg]
            for name, item in like.items()
        }
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**args)))
        for name, item in like.items():
            if isinstance(item, grain.DatasetIterator):
                item.set_state(restored[name])
                restored[name] = item
        return restored

    def close(self) -> None:
        """Waits for saves under way."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A save under way waits for every process, and after an error one of them may be gone.
        if error is None or jax.process_count() == 1:
            self.close()


def _abstract(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return x


# --- a tree of arrays by itself, such as a frozen network's weights ---------------------------------

_AT_ONCE = 2**28  # bytes of small arrays that are written together
_CHUNK = 2**26  # bytes on disk that are read together: a shard of a mesh needs few more than its own


def save_stream(folder: str | Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes the tree of (path, array) pairs, paths like "a/b/c", without holding it in memory.

    The folder appears under its name only when all are in it.
    """
    folder = Path(folder).absolute()
    host = jax.local_devices(backend="cpu")[0]
    waiting: dict[str, Any] = {}
    size = 0
    context = v1.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    with context:
        for path, array in arrays:
            *parents, leaf = path.split("/")
            node = waiting
            for name in parents:
                node = node.setdefault(name, {})
            # As JAX's, which Orbax writes from where they are; numpy's it would copy.
            node[leaf] = jax.device_put(array, host, may_alias=True)
            size += array.nbytes
            del array, node
            if size >= _AT_ONCE:
                v1.partial.save(str(folder), waiting)
                waiting, size = {}, 0
        if waiting:
            v1.partial.save(str(folder), waiting)
        v1.partial.finalize(str(folder))


def restore_tree(folder: str | Path, shapes: Any, shardings: Any = None) -> Any:
    """The tree saved in a folder with the dtypes of `shapes`, each array straight into its sharding.

    Without shardings they are numpy arrays on this host. Raises ValueError when the folder is damaged
    or holds another tree.
    """
    folder = Path(folder).absolute()
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        where = jax.tree.map(lambda _: here, shapes)
    else:
        where = shardings
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    try:
        tree = v1.load(str(folder), like)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder} is damaged, or holds the weights of another network: {error}") from error
    return tree if shardings is not None else jax.tree.map(np.asarray, tree)
