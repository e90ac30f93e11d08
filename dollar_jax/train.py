"""`dollar train`: the host's loop around the one compiled step.

While the devices run a step, the host decodes and scores the previous step's latents; the rewards reach
the latent reward model one step later. What was scored is flushed before a checkpoint, so that a
resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import DistillConfig, from_config
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.generate import Generator
from dollar_jax.objectives import Frozen
from dollar_jax.program import Program, build_program
from dollar_jax.rewards import Reward, get_reward
from dollar_jax.rewards.replay import Replay
from dollar_jax.state import TrainState, from_items, to_items

HISTORY = "history.jsonl"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# Settings that may change between a run and its resumption.
_CHANGEABLE = {"mesh", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "pretrain"}


def train(
    config: DistillConfig, workdir: Path, generator: Generator, data: EncodedVideos
) -> TrainState:
    """Distils for `config.steps` steps, from the newest checkpoint in `workdir` if there is one.

    Leaves checkpoints, history.jsonl, TensorBoard events and config.json. Raises ValueError when the
    workdir holds a run with other settings, FloatingPointError when the loss stops being finite.
    """
    remember_config(config, workdir)
    pipeline = generator.pipeline
    text_shape = generator.null_text.shape[1:]
    program = build_program(
        config, pipeline.transformer.network, pipeline.schedule, generator.latent_shape, text_shape
    )
    frozen = sharding.put(
        Frozen(pipeline.transformer.params, generator.null_text), program.frozen_sharding
    )
    reward = None if config.reward.name is None else get_reward(config.reward.name)
    scorer = None if reward is None else Scorer(config, generator, reward, text_shape)
    rows = sharding.local_rows(program.batch_sharding["latent"], config.batch_size)
    batches = data.batches(config, rows)

    with Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints) as checkpoints:
        first = checkpoints.latest() or 0
        if first:
            state = _restore(checkpoints, program, scorer, batches)
        else:
            state = program.init(jax.random.key(config.seed), frozen.teacher)
        with Log(workdir, first, config) as log, Trace(workdir) as trace:
            for step in range(first, config.steps):
                batch = dict(next(batches))
                captions = [str(data.captions[i]) for i in batch.pop("index")]
                scored = {} if scorer is None else scorer.scored(step)
                placed = _put(program, rows, batch | scored)
                state, metrics, generated = program.step(state, frozen, placed)
                trace.step(metrics)
                if scorer is not None:
                    scorer.score_pending()
                    scorer.pend(generated, batch, captions)
                saving = step + 1 == config.steps or (step + 1) % config.checkpoint_every == 0
                if saving and scorer is not None:
                    scorer.score_pending()
                log.step(step + 1, metrics, {} if scorer is None else scorer.latest, saving)
                if saving:
                    items = {**to_items(state), "data": batches}
                    if scorer is not None:
                        items["replay"] = scorer.replay.state
                    checkpoints.save(step + 1, items)
    return state


def _restore(
    checkpoints: Checkpoints,
    program: Program,
    scorer: Scorer | None,
    batches: grain.DatasetIterator,
) -> TrainState:
    shapes = jax.eval_shape(to_items, program.state_shapes)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes, sharding.shard(program.mesh, shapes),
    )  # fmt: skip
    like = {**abstract, "data": batches}
    if scorer is not None:
        like["replay"] = scorer.replay.state
    items = checkpoints.restore(like)
    if scorer is not None:
        scorer.replay.state = {k: np.array(v) for k, v in items.pop("replay").items()}
    items.pop("data")
    return from_items(items)


def _put(
    program: Program, rows: np.ndarray, batch: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """The step's global arrays: of this process's `rows` of the videos, and of what every process has whole."""
    shapes, places = program.batch_shapes, program.batch_sharding
    return {
        name: sharding.put(value, places[name])
        if name.startswith("scored")
        else sharding.put_rows(value, rows, places[name], shapes[name].shape[0])
        for name, value in batch.items()
    }


class Scorer:
    """Scores this process's share of the latents with the pixel-space reward, one step behind the devices.

    What was scored goes to all processes, so that each has the same replay.
    """

    def __init__(
        self,
        config: DistillConfig,
        generator: Generator,
        reward: Reward,
        text_shape: tuple[int, ...],
    ):
        c = self.config = config.reward
        self.seed = config.seed
        self.count = max(1, c.samples // jax.process_count())
        self.stride = config.accumulation
        self.generator, self.reward = generator, reward
        self.replay = Replay(c.replay, generator.latent_shape, text_shape)
        self.latest: dict[str, float] = {}
        self._pending: tuple[jax.Array, np.ndarray, np.ndarray, list[str]] | None = None

    def scored(self, step: int) -> dict[str, np.ndarray]:
        """The latent reward model's batches for a step; the same on every process."""
        return self.replay.sample(self.config.updates, self.config.batch_size, [self.seed, step])

    def pend(
        self, generated: jax.Array, batch: Mapping[str, np.ndarray], captions: Sequence[str]
    ) -> None:
        """Leaves a step's generated latents, and as many real ones, to be scored later."""
        # `generated` is the last micro-batch: every stride-th row of the batch.
        rows = slice(self.stride - 1, None, self.stride)
        latent, text = (np.asarray(batch[k])[rows][: self.count] for k in ("latent", "text"))
        self._pending = (generated, latent, text, list(captions[rows][: self.count]))

    def score_pending(self) -> None:
        self.latest = {}
        if self._pending is None:
            return
        generated, real, text, prompts = self._pending
        self._pending = None
        latents = np.concatenate([_local_rows(generated)[: self.count], real])
        # A reward may give a finite number to anything, so what is not finite never counts.
        finite = np.isfinite(latents).all(axis=(1, 2, 3, 4), keepdims=True)
        frames = self.generator.decode(np.where(finite, latents, 0.0))
        rewards = np.where(np.ravel(finite), self.reward(frames, prompts * 2), np.nan)
        scored = (latents, np.concatenate([text, text]), rewards)
        if jax.process_count() > 1:
            scored = jax.tree.map(_all_halves, multihost_utils.process_allgather(scored))
        self.replay.add(*scored)
        rewards = scored[-1]
        for name, row in zip(("generated", "real"), rewards.reshape(2, -1), strict=True):
            if np.isfinite(row).any():
                self.latest[f"reward_{name}"] = float(row[np.isfinite(row)].mean())


