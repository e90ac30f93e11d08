"""Steps whose updates were skipped because something in them was not finite: noted, and at last the end of a run."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dollar_jax import objectives, sharding
from dollar_jax.config import DistillConfig
from dollar_jax.distillation import Batch, Distillation, Frozen, References
from dollar_jax.distributed import gather
from dollar_jax.files import new_file, read_arrays
from dollar_jax.program import Program
from dollar_jax.programs import TrainPrograms
from dollar_jax.run import SKIPPED, truncate_history
from dollar_jax.state import TrainState
from dollar_jax.step import full_params, micro_batches, skipped
from dollar_jax.types import Key


class Skips:
    """The skipped steps of a run, a line for each in WORKDIR/skipped.jsonl; `total` counts them."""

    def __init__(self, config: DistillConfig, workdir: Path, first: int):
        self.config, self.workdir, self._in_a_row = config, workdir, 0
        self.total = truncate_history(workdir, first, SKIPPED)
        self._held: tuple[int, Mapping[str, jax.Array], Mapping[int, str], Batch] | None = None

    def step(self, step: int, metrics: Mapping[str, jax.Array], names: Mapping[int, str], batch: Batch) -> None:
        """Takes in a step and this process's records by row; looks at the step before, which has had its time."""
        self.check()
        self._held = step, metrics, names, batch

    def check(self) -> None:
        """Waits for the last step; FloatingPointError, with its batch in WORKDIR, after config.max_skipped in a row."""
        held, self._held = self._held, None
        if held is None:
            return
        step, metrics, own, batch = held
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        bad = skipped(self.config, values)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if not bad:
            return
        self.total += 1
        parts = (json.loads(part) for part in gather(json.dumps([*own.items()]).encode()))
        names = [name for _, name in sorted({row: name for part in parts for row, name in part}.items())]
        if jax.process_index() == 0:
            line = {"step": step, "because_of": {k: str(values[k]) for k in bad}, "records": names}
            with (self.workdir / SKIPPED).open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(f"skipped step {step}: {bad[0]} is {values[bad[0]]:g}; its records are in {file.name}")
        if self._in_a_row > self.config.max_skipped:
            path, leaves = self.workdir / f"skipped_{step:06d}.npz", jax.tree.leaves(batch)
            if jax.process_count() > 1:
                leaves = multihost_utils.process_allgather(leaves, tiled=True)
            if jax.process_index() == 0:
                with new_file(path) as draft, draft.open("wb") as file:
                    np.savez(file, *map(np.asarray, leaves), step=step, names=names)
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]:g} at step {step}: lower the learning rates or clip the gradients; "
                f"{self._in_a_row} steps in a row were skipped, and the last checkpoint is from before this step. What "
                f"is not finite is shown by dollar train with the same flags and --replay_batch={path}"
            )


def explain(programs: TrainPrograms, state: TrainState, frozen: Frozen, path: Path) -> list[str]:
    """Sentences that say which metrics, and which rows of a saved batch, are not finite in its step, run again. Raises
    ValueError for a file that holds no batch of this run."""
    structure = jax.tree.structure(programs.batch_shapes)
    try:
        stored = read_arrays(path)
        step, names = int(stored["step"]), stored["names"].tolist()
        leaves = [stored[f"arr_{i}"] for i in range(structure.num_leaves)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"--replay_batch={path} is no batch that a run of these settings left: {error}") from error
    said = [f"step {step} again, on the state after step {int(state.step)}:"]
    batch = sharding.put(jax.tree.unflatten(structure, leaves), programs.batch_sharding)
    begun = sharding.put(np.asarray(step - 1, np.int32), programs.state_sharding.step)
    state = dataclasses.replace(state, step=begun)
    on_devices = sharding.put(state, sharding.shard(programs.mesh, programs.state_shapes))  # all of it
    by_row = Program("losses_by_row", functools.partial(losses_by_row, programs.distillation), mesh=programs.mesh)
    rows = {"latent": leaves[0], "text": leaves[1]} | jax.device_get(by_row(on_devices, frozen, batch))
    values = jax.device_get(dict(programs.step(state, frozen, batch)[1]))
    said += [f"{name} is {value:g}" for name, value in values.items() if not math.isfinite(value)]
    for name, value in rows.items():
        if bad := np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1)).tolist():
            called = [f"{i} ({names[i]})" if i < len(names) else str(i) for i in bad]
            said.append(f"{name} is not finite in row {', '.join(called)}")
    return said if len(said) > 1 else [*said, "all is finite, so that the steps between the two made it not so"]


def losses_by_row(d: Distillation, state: TrainState, frozen: Frozen, batch: Batch) -> dict[str, jax.Array]:
    """[b] of each term of the student's loss in a step; a reward's may have fewer rows."""
    count, key = d.config.accumulation, jax.random.split(jax.random.fold_in(state.key, state.step), 3)[0]
    full = functools.partial(full_params, d.config.lora.rank, frozen.teacher)
    reward = state.latent_reward, state.reward_statistics
    d = d.reading(frozen.teacher)
    references = References(full(state.ema), full(state.fake_score), *reward, frozen, state.step)

    def rows(inputs: tuple[Batch, Key]) -> dict[str, jax.Array]:
        _, losses = objectives.student_rows(d, full(state.student), references, *inputs)
        return {term.name: each for term, each, _ in losses}

    micro = micro_batches(dataclasses.replace(batch, reward=None), count)
    return {k: v.T.ravel() for k, v in jax.lax.map(rows, (micro, jax.random.split(key, count))).items()}
