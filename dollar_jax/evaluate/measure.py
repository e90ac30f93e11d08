"""Samples and measures every way of drawing a video: teacher, student, and the teacher left undistilled."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dollar_jax import sharding
from dollar_jax.data import shapes
from dollar_jax.data.latents import give_first_frames
from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.folder import variety
from dollar_jax.evaluate.quality import frechet_distance, net_change, temporal_flicker
from dollar_jax.generate import BoundSampler, Generator, Sampler, subset, video_keys
from dollar_jax.program import Program
from dollar_jax.rewards import AnyReward
from dollar_jax.types import Params
from dollar_jax.video import to_uint8

TIMED = 3  # batches at least, for a median


def samplers(generator: Generator, student: Params | None, timesteps: Sequence[float]) -> dict[str, BoundSampler]:
    """The table's rows. `teacher_n`: n guided ODE steps. `undistilled_n`: the teacher in the student's place."""
    teacher, weight = generator.pipeline.params, generator.sampling.guidance_weight
    rows: list[tuple[str, Sampler, Params, int]] = []
    for steps in dict.fromkeys((generator.sampling.num_steps, 4, 1)):
        draw = generator.teacher_sampler(steps, weight)
        rows.append((f"teacher_{steps}", draw, teacher, steps * (2 if weight else 1)))
    for prefix, params, counts in (("student", student, (4, 2, 1)), ("undistilled", teacher, (4, 1))):
        for steps in dict.fromkeys((len(timesteps), *counts)):
            if params is not None and 0 < steps <= len(timesteps):
                draw = generator.student_sampler(subset(timesteps, steps))
                rows.append((f"{prefix}_{steps}", draw, params, steps))
    return {name: BoundSampler(draw, params, n, {"sampler": name, "nfe": n}) for name, draw, params, n in rows}


@dataclasses.dataclass(frozen=True)
class SamplePlan:
    """Which videos are drawn: one per caption, and `samples` more of each of the `diverse` captions."""

    captions: Sequence[shapes.Caption]
    diverse: Sequence[shapes.Caption]
    samples: int
    batch: int
    seed: int

    @property
    def prompts(self) -> list[str]:
        repeated = [caption for caption in self.diverse for _ in range(self.samples)]
        return [str(caption) for caption in (*self.captions, *repeated)]

    def spread(self, count: int) -> np.ndarray:
        return np.linspace(0, len(self.captions) - 1, count).round().astype(int)


def default_plan(seed: int, quick: bool = False) -> SamplePlan:
    """72 captions that cover every colour, shape and direction, and 6 captions drawn 8 times; a third if quick."""
    captions = shapes.covering_captions()
    return SamplePlan(captions[::3] if quick else captions, captions[5::12], 4 if quick else 8, 24, seed)


def measure(
    generator: Generator,
    rows: dict[str, BoundSampler],
    plan: SamplePlan,
    reward: AnyReward | None,
    features: Features | None = None,
    real: np.ndarray | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Per row: alignment, reward, vendi, flicker, nfe, seconds per video, ...; and its videos, uint8 [n t h w 3]. Every
    row draws from the same noise. Times are medians over at least `TIMED` batches, see `draw_in_turns`. `features` and
    `real` are as of `quality`."""
    give_first_frames(generator, [*plan.captions, *plan.diverse], plan.seed)
    batches = -(-len(plan.prompts) // plan.batch)
    drawn, seconds = draw_in_turns(generator, rows, plan.prompts, plan.batch, plan.seed, -(-TIMED // batches))
    metrics = {}
    for name, row in rows.items():
        medians = {f"{stage}_seconds": statistics.median(times) for stage, times in seconds[name].items()}
        metrics[name] = {**quality(drawn[name], plan, reward, features, real), "nfe": row.nfe, **medians}
    return metrics, {name: to_uint8(frames) for name, frames in drawn.items()}


def draw_in_turns(
    generator: Generator, rows: dict[str, BoundSampler], prompts: Sequence[str], batch: int, seed: int, rounds: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, list[float]]]]:
    """Per row the videos of all prompts, floats [n t h w 3] in [0, 1], and seconds per video of each batch: those of
    the `diffusion`, and with text encoder and decoder in `total`. All prompts are drawn `rounds` times. The rows take
    turns batch by batch, so that what else the machine does falls on all alike. All is compiled before."""
    padded = [*prompts, *prompts[: -len(prompts) % batch]]
    parts = [slice(start, start + batch) for start in range(0, len(padded), batch)]
    frames: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    seconds: dict[str, dict[str, list[float]]] = {name: {"diffusion": [], "total": []} for name in rows}
    programs = {way.draw.program(batch) for way in rows.values()}
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(Program.compile, programs), "compiling the samplers", len(programs), unit="program"))
    generator.condition(padded[parts[0]])
    generator.decode(np.zeros((batch, *generator.latent_shape), np.float32))
    params = {id(way.params): way.params for way in rows.values()}
    params = {key: sharding.put(x, sharding.shard(generator.mesh, x)) for key, x in params.items()}
    turns = [(i, part, name) for i, part in enumerate(parts * rounds) for name in rows]
    for i, part, name in tqdm(turns, "sampling in turns", unit="batch"):
        keys = video_keys(seed, len(padded))[part]  # anew: the rows share their noise, which JAX takes for a mistake
        clock: list[float] = []
        condition = _timed(clock, generator.condition, padded[part])
        latent = _timed(clock, rows[name].draw, params[id(rows[name].params)], keys, *condition)
        drawn = _timed(clock, generator.decode, latent)
        if i < len(parts):
            frames[name].append(drawn)
        seconds[name]["diffusion"].append(clock[1] / batch)
        seconds[name]["total"].append(sum(clock) / batch)
    return {name: np.concatenate(found)[: len(prompts)] for name, found in frames.items()}, seconds


