"""Measures a run: its student and its teacher, as numbers, as a page and as videos."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.measure import default_plan, measure, network_measures, percentages, samplers, speedups
from dollar_jax.evaluate.metrics import write_metrics
from dollar_jax.generate import Generator
from dollar_jax.report.run import write_report
from dollar_jax.rewards import LOADERS, REWARDS, load_rewards, weighted_sum
from dollar_jax.run import read_config, read_history, restore_student
from dollar_jax.video import side_by_side, write_video

SHOWN = 8  # prompts whose videos are on the page


def evaluate(
    workdir: Path,
    generator: Generator,
    out: Path,
    quick: bool = False,
    timings: Mapping[str, float] | None = None,
    features: Features | None = None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Samples and measures the run in `workdir`; writes `out`, and beside it the page and videos of `outputs`.

    `timings` are the seconds of what came before, by name. With a network's `features` also the diversity and the
    Fréchet distance they tell of. A run's rewards that are code of its own are left out, and named, unless
    `allow_code`: a run folder may come from anybody. Raises ValueError when `out` does not end in .json.
    """
    begun = time.perf_counter()
    page, folder = outputs(out)
    config = read_config(workdir)
    plan = default_plan(config.seed, quick)
    terms = [term for term in config.reward.rewards if allow_code or term.name in {*REWARDS, *LOADERS}]
    for term in set(config.reward.rewards).difference(terms):
        print(f"{workdir} names code as a reward, which is not run without --allow_code: {term.name}", file=sys.stderr)
    reward = weighted_sum(terms, load_rewards(terms))
    rewards = ", ".join(term.label for term in terms if term.weight)
    rows = samplers(generator, restore_student(workdir, generator), config.student.timesteps)
    network = None if features is None else network_measures(features, quick)
    table, videos = measure(generator, rows, plan, reward, network)
    teacher = f"teacher_{config.sampling.num_steps}"
    percentages(table, teacher)
    timings = {**(timings or {}), "sample and measure": time.perf_counter() - begun}
    metrics: dict[str, Any] = {
        **table,
        **speedups(table, teacher),
        "seconds": sum(timings.values()),
        "timings": timings,
    }
    metrics |= {} if features is None else {"features": features.name}
    metrics |= {"config": dataclasses.asdict(config)}
    write_metrics(out, metrics)

    chosen = plan.spread(SHOWN)
    shown = {name: clips[chosen] for name, clips in videos.items()}
    prompts = [str(plan.captions[i]) for i in chosen]
    for i, prompt in enumerate(prompts):
        pair = [shown[name][i] for name in (teacher, "student_4") if name in shown]
        write_video(folder / f"{prompt.replace(' ', '_')}.mp4", side_by_side(pair), scale=8)
    notes = [] if reward is None else [f"The reward is {rewards}: {reward.meaning}."]
    text, made = json.dumps(metrics["config"], indent=2), {"metrics": metrics, "timings": timings, "notes": notes}
    write_report(page, prompts=prompts, videos=shown, history=read_history(workdir), config_text=text, **made)
    return metrics


def outputs(out: Path) -> tuple[Path, Path]:
    """The page and the folder of videos beside a JSON file: report.html and videos/ beside metrics.json, which are
    the run's own, and for any other file those of its name.
    """
    if out.suffix != ".json":
        raise ValueError(f"--out={out} must end in .json: the page and the videos are named after it")
    if out.name == "metrics.json":
        return out.with_name("report.html"), out.with_name("videos")
    return out.with_suffix(".html"), out.with_name(f"{out.stem}_videos")
