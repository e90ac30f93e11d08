"""`dollar train`: the host's loop around the one compiled step.

While the devices run a step, host rewards score the previous step's latents. What was scored is taken in
before a checkpoint, so that a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import DistillConfig, LoraConfig, from_config
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.data.prepared import PreparedVideos
from dollar_jax.distributed import Preempted, preemption
from dollar_jax.files import write_file
from dollar_jax.generate import Generator
from dollar_jax.models import lora
from dollar_jax.models.network import Network
from dollar_jax.objectives import Frozen
from dollar_jax.program import Program, build_program, student_network, student_params
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.rewards.scorer import Scorer
from dollar_jax.state import ITEMS, TrainState, from_items, to_items
from dollar_jax.video import encode_gif
from dollar_jax.visibility import Profile, Throughput, make_throughput, make_watch, readable

HISTORY = "history.jsonl"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# Settings that may change between a run and its resumption.
_CHANGEABLE = {"mesh", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "visibility", "pretrain"}


def train(
    config: DistillConfig, workdir: Path, generator: Generator, data: EncodedVideos | PreparedVideos
) -> TrainState:
    """Distils for `config.steps` steps, from the newest checkpoint in `workdir` if there is one.

    Leaves checkpoints, history.jsonl, TensorBoard events and config.json. Stops early, with a checkpoint,
    when config.reward.guard says that the reward is being hacked. Raises ValueError when the workdir
    holds a run with other settings, FloatingPointError when the loss stops being finite, Preempted
    after SIGTERM, with a checkpoint.
    """
    remember_config(config, workdir)
    pipeline = generator.pipeline
    text_shape = generator.null_text.shape[1:]
    rewards = load_rewards(config.reward.rewards)
    pixels = pixel_rewards(config.reward, rewards, generator.frames)
    program = build_program(
        config,
        pipeline.transformer.network,
        pipeline.schedule,
        generator.latent_shape,
        text_shape,
        pixel_rewards=pixels,
        score_real=data.has_latents,
    )
    decoder = None
    if rewards:
        decoder = sharding.put(pipeline.vae.params, sharding.replicated(program.mesh))
    reward_params = () if pixels is None else pixels.params(decoder)
    frozen = sharding.put(
        Frozen(pipeline.transformer.params, generator.null_text, reward_params), program.frozen_sharding
    )
    scorer = None
    if rewards:
        scorer = Scorer(config, rewards, pixels, generator.frames, decoder, data.latent_shapes, text_shape)
    rows = sharding.local_rows(program.batch_sharding["latent"], config.batch_size)
    batches = data.batches(config, rows, program.batch_sharding)
    guard = config.reward.guard
    sampled = functools.partial(student_params, config.lora)
    if config.lora.rank:
        sampled = jax.jit(sampled, out_shardings=program.frozen_sharding.teacher)

    with Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints) as checkpoints:
        first = checkpoints.latest() or 0
        if first:
            state = _restore(checkpoints, program, scorer, batches)
        else:
            state = program.init(jax.random.key(config.seed), frozen.teacher)
            if config.init is not None:
                state = _go_on_from(Path(config.init), program, state)
        hacked = None if scorer is None else scorer.monitor.hacked(guard)
        watch = make_watch(config, workdir, generator, frozen.teacher)
        throughput = make_throughput(config, program, reward_params)
        with (
            Log(workdir, first, config, throughput) as log,
            Profile(config.visibility.profile_steps, workdir, first) as profile,
            preemption() as noticed,
        ):
            busy = None
            for step in range(first, config.steps):
                if hacked:
                    break
                profile.before(step)
                begun = time.perf_counter()
                read = next(batches)
                if busy is None or busy.is_ready():  # the devices had nothing left to do
                    log.waited += time.perf_counter() - begun
                batch, captions = read["on_device"], data.captions_of(read)
                if scorer is not None:
                    batch = batch | scorer.inputs(step, captions, read["latent"].shape[1:])
                state, metrics, fresh = program.step(state, frozen, _put(program, rows, batch))
                busy = metrics["student_loss"]
                if scorer is not None:
                    scorer.collect()
                    scorer.submit(fresh, read, captions)
                    if (step + 1) % config.log_every == 0:
                        hacked = scorer.monitor.hacked(guard)
                saving = step + 1 == config.steps or (step + 1) % config.checkpoint_every == 0
                preempted = noticed(step)
                saving = saving or hacked is not None or preempted
                if saving and scorer is not None:
                    scorer.collect()
                profile.after(step, metrics)
                host = {} if scorer is None else dict(scorer.latest)
                if watch.due(step + 1):
                    ema = jax.device_put(state.ema, sharding.shard(program.mesh, state.ema))
                    seen, video, warnings = watch.samples(step + 1, sampled(frozen.teacher, ema))
                    log.show(step + 1, video, warnings)
                    host |= seen
                log.step(step + 1, metrics, host, saving or watch.due(step + 1))
                if saving:
                    items = {**to_items(state), "data": batches}
                    if scorer is not None:
                        items["replay"] = scorer.state
                    checkpoints.save(step + 1, items)
                if preempted and step + 1 < config.steps:
                    checkpoints.wait()
                    raise Preempted(f"terminated after step {step + 1}, which is saved; run it again to go on")
        if hacked and jax.process_index() == 0:
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
    fields = vars(program.state_sharding)
    places = {item: {name: fields[name] for name in names} for item, names in ITEMS.items()}
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def _restore(
    checkpoints: Checkpoints, program: Program, scorer: Scorer | None, batches: grain.DatasetIterator
) -> TrainState:
    like = {**_abstract(program), "data": batches}
    if scorer is not None:
        like["replay"] = scorer.state
    items = checkpoints.restore(like)
    if scorer is not None:
        scorer.state = items.pop("replay")
    items.pop("data")
    return from_items(items)


def _put(program: Program, rows: np.ndarray, batch: Mapping[str, np.ndarray | jax.Array]) -> dict[str, jax.Array]:
    """The step's global arrays: of this process's `rows` of the videos, and of what every process has whole.

    What is on the devices already stays as it is.
    """

    def place(name: str, value: np.ndarray | jax.Array) -> jax.Array:
        where = program.batch_sharding[name]
        if isinstance(value, jax.Array):
            return value
        if name.startswith(("scored", "walk")):
            return sharding.put(value, where)
        return sharding.put_rows(value, rows, where, program.batch_shapes[name].shape[0])

    return {name: place(name, value) for name, value in batch.items()}


class Log:
    """history.jsonl, TensorBoard events and a progress bar; written by process 0 only.

    Metrics are fetched one logging interval late, so that logging does not wait for the devices; but
    at a checkpoint at once, so that no state is saved whose metrics are not finite or not on disk.
    """

    def __init__(self, workdir: Path, first: int, config: DistillConfig, throughput: Throughput):
        self.every, self.throughput = config.log_every, throughput
        self.main = jax.process_index() == 0
        self.bar = tqdm(total=config.steps, initial=first, desc="distilling", disable=not self.main, unit="step")
        self._held: tuple[int, Mapping[str, jax.Array], dict[str, float], float] | None = None
        self._clock = (first, time.perf_counter())
        self.waited = 0.0  # seconds that the devices stood idle for want of a batch
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

    def step(self, step: int, metrics: Mapping[str, jax.Array], host: dict[str, float], now: bool) -> None:
        self.bar.update()
        if now or step % self.every == 0:
            self._write()
            self._held = (step, metrics, dict(host), time.perf_counter())
        if now:
            self._write()

    def show(self, step: int, video: np.ndarray, warnings: Sequence[str]) -> None:
        """A video uint8 [t h w 3] and warnings among the TensorBoard events."""
        if not self.main:
            return
        data, (_, height, width, _) = encode_gif(video), video.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        value = Summary.Value(tag="teacher_left_student_right", image=image)
        self.events.file_writer.add_summary(  # pyright: ignore[reportOptionalMemberAccess]
            Summary(value=[value]), step
        )
        for warning in warnings:
            self.events.add_text("warning", warning, step)

    def _write(self) -> None:
        if self._held is None:
            return
        step, metrics, host, now = self._held
        self._held = None
        values = {name: float(value) for name, value in metrics.items()}
        before, then = self._clock
        self._clock = (step, now)
        waited = {"data_wait": min(self.waited / max(now - then, 1e-9), 1.0)}
        self.waited = 0.0
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}: lower the learning rates or clip the "
                    "gradients; the last checkpoint is from before this step"
                )
        seconds = (now - then) / max(step - before, 1)
        values = readable(values) | host
        values |= {"seconds_per_step": seconds, **waited, **self.throughput(seconds)}
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
    write_file(path, "".join(kept))


def remember_config(config: DistillConfig, workdir: Path) -> None:
    """Writes the run's settings into its workdir, or compares them with those it was started with."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    if path.exists():
        before, now = (_flat(dataclasses.asdict(read_config(workdir))), _flat(dataclasses.asdict(config)))
        for name in sorted(before.keys() | now.keys()):
            changeable = name.split(".")[0] in _CHANGEABLE
            if not changeable and before.get(name) != now.get(name):
                raise ValueError(
                    f"{workdir} holds a run with config.{name} = {before.get(name)!r}, not "
                    f"{now.get(name)!r}: choose another workdir, or the run's own settings to resume it"
                )
    if jax.process_index() == 0:
        write_file(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(workdir: Path) -> DistillConfig:
    """The settings of the run in a workdir; raises FileNotFoundError when there is none."""
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG} in it")
    return from_config(DistillConfig, json.loads(path.read_text()))


def restore_student(workdir: Path, generator: Generator, ema: bool = True) -> Any:
    """The newest student's parameters, and nothing else of the checkpoint; the average unless `ema` is False."""
    transformer = generator.pipeline.transformer
    config = read_config(workdir).lora
    _, params = restore_trained(workdir, transformer.network, config, ema)
    return student_params(config, transformer.params, params)


def restore_trained(workdir: Path, transformer: Network, config: LoraConfig, ema: bool) -> tuple[int, Any]:
    """The newest checkpoint's step, and what was trained of its student, or that's average: all or adapters."""
    shapes = student_network(transformer, config).shapes
    if config.rank:
        shapes = lora.adapters(shapes)
    name = "ema" if ema else "student"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=here), shapes)}
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        params = checkpoints.restore({name: like})[name][name]
        return checkpoints.latest() or 0, params


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: list(tree) if isinstance(tree, tuple) else tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
