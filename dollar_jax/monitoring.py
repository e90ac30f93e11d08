"""What a training run shows of itself: samples beside the teacher's, signs of collapse, its log, a profile.

Losses of distillation say little about quality; these do. Nothing here changes the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dollar_jax.config import DistillConfig, VisibilityConfig
from dollar_jax.evaluate.vendi import pixel_features, vendi_per_prompt
from dollar_jax.flops import PEAK_TFLOPS, Throughput
from dollar_jax.generate import Generator, video_keys
from dollar_jax.objectives import SCORE_BINS
from dollar_jax.run import EVENTS, HISTORY, PROFILE, SAMPLES, truncate_history
from dollar_jax.signals import SignalFlag
from dollar_jax.types import Params
from dollar_jax.video import encode_gif, grid, side_by_side, to_uint8, write_video

# Parameters → latents [prompts × videos, t, h, w, c], from the same noise each time.
Draw = Callable[[Params], np.ndarray]
PROFILE_AFTER = 2  # steps: the first compiles


@dataclasses.dataclass(frozen=True)
class SampleStats:
    """A set of samples: Vendi score of their pixels within the prompts, and their latents' statistics."""

    vendi: float
    mean: float
    std: float


def sample_stats(latent: np.ndarray, frames: np.ndarray, prompts: int) -> SampleStats:
    """Of latents [n t h w c] and their frames, prompt by prompt with equally many videos each."""
    groups = frames.reshape(prompts, -1, *frames.shape[1:])
    vendi, _ = vendi_per_prompt(pixel_features(groups))
    return SampleStats(vendi, float(latent.mean()), float(latent.std()))


def collapse(config: VisibilityConfig, student: SampleStats, teacher: SampleStats) -> list[str]:
    """One sentence for each way in which the student's samples leave the teacher's range; empty if none."""
    found = []
    if not all(map(np.isfinite, dataclasses.astuple(student))):
        return ["the student's samples are not finite"]
    # Of the videos beyond the first: one video alone has a score of 1.
    kept = (student.vendi - 1) / max(teacher.vendi - 1, 1e-9)
    if kept < config.least_diversity:
        found.append(f"diversity is down to a Vendi score of {student.vendi:.2f}, the teacher's is {teacher.vendi:.2f}")
    ratio, (low, high) = student.std / max(teacher.std, 1e-9), config.std_range
    if not low <= ratio <= high:
        found.append(f"the latents' deviation is {student.std:.3g}, the teacher's {teacher.std:.3g}")
    if abs(student.mean - teacher.mean) > config.most_drift * teacher.std:
        found.append(f"the latents' mean is {student.mean:.3g}, the teacher's {teacher.mean:.3g}")
    return found


