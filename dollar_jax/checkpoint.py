"""Orbax checkpoints: one folder per step, one item per part of the state.

    checkpoints/120/student, ema, fake_score, reward_head, optimisers, progress, data, ...

Items are restored by name, so that sampling reads the student alone. A step's folder appears under its
name only when it is whole: a killed save leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp


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

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """The named items of a step (the newest, unless given).

        `like` gives each item's structure, shapes, dtypes and shardings, as arrays or
        `jax.ShapeDtypeStruct`s; a Grain iterator is moved to the saved position.

        Raises FileNotFoundError when there is no checkpoint or it lacks an item.
        """
        step = self.latest() if step is None else step
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
        self._manager.wait_until_finished()
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
