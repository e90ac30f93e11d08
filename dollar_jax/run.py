"""The folder of a training run: its settings, its history, and the student in its checkpoints."""

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from dollar_jax import sharding
from dollar_jax.checkpoint import Checkpoints, abstract, on_host
from dollar_jax.config import DistillConfig, LoraConfig, distill_config, unresumable
from dollar_jax.files import parse_json, read_json, read_text, write_file
from dollar_jax.generate import BoundSampler, Generator, merge_program, student_network, subset
from dollar_jax.models import lora
from dollar_jax.models.network import Network
from dollar_jax.types import Params

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
HISTORY = "history.jsonl"
SKIPPED = "skipped.jsonl"
EVENTS = "events"
SAMPLES = "samples"
PROFILE = "profile"


def read_config(workdir: Path) -> DistillConfig:
    """The settings of the run in a workdir; raises FileNotFoundError when there is none."""
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {CONFIG} in it")
    fields = read_json(path)
    try:
        return distill_config(fields, past=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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
        write_file(workdir / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


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


def restore_student(workdir: Path, generator: Generator, ema: bool = True) -> Params:
    """The newest student's parameters, and nothing else of the checkpoint; the average unless `ema` is False."""
    transformer = generator.pipeline.transformer
    config = read_config(workdir).lora
    _, params = restore_trained(workdir, transformer.network, config, ema, generator.mesh)
    if not config.rank:
        return params
    shapes = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p) for p in (transformer.params, params))
    program = merge_program(config, generator.mesh, *shapes)
    return program(*program.place(transformer.params, params))


def choose_teacher(generator: Generator, config: DistillConfig, steps: int | None = None) -> BoundSampler:
    """The teacher in its own number of steps, or in `steps`."""
    c = config.sampling
    steps = steps or c.num_steps
    described = {"sampler": c.solver, "steps": steps, "guidance_weight": c.guidance_weight, "eta": c.eta}
    draw = generator.teacher_sampler(steps, c.guidance_weight)
    return BoundSampler(draw, generator.pipeline.transformer.params, steps * (2 if c.guidance_weight else 1), described)


def choose_student(
    generator: Generator, workdir: Path, config: DistillConfig, steps: int, ema: bool = True
) -> BoundSampler:
    """The newest student of the run in `steps` steps."""
    timesteps, params = subset(config.student.timesteps, steps), restore_student(workdir, generator, ema)
    described = {"sampler": "student", "steps": steps, "timesteps": timesteps}
    described |= {"solver": "ode"} if generator.student_ode else {}
    return BoundSampler(generator.student_sampler(timesteps), params, steps, described)


def restore_trained(
    workdir: Path, transformer: Network, config: LoraConfig, ema: bool, mesh: Mesh | None = None
) -> tuple[int, Params]:
    """The newest checkpoint's step, and of its student (the average if `ema`) all parameters or the adapters, on `mesh`
    or in this host's memory. Raises FileNotFoundError."""
    shapes = student_network(transformer, config).shapes
    if config.rank:
        shapes = lora.adapters(shapes)
    name = "ema" if ema else "student"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), shapes)
    like = {name: abstract(shapes, on_host(shapes) if mesh is None else sharding.shard(mesh, shapes))}
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        params = checkpoints.restore({name: like})[name][name]
        return checkpoints.restored, params
