"""What a training run shows of itself: samples beside the teacher's, signs of collapse, its log, a profile."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dollar_jax.config import DistillConfig, RewardConfig, VisibilityConfig
from dollar_jax.data.clip import clip_fps
from dollar_jax.evaluate.quality import pixel_features, vendi_score
from dollar_jax.files import new_file, read_arrays
from dollar_jax.flops import PEAK_TFLOPS, Throughput
from dollar_jax.generate import DATA_PROMPTS, Generator, video_keys
from dollar_jax.objectives import SCORE_BINS
from dollar_jax.optim import learning_rate
from dollar_jax.rewards import AnyReward, Reward, weighted_sum
from dollar_jax.rewards.builtin import vivid
from dollar_jax.rewards.host import HostScorer
from dollar_jax.run import EVENTS, HISTORY, PROFILE, SAMPLES, truncate_history
from dollar_jax.signals import SignalFlag
from dollar_jax.types import Params
from dollar_jax.video import grid, side_by_side, unit_range, write_video

TEACHER = "teacher.npz"  # its samples, in the folder of samples
SHEET_TIMES = 4  # of a video on a picture of samples
# Where TensorBoard shows a metric: the first group whose expression its name begins with.
GROUPS = {"samples": "sample_|collapse", "speed": "seconds|data_wait|videos_per|tflops|mfu|memory"}
GROUPS |= {"learning_rate": "learning_rate", "reward": "reward_|latent_reward|faults"}
GROUPS |= {"latents": "latent_|data_", "loss": ""}
PROFILE_AFTER = 2  # steps: the first compiles


class SampleStats(NamedTuple):
    """Of a set of samples: the Vendi score of their pixels within the prompts, and their latents' statistics."""

    vendi: float
    mean: float
    std: float
    saturation: float = 0.0


class Shown(NamedTuple):
    """Samples to look at, prompt by prompt: frames uint8 [n t h w 3], mean and mean square [n] of their latents."""

    frames: Any
    mean: Any
    square: Any

    def stats(self, prompts: int) -> SampleStats:
        groups = pixel_features(self.frames.reshape(prompts, -1, *self.frames.shape[1:]))
        vendi = float(np.mean([vendi_score(group) for group in groups]))
        mean, square = (float(np.mean(x, dtype=np.float64)) for x in (self.mean, self.square))
        std = math.sqrt(max(square - mean**2, 0)) if np.isfinite(square) else math.nan
        return SampleStats(vendi, mean, std, float(vivid(unit_range(self.frames), ()).mean()))


Draw = Callable[..., Sequence[Shown]]
Look = tuple[dict[str, float], np.ndarray, list[str]]  # at samples: scalars, a picture uint8 [h w 3] and warnings
Looked = Future[Look] | None


def collapse(config: VisibilityConfig, student: SampleStats, teacher: SampleStats) -> list[str]:
    """One sentence for each way in which the student's samples leave the teacher's range; empty if none."""
    if not all(map(np.isfinite, student)):
        return ["the student's samples are not finite"]
    found = []
    # Of the videos beyond the first: one video alone has a score of 1.
    if (student.vendi - 1) / max(teacher.vendi - 1, 1e-9) < config.least_diversity:
        found.append(f"diversity is down to a Vendi score of {student.vendi:.2f}, the teacher's is {teacher.vendi:.2f}")
    ratio, (low, high) = student.std / max(teacher.std, 1e-9), config.std_range
    if not low <= ratio <= high:
        found.append(f"the latents' deviation is {student.std:.3g}, the teacher's {teacher.std:.3g}")
    if student.saturation > config.most_saturation * max(teacher.saturation, 0.05):
        found.append(f"{student.saturation:.0%} of coloured pixels are vivid, the teacher's {teacher.saturation:.0%}")
    if abs(student.mean - teacher.mean) > config.most_drift * teacher.std:
        found.append(f"the latents' mean is {student.mean:.3g}, the teacher's {teacher.mean:.3g}")
    return found


