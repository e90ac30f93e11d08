"""`dollar export`: the student of a run as a diffusers pipeline folder, with a model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dollar_jax.config import DistillConfig
from dollar_jax.data.clip import clip_size
from dollar_jax.files import new_folder, read_json, write_checksums
from dollar_jax.generate import teacher_folder
from dollar_jax.models import lora
from dollar_jax.objectives import terms
from dollar_jax.run import read_config, restore_trained
from dollar_jax.schedule import Schedule, coefficients
from dollar_jax.types import Params
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.pipeline import (
    IMPORTED,
    Component,
    check_whole,
    load_component,
    read_family,
    read_parts,
    read_schedule,
    save_component,
    write_json,
)
from dollar_jax.weights.scheduler import TEACHER, scheduler_json
from dollar_jax.weights.table import Row, export_stream

# A name that begins with an underscore passes diffusers' check of a scheduler's fields.
TIMESTEPS = "_student_timesteps"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SCHEDULERS = {"rf": "FlowMatchEulerDiscreteScheduler", "ddpm": "LCMScheduler"}  # by the diffusion's path


def export_run(workdir: Path, folder: Path, *, ema: bool, dtype: str, shard_size: int, adapter: bool = False) -> None:
    """Writes `folder`, which the teacher's diffusers pipeline loads and `dollar import` imports.

    The transformer is the newest student of the run, its average with `ema`, in `dtype` and in files of at
    most `shard_size` bytes. VAE, text encoder and tokenizer are the teacher's. Adapters (config.lora) are
    merged into the teacher's weights; or, with `adapter`, the folder holds them alone, for
    `load_lora_weights`, and the scheduler. The folder appears when it is whole.

    Raises FileNotFoundError, FileExistsError or ValueError naming what is wrong.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; delete it, or export into another folder")
    config = read_config(workdir)
    teacher = teacher_folder(config.teacher)
    family = read_family(teacher)
    schedule = read_schedule(teacher, family)
    if adapter and not config.lora.rank:
        raise ValueError(f"{workdir} trained the student whole (config.lora.rank is 0): it has no adapter")
    check_whole(teacher)
    parts = read_parts(teacher)
    student = parts["transformer"]
    step, params = restore_trained(workdir, student.network, config.lora, ema)

    with new_folder(folder) as draft:
        if adapter:
            tensors = adapter_tensors(params, config.lora.scale, student.table)
            files.write_file(draft / ADAPTER_FILE, tensors, dtype)
        else:
            if config.lora.rank:
                whole = load_component(teacher / "transformer", student).params
                params = lora.merge(whole, params, config.lora.scale)
            for name, part in tqdm(parts.items(), "exporting"):
                if name == "transformer":
                    component = Component(student.config, student.network, params)
                    save_component(draft / name, part.kind, component, dtype, shard_size)
                elif (teacher / name / IMPORTED).is_dir():
                    component = load_component(teacher / name, part)
                    save_component(draft / name, part.kind, component, "float32", shard_size)
                else:
                    shutil.copytree(teacher / name, draft / name)
            shutil.copytree(teacher / "tokenizer", draft / "tokenizer")
            index = read_json(teacher / "model_index.json")
            write_json(draft / "model_index.json", index | {"scheduler": ["diffusers", SCHEDULERS[schedule.path]]})
        write_json(draft / "scheduler" / "scheduler_config.json", scheduler(config, schedule))
        path = workdir / "metrics.json"
        metrics = read_json(path) if path.is_file() else {}
        card = model_card(config, schedule, family.pipeline, step, ema, metrics, adapter)
        (draft / "README.md").write_text(card)
        write_checksums(draft, f"student of step {step}")


def adapter_tensors(adapters: Params, scale: float, table: Sequence[Row]) -> dict[str, np.ndarray]:
    """The tensors of `load_lora_weights` by PEFT's names; the scale, 1 for PEFT without an alpha, is in B.

    A is [rank, in] and B [out, rank], as dense layers are there; one pair for each layer of a stack.
    """

    def kernels(tree: Params, leaf: str) -> Params:
        return {
            name: {"kernel": np.asarray(value[lora.NAME][leaf])} if lora.NAME in value else kernels(value, leaf)
            for name, value in tree.items()
        }

    tensors = {}
    for leaf, part, factor in (("down", "lora_A", 1.0), ("up", "lora_B", scale)):
        for name, tensor in export_stream(table, kernels(adapters, leaf)):
            name = f"transformer.{name.removesuffix('.weight')}.{part}.weight"
            tensors[name] = (tensor * np.float32(factor)).astype(tensor.dtype)
    return tensors


