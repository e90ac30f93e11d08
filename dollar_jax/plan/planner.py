"""`dollar plan`: the very programs that will run, compiled for TPU chips that need not be there. The time is a bound:
the slowest of matrix products, memory traffic and collectives at the chip's peaks, as if all three overlapped."""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, changed
from dollar_jax.data.clip import MOVING_SHAPES, clip_size
from dollar_jax.data.latents import load_programs
from dollar_jax.flops import count_flops
from dollar_jax.generate import Generator, draw_programs, sampling_mesh
from dollar_jax.hlo import Cost, cost
from dollar_jax.plan.chips import Chip, chips, host_devices
from dollar_jax.plan.teachers import architecture_of, weightless_generator
from dollar_jax.prepare.shards import prepare_programs
from dollar_jax.program import Program
from dollar_jax.programs import run_programs, shared_rewards, step_flops, teacher_programs
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import PixelRewards, pixel_rewards

What = Literal["train", "sample", "decode", "text", "import"]
Whole = Literal["run", "prepare", "sample-command", "evaluate"]  # a command with all that it executes
GIB = 2**30
Video = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Per device and call. What could not be compiled has no time and, but for want of memory, an `error`."""

    what: str
    program: str
    videos: int | None  # or prompts, of one call; None where the program has other arguments
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    argument_gib: float
    output_gib: float = 0.0
    temp_gib: float | None  # None where the compiler refuses or aborts
    peak_gib: float | None
    kept_gib: float  # beside the arguments: of a run its state and teacher, between two steps
    hbm_gib: float
    fits: bool = False
    model_tflops: float
    compiled_tflops: float | None = None
    collective_gib: float | None = None
    collectives_gib: dict[str, float] | None = None
    roofline_seconds: float | None = None
    bound: str | None = None
    compile_seconds: float
    largest_buffers: Sequence[str] = ()
    advice: str | None = None
    error: str | None = None


def plan(config: DistillConfig, topology: str, what: What = "train", video: Video | None = None) -> Plan:
    """Compiles for a topology such as "v5p:2x2x2"; `video` is height, width and frames. Raises ValueError."""
    (found,) = plans(config, topology, what, video)
    if found.error:
        raise ValueError(f"the compiler refuses this program: {found.error}")
    return found


def plans(config: DistillConfig, topology: str, what: What | Whole, video: Video | None = None) -> Iterator[Plan]:
    """A plan of every program that is executed, as they are compiled; raises as `plan` does for what cannot be."""
    return (job.plan() for job in _jobs(config, topology, what, video))


def plans_apart(*request: Any) -> Iterator[Plan]:
    """`plans` by a process of its own: where the compiler aborts, the plan says so, and the next one is made."""
    aborted: list[Plan] | None = None
    done = 0
    while aborted is None or done < len(aborted):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
            aborted = worker.submit(_load, request).result()
            with contextlib.suppress(BrokenProcessPool):
                while done < len(aborted):
                    done += 1
                    yield worker.submit(_plan, done - 1).result()
                return
            yield aborted[done - 1]


_loaded: "list[_Job]" = []  # in a worker


def _load(request: Sequence[Any]) -> list[Plan]:
    _loaded[:] = _jobs(*request)
    return [job.failed("the compiler aborts") for job in _loaded]


def _plan(index: int) -> Plan:
    return _loaded[index].plan()


@dataclasses.dataclass
class _Job:
    """A program to be compiled, and what is known of it before that."""

    program: Program
    config: DistillConfig
    chip: Chip
    common: dict[str, Any]
    flops: Callable[[], float] | None  # of all devices together; None for those that are traced

    def plan(self) -> Plan:
        begun = time.perf_counter()
        assert self.program.mesh is not None
        devices = list(self.program.mesh.devices.flat)
        # Several times faster to compile, and hardly different in memory.
        options: Any = {"exec_time_optimization_effort": -1.0} if devices[0].platform == "tpu" else None
        traced = self.program.trace()
        flops = count_flops(traced.jaxpr.jaxpr) if self.flops is None else self.flops()
        self.common["model_tflops"] = flops / len(devices) / 1e12
        lowered = traced.lower()
        try:
            compiled = lowered.compile(compiler_options=options)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # the latter from Mosaic
            self.common["compile_seconds"] = time.perf_counter() - begun
            return self.failed(str(error))
        self.common["compile_seconds"] = time.perf_counter() - begun
        memory, used = compiled.memory_analysis(), cost(compiled.as_text())
        found: Any = {"argument": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
        found["output"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak, room = getattr(memory, "peak_memory_in_bytes", 0), self.chip.hbm_gib - self.common["kept_gib"]
        fits = sum(found.values()) / GIB <= room
        if not fits and options and peak / GIB <= room:
            # The temporaries' sum counts memory that is used twice: the compiler is asked whether the same fits there.
            options["xla_tpu_max_hbm_size_mib"] = int(room * 1024)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                again = lowered.compile(compiler_options=options).memory_analysis()
                fits = again.temp_size_in_bytes == memory.temp_size_in_bytes
        found["peak"] = peak
        found = {f"{name}_gib": size / GIB for name, size in found.items()}
        collectives = {kind: value / GIB for kind, value in used.collective_bytes.items()}
        found |= {"collectives_gib": collectives, "collective_gib": sum(collectives.values())}
        found["roofline_seconds"], found["bound"] = _roofline(used, self.chip)
        return Plan(**self.common, **found, fits=fits, compiled_tflops=used.flops / 1e12)

    def failed(self, failure: str) -> Plan:
        return _failed(self.config, failure, _held(self.program.arguments, self.program.in_shardings), self.common)


def _jobs(config: DistillConfig, topology: str, what: What | Whole, video: Video | None = None) -> list[_Job]:
    devices, chip = chips(topology)
    clip = _clip(config, video)
    generator = weightless_generator(config, architecture_of(config), clip, sharding.make_mesh(config.mesh, devices))
    config = shared_rewards(config, generator.mesh)
    generator = dataclasses.replace(generator, host=sharding.host_mesh(host_devices(topology, devices)))
    pixels = pixel_rewards(config.reward, load_rewards(config.reward.rewards), generator.frames)
    programs = programs_of(what, config, generator, pixels)
    jobs = []
    for program in programs:
        common: dict[str, Any] = {"what": what, "topology": topology, "chips": len(devices), "hbm_gib": chip.hbm_gib}
        common |= {"program": program.name, "remat": config.compute.remat, "kept_gib": _kept(what, program, programs)}
        common["videos"] = program.arguments[1].shape[0] if hasattr(program.arguments[1], "shape") else None
        common["mesh"] = dict(generator.mesh.shape if program.mesh is None else program.mesh.shape)
        common |= {"model_tflops": 0.0, "compile_seconds": 0.0}
        flops = functools.partial(step_flops, config, generator, pixels) if program.name == "step" else None
        jobs.append(_Job(program, config, chip, common, flops))
    return jobs


def search(config: DistillConfig, topology: str, what: What = "train", video: Video | None = None) -> Iterator[Plan]:
    """Plans of every mesh that makes sense and of the remat policies; tensor parallelism would save nothing beside."""
    count = len(chips(topology)[0])
    rows = config.batch_size // config.accumulation
    for context in (c for c in (1, 2, 4, 8, 16) if count % c == 0 and rows % (count // c) == 0):
        for remat in ("attention", "full") if what == "train" else (config.compute.remat,):
            mesh = {"data": 1, "fsdp": count // context, "context": context, "tensor": 1}
            yield plan(changed(config, {"mesh": mesh, "compute.remat": remat}), topology, what, video)


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """What fits first, the fastest bound first."""
    return sorted(plans, key=lambda p: (not p.fits, p.roofline_seconds or math.inf))


def parse_video(text: str) -> Video:
    """ "480x832x81": height, width, frames."""
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise ValueError(f"--video={text} is not HEIGHTxWIDTHxFRAMES")
    height, width, frames = (int(n) for n in text.split("x"))
    return height, width, frames


def table(plans: Sequence[Plan]) -> str:
    """The plans as lines of text, one column each."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    memories = ("argument", "output", "temp", "peak", "kept", "hbm")
    kinds = sorted({kind for p in plans for kind in p.collectives_gib or {}})
    rows = [
        ("program", [p.program + (f" × {p.videos}" if p.videos else "") for p in plans]),
        ("mesh", [",".join(f"{a}={n}" for a, n in p.mesh.items() if n > 1) or "1 chip" for p in plans]),
        ("remat", [p.remat for p in plans]),
        *((f"{name}, GiB", [number(getattr(p, f"{name}_gib")) for p in plans]) for name in memories),
        ("fits", ["yes" if p.fits else "NO" for p in plans]),
        ("model, TFLOP", [number(p.model_tflops) for p in plans]),
        ("compiled, TFLOP", [number(p.compiled_tflops) for p in plans]),
        *((f"{kind}, GiB", [number((p.collectives_gib or {}).get(kind)) for p in plans]) for kind in kinds),
        ("roofline, s", [number(p.roofline_seconds) for p in plans]),
        ("bound by", [p.bound or "–" for p in plans]),
        ("compiled in, s", [number(p.compile_seconds) for p in plans]),
    ]
    if len({p.program for p in plans}) > 1:  # a line for each
        wide = [max(len(cell) for cell in (name, *cells)) for name, cells in rows]
        turned = zip(*([name, *cells] for name, cells in rows), strict=True)
        lines = ["  ".join(f"{c:>{w}}" for c, w in zip(line, wide, strict=True)) for line in turned]
    else:
        width = max(max(len(cell) for _, cells in rows for cell in cells) + 2, 10)
        lines = [f"{name:20}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows]
    notes = [f"{p.program}: {n}" for p in plans for n in (*p.largest_buffers, p.advice, p.error) if n]
    return "\n".join([*lines, *notes])


def _clip(config: DistillConfig, video: Video | None) -> tuple[int, int, int]:
    """Frames, height, width; the data's own unless given."""
    if video is not None:
        height, width, frames = video
        return frames, height, width
    if config.data.name != MOVING_SHAPES and not Path(config.data.name).is_dir():
        raise ValueError(f"the data {config.data.name} is not there: give --video=HEIGHTxWIDTHxFRAMES")
    return clip_size(config.data)


def programs_of(what: str, config: DistillConfig, generator: Generator, pixels: PixelRewards | None) -> list[Program]:
    """The very programs that are executed, alone in batches of config.batch_size; raises ValueError as that would."""
    mesh, batch = generator.mesh, config.batch_size
    if what in ("train", "import", "run"):
        rewards = load_rewards(config.reward.rewards)
        programs = teacher_programs(config, generator, pixels, list(mesh.devices.flat))
        if what == "run":
            found = [*load_programs(config, generator), *run_programs(config, generator, programs, rewards)]
            return list({(p.name, str(p.arguments)): p for p in found}.values())
        # After an import: from the shards of the teacher, the state that training starts from.
        return [programs.step if what == "train" else programs.init]
    if what == "prepare":
        here = dataclasses.replace(generator, mesh=generator.own_mesh)
        return prepare_programs(here, generator.clip, here.mesh.size)
    if what in ("sample-command", "evaluate"):
        here = list(generator.own_mesh.devices.flat)
        here = dataclasses.replace(generator, mesh=sampling_mesh(config.mesh, here))
        if what == "sample-command":
            return draw_programs(here, config, 4, [len(config.student.timesteps)])
        known = [n for n in (4, 2, 1) if n <= len(config.student.timesteps)]
        features = here.encode_program((1, *here.clip, 3), here.own_mesh)
        return [*draw_programs(here, config, 16, known), features]
    sharding.check_batch(mesh, "batch_size", batch)
    if what == "sample":
        return [generator.student_sampler(config.student.timesteps).program(batch)]
    if what == "decode":
        return [generator.decode_program((batch, *generator.latent_shape), mesh)]
    if what == "text":
        return [generator.text_program(batch, mesh)]
    raise ValueError(f"--what={what} is none of {', '.join((*get_args(What), *get_args(Whole)))}")


def _roofline(used: Cost, chip: Chip) -> tuple[float, str]:
    """Seconds of the slowest of the three, and which it is."""
    times = {
        "matrix products": used.flops / (chip.tflops * 1e12),
        "memory": used.memory_bytes / (chip.memory_gbps * 1e9),
        "collectives": sum(used.collective_bytes.values()) / (chip.link_gbps * 1e9),
    }
    return max((seconds, name) for name, seconds in times.items())


def _kept(what: What | Whole, program: Program, programs: Sequence[Program]) -> float:
    """GiB of a device's memory that a command keeps beside a program's arguments, and perhaps some of those too."""
    if what == "run" and program.name not in ("init", "step"):
        return sum(_held(p.arguments, p.in_shardings) for p in programs if p.name == "step")
    if what == "prepare":
        others = {p.name: p for p in programs if p.name != program.name}.values()
        return sum(_held(p.arguments[:1], p.in_shardings[:1]) for p in others)
    return 0.0


def _held(arguments: Any, places: Any) -> float:
    """GiB of a device's memory that arguments take."""
    total = 0
    leaves = jax.tree.leaves(arguments)
    for leaf, where in zip(leaves, jax.tree.leaves(jax.tree.broadcast(places, arguments)), strict=True):
        # A key's type has no size of its own.
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(where.shard_shape(leaf.shape)) * size
    return total / GIB


def _failed(config: DistillConfig, failure: str, held: float, common: dict[str, Any]) -> Plan:
    """From the compiler's own account of what it refuses, or what does not fit."""
    too_large = "RESOURCE_EXHAUSTED" in failure
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0}
    # It names all that is used, or the temporaries alone.
    everything = re.search(r"Used ([\d.]+)([KMG]) of", failure)
    found = everything or re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", failure)
    used = float(found[1]) * units[found[2]] + (0.0 if everything else held) if found else None
    buffers = []
    for size, rest in re.findall(r"Size: ([\d.]+[KMG])(.*?)(?====|\Z)", failure, re.DOTALL):
        name, shape = re.search(r'op_name="([^"]*)"', rest), re.search(r"Shape: (\S+?)[{\s]", rest)
        buffers.append(f"{size:>8}  {shape[1] if shape else ''}  {name[1] if name else ''}".rstrip())
    said: Any = {"advice": _advice(config, held, common)} if too_large else {"error": failure.splitlines()[0]}
    sizes = {"argument_gib": held, "temp_gib": None if used is None else used - held, "peak_gib": used}
    return Plan(**common, **sizes, largest_buffers=buffers[:8], **said)


def _advice(config: DistillConfig, held: float, common: dict[str, Any]) -> str:
    if held > common["hbm_gib"] / 2:
        return "It is the state that fills the chip: a larger fsdp or context in --mesh shares it out further"
    if "vae" in common["program"] or "decode" in common["program"]:
        return "Decode fewer frames at a time: --config.compute.vae_chunk=1"
    if common["program"] == "step" and config.compute.remat == "none":
        return "Keep less of each block for the backward pass: --config.compute.remat=attention, or full"
    rows = config.batch_size // config.accumulation // (common["mesh"]["data"] * common["mesh"]["fsdp"])
    if rows > 1:
        return "Take fewer videos at a time: a larger --config.accumulation, or a smaller --config.batch_size"
    if common["program"] == "step" and config.compute.remat in ("dots", "attention"):
        return "Keep less of each block for the backward pass: --config.compute.remat=full"
    return "Share each video over more chips: a larger context in --mesh"