def _all_halves(x: np.ndarray) -> np.ndarray:
    """[processes, 2 n, ...] → [2 · processes · n, ...]: all generated latents, then all real ones."""
    x = np.asarray(x).reshape(len(x), 2, -1, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])


def _local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in order, each once."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


class Trace:
    """At the signal USR1, a profile of the next steps of this process in WORKDIR/profile, for XProf."""

    STEPS = 3

    def __init__(self, workdir: Path):
        self.folder = workdir / "profile"
        self._asked = False
        self._left = 0

    def __enter__(self) -> Trace:
        # Python takes signals in its main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._before)
        if self._left:
            jax.profiler.stop_trace()

    def _ask(self, *_: object) -> None:
        self._asked = True

    def step(self, metrics: Mapping[str, jax.Array]) -> None:
        """After each step is dispatched; `metrics` are what it will leave."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                print(f"the profile of {self.STEPS} steps is in {self.folder}", flush=True)
        elif self._asked:
            self._asked = False
            jax.profiler.start_trace(str(self.folder))
            self._left = self.STEPS


class Log:
    """history.jsonl, TensorBoard events and a progress bar; written by process 0 only.

    Metrics are fetched one logging interval late, so that logging does not wait for the devices; but
    at a checkpoint at once, so that no state is saved whose metrics are not finite or not on disk.
    """

    def __init__(self, workdir: Path, first: int, config: DistillConfig):
        self.every = config.log_every
        self.main = jax.process_index() == 0
        self.bar = tqdm(
            total=config.steps, initial=first, desc="distilling", disable=not self.main, unit="step"
        )
        self._held: tuple[int, Mapping[str, jax.Array], dict[str, float]] | None = None
        self._clock = (first, time.perf_counter())
        if self.main:
            self.path = workdir / HISTORY
            _truncate(self.path, first)
            self.file = self.path.open("a")
            self.events = SummaryWriter(str(workdir / "events"), purge_step=first or None)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._write()
        finally:
            self.bar.close()
            if self.main:
                self.file.close()
                self.events.close()

    def step(
        self, step: int, metrics: Mapping[str, jax.Array], host: dict[str, float], now: bool
    ) -> None:
        self.bar.update()
        if now or step % self.every == 0:
            self._write()
            self._held = (step, metrics, dict(host))
        if now:
            self._write()

    def _write(self) -> None:
        if self._held is None:
            return
        step, metrics, host = self._held
        self._held = None
        values = {name: float(value) for name, value in metrics.items()} | host
        before, then = self._clock
        self._clock = (step, now := time.perf_counter())
        values["seconds_per_step"] = (now - then) / max(step - before, 1)
        for name in metrics:
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"{name} is {values[name]} at step {step}: lower the learning rates or clip the "
                    "gradients; the last checkpoint is from before this step"
                )
        if self.main:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            shown = {"loss": values["student_loss"]}
            shown |= {k[7:]: host[k] for k in ("reward_generated", "reward_real") if k in host}
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})


def read_history(workdir: Path) -> list[dict[str, float]]:
    """The logged metrics of a run, one mapping per logged step."""
    path = workdir / HISTORY
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _truncate(path: Path, step: int) -> None:
    """Drops lines after `step`, and a last line that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    _replace(path, "".join(kept))


def remember_config(config: DistillConfig, workdir: Path) -> None:
    """Writes the run's settings into its workdir, or compares them with those it was started with."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    if path.exists():
        before, now = (
            _flat(dataclasses.asdict(read_config(workdir))),
            _flat(dataclasses.asdict(config)),
        )
        for name in sorted(before.keys() | now.keys()):
            changeable = name.split(".")[0] in _CHANGEABLE
            if not changeable and before.get(name) != now.get(name):
                raise ValueError(
                    f"{workdir} holds a run with config.{name} = {before.get(name)!r}, not "
                    f"{now.get(name)!r}: choose another workdir, or the run's own settings to resume it"
                )
    if jax.process_index() == 0:
        _replace(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(workdir: Path) -> DistillConfig:
    """The settings of the run in a workdir; raises FileNotFoundError when there is none."""
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG} in it")
    return from_config(DistillConfig, json.loads(path.read_text()))


def restore_student(workdir: Path, generator: Generator, ema: bool = True) -> Any:
    """The newest student's parameters, and nothing else of the checkpoint; the average unless `ema` is False."""
    name = "ema" if ema else "student"
    shapes = generator.pipeline.transformer.network.shapes
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=here), shapes
        )
    }
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        return checkpoints.restore({name: like})[name][name]


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: list(tree) if isinstance(tree, tuple) else tree}
    return {
        k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()
    }