def scheduler(config: DistillConfig, schedule: Schedule) -> dict[str, Any]:
    """The scheduler that samples as `sampling.few_step_sample` does: predict x0, re-noise, repeat.

    The file also keeps the teacher's scheduler, which `dollar import` goes by. On the rectified flow the shift is 1,
    for the student's timesteps are shifted already. The consistency models' scheduler takes the path's final betas,
    and a scaling that leaves nothing of its boundary condition.
    """
    common: dict[str, Any] = {
        "_class_name": SCHEDULERS[schedule.path],
        "num_train_timesteps": schedule.num_train_timesteps,
        TIMESTEPS: list(config.student.timesteps),
        TEACHER: scheduler_json(schedule, schedule.path),
    }
    if schedule.path == "rf":
        return {**common, "shift": 1.0, "stochastic_sampling": True}
    kept, _ = coefficients(schedule, jnp.arange(schedule.num_train_timesteps, dtype="float32"))
    products = np.square(np.asarray(kept, np.float64))
    betas = 1 - products / np.concatenate([[1.0], products[:-1]])
    return {
        **common,
        "trained_betas": betas.tolist(),
        "prediction_type": common[TEACHER]["prediction_type"],
        "original_inference_steps": schedule.num_train_timesteps,
        "timestep_scaling": 1e6,
        "clip_sample": False,
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
from diffusers import {pipeline}

{load}
{times}
torch.manual_seed(0)
video = pipe(
    "{prompt}",
    height={height},
    width={width},
    num_frames={frames},
    {argument},
    guidance_scale=1.0,
    max_sequence_length={length},
    output_type="np",
).frames[0]  # frames, height, width, RGB in [0, 1]
"""


_LOAD = 'pipe = {pipeline}.from_pretrained(".")'
_LOAD_ADAPTER = """\
from diffusers import {scheduler}

pipe = {pipeline}.from_pretrained("{teacher}")  # the teacher, with this adapter and this scheduler
pipe.load_lora_weights(".")
pipe.scheduler = {scheduler}.from_pretrained("scheduler")"""
# How the student's own times reach the scheduler: by the pipeline's argument where it has one.
_TIMES = {
    "rf": """\
# The scheduler takes its times from the number of steps; the student has times of its own.
scheduler = pipe.scheduler
sigmas = [t / scheduler.config.num_train_timesteps for t in scheduler.config["{field}"]]
set_timesteps = scheduler.set_timesteps
scheduler.set_timesteps = lambda steps, device=None: set_timesteps(steps, device, sigmas=sigmas)""",
    "ddpm": """timesteps = [int(t) for t in pipe.scheduler.config["{field}"]]""",
}
_ARGUMENT = {"rf": "num_inference_steps=len(sigmas)", "ddpm": "timesteps=timesteps"}


def model_card(
    config: DistillConfig,
    schedule: Schedule,
    pipeline: str,
    step: int,
    ema: bool,
    metrics: Mapping[str, Any],
    adapter: bool = False,
) -> str:
    """README.md: what the student is, how diffusers' `pipeline` samples it, and what its run measured."""
    frames, height, width = clip_size(config.data)
    prompt = "a large red circle moving left slowly"
    names = {"pipeline": pipeline, "scheduler": SCHEDULERS[schedule.path], "teacher": config.teacher}
    snippet = _SNIPPET.format(
        pipeline=pipeline,
        load=(_LOAD_ADAPTER if adapter else _LOAD).format(**names),
        times=_TIMES[schedule.path].format(field=TIMESTEPS),
        argument=_ARGUMENT[schedule.path],
        prompt=prompt,
        height=height,
        width=width,
        frames=frames,
        length=config.data.max_text_length,
    )
    losses = ""
    for term in filter(None, terms(config)):
        name = f"{term.label}, {term.symbol}" if term.symbol else term.label
        losses += f"| {name} | {term.weight(config):g} |\n"
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
        count=len(config.student.timesteps),
        teacher=config.teacher,
        steps=step,
        batch=config.batch_size,
        weights="moving average" if ema else "raw weights",
        total=schedule.num_train_timesteps,
        timesteps=", ".join(f"{t:g}" for t in config.student.timesteps),
        snippet=snippet,
        losses=losses.rstrip(),
        measures=measures,
        config=json.dumps(dataclasses.asdict(config), indent=2),
    )
