"""`dollar reproduce`: the paper's ablation on the default domain, every cell over several seeds, as one page. A cell is
one method with one seed: trained in `runs/`, measured into `cells/`. Started again, it goes on where it was."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dollar_jax.config import DistillConfig, changed, distill_config
from dollar_jax.data import shapes
from dollar_jax.data.latents import load_data
from dollar_jax.evaluate.features import vae_features
from dollar_jax.evaluate.measure import default_plan, draw_in_turns, measure, real_features, samplers
from dollar_jax.files import read_arrays, read_json, write_json
from dollar_jax.generate import Generator, make_generator
from dollar_jax.report.ablation import Result, write_ablation
from dollar_jax.rewards import load_rewards, weighted_sum
from dollar_jax.run import restore_student
from dollar_jax.train import train

SPEED = "speed"  # the cell with the time that samplers take
ROUNDS = 5  # of timing
SHOWN = 4  # prompts whose videos are on the page
# The demo's training as most tables of docs/ were measured: by Adam, longer, and all samples new, as in Algorithm 29.
WITH_ADAM: dict[str, Any] = {"steps": 200, "fake_score.samples": "fresh", "reward.start_step": 40}
WITH_ADAM |= {"fake_score.updates": 2, "student.optimiser.name": "adamw", "student.optimiser.learning_rate": 3e-4}
Experiment = Callable[[str], DistillConfig]  # the losses of configs/demo.py → its settings


class Method(NamedTuple):
    """A row of the ablation: the losses of configs/demo.py, and what of its settings is changed besides."""

    key: str
    label: str
    losses: str
    changes: Mapping[str, Any]


METHODS = (
    Method("vsd", "VSD", "vsd", {}),
    Method("cd", "CD", "cd", {}),
    Method("vsd_cd", "VSD + CD", "vsd+cd", {}),
    Method("vsd_cd_lrm", "VSD + CD + LRM", "vsd+cd+lrm", {}),
    Method("vsd_cd_ddpo", "VSD + CD + DDPO", "vsd+cd+lrm", {"reward.method": "ddpo"}),
    Method("cd_m1", "CD, grid, m = 1", "cd", {"consistency.times": "grid", "consistency.skip": 1}),
    Method("cd_m5", "CD, grid, m = 5", "cd", {"consistency.times": "grid", "consistency.skip": 5}),
)


def reproduce(experiment: Any, workdir: Path, quick: bool, seeds: int | None = None, steps: int | None = None) -> Path:
    """Runs every cell that is not there yet; returns the page, which lies beside a CSV and a Markdown table. `seeds`
    and `steps` are 3 and the experiment's own, or 2 and a fifth of them when `quick`. ValueError for other settings."""
    start = time.perf_counter()
    base = experiment("vsd+cd+lrm")
    count = seeds or (2 if quick else 3)
    steps = steps or (max(base.steps // 5, 1) if quick else base.steps)
    common = {"steps": steps, "reward.start_step": base.reward.start_step * steps // base.steps}
    common["visibility.samples_every"] = 0
    base = changed(base, common)
    configs = {method.key: changed(experiment(method.losses), {**common, **method.changes}) for method in METHODS}
    configs = {"teacher": base, **configs}
    cells = [(key, seed) for seed in range(count) for key in configs]
    for key, seed in cells:  # before hours of work
        _read_cell(workdir, key, seed, configs[key], quick)
    lab = Lab(workdir, make_generator(base, hold_vae=True), base, quick)
    results = []
    for key, seed in tqdm(cells, "ablation", unit="cell"):
        rows = _read_cell(workdir, key, seed, configs[key], quick) or lab.run(key, seed, configs[key])
        results.append(Result(key, seed, rows))
    shown: Any = {"labels": {"teacher": "Teacher", **{method.key: method.label for method in METHODS}}}
    shown |= {"speed": _read_cell(workdir, SPEED, 0, base, quick) or lab.time(METHODS[0].key, base)}
    shown |= {"videos": {key: read_arrays(workdir / "cells" / f"{key}.npz") for key in configs}}
    shown |= {"commands": [_command(method, common, seed) for method in METHODS for seed in range(count)]}
    shown |= {"prompts": lab.shown(0), "config_text": json.dumps(dataclasses.asdict(base), indent=2)}
    return write_ablation(workdir, results, **shown, seconds=time.perf_counter() - start)


class Lab:
    """What the cells share: the data, encoded once, and the features of real clips."""

    def __init__(self, workdir: Path, generator: Generator, base: DistillConfig, quick: bool):
        self.workdir, self.generator, self.base, self.quick = workdir, generator, base, quick
        self.reward = weighted_sum(base.reward.rewards, load_rewards(base.reward.rewards))
        self.features = vae_features(generator)
        self.reference = functools.cache(functools.partial(real_features, self.features, quick))

    def shown(self, seed: int) -> list[str]:
        """The prompts whose videos are kept."""
        plan = default_plan(seed, self.quick)
        return [str(plan.captions[i]) for i in plan.spread(SHOWN)]

    def run(self, key: str, seed: int, config: DistillConfig) -> dict[str, Any]:
        """Trains and measures a cell; its rows by sampler, which lie in `cells/` when it is done."""
        config = dataclasses.replace(config, seed=seed)
        run = self.workdir / "runs" / f"{key}-seed{seed}"
        student, wanted = None, "teacher"
        if key != "teacher":
            train(config, run, self.generator, load_data(config, self.generator, self.workdir))
            student, wanted = restore_student(run, self.generator), "student"
        drawn = samplers(self.generator, student, config.student.timesteps)
        drawn = {name: row for name, row in drawn.items() if name.startswith(wanted)}
        plan = default_plan(seed, self.quick)
        rows, videos = measure(self.generator, drawn, plan, self.reward, self.features, self.reference())
        for row in rows.values():
            # Taken hours apart from the others': `time` takes them side by side.
            del row["diffusion_seconds"], row["total_seconds"]
        if seed == 0:
            folder = self.workdir / "cells"
            folder.mkdir(parents=True, exist_ok=True)
            kept: dict[str, Any] = {name: video[plan.spread(SHOWN)] for name, video in videos.items()}
            np.savez_compressed(folder / f"{key}.npz", **kept)
        else:
            # Optimisers and all, a checkpoint is far larger than what it was made for.
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        write_json(_path(self.workdir, key, seed), {"settings": _settings(config, self.quick), "rows": rows})
        return rows

    def time(self, key: str, config: DistillConfig) -> dict[str, Any]:
        """Seconds of the teacher and of a student, whose speed is that of every other's, side by side."""
        student = restore_student(self.workdir / "runs" / f"{key}-seed0", self.generator)
        drawn = samplers(self.generator, student, config.student.timesteps)
        drawn = {name: row for name, row in drawn.items() if not name.startswith("undistilled")}
        prompts = [str(caption) for caption in shapes.covering_captions()[: self.base.batch_size]]
        _, seconds = draw_in_turns(self.generator, drawn, prompts, len(prompts), 0, ROUNDS)
        rows = {name: {"nfe": row.nfe, **seconds[name]} for name, row in drawn.items()}
        write_json(_path(self.workdir, SPEED, 0), {"settings": _settings(config, self.quick), "rows": rows})
        return rows


def _path(workdir: Path, key: str, seed: int) -> Path:
    return workdir / "cells" / f"{key}-seed{seed}.json"


def _settings(config: DistillConfig, quick: bool) -> Any:
    """The settings that a cell's figures depend on, as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config) | {"pretrain": None, "visibility": None, "quick": quick}))


def _read_cell(workdir: Path, key: str, seed: int, config: DistillConfig, quick: bool) -> dict[str, Any] | None:
    """A finished cell's rows, or None when it is not there."""
    if not (path := _path(workdir, key, seed)).exists():
        return None
    cell = read_json(path)
    stored = {name: value for name, value in cell["settings"].items() if name not in ("visibility", "quick")}
    before = distill_config(stored, past=True)  # with the defaults of settings that are newer than the cell
    if _settings(before, cell["settings"]["quick"]) != _settings(dataclasses.replace(config, seed=seed), quick):
        raise ValueError(f"{path} is of other settings than these: choose another workdir, or remove it")
    return cell["rows"]


def _command(method: Method, common: Mapping[str, Any], seed: int) -> str:
    changes: Sequence[tuple[str, Any]] = [*common.items(), *method.changes.items(), ("seed", seed)]
    flags = " ".join(f"--config.{name}={value}" for name, value in changes)
    return f"dollar train --config=configs/demo.py:{method.losses} --workdir=runs/{method.key}-seed{seed} {flags}"
