"""What a training run shows of itself: samples beside the teacher's, signs of collapse, throughput, a profile.

Losses of distillation say little about quality; these do. Nothing here changes the training.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dollar_jax.config import DistillConfig, VisibilityConfig
from dollar_jax.evaluate.vendi import pixel_features, vendi_per_prompt
from dollar_jax.generate import Generator, video_keys
from dollar_jax.objectives import SCORE_BINS, Frozen
from dollar_jax.program import Program
from dollar_jax.signals import Heard
from dollar_jax.types import Params
from dollar_jax.video import grid, side_by_side, to_uint8, write_video

# Parameters → latents [prompts × videos, t, h, w, c], from the same noise each time.
Draw = Callable[[Params], np.ndarray]
PROFILE_AFTER = 2  # steps: the first compiles

# Dense bf16 TFLOP/s per device, by JAX's name of the device, as its vendor states them.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}


@dataclasses.dataclass(frozen=True)
class Look:
    """A set of samples: Vendi score of their pixels within the prompts, and their latents' statistics."""

    vendi: float
    mean: float
    std: float


def look(latent: np.ndarray, frames: np.ndarray, prompts: int) -> Look:
    """Of latents [n t h w c] and their frames, prompt by prompt with equally many videos each."""
    groups = frames.reshape(prompts, -1, *frames.shape[1:])
    vendi, _ = vendi_per_prompt(pixel_features(groups))
    return Look(vendi, float(latent.mean()), float(latent.std()))


def collapse(config: VisibilityConfig, student: Look, teacher: Look) -> list[str]:
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


class Watch:
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
        self.config, self.folder = config, workdir / "samples"
        self._student, self._teacher, self._decode = student, teacher, decode
        self._reference: tuple[Look, np.ndarray] | None = None

    def due(self, step: int) -> bool:
        return self.config.samples_every > 0 and step % self.config.samples_every == 0

    def samples(self, step: int, params: Params) -> tuple[dict[str, float], np.ndarray, list[str]]:
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

    def _seen(self, latent: np.ndarray) -> tuple[Look, np.ndarray]:
        frames = to_uint8(np.nan_to_num(self._decode(latent)))
        return look(latent, frames, len(self.config.prompts)), frames


def make_watch(config: DistillConfig, workdir: Path, generator: Generator, teacher: Params) -> Watch:
    """The watch of a run: fixed prompts, fixed noise, the student's own timesteps, the teacher's own steps."""
    c, sampling = config.visibility, config.sampling
    prompts = [prompt for prompt in c.prompts for _ in range(c.videos)]

    def draw(sampler: Any, params: Params) -> np.ndarray:
        latent = sampler(params, video_keys(c.seed, len(prompts)), generator.text(prompts))
        if latent.is_fully_addressable:
            return np.asarray(latent)
        return np.asarray(multihost_utils.process_allgather(latent, tiled=True))

    return Watch(
        c,
        workdir,
        lambda params: draw(generator.student_sampler(config.student.timesteps), params),
        lambda: draw(generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight), teacher),
        generator.decode,
    )


class Profile:
    """XProf traces of this process in `workdir/profile`: of `steps` steps once the first ones have run, and of
    `ON_SIGNAL` steps whenever the signal USR1 asks for them.
    """

    ON_SIGNAL = 3

    def __init__(self, steps: int, workdir: Path, first: int):
        self.start, self.steps = first + PROFILE_AFTER, steps
        self.folder = workdir / "profile"
        self._stop: int | None = None  # the step before which the running trace ends
        self._asked = Heard(signal.SIGUSR1)

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


@dataclasses.dataclass(frozen=True)
class Throughput:
    """`flops` of one step on all devices together; None where they, or the devices' peak, are not known."""

    batch_size: int
    flops: float | None
    peak: float | None  # FLOP/s of all devices together

    def __call__(self, seconds_per_step: float) -> dict[str, float]:
        rates = {"videos_per_second": self.batch_size / seconds_per_step}
        if self.flops and self.peak:
            rates["tflops_per_second"] = self.flops / seconds_per_step / 1e12
            rates["mfu"] = self.flops / seconds_per_step / self.peak
        return rates


def make_throughput(config: DistillConfig, program: Program, reward: Params = ()) -> Throughput:
    """MFU counts every multiplication of the step as written, those of recomputation too.

    `reward` are the parameters of JAX rewards and their decoder, `Frozen.reward`.
    """
    devices = program.mesh.devices.ravel()
    peak = config.visibility.peak_tflops or PEAK_TFLOPS.get(devices[0].device_kind)
    if peak is None:
        return Throughput(config.batch_size, None, None)
    frozen = Frozen(
        program.state_shapes.student,
        jax.ShapeDtypeStruct((1, *program.batch_shapes["text"].shape[1:]), "float32"),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), reward),
    )
    jaxpr = jax.make_jaxpr(program.step)(program.state_shapes, frozen, program.batch_shapes)
    return Throughput(config.batch_size, count_flops(jaxpr.jaxpr), peak * 1e12 * len(devices))


def count_flops(jaxpr: Any) -> float:
    """Twice the multiplications of a jaxpr's matrix products and convolutions; a scan's body by its length.

    Of the branches of a condition the dearest counts; a while loop's body counts once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted], dtype=float)
            total += 2 * out.size * depth
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec
            total += 2 * out.size * kernel.size / kernel.shape[spec[0]]
        elif eqn.primitive.name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            inner = [leaf for value in eqn.params.values() for leaf in jax.tree.leaves(value, is_leaf=_is_jaxpr)]
            total += times * sum(count_flops(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x))
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


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
