"""Measures a run: its student and its teacher, as numbers, as a page and as videos."""

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.config import DistillConfig, RewardTerm
from dollar_jax.data.clip import clip_fps
from dollar_jax.evaluate import measure
from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.files import draw_missing, file_name
from dollar_jax.evaluate.folder import measure_folder
from dollar_jax.evaluate.manifest import describe, made_of, manifest_path, write_manifest
from dollar_jax.files import write_json
from dollar_jax.generate import BoundSampler, Generator, video_keys
from dollar_jax.report.run import write_report
from dollar_jax.rewards import LOADERS, REWARDS, AnyReward, load_rewards, weighted_sum
from dollar_jax.run import read_config, read_history, restore_student
from dollar_jax.video import read_video, side_by_side, write_video

SHOWN = 8  # prompts whose videos are on the page


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Samples and measures the run in `workdir`; writes `out`, and beside it the page and videos of `outputs`. With a
    network's `features` also the diversity and the Fréchet distance they tell of. A run's rewards that are code of its
    own are left out, and named, unless `allow_code`: a run may come from anybody. ValueError for no .json `out`."""

    workdir: Path
    generator: Generator
    out: Path
    features: Features | None = None
    allow_code: bool = False

    def of_captions(self, quick: bool = False, timings: Mapping[str, float] | None = None) -> None:
        """On captions of the default domain. `timings` are the seconds of what came before, by name."""
        begun, (_, folder), config = time.perf_counter(), outputs(self.out), read_config(self.workdir)
        plan = measure.default_plan(config.seed, quick)
        terms, reward = self._reward(config)
        rewards = ", ".join(term.label for term in terms if term.weight)
        rows = self._samplers(config)
        reference = None if self.features is None else measure.real_features(self.features, quick)
        table, videos = measure.measure(self.generator, rows, plan, reward, self.features, reference)
        teacher, chosen = f"teacher_{config.sampling.num_steps}", plan.spread(SHOWN)
        shown = {name: clips[chosen] for name, clips in videos.items()}
        prompts = [str(plan.captions[i]) for i in chosen]
        beside = [teacher, *[name for name in rows if name.startswith("student")][:1]]
        for i, prompt in enumerate(prompts):
            pair = [shown[name][i] for name in beside]
            write_video(folder / f"{prompt.replace(' ', '_')}.mp4", side_by_side(pair), scale=8)
        timings = {**(timings or {}), "sample and measure": time.perf_counter() - begun}
        notes = [] if reward is None else [f"The reward is {rewards}: {reward.meaning}."]
        fps = clip_fps(config.data, self.generator.pipeline.family.fps)
        described = [rows[name] for name in beside]
        made = made_of(plan.prompts, [plan.seed], plan.samples, {}) | describe(config, self.generator, fps, described)
        write_json(manifest_path(folder), made | {"shown": prompts})
        self._write(config, table, timings, made, prompts=prompts, videos=shown, notes=notes)

    def of_prompts(
        self, prompts: Sequence[str], num: int, seed: int, rewards: Mapping[str, AnyReward], batch_size: int | None
    ) -> None:
        """With `num` videos of any prompts, for a teacher of any domain: what a folder's videos can tell. Each sampler
        has a folder of videos beside `out`, of which a second start draws the missing."""
        begun, (_, folder), config = time.perf_counter(), outputs(self.out), read_config(self.workdir)
        generator, (_, reward) = self.generator, self._reward(config)
        rewards = {**rewards, **({} if reward is None else {"reward": reward})}
        teacher = f"teacher_{config.sampling.num_steps}"
        ways = self._samplers(config).items()
        ways = {name: way for name, way in ways if name == teacher or name.startswith("student")}
        fps = clip_fps(config.data, generator.pipeline.family.fps)
        files = [(file_name(prompt, i), prompt, i) for prompt in prompts for i in range(num)]
        batch = generator.samples_at_once(len(prompts))
        few = list(itertools.islice(itertools.cycle(prompts), batch))
        _, seconds = measure.draw_in_turns(generator, ways, few, batch, seed, measure.TIMED)
        table, shown, made = {}, {}, made_of(prompts, [seed], num, {name: prompt for name, prompt, _ in files})
        scale = max(1, 256 // generator.clip[2])  # small videos lose their colours in H.264
        stride = scale * max(1, generator.clip[2] // 256)
        for name, way in ways.items():
            write_manifest(folder / name, made | describe(config, generator, fps, [way]))
            keys = functools.partial(video_keys, seed, num)
            draw_missing(folder / name, files, keys, generator, [(way.draw, way.params)], batch_size, fps, scale)
            measured = measure_folder(folder / name, self.features, rewards=rewards, enlarged=scale)
            medians = {f"{stage}_seconds": statistics.median(times) for stage, times in seconds[name].items()}
            table[name] = {k: v for k, v in measured.items() if isinstance(v, float)} | {"nfe": way.nfe, **medians}
            first = [read_video(folder / name / file_name(prompt, 0)) for prompt in prompts[:SHOWN]]
            shown[name] = np.stack(first)[:, :, ::stride, ::stride]
        timings = {"sample and measure": time.perf_counter() - begun}
        notes = [f"{name.capitalize()}: {reward.meaning}." for name, reward in rewards.items()]
        self._write(config, table, timings, made, prompts=prompts[:SHOWN], videos=shown, notes=notes)

    def _samplers(self, config: DistillConfig) -> dict[str, BoundSampler]:
        student = restore_student(self.workdir, self.generator)
        return measure.samplers(self.generator, student, config.student.timesteps)

    def _reward(self, config: DistillConfig) -> tuple[list[RewardTerm], AnyReward | None]:
        """The run's rewards that may be run, and their weighted sum."""
        terms = [term for term in config.reward.rewards if self.allow_code or term.name in {*REWARDS, *LOADERS}]
        for term in set(config.reward.rewards).difference(terms):
            why = f"{self.workdir} names code as a reward, which is not run without --allow_code"
            print(f"{why}: {term.name}", file=sys.stderr)
        return terms, weighted_sum(terms, load_rewards(terms))

    def _write(self, config: DistillConfig, table: Any, timings: Mapping[str, float], made: Any, **shown: Any) -> None:
        """The JSON and the page of the samplers in `table`; `shown` is the page's."""
        teacher = f"teacher_{config.sampling.num_steps}"
        measure.percentages(table, teacher)
        metrics = {**table, **measure.speedups(table, teacher), "seconds": sum(timings.values()), "timings": timings}
        metrics |= {"manifest": made, **({} if self.features is None else {"features": self.features.name})}
        metrics["config"] = dataclasses.asdict(config)
        write_json(self.out, metrics)
        shown |= {"history": read_history(self.workdir), "config_text": json.dumps(metrics["config"], indent=2)}
        write_report(outputs(self.out)[0], metrics=metrics, timings=timings, **shown)


def outputs(out: Path) -> tuple[Path, Path]:
    """The page and the folder of videos beside a JSON file: report.html and videos/ beside metrics.json, which are
    the run's own, and for any other file those of its name."""
    if out.suffix != ".json":
        raise ValueError(f"--out={out} must end in .json: the page and the videos are named after it")
    if out.name == "metrics.json":
        return out.with_name("report.html"), out.with_name("videos")
    return out.with_suffix(".html"), out.with_name(f"{out.stem}_videos")