def real_features(features: Features, quick: bool = False) -> np.ndarray:
    """Features [n d] of 256 real clips of the default domain's validation split; of a quarter if quick."""
    clips = [shapes.example(shapes.SEED, "validation", i)[0] for i in range(64 if quick else 256)]
    parts = np.split(np.stack(clips), 16)
    bar = tqdm(parts, "features of real clips", unit_scale=len(parts[0]), unit="video")
    return np.concatenate([features.vectors(part) for part in bar])


def quality(
    drawn: np.ndarray, plan: SamplePlan, reward: AnyReward | None, features: Features | None, real: np.ndarray | None
) -> dict[str, float]:
    """The measures of a plan's videos, floats in [0, 1] in the order of its prompts. `real` are the `features` [n d] of
    real clips, which the Fréchet distance is to."""
    count = len(plan.captions)
    groups = to_uint8(drawn[count:]).reshape(len(plan.diverse), plan.samples, *drawn.shape[1:])
    vectors = None if features is None else features.vectors(to_uint8(drawn))
    parts = [None] * len(groups) if vectors is None else np.split(vectors[count:], len(groups))
    within = [variety(group, features, part) for group, part in zip(groups, parts, strict=True)]
    scores = {} if reward is None else {"reward": float(reward(drawn, plan.prompts).mean())}
    if vectors is not None and real is not None:
        # One video per caption, as of the real: those of the few captions drawn often would bias it.
        scores["frechet"] = frechet_distance(vectors[:count], real)
    scores |= {name: float(np.mean([row[name] for row in within])) for name in within[0]}
    scores["vendi_std"] = float(np.std([row["vendi"] for row in within]))
    scores |= {"flicker": float(temporal_flicker(drawn).mean()), "net_change": float(net_change(drawn).mean())}
    return {**shapes.alignment(drawn[:count], list(plan.captions)), **scores}


def _timed(times: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
    return result


def speedups(metrics: dict[str, dict[str, float]], teacher: str) -> dict[str, float]:
    """`speedup_n` in diffusion time of each student against the teacher, by DOLLAR table 8.4."""
    base, students = metrics[teacher]["diffusion_seconds"], [name for name in metrics if name.startswith("student")]
    return {name.replace("student", "speedup"): base / metrics[name]["diffusion_seconds"] for name in students}


def percentages(metrics: dict[str, dict[str, float]], teacher: str) -> None:
    """Adds to each row its `diffusion_percent` and `total_percent` of the teacher's whole inference, table 8.4."""
    whole = metrics[teacher]["total_seconds"]
    for row in metrics.values():
        row.update({f"{stage}_percent": 100 * row[f"{stage}_seconds"] / whole for stage in ("diffusion", "total")})
