"""`dollar demo`: distils the default teacher, samples, measures, and leaves a page to look at."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.config import DistillConfig
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.measure import default_plan, measure, network_measures, percentages, samplers, speedups
from dollar_jax.evaluate.metrics import write_metrics
from dollar_jax.generate import Generator, make_generator
from dollar_jax.report.run import write_report
from dollar_jax.rewards import load_rewards, weighted_sum
from dollar_jax.run import read_config, read_history, restore_student
from dollar_jax.sharding import make_mesh
from dollar_jax.train import train
from dollar_jax.video import side_by_side, write_video

SHOWN = 8  # prompts whose videos are on the page


def demo(config: DistillConfig, workdir: Path, quick: bool = False) -> Path:
    """Runs the whole; returns the page. Again in the same workdir it resumes, or only measures again."""
    start = time.perf_counter()
    timings = {}

    def lap(name: str) -> None:
        timings[name] = time.perf_counter() - start - sum(timings.values())

    generator = make_generator(config, mesh=make_mesh(config.mesh))
    data = load_data(config, generator, workdir)
    lap("load and encode data")
    train(config, workdir, generator, data)
    lap("distil")
    evaluate(workdir, generator, workdir / "metrics.json", quick, timings, start)
    return workdir / "report.html"


def evaluate(
    workdir: Path,
    generator: Generator,
    out: Path,
    quick: bool = False,
    timings: dict[str, float] | None = None,
    start: float | None = None,
    features: Features | None = None,
) -> dict[str, Any]:
    """Samples and measures the run in `workdir`: `out` (JSON), report.html and videos/ beside it.

    With a network's `features` also the diversity and the Fréchet distance they tell of.
    """
    config = read_config(workdir)
    begun = time.perf_counter()
    plan = default_plan(config.seed, quick)
    reward = weighted_sum(config.reward.rewards, load_rewards(config.reward.rewards))
    rewards = ", ".join(term.label for term in config.reward.rewards if term.weight)
    rows = samplers(generator, restore_student(workdir, generator), config.student.timesteps)
    network = None if features is None else network_measures(features, quick)
    table, videos = measure(generator, rows, plan, reward, network)
    teacher = f"teacher_{config.sampling.num_steps}"
    percentages(table, teacher)
    timings = {**(timings or {}), "sample and measure": time.perf_counter() - begun}
    metrics: dict[str, Any] = {
        **table,
        **speedups(table, teacher),
        "seconds": time.perf_counter() - (begun if start is None else start),
        "timings": timings,
        **({} if features is None else {"features": features.name}),
        "config": dataclasses.asdict(config),
    }
    write_metrics(out, metrics)

    chosen = np.linspace(0, len(plan.captions) - 1, SHOWN).round().astype(int)
    shown = {name: clips[chosen] for name, clips in videos.items()}
    prompts = [str(plan.captions[i]) for i in chosen]
    folder = out.parent / "videos"
    for i, prompt in enumerate(prompts):
        pair = [shown[name][i] for name in (teacher, "student_4") if name in shown]
        write_video(folder / f"{prompt.replace(' ', '_')}.mp4", side_by_side(pair), scale=8)
    write_report(
        out.parent / "report.html",
        metrics=metrics,
        prompts=prompts,
        videos=shown,
        history=read_history(workdir),
        timings=timings,
        config_text=json.dumps(metrics["config"], indent=2),
        notes=[] if reward is None else [f"The reward is {rewards}: {reward.meaning}."],
    )
    return metrics
