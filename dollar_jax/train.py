"""`dollar train`: the host's loop around the one compiled step. While it runs, host rewards score the last step's
latents; they are taken in before a checkpoint, so that a resumed run repeats an uninterrupted one to the bit."""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints, abstract
from dollar_jax.config import DistillConfig
from dollar_jax.data.latents import Videos
from dollar_jax.distillation import Batch, Frozen
from dollar_jax.distributed import gather, preemption
from dollar_jax.generate import Generator
from dollar_jax.lock import owned
from dollar_jax.monitoring import Log, Profile, make_sample_logger, make_throughput
from dollar_jax.programs import TrainPrograms, sample_programs, shared_rewards, step_flops, teacher_programs
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.methods import method_of
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.rewards.scorer import Scorer
from dollar_jax.run import CHECKPOINTS, check_config, read_config, record_config
from dollar_jax.skips import Skips, explain
from dollar_jax.state import GAN_HEAD, TrainState, as_items, from_items, to_items
from dollar_jax.types import Params


def train(
    config: DistillConfig,
    workdir: Path,
    generator: Generator,
    data: Videos | Callable[[], Videos],
    replay_batch: Path | None = None,
) -> TrainState:
    """Distils up to step `config.steps`, from the newest checkpoint in `workdir`, and leaves checkpoints,
    history.jsonl, TensorBoard events and config.json, nothing before the first step can be taken; latents that `data`
    renders, given as a function, only when all else has been checked and the workdir is its own. Stops early, with a
    checkpoint, when config.reward.guard says that the reward is being hacked. Without a checkpoint a run may begin anew
    with other settings. With `replay_batch`, which a step that was not finite left, it prints what is not, and trains
    nothing. Raises ValueError for a run with other settings, FloatingPointError for too many steps in a row that were
    not finite, Preempted after SIGTERM or Ctrl-C, with a checkpoint, SaveFailed without one, InUse."""
    method_of(config).check()
    if Checkpoints(workdir / CHECKPOINTS).latest():
        check_config(config, workdir)
    asked, config = config, shared_rewards(config, generator.mesh)
    pipeline, rewards = generator.pipeline, load_rewards(config.reward.rewards)
    pixels = pixel_rewards(config.reward, rewards, generator.frames)
    programs = teacher_programs(config, generator, pixels, real=callable(data) or data.has_latents)
    decodes = rewards or config.visibility.samples_every
    decoder = sharding.put(pipeline.vae.params, sharding.replicated(programs.mesh)) if decodes else None
    reward_params = () if pixels is None else pixels.params(decoder)
    frozen = Frozen(pipeline.transformer.params, generator.null_text, reward_params)
    frozen = sharding.put(frozen, programs.frozen_sharding)
    rows = sharding.local_rows(programs.batch_sharding.latent, config.batch_size)
    guard = config.reward.guard
    with (
        owned(workdir) as still_owned,
        Checkpoints(workdir / CHECKPOINTS, config.keep_checkpoints) as checkpoints,
        _Compiler(2) as compiler,
    ):
        resumed, compiled, drawing = bool(checkpoints.latest()), None, []
        compile_step = functools.partial(compiler.submit, programs.step.compile)
        if replay_batch is None and (checkpoints.latest() or 0) < config.steps:
            compiled = compile_step()  # while the rest is made ready
        state = None if resumed else _begin(config, programs, frozen.teacher)
        data = data() if callable(data) else data
        batches = data.batches(config, rows, vars(programs.batch_sharding))
        scorer = None
        if rewards:
            shapes = data.latent_shapes, generator.text_shape
            scorer = Scorer(config, rewards, pixels, generator.frames, decoder, *shapes)
        state = state or _restore(checkpoints, programs, scorer, batches)
        if replay_batch is not None:
            print("\n  ".join(explain(programs, state, frozen, replay_batch)))
            return state
        first = checkpoints.restored
        hacked = None if scorer is None else scorer.monitor.hacked(guard)
        skips = Skips(config, workdir, first)
        logger = make_sample_logger(config, workdir, generator, frozen.teacher, decoder, data.some_captions, rewards)
        if compiled and scorer is not None and scorer.hosts:
            compiler.submit(lambda: scorer.program(programs.scored()).compile())
        if compiled and any(map(logger.due, range(first + 1, config.steps + 1))):  # on a TPU it takes minutes
            found = sample_programs(config, generator)  # after the step, for which all wait
            drawing = [compiler.submit(lambda p=p, step=compiled: wait([step]) and p.compile()) for p in found]
        flops = functools.partial(step_flops, config, generator, pixels, data.has_latents)
        throughput = make_throughput(config, programs.mesh, flops)
        record_config(asked, workdir, resumed)
        with (
            Log(workdir, first, config, throughput) as log,
            Profile(config.visibility.profile_steps, workdir, first) as profile,
            preemption() as noticed,
        ):
            busy, saved = None, time.monotonic()
            for step in range(first, config.steps):
                if hacked:
                    break
                profile.before(step)
                begun = time.perf_counter()
                read = next(batches)
                if busy is None or busy.is_ready():  # the devices had nothing left to do
                    log.waited += time.perf_counter() - begun
                captions, (tokens, kept) = read["caption"].tolist(), ({}, None)
                if scorer is not None:
                    tokens, kept = scorer.inputs(step, captions, read["latent"].shape[1:])
                batch = _global_batch(programs, rows, read["on_device"], tokens, kept)
                if busy is None:
                    log.wait_for(compiled or compile_step())
                state, metrics, samples = programs.step(state, frozen, batch)
                skips.step(step + 1, metrics, dict(zip(rows.tolist(), read["name"].tolist(), strict=True)), batch)
                busy = metrics["student_loss"]
                if scorer is not None:
                    scorer.collect()
                    scorer.submit(samples, read, captions)
                    if (step + 1) % config.log_every == 0:
                        hacked = scorer.monitor.hacked(guard)
                saving = step + 1 == config.steps or (step + 1) % config.checkpoint_every == 0
                if not saving and config.checkpoint_minutes is not None:
                    late = time.monotonic() - saved > 60 * config.checkpoint_minutes
                    saving = gather(bytes([late]))[0] == b"\1"  # the first process decides
                preempted = noticed(step)
                saving = saving or bool(hacked or preempted) or checkpoints.failed()
                if saving and scorer is not None:
                    scorer.collect()
                if saving:
                    skips.check()
                profile.after(step, metrics)
                host, seen = {} if scorer is None else dict(scorer.latest), None
                if skips.total:
                    host["skipped_steps"] = float(skips.total)
                if logger.due(step + 1):
                    wait(drawing)
                    student = state.ema
                    if programs.merge is not None:
                        student = programs.merge(*programs.merge.place(frozen.teacher, student))
                    seen = logger.draw(step + 1, student)
                log.step(step + 1, metrics, host, saving, seen)
                if saving:
                    items = {**to_items(state), "data": batches}
                    if scorer is not None:
                        items["replay"] = scorer.state
                    still_owned()
                    checkpoints.save(step + 1, items, wait=step + 1 == config.steps or bool(hacked or preempted))
                    saved = time.monotonic()
                if preempted and step + 1 < config.steps:
                    raise preempted(f"{preempted.said} after step {step + 1}, which is saved; run it again to go on")
        if hacked and jax.process_index() == 0:
            tqdm.write(f"stopped at step {int(state.step)}: {hacked}")
    return state