class SampleLogger:
    """Every `samples_every` steps: the student's samples beside the teacher's, and whether they collapse.

    The teacher's are drawn once, when they are first needed. All processes take part in the sampling.
    """

    def __init__(
        self,
        config: VisibilityConfig,
        workdir: Path,
        student: Draw,
        teacher: Callable[[], np.ndarray],
        decode: Callable[[np.ndarray], np.ndarray],
    ):
        self.config, self.folder = config, workdir / SAMPLES
        self._student, self._teacher, self._decode = student, teacher, decode
        self._reference: tuple[SampleStats, np.ndarray] | None = None

    def due(self, step: int) -> bool:
        return self.config.samples_every > 0 and step % self.config.samples_every == 0

    def draw(self, step: int, params: Params) -> tuple[dict[str, float], np.ndarray, list[str]]:
        """Scalars, a video uint8 [t h w 3] (a row per prompt; teacher left, student right), and warnings.

        Process 0 leaves the video in `samples/` too, and the warnings on stderr.
        """
        if self._reference is None:
            self._reference = self._seen(self._teacher())
        teacher, theirs = self._reference
        student, ours = self._seen(self._student(params))
        warnings = collapse(self.config, student, teacher)
        pairs = [side_by_side(pair) for pair in zip(theirs, ours, strict=True)]
        video = grid(np.stack(pairs), self.config.videos, gap=6)
        if jax.process_index() == 0:
            write_video(self.folder / f"step_{step:06d}.mp4", video, scale=max(1, 96 // theirs.shape[2]))
            for warning in warnings:
                tqdm.write(f"warning: step {step}: {warning}: the student may be collapsing", file=sys.stderr)
        scalars = {
            "sample_vendi": student.vendi,
            "sample_vendi_teacher": teacher.vendi,
            "sample_mean_drift": student.mean - teacher.mean,
            "sample_std_ratio": student.std / max(teacher.std, 1e-9),
            "collapse": float(len(warnings)),
        }
        return scalars, video, warnings

    def _seen(self, latent: np.ndarray) -> tuple[SampleStats, np.ndarray]:
        frames = to_uint8(np.nan_to_num(self._decode(latent)))
        return sample_stats(latent, frames, len(self.config.prompts)), frames


def make_sample_logger(config: DistillConfig, workdir: Path, generator: Generator, teacher: Params) -> SampleLogger:
    """The sample logger of a run: fixed prompts, fixed noise, the student's own timesteps, the teacher's own steps."""
    c, sampling = config.visibility, config.sampling
    prompts = [prompt for prompt in c.prompts for _ in range(c.videos)]

    def draw(sampler: Any, params: Params) -> np.ndarray:
        latent = sampler(params, video_keys(c.seed, len(prompts)), generator.text(prompts))
        if latent.is_fully_addressable:
            return np.asarray(latent)
        return np.asarray(multihost_utils.process_allgather(latent, tiled=True))

    return SampleLogger(
        c,
        workdir,
        lambda params: draw(generator.student_sampler(config.student.timesteps), params),
        lambda: draw(generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight), teacher),
        generator.decode,
    )


class Log:
    """history.jsonl, TensorBoard events and a progress bar; written by process 0 only.

    Metrics are fetched one logging interval late, so that logging does not wait for the devices; but
    at a checkpoint at once, so that no state is saved whose metrics are not on disk.
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
            truncate_history(workdir, first)
            self.file = self.path.open("a")
            self.events = event_writer(workdir / EVENTS, first)
            self.wandb = start_wandb(config, workdir)

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
                if self.wandb is not None:
                    self.wandb.finish()

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Shows on the bar what it waits for, with the seconds so far, and keeps them out of its estimate."""
        begun, done = time.perf_counter(), threading.Event()

        def tell() -> None:
            while not done.wait(1):
                self.bar.set_description_str(f"{doing}, {time.perf_counter() - begun:.0f} s")

        teller = threading.Thread(target=tell, daemon=True)
        if doing:
            self.bar.set_description_str(doing)
            teller.start()
        try:
            yield
        finally:
            done.set()
            if doing:
                teller.join()
                self.bar.unpause()
                self.bar.set_description_str("distilling")

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
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        data, (_, height, width, _) = encode_gif(video), video.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        value = Summary.Value(tag="teacher_left_student_right", image=image)
        self.events.file_writer.add_summary(  # pyright: ignore[reportOptionalMemberAccess]
            Summary(value=[value]), step
        )
        for warning in warnings:
            self.events.add_text("warning", warning, step)
        if self.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            shown = wandb.Video(video.transpose(0, 3, 1, 2), fps=8, format="mp4")
            self.wandb.log({"teacher_left_student_right": shown, "warnings": len(warnings), "step": step})

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
        seconds = (now - then) / max(step - before, 1)
        # Of a step that was skipped there is nothing to learn: see `skips`.
        values = (readable(values) if all(map(math.isfinite, values.values())) else {}) | host
        values |= {"seconds_per_step": seconds, **waited, **self.throughput(seconds)}
        if self.main:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            if self.wandb is not None:  # with its step as a value: samples come before the scalars of earlier steps
                self.wandb.log({**values, "step": step})
            shown = {"loss": values.get("student_loss", math.nan)}
            shown |= {k[7:]: host[k] for k in ("reward_generated", "reward_real") if k in host}
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


class Profile:
    """XProf traces of this process in `workdir/profile`: of `steps` steps once the first ones have run, and of
    `ON_SIGNAL` steps whenever the signal USR1 asks for them.
    """

    ON_SIGNAL = 3

    def __init__(self, steps: int, workdir: Path, first: int):
        self.start, self.steps = first + PROFILE_AFTER, steps
        self.folder = workdir / PROFILE
        self._stop: int | None = None  # the step before which the running trace ends
        self._asked = SignalFlag(signal.SIGUSR1)

    def __enter__(self) -> Profile:
        self._asked.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._asked.__exit__(*error)
        self.close()

    def before(self, step: int) -> None:
        count = self.steps if step == self.start else 0
        if self._asked.take():
            count = self.ON_SIGNAL
        if count and self._stop is None:
            jax.profiler.start_trace(str(self.folder))
            self._stop = step + count

    def after(self, step: int, result: Any) -> None:
        """`step` has been dispatched, and `result` is what it gives."""
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
    peak = config.visibility.peak_tflops or PEAK_TFLOPS.get(devices[0].device_kind)
    if peak is None:
        return Throughput(config.batch_size, None, None)
    return Throughput(config.batch_size, flops(), peak * 1e12 * len(devices))


def readable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The step's metrics as they are looked at.

    `fake_score_bin_k` is the mean loss at each quarter of the timesteps from clean to noise, in place of the
    sums and counts it is made of; a quarter without a sample is left out. `latent_mean_drift` and
    `latent_std_ratio` set the generated latents against the data's.
    """
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