class SampleLogger:
    """Every `samples_every` steps: the student's samples beside the teacher's, and whether they collapse.
    `student(params)` and `teacher()` dispatch, on all processes, what draws `count` samples from the same noise each
    time, in parts; process 0 looks at what comes of it in the background of the next steps. The teacher's are drawn
    when they are first needed, and kept in `samples/`, by `key`, for a resumed run. `scorer` scores both as shown."""

    def __init__(
        self,
        config: VisibilityConfig,
        workdir: Path,
        student: Draw,
        teacher: Draw,
        prompts: Sequence[str],
        key: str,
        fps: float,
        scorer: HostScorer | None = None,
    ):
        self.config, self.folder, self._scorer, self._fps = config, workdir / SAMPLES, scorer, fps
        self._student, self._teacher, self._prompts, self._key = student, teacher, prompts, key
        self._background = ThreadPoolExecutor(1)
        self._reference, self._reference_reward = self._kept(), {}
        found = np.array(self._reference is not None)
        self._known = bool(multihost_utils.broadcast_one_to_all(found)) if jax.process_count() > 1 else bool(found)

    def due(self, step: int) -> bool:
        return self.config.samples_every > 0 and step % self.config.samples_every == 0

    def draw(self, step: int, params: Params) -> Looked:
        """What becomes of the samples; None but on process 0. It leaves a video in `samples/`, a row per prompt,
        teacher left and student right, and warnings on stderr."""
        ours, theirs = self._student(params), None if self._known else self._teacher()
        self._known = True
        return None if jax.process_index() else self._background.submit(self._look, step, ours, theirs)

    def _look(self, step: int, student: Sequence[Shown], teacher: Sequence[Shown] | None) -> Look:
        if teacher is not None:
            self._reference = self._on_host(teacher)
            with new_file(self.folder / TEACHER) as draft, draft.open("wb") as file:
                np.savez(file, key=self._key, **self._reference._asdict())
        ours, theirs = self._on_host(student), self._reference
        assert theirs is not None
        a, b = ours.stats(len(self._prompts)), theirs.stats(len(self._prompts))
        warnings = collapse(self.config, a, b)
        pairs = np.stack([side_by_side(pair) for pair in zip(theirs.frames, ours.frames, strict=True)])
        video = grid(pairs, self.config.videos, gap=6)
        write_video(self.folder / f"step_{step:06d}.mp4", video, self._fps, max(1, 96 // ours.frames.shape[2]))
        for warning in warnings:
            tqdm.write(f"warning: step {step}: {warning}: the student may be collapsing", file=sys.stderr)
        scalars = {"sample_vendi": a.vendi, "sample_vendi_teacher": b.vendi, "sample_mean_drift": a.mean - b.mean}
        scalars |= {"sample_std_ratio": a.std / max(b.std, 1e-9), "collapse": float(len(warnings))}
        scalars |= {"sample_saturation": a.saturation, "sample_saturation_teacher": b.saturation}
        # The teacher's is asked for again only while there is none.
        self._reference_reward = self._reference_reward or self._rewards("sample_reward_teacher", theirs)
        scalars |= self._rewards("sample_reward", ours) | self._reference_reward
        # Each prompt's first pair at a few times: a row per prompt.
        times = np.linspace(0, pairs.shape[1] - 1, SHEET_TIMES).round().astype(int)
        tiles = pairs[:: self.config.videos, times]
        return scalars, grid(tiles.reshape(-1, 1, *tiles.shape[2:]), SHEET_TIMES, gap=6)[0], warnings

    def _rewards(self, name: str, shown: Shown) -> dict[str, float]:
        """The mean weighted sum of raw rewards, of those videos that got one; nothing where none did."""
        if self._scorer is None:
            return {}
        self._scorer.submit(unit_range(shown.frames), np.repeat(self._prompts, self.config.videos).tolist())
        rewards = self._scorer.collect()
        return {name: float(np.nanmean(rewards))} if np.isfinite(rewards).any() else {}

    def _on_host(self, parts: Sequence[Shown]) -> Shown:
        count = len(self._prompts) * self.config.videos  # the last part may be filled up
        return Shown(*(np.concatenate([np.asarray(x) for x in field])[:count] for field in zip(*parts, strict=True)))

    def _kept(self) -> Shown | None:
        path = self.folder / TEACHER
        if path.is_file() and jax.process_index() == 0:
            stored = read_arrays(path)
            if str(stored["key"]) == self._key:
                return Shown(*(stored[name] for name in Shown._fields))
        return None


def make_sample_logger(
    config: DistillConfig,
    workdir: Path,
    generator: Generator,
    teacher: Params,
    decoder: Params,
    captions: Any,
    rewards: Sequence[AnyReward],
) -> SampleLogger:
    """The sample logger of a run: fixed prompts, fixed noise, the student's own timesteps, the teacher's own steps. The
    prompts are the configuration's, or `DATA_PROMPTS` of the data's `captions`, with their first frames. `rewards` are
    those of the configuration's terms."""
    c, sampling = config.visibility, config.sampling
    given = captions(DATA_PROMPTS) if c.samples_every and not c.prompts else {}
    generator.given.update(given)
    prompts = (c.prompts or tuple(given)) if c.samples_every else ()
    total = len(prompts) * c.videos
    batch, shrink = generator.samples_at_once(total), generator.shrink(2 * total)
    condition = jax.tree.map(lambda x: x.repeat(c.videos, 0), generator.condition(prompts) if prompts else ())

    def draw(sampler: Any, params: Params) -> list[Shown]:
        parts = []
        for start in range(0, total, batch):
            index = np.minimum(np.arange(start, start + batch), total - 1)
            given = jax.tree.map(lambda x, index=index: x[index], condition)
            latent = sampler(params, video_keys(c.seed, total)[index], *given)
            show = generator.show_program(latent.shape, shrink)
            parts.append(Shown(*show(*show.place(decoder, latent))))
        return parts

    made = [config.teacher, prompts, c.videos, c.seed, dataclasses.asdict(sampling), generator.clip, shrink]
    student = functools.partial(draw, generator.student_sampler(config.student.timesteps))
    own = generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight)
    fps, scorer = clip_fps(config.data, generator.pipeline.family.fps), _sample_scorer(config.reward, rewards)
    return SampleLogger(c, workdir, student, lambda: draw(own, teacher), prompts, json.dumps(made), fps, scorer)


def _sample_scorer(c: RewardConfig, rewards: Sequence[AnyReward]) -> HostScorer | None:
    """What scores samples by the weighted sum of raw rewards, JAX ones on the host's CPU: the devices are busy."""
    if (total := weighted_sum(c.rewards, rewards)) is None:
        return None

    def on_cpu(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return total(frames, prompts)

    # What a reward does wrong is said of the training's own samples.
    return HostScorer("of samples", Reward(on_cpu, total.meaning), c.timeout, 0, quiet=True)


class Log:
    """history.jsonl, TensorBoard events and a progress bar; written by process 0 only. Metrics are fetched one logging
    interval late, so that logging does not wait for the devices; but at a checkpoint at once, before the state."""

    def __init__(self, workdir: Path, first: int, config: DistillConfig, throughput: Throughput):
        self.config, self.throughput, self._samples = config, throughput, workdir / SAMPLES
        self.main = jax.process_index() == 0
        self.bar = tqdm(total=config.steps, initial=first, desc="distilling", disable=not self.main, unit="step")
        self._held: tuple[int, Mapping[str, jax.Array], dict[str, float], Looked, float] | None = None
        self._start, self._begun = time.perf_counter(), True
        self._clock = (first, self._start)
        self.waited = 0.0  # seconds that the devices stood idle for want of a batch
        fake = config.fake_score
        self.optimisers = {"student": (config.student.optimiser, 1), "fake_score": (fake.optimiser, fake.updates)}
        if self.main:
            self.wandb = start_wandb(config, workdir)  # may refuse, before a file is open
            truncate_history(workdir, first)
            self.file = (workdir / HISTORY).open("a")
            self.events = event_writer(workdir / EVENTS, first)
            text = json.dumps(dataclasses.asdict(config), indent=4, default=str)
            self.events.add_text("config", "    " + text.replace("\n", "\n    "), first + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._write()
        finally:
            self.bar.close()
            if self.main:
                self.file.close()
                self.events.close()
                if self.wandb is not None:
                    self.wandb.finish()

    def wait_for(self, compiled: Future[Any]) -> None:
        """Shows on the bar that it compiles and for how long, and keeps that out of its estimate; raises as it does."""
        begun = time.perf_counter()
        while not compiled.done():
            self.bar.set_description_str(f"compiling, {time.perf_counter() - begun:.0f} s")
            wait([compiled], 1)
        self.bar.unpause()
        self.bar.set_description_str("distilling")
        compiled.result()

    def step(self, step: int, metrics: Mapping[str, jax.Array], host: dict, now: bool, samples: Looked = None) -> None:
        self.bar.update()
        if self._begun and self.main:
            loss, seconds = float(metrics["student_loss"]), time.perf_counter() - self._clock[1]
            tqdm.write(f"step {step}: loss {loss:.4g}, after {seconds:.0f} s, compiling among them")
        self._begun = False
        # Process 0 alone writes, so the others need not know when.
        late = time.perf_counter() - (self._held or self._clock)[-1] > 60 * self.config.log_minutes
        if now or late or samples is not None or step % self.config.log_every == 0:
            self._write()
            self._held = (step, metrics, dict(host), samples, time.perf_counter())
        if now:
            self._write()

    def _write(self) -> None:
        if self._held is None:
            return
        (step, metrics, host, samples, now), (before, then) = self._held, self._clock
        self._held, self._clock = None, (step, now)
        values = {name: float(value) for name, value in metrics.items()}
        waited, self.waited = {"data_wait": min(self.waited / max(now - then, 1e-9), 1.0)}, 0.0
        seconds = (now - then) / max(step - before, 1)
        # Of a step that was skipped there is nothing to learn: see `skips`.
        values = (readable(values) if all(map(math.isfinite, values.values())) else {}) | host
        values |= {"seconds_per_step": seconds, **waited, **self.throughput(seconds)}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the others are busy
            for name, (optimiser, updates) in self.optimisers.items():
                rate = learning_rate(optimiser, self.config.steps * updates)
                values[f"learning_rate_{name}"] = float(np.asarray(rate((step - 1) * updates)))
        if memory := jax.local_devices()[0].memory_stats():
            values["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        if samples is not None:
            scalars, sheet, warnings = samples.result()
            values |= scalars
            self.events.add_image("samples/teacher_left_student_right", sheet, step, dataformats="HWC")
            for warning in warnings:
                self.events.add_text("warning", warning, step)
            if self.wandb is not None:
                from wandb import Video  # pyright: ignore[reportMissingImports]

                video = Video(str(self._samples / f"step_{step:06d}.mp4"), format="mp4")
                seen = {"samples/teacher_left_student_right": video, "samples/warnings": len(warnings)}
                self.wandb.log({**seen, "step": step})
        if self.main:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            grouped = {f"{next(g for g, p in GROUPS.items() if re.match(p, k))}/{k}": v for k, v in values.items()}
            for name, value in grouped.items():
                self.events.add_scalar(name, value, step)
            if self.wandb is not None:  # with its step as a value: samples come before the scalars of earlier steps
                self.wandb.log({**grouped, "step": step})
            shown = {"loss": values.get("student_loss", math.nan)}
            shown |= {k[7:]: host[k] for k in ("reward_generated", "reward_real") if k in host}
            shown["hours_to_go"] = seconds * (self.config.steps - step) / 3600
            if price := self.config.visibility.device_hour_price:
                price *= jax.device_count()
                shown |= {"cost": price * (now - self._start) / 3600, "cost_to_go": price * shown["hours_to_go"]}
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})


def event_writer(folder: Path, first: int) -> Any:
    """A writer of TensorBoard events after step `first`, without torch, which tensorboardX would import for seconds."""
    sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if sys.modules["torch"] is None:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=first + 1)


def start_wandb(config: DistillConfig, workdir: Path) -> Any:
    """A Weights & Biases run where WANDB_PROJECT names its project, else None; one workdir is one run there too."""
    if not (project := os.environ.get("WANDB_PROJECT")):
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("WANDB_PROJECT is set, but wandb is not there: pip install wandb, or unset it") from error
    name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, id=name, resume="allow", dir=str(workdir), config=dataclasses.asdict(config))


