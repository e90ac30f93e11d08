"""`dollar train`: the host's loop around the one compiled step.

While the devices run a step, host rewards score the previous step's latents. What was scored is taken in
before a checkpoint, so that a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import DistillConfig, from_config
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.generate import Generator
from dollar_jax.objectives import Frozen
from dollar_jax.program import Program, build_program
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.rewards.scorer import Scorer
from dollar_jax.state import TrainState, from_items, to_items

HISTORY = "history.jsonl"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# Settings that may change between a run and its resumption.
_CHANGEABLE = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "pretrain"}


def train(
    config: DistillConfig, workdir: Path, generator: Generator, data: EncodedVideos
) -> TrainState:
    """Distils for `config.steps` steps, from the newest checkpoint in `workdir` if there is one.

    Leaves checkpoints, history.jsonl, TensorBoard events and config.json. Stops early, with a checkpoint,
    when config.reward.guard says that the reward is being hacked. Raises ValueError when the workdir
    holds a run with other settings, FloatingPointError when the loss stops being finite.
    """
    remember_config(config, workdir)
    pipeline = generator.pipeline
    text_shape = generator.null_text.shape[1:]
    rewards = load_rewards(config.reward.rewards)
    pixels = pixel_rewards(config.reward, rewards, generator.frames)
    program = build_program(
        config, pipeline.transformer.network, pipeline.schedule, generator.latent_shape, text_shape,
        pixel_rewards=pixels,
    )  # fmt: skip
    decoder = None
    if rewards:
        decoder = jax.device_put(pipeline.vae.params, sharding.replicated(program.mesh))
    reward_params = () if pixels is None else pixels.params(decoder)
    frozen = jax.device_put(
        Frozen(pipeline.transformer.params, generator.null_text, reward_params), program.frozen_sharding
    )
    scorer = None
    if rewards:
        scorer = Scorer(
            config, rewards, pixels, generator.frames, decoder, generator.latent_shape, text_shape
        )
    batches = data.batches(config)
    guard = config.reward.guard

    with Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints) as checkpoints:
        first = checkpoints.latest() or 0
        if first:
            state = _restore(checkpoints, program, scorer, batches)
        else:
            state = program.init(jax.random.key(config.seed), frozen.teacher)
            if config.init is not None:
                state = _go_on_from(Path(config.init), program, state)
        hacked = None if scorer is None else scorer.monitor.hacked(guard)
        with Log(workdir, first, config) as log:
            for step in range(first, config.steps):
                if hacked:
                    break
                rows = next(batches)
                captions = [str(data.captions[i]) for i in rows["index"]]
                batch = {"latent": rows["latent"], "text": rows["text"]}
                if scorer is not None:
                    batch |= scorer.inputs(step, captions)
                state, metrics, fresh = program.step(state, frozen, _put(program, batch))
                if scorer is not None:
                    scorer.collect()
                    scorer.submit(fresh, batch, captions)
                    if (step + 1) % config.log_every == 0:
                        hacked = scorer.monitor.hacked(guard)
                saving = step + 1 == config.steps or (step + 1) % config.checkpoint_every == 0
                saving = saving or hacked is not None
                if saving and scorer is not None:
                    scorer.collect()
                log.step(step + 1, metrics, {} if scorer is None else scorer.latest, saving)
                if saving:
                    items = {**to_items(state), "data": batches}
                    if scorer is not None:
                        items["replay"] = scorer.state
                    checkpoints.save(step + 1, items)
        if hacked:
            tqdm.write(f"stopped at step {int(state.step)}: {hacked}")
    return state


def _go_on_from(workdir: Path, program: Program, state: TrainState) -> TrainState:
    """The state with another run's student, average and fake score; raises FileNotFoundError without one."""
    read_config(workdir)
    items = _abstract(program)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        parts = checkpoints.restore({name: items[name] for name in ("student", "ema", "fake_score")})
    return dataclasses.replace(state, **{k: v for item in parts.values() for k, v in item.items()})


def _abstract(program: Program) -> dict[str, Any]:
    """The items of a checkpoint of the state as shapes on the program's mesh."""
    shapes = jax.eval_shape(to_items, program.state_shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes, sharding.shard(program.mesh, shapes),
    )  # fmt: skip


def _restore(
    checkpoints: Checkpoints,
    program: Program,
    scorer: Scorer | None,
    batches: grain.DatasetIterator,
) -> TrainState:
    like = {**_abstract(program), "data": batches}
    if scorer is not None:
        like["replay"] = scorer.state
    items = checkpoints.restore(like)
    if scorer is not None:
        scorer.state = items.pop("replay")
    items.pop("data")
    return from_items(items)


def _put(program: Program, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Each process's rows as the global arrays of the step."""
    return {
        name: jax.make_array_from_process_local_data(program.batch_sharding[name], value)
        for name, value in batch.items()
    }


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
