"""The folder of a training run: its settings, its history, and the student in its checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints, abstract, on_host
from dollar_jax.config import DistillConfig, changed, distill_config, unresumable
from dollar_jax.files import parse_json, read_json, read_text, write_file, write_json
from dollar_jax.generate import BoundSampler, Generator, merge_program, student_network, student_shapes, subset
from dollar_jax.models import lora
from dollar_jax.models.network import Network
from dollar_jax.types import Params
from dollar_jax.weights.pipeline import EXPERTS, Component

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
HISTORY = "history.jsonl"
SKIPPED = "skipped.jsonl"
EVENTS = "events"
SAMPLES = "samples"
PROFILE = "profile"


def read_config(workdir: Path) -> DistillConfig:
    """The settings of the run in a workdir; raises FileNotFoundError when there is none."""
    if not (path := workdir / CONFIG).is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG} in it")
    fields = read_json(path)
    try:
        return distill_config(fields, past=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_runs(workdir: Path, low: Path | None = None) -> dict[Path, DistillConfig]:
    """The run that draws videos, or the two of two experts, the high-noise one first; ValueError if no pair."""
    config = read_config(workdir)
    if low is None:
        if config.expert:
            mend = "give the high-noise expert's run as --workdir and the other's as --low"
            raise ValueError(f"{workdir} distilled the {config.expert} expert, which draws no video alone: {mend}")
        return {workdir: config}
    runs = {workdir: config, low: read_config(low)}
    for wanted, folder in zip(EXPERTS, (workdir, low), strict=True):
        c = runs[folder]
        own, first = c.student, config.student
        if (c.expert, c.teacher, own.sampler, own.layers) != (wanted, config.teacher, first.sampler, first.layers):
            found = f"expert {c.expert!r} of {c.teacher}, sampler {own.sampler!r}, layers {own.layers}"
            raise ValueError(f"{folder} has {found}, where {wanted!r} of {config.teacher} belongs")
    return runs


def drawing_config(
    workdir: Path, low: Path | None = None, teacher: bool = False, vae: str | None = None
) -> DistillConfig:
    """The settings by which `read_runs` draw videos, with the `vae` in that folder if given: of a pair the timesteps of
    both; for the `teacher` any one."""
    first, *others = [read_config(workdir)] if teacher else read_runs(workdir, low).values()
    first = changed(first, {"sampling.vae": vae}) if vae else first
    times = tuple(t for run in (first, *others) for t in run.student.timesteps)
    both = {"expert": None, "student.timesteps": times, "vsd.guidance_by_step": ()}
    return changed(first, both) if first.expert else first


def check_config(config: DistillConfig, workdir: Path) -> None:
    """Raises ValueError when the workdir holds a run whose settings differ where a resumption may not change them."""
    if (workdir / CONFIG).exists():
        for name, before, now in unresumable(read_config(workdir), config):
            mend = "choose another workdir, or the run's own settings to resume it"
            raise ValueError(f"{workdir} holds a run with config.{name} = {before!r}, not {now!r}: {mend}")


def record_config(config: DistillConfig, workdir: Path, resumed: bool = True) -> None:
    """Writes the run's settings into its workdir; raises as `check_config` if the run is `resumed`."""
    if resumed:
        check_config(config, workdir)
    if jax.process_index() == 0:
        write_json(workdir / CONFIG, dataclasses.asdict(config))


def read_history(workdir: Path) -> list[dict[str, float]]:
    """The logged metrics of a run, one mapping per logged step."""
    path = workdir / HISTORY
    return [parse_json(line, path) for line in read_text(path).splitlines()] if path.exists() else []


def truncate_history(workdir: Path, step: int, name: str = HISTORY) -> int:
    """Drops the lines after `step`, and a last line that a kill cut off; how many are left."""
    path, kept = workdir / name, []
    if not path.exists():
        return 0
    for line in read_text(path).splitlines():
        try:
            if parse_json(line, path)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            break
    write_file(path, "".join(kept))
    return len(kept)


def restore_student(workdir: Path, generator: Generator, ema: bool = True, low: Path | None = None) -> Any:
    """The newest student's parameters alone, the average unless `ema` is False; both with the `low` run."""
    p, runs = generator.pipeline, read_runs(workdir, low).items()
    pairs = zip(runs, (p.transformer, p.transformer_2), strict=False)
    params = [_restore_one(folder, c, expert, generator, ema) for (folder, c), expert in pairs if expert]
    return tuple(params) if low else params[0]


def _restore_one(
    workdir: Path, config: DistillConfig, transformer: Component, generator: Generator, ema: bool
) -> Params:
    _, params = restore_trained(workdir, transformer.network, config, ema, generator.mesh)
    if not config.lora.rank:
        return params
    shapes = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p) for p in (transformer.params, params))
    program = merge_program(config.lora, generator.mesh, *shapes)
    return program(*program.place(transformer.params, params))


def choose_teacher(generator: Generator, config: DistillConfig, steps: int | None = None) -> BoundSampler:
    """The teacher in its own number of steps, or in `steps`."""
    c = config.sampling
    steps = steps or c.num_steps
    described = {"sampler": c.solver, "steps": steps, "guidance_weight": c.guidance_weight, "eta": c.eta}
    described |= {"low_guidance_weight": c.low_guidance_weight} if generator.pipeline.transformer_2 else {}
    draw = generator.teacher_sampler(steps, c.guidance_weight)
    return BoundSampler(draw, generator.pipeline.params, steps * (2 if c.guidance_weight else 1), described)


def choose_student(
    generator: Generator, workdir: Path, config: DistillConfig, steps: int, ema: bool = True, low: Path | None = None
) -> BoundSampler:
    """The newest student of the run in `steps` steps; `low` as in `restore_student`."""
    timesteps, params = subset(config.student.timesteps, steps), restore_student(workdir, generator, ema, low)
    described = {"sampler": "student", "steps": steps, "timesteps": timesteps}
    described |= {"solver": "ode"} if generator.student.sampler == "ode" else {}
    return BoundSampler(generator.student_sampler(timesteps), params, steps, described)


def restore_trained(
    workdir: Path, transformer: Network, config: DistillConfig, ema: bool, mesh: Mesh | None = None
) -> tuple[int, Params]:
    """The newest checkpoint's step, and of its student (the average if `ema`) parameters or adapters, on `mesh`."""
    shapes = student_shapes(transformer, config.student.layers)
    if config.lora.rank:
        shapes = lora.adapters(student_network(transformer, config.lora).shapes)
    name = "ema" if ema else "student"
    like = {name: abstract(shapes, on_host(shapes) if mesh is None else sharding.shard(mesh, shapes))}
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        params = checkpoints.restore({name: like})[name][name]
        return checkpoints.restored, params