class Profile(SignalFlag):
    """XProf traces in `workdir/profile`: of `steps` steps after the first ones, and of `ON_SIGNAL` at each USR1."""

    ON_SIGNAL = 3

    def __init__(self, steps: int, workdir: Path, first: int):
        self.start, self.steps, self.folder = first + PROFILE_AFTER, steps, workdir / PROFILE
        self._stop: int | None = None  # the step before which the running trace ends
        super().__init__(signal.SIGUSR1)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.close()

    def before(self, step: int) -> None:
        count = self.ON_SIGNAL if self.take() else self.steps if step == self.start else 0
        if count and self._stop is None:
            jax.profiler.start_trace(str(self.folder))
            self._stop = step + count

    def after(self, step: int, result: Any) -> None:
        if self._stop is not None and step + 1 >= self._stop:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._stop is not None:
            jax.profiler.stop_trace()
            self._stop = None


def make_throughput(config: DistillConfig, mesh: Mesh, flops: Callable[[], float]) -> Throughput:
    """Of steps of so many model FLOPs, which are counted only where the devices' peak is known."""
    devices = mesh.devices.ravel()
    if (peak := config.visibility.peak_tflops or PEAK_TFLOPS.get(devices[0].device_kind)) is None:
        return Throughput(config.batch_size, None, None)
    return Throughput(config.batch_size, flops(), peak * 1e12 * len(devices))


def readable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The step's metrics as they are looked at. `fake_score_bin_k` is the mean loss at each quarter of the timesteps
    from clean to noise, left out without a sample; `latent_mean_drift`, `latent_std_ratio`: generated against data."""
    values = dict(metrics)
    for k in range(SCORE_BINS):
        if (name := f"fake_score_sum_{k}") in values:
            total, count = values.pop(name), values.pop(f"fake_score_count_{k}")
            if count:
                values[f"fake_score_bin_{k}"] = total / count
    if "data_std" in values:
        values["latent_mean_drift"] = values["latent_mean"] - values["data_mean"]
        if values["data_std"]:
            values["latent_std_ratio"] = values["latent_std"] / values["data_std"]
    return values