class _Compiler(ThreadPoolExecutor):
    """Threads that compile beside other work; what they have not begun at the end is left."""

    def __exit__(self, *_: Any) -> None:
        self.shutdown(wait=False, cancel_futures=True)


def _begin(config: DistillConfig, programs: TrainPrograms, teacher: Params) -> TrainState:
    """The first state, with the student, average and fake score of the run that config.init names, if any."""
    state = programs.init(jax.random.key(config.seed), teacher)
    if config.init is None:
        return state
    workdir = Path(config.init)
    items = _abstract(programs)
    if not read_config(workdir).gan.weight:
        items["fake_score"]["fake_score"].pop(GAN_HEAD, None)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        parts = checkpoints.restore({name: items[name] for name in ("student", "ema", "fake_score")})
    found = {k: v for item in parts.values() for k, v in item.items()}
    return dataclasses.replace(state, **found | {"fake_score": {**state.fake_score, **found["fake_score"]}})


def _abstract(programs: TrainPrograms) -> dict[str, Any]:
    """The items of a checkpoint of the state as shapes on the programs' mesh."""
    return abstract(jax.eval_shape(to_items, programs.state_shapes), as_items(programs.state_sharding))


def _restore(checkpoints: Checkpoints, programs: TrainPrograms, scorer: Scorer | None, batches: Any) -> TrainState:
    like = {**_abstract(programs), "data": batches}
    if scorer is not None:
        like["replay"] = scorer.state
    items = checkpoints.restore(like)
    if scorer is not None:
        scorer.state = items.pop("replay")
    items.pop("data")
    return from_items(items)


def _global_batch(programs: TrainPrograms, rows: np.ndarray, on_device: Any, tokens: Any, kept: Any) -> Batch:
    """The step's global arrays: `tokens` of this process's `rows`, and `kept`, which every process has whole."""
    where, count = programs.batch_sharding, programs.batch_shapes.latent.shape[0]
    placed = {k: sharding.make_global_rows(v, rows, where.tokens[k], count) for k, v in tokens.items()}
    kept = sharding.put(kept, where.reward)
    return Batch(on_device["latent"], on_device["text"], placed, kept, on_device.get("image"))
