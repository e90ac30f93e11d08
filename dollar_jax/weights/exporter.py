"""`dollar export`: the student of a run as a diffusers pipeline folder, with a model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dollar_jax.config import DistillConfig
from dollar_jax.data.latents import clip_size
from dollar_jax.generate import teacher_folder
from dollar_jax.schedule import Schedule
from dollar_jax.train import read_config, restore_weights
from dollar_jax.weights.pipeline import (
    IMPORTED,
    Component,
    load_component,
    read_parts,
    read_schedule,
    save_component,
    write_json,
)

# A name that begins with an underscore passes diffusers' check of a scheduler's fields.
TIMESTEPS = "_student_timesteps"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def export_run(
    workdir: Path, folder: Path, *, ema: bool, dtype: str, shard_size: int
) -> None:
    """Writes `folder`, which diffusers' `WanPipeline.from_pretrained` loads and `dollar import` imports.

    The transformer is the newest student of the run, its average with `ema`, in `dtype` and in files of at
    most `shard_size` bytes. VAE, text encoder and tokenizer are the teacher's. The folder appears
    when it is whole.

    Raises FileNotFoundError, FileExistsError or ValueError naming what is wrong.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; delete it, or export into another folder")
    config = read_config(workdir)
    teacher = teacher_folder(config.teacher)
    schedule = read_schedule(teacher)
    if schedule.path != "rf":
        raise ValueError("only students of rectified-flow teachers can be exported")
    parts = read_parts(teacher)
    student = parts["transformer"]
    step, params = restore_weights(workdir, student.network.shapes, ema)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
    partial.mkdir(parents=True)
    for name, part in tqdm(parts.items(), "exporting"):
        if name == "transformer":
            component = Component(student.config, student.network, params)
            save_component(partial, name, component, dtype, shard_size)
        elif (teacher / name / IMPORTED).is_dir():
            save_component(partial, name, load_component(teacher / name, part), "float32", shard_size)
        else:
            shutil.copytree(teacher / name, partial / name)
    shutil.copytree(teacher / "tokenizer", partial / "tokenizer")
    write_json(partial / "scheduler" / "scheduler_config.json", scheduler(config, schedule))
    index = json.loads((teacher / "model_index.json").read_text())
    write_json(partial / "model_index.json", index | {"scheduler": ["diffusers", SCHEDULER]})
    path = workdir / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    (partial / "README.md").write_text(model_card(config, schedule, step, ema, metrics))
    partial.rename(folder)


def scheduler(config: DistillConfig, schedule: Schedule) -> dict[str, Any]:
    """The scheduler that samples as `sample.few_step_sample` does: predict x0, re-noise, repeat.

    Its shift is 1, for the student's timesteps are shifted already.
    """
    return {
        "_class_name": SCHEDULER,
        "num_train_timesteps": schedule.num_train_timesteps,
        "shift": 1.0,
        "stochastic_sampling": True,
        TIMESTEPS: list(config.student.timesteps),
    }


_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-video
tags: [dollar, few-step, distillation]
---

# {count}-step student of {teacher}

Distilled with [DOLLAR](https://arxiv.org/abs/2412.15689) by dollar_jax: {steps} steps at batch size {batch}; these
are the student's {weights}. It takes {count} network evaluations and no guidance, at the
timesteps {timesteps} of {total}.

## Sampling with diffusers

```python
{snippet}```

## Losses

| loss | weight |
|---|---|
{losses}
{measures}
## Configuration

```json
{config}
```
"""

_SNIPPET = """\
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("{folder}")
# The scheduler takes its times from the number of steps; the student has times of its own.
scheduler = pipe.scheduler
sigmas = [t / scheduler.config.num_train_timesteps for t in scheduler.config["{field}"]]
set_timesteps = scheduler.set_timesteps
scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps, device, sigmas=sigmas)
torch.manual_seed(0)
video = pipe(
    "{prompt}",
    height={height},
    width={width},
    num_frames={frames},
    num_inference_steps=len(sigmas),
    guidance_scale=1.0,
    max_sequence_length={length},
    output_type="np",
).frames[0]  # frames, height, width, RGB in [0, 1]
"""


def model_card(
    config: DistillConfig, schedule: Schedule, step: int, ema: bool, metrics: Mapping[str, Any]
) -> str:
    """README.md: what the student is, how to sample it, and what its run measured."""
    frames, height, width = clip_size(config.data)
    prompt = "a large red circle moving left slowly"
    snippet = _SNIPPET.format(
        folder=".", field=TIMESTEPS, prompt=prompt, height=height, width=width, frames=frames,
        length=config.data.max_text_length,
    )  # fmt: skip
    weights = {
        "variational score distillation (VSD)": config.vsd.weight,
        "consistency distillation (CD), β_CD": config.consistency.weight,
        "latent reward (LRM), β_FT": config.reward.weight if config.reward.name else 0.0,
    }
    rows = {k: v for k, v in metrics.items() if isinstance(v, Mapping) and "nfe" in v}
    columns = sorted({c for row in rows.values() for c, v in row.items() if isinstance(v, float | int)})
    measures = ""
    if rows:
        lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            cells = [f"{row[c]:.4g}" if c in row else "–" for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        measures = "\n## Evaluation\n\n" + "\n".join(lines) + "\n"
    return _CARD.format(
        count=len(config.student.timesteps), teacher=config.teacher, steps=step, batch=config.batch_size,
        weights="moving average" if ema else "raw weights", total=schedule.num_train_timesteps,
        timesteps=", ".join(f"{t:g}" for t in config.student.timesteps), snippet=snippet,
        losses="\n".join(f"| {name} | {weight:g} |" for name, weight in weights.items()),
        measures=measures, config=json.dumps(dataclasses.asdict(config), indent=2),
    )  # fmt: skip
