"""`dollar plan`: the very programs that will run, compiled for TPU chips that need not be there. The times are bounds,
at the chips' peaks: `links.bounds`."""

import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, get_args

import jax

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, changed
from dollar_jax.data.latents import load_programs
from dollar_jax.flops import count_flops
from dollar_jax.generate import Generator, draw_programs, sampling_mesh
from dollar_jax.hlo import cost
from dollar_jax.models.attention import ContextParallel
from dollar_jax.plan.chips import Chip, chips, host_devices
from dollar_jax.plan.links import bounds
from dollar_jax.plan.teachers import architecture_of, clip_of, weightless_generator
from dollar_jax.prepare.shards import prepare_programs
from dollar_jax.program import Program
from dollar_jax.programs import run_programs, shared_rewards, step_flops, teacher_programs
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import PixelRewards, pixel_rewards

What = Literal["train", "sample", "decode", "text", "import"]
# A command with all that it executes.
Whole = Literal["run", "prepare", "teacher-samples", "sample-command", "evaluate"]
GIB = 2**30
TIMES = ("all hidden", "as scheduled", "nothing hidden")
# The compiler's effort of -1 to 1: the least is several times faster than its own, which a run has, makes no collective
# asynchronous, and may want less memory for it.
LOW, OWN = -1.0, 0.0
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
    accumulation: int = 1
    context_parallel: str = "gather"
    whole_teacher: bool = False
    argument_gib: float
    output_gib: float = 0.0
    temp_gib: float | None  # None where the compiler refuses or aborts
    peak_gib: float | None
    kept_gib: float  # beside the arguments: of a run its state and teacher, between two steps
    hbm_gib: float
    fits: bool = False
    model_tflops: float = 0.0
    compiled_tflops: float | None = None
    collectives_gib: dict[str, float] | None = None
    parts_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # TIMES: see links.bounds
    mfu: dict[str, float] = dataclasses.field(default_factory=dict)
    bound: str | None = None
    compile_seconds: float = 0.0
    largest_buffers: Sequence[str] = ()
    advice: str | None = None
    error: str | None = None

    @property
    def setting(self) -> dict[str, str]:
        """What a search tries."""
        mesh = ",".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "1 chip"
        ways = {"micro-batches": str(self.accumulation), "keys by": self.context_parallel}
        return {"mesh": mesh, **ways, "remat": self.remat, "teacher": "whole" if self.whole_teacher else "shared"}


def plans(
    config: DistillConfig, topology: str, what: What | Whole, video: Video | None = None, first: float = LOW
) -> Iterator[Plan]:
    """Of each program that is executed, as it is compiled for a topology such as "v5p:2x2x2"; `video` is height, width
    and frames, `first` the compiler's effort. By a process of its own: where the compiler aborts it is asked again at
    its own effort, and if it aborts then too, the plan says so. Raises ValueError for what cannot be asked."""
    aborted: list[Plan] | None = None
    done, effort = 0, first
    while aborted is None or done < len(aborted):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
            aborted = worker.submit(_load, config, topology, what, video).result()
            with contextlib.suppress(BrokenProcessPool):
                while done < len(aborted):
                    yield worker.submit(_plan, done, effort).result()
                    done, effort = done + 1, first
                return
        if effort != LOW:
            yield aborted[done]
        done, effort = (done, OWN) if effort == LOW else (done + 1, first)


_loaded: "list[_Job]" = []  # in a worker


def _load(*request: Any) -> list[Plan]:
    _loaded[:] = _jobs(*request)
    said = "the compiler aborts, or the host has not the memory for it: try another --mesh or --config.compute.remat"
    return [job.failed(said) for job in _loaded]


def _plan(index: int, effort: float) -> Plan:
    return _loaded[index].plan(effort)


@dataclasses.dataclass
class _Job:
    """A program to be compiled, and what is known of it before that."""

    program: Program
    config: DistillConfig
    chip: Chip
    common: dict[str, Any]
    flops: Callable[[], float] | None  # of all devices together; None for those that are traced

    def plan(self, effort: float = LOW) -> Plan:
        begun = time.perf_counter()
        assert self.program.mesh is not None
        devices = list(self.program.mesh.devices.flat)
        options: Any = {"exec_time_optimization_effort": effort} if devices[0].platform == "tpu" else None
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
        sizes = {"argument": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
        sizes["output"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak, room = getattr(memory, "peak_memory_in_bytes", 0), self.chip.hbm_gib - self.common["kept_gib"]
        fits = sum(sizes.values()) / GIB <= room
        if not fits and options and peak / GIB <= room:
            # The temporaries' sum counts memory that is used twice: the compiler is asked whether the same fits there.
            options["xla_tpu_max_hbm_size_mib"] = int(room * 1024)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                again = lowered.compile(compiler_options=options).memory_analysis()
                fits = again.temp_size_in_bytes == memory.temp_size_in_bytes
        found: Any = {f"{name}_gib": size / GIB for name, size in (sizes | {"peak": peak}).items()}
        found["collectives_gib"] = {kind: value / GIB for kind, value in used.collective_bytes.items()}
        found |= bounds(used, devices, self.chip, self.common["model_tflops"])
        return Plan(**(self.common | found), fits=fits, compiled_tflops=used.flops / 1e12)

    def failed(self, failure: str) -> Plan:
        """From the compiler's own account of what it refuses, or what does not fit."""
        units, held = {"K": 2**-20, "M": 2**-10, "G": 1.0}, self.common["argument_gib"]
        # It names all that is used, or the temporaries alone.
        everything = re.search(r"Used ([\d.]+)([KMG]) of", failure)
        found = everything or re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", failure)
        used = float(found[1]) * units[found[2]] + (0.0 if everything else held) if found else None
        buffers = []
        for size, rest in re.findall(r"Size: ([\d.]+[KMG])(.*?)(?====|\Z)", failure, re.DOTALL):
            name, shape = re.search(r'op_name="([^"]*)"', rest), re.search(r"Shape: (\S+?)[{\s]", rest)
            buffers.append(f"{size:>8}  {shape[1] if shape else ''}  {name[1] if name else ''}".rstrip())
        said: Any = {"peak_gib": used, "temp_gib": None if used is None else used - held}
        if "RESOURCE_EXHAUSTED" in failure:
            said["advice"] = _advice(self.config, self.common)
        else:
            said["error"] = failure.partition("\n")[0] or "the compiler gave no reason"
        return Plan(**self.common, **said, largest_buffers=buffers[:8])


def _jobs(config: DistillConfig, topology: str, what: What | Whole, video: Video | None = None) -> list[_Job]:
    devices, chip = chips(topology)
    clip = clip_of(config, video)
    generator = weightless_generator(config, architecture_of(config), clip, sharding.make_mesh(config.mesh, devices))
    config = shared_rewards(config, generator.mesh)
    generator = dataclasses.replace(generator, host=sharding.host_mesh(host_devices(topology, devices)))
    pixels = pixel_rewards(config.reward, load_rewards(config.reward.rewards), generator.frames)
    programs = programs_of(what, config, generator, pixels)
    jobs = []
    for program in programs:
        common: dict[str, Any] = {"what": what, "topology": topology, "chips": len(devices), "hbm_gib": chip.hbm_gib}
        common |= {"program": program.name, "accumulation": config.accumulation}
        common |= {name: getattr(config.compute, name) for name in ("remat", "context_parallel", "whole_teacher")}
        common["kept_gib"] = _kept(what, program, programs)
        common["videos"] = program.arguments[1].shape[0] if hasattr(program.arguments[1], "shape") else None
        common["mesh"] = dict(generator.mesh.shape if program.mesh is None else program.mesh.shape)
        common["argument_gib"] = _held(program.arguments, program.in_shardings)
        flops = functools.partial(step_flops, config, generator, pixels) if program.name == "step" else None
        jobs.append(_Job(program, config, chip, common, flops))
    return jobs


def search(
    config: DistillConfig, topology: str, what: What = "train", video: Video | None = None, first: float = LOW
) -> Iterator[Plan]:
    """Plans of every mesh and way of keys over its context axis; tensor parallelism would save nothing beside. A step's
    have the fewest micro-batches that fit, or fewer with all computed again. Last is the best with a whole teacher,
    and its state over all chips, a half and a quarter, while it fits. Each is made by a process of its own."""
    count, heads = len(chips(topology)[0]), architecture_of(config).transformer.num_attention_heads
    pieces, remats = sorted({1, 2, 4, 8, config.accumulation}), ("qkv", "attention", "full")
    if what != "train":
        pieces, remats = [config.accumulation], (config.compute.remat,)
    fewest, fitting = dict[Any, int](), list[tuple[Plan, dict[str, Any]]]()
    for context, way, remat, parts in itertools.product((1, 2, 4, 8, 16), get_args(ContextParallel), remats, pieces):
        fsdp, left = divmod(count, context)
        divides = not left and config.batch_size % (parts * fsdp) == 0
        divides &= way == "gather" or (context > 1 and heads % context == 0)
        divides &= remat != "qkv" or context > 1  # it spares sending them again
        if divides and parts < fewest.get((context, way), math.inf):
            mesh = {"data": 1, "fsdp": fsdp, "context": context, "tensor": 1}
            scored = math.gcd(config.batch_size // parts, math.lcm(config.reward.samples, fsdp))
            changes = {"mesh": mesh, "accumulation": parts, "reward.samples": scored}
            changes |= {"compute.remat": remat, "compute.context_parallel": way}
            (found,) = plans(changed(config, changes), topology, what, video, first)
            fewest |= {(context, way): parts} if found.fits else {}
            fitting += [(found, changes)] if found.fits else []
            yield found
    if what == "train" and fitting:
        found, changes = min(fitting, key=lambda x: x[0].seconds["as scheduled"])
        mesh = changes["mesh"]
        for data in (1, 2, 4)[config.compute.whole_teacher :]:  # the first of which would be the best itself again
            if not found.fits or mesh["fsdp"] % data:
                break
            more = {"mesh": mesh | {"data": data, "fsdp": mesh["fsdp"] // data}, "compute.whole_teacher": True}
            (found,) = plans(changed(config, changes | more), topology, what, video, first)
            yield found


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """What fits first, the fastest first where only what is asynchronous is hidden."""
    return sorted(plans, key=lambda p: (not p.fits, p.seconds.get("as scheduled", math.inf)))


def why(ranked: Sequence[Plan]) -> str:
    """A sentence: what makes the first of ranked plans the first."""
    fitting = [p for p in ranked if p.fits][:2]
    settings = [", ".join(f"{name} {value}" for name, value in p.setting.items()) for p in fitting]
    told = [f"{setting}: {p.seconds['as scheduled']:.3g} s" for setting, p in zip(settings, fitting, strict=True)]
    if len(told) < 2:
        return f"only one fits, {told[0]}" if told else "none fits: take more chips, or fewer videos to a step"
    now, then = (p.parts_seconds for p in fitting)
    worse = max(now, key=lambda part: then[part] - now[part])
    return f"best is {told[0]}; next {told[1]}, its {worse} {then[worse]:.3g} s in place of {now[worse]:.3g}"


def parse_video(text: str) -> Video:
    """ "480x832x81": height, width, frames."""
    if (found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)) is None:
        raise ValueError(f"--video={text} is not HEIGHTxWIDTHxFRAMES")
    return int(found[1]), int(found[2]), int(found[3])


def table(plans: Sequence[Plan]) -> str:
    """The plans as lines of text, those of one program as a column each."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    def cells(p: Plan) -> dict[str, str]:
        memories = {f"{n}, GiB": getattr(p, f"{n}_gib") for n in ("argument", "output", "temp", "peak", "kept", "hbm")}
        work = {"model, TFLOP": p.model_tflops, "compiled, TFLOP": p.compiled_tflops}
        work |= {f"{kind}, GiB": (p.collectives_gib or {}).get(kind) for kind in kinds}
        work |= {f"{name}, s": p.seconds.get(name) for name in TIMES}
        found = {"program": p.program + (f" × {p.videos}" if p.videos else ""), **p.setting}
        found |= {name: number(gib) for name, gib in memories.items()} | {"fits": "yes" if p.fits else "NO"}
        found |= {name: number(value) for name, value in work.items()}
        found["MFU of these, %"] = "/".join(f"{100 * mfu:.0f}" for mfu in p.mfu.values()) or "–"
        return found | {"bound by": p.bound or "–", "compiled in, s": number(p.compile_seconds)}

    kinds = sorted({kind for p in plans for kind in p.collectives_gib or {}})
    rows = [list(cells(plans[0])), *(list(cells(p).values()) for p in plans)]
    if len({p.program for p in plans}) == 1:
        rows = list(zip(*rows, strict=True))
    wide = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, wide, strict=True)) for row in rows]
    notes = [f"{p.program}: {n}" for p in plans for n in (*p.largest_buffers, p.advice, p.error) if n]
    return "\n".join([*lines, *notes])


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
    if what in ("prepare", "teacher-samples"):
        here = dataclasses.replace(generator, mesh=generator.own_mesh)
        sampling = config.sampling if what == "teacher-samples" else None
        return prepare_programs(here, generator.clip, here.mesh.size, sampling)
    if what in ("sample-command", "evaluate"):
        here = list(generator.own_mesh.devices.flat)
        here = dataclasses.replace(generator, mesh=sampling_mesh(config.mesh, here))
        if what == "sample-command":
            return draw_programs(here, config, 4, [len(config.student.timesteps)])
        known = [n for n in (4, 2, 1) if n <= len(config.student.timesteps)]
        return [*draw_programs(here, config, 16, known), here.encode_program((1, *here.clip, 3), here.own_mesh)]
    sharding.check_batch(mesh, "batch_size", batch)
    if what == "sample":
        return [generator.student_sampler(config.student.timesteps).program(batch)]
    if what == "decode":
        return [generator.decode_program((batch, *generator.latent_shape), mesh)]
    assert what == "text"
    return [generator.text_program(batch, mesh)]


def _kept(what: What | Whole, program: Program, programs: Sequence[Program]) -> float:
    """GiB of a device's memory that a command keeps beside a program's arguments, and perhaps some of those too."""
    if what == "run" and program.name not in ("init", "step"):
        return sum(_held(p.arguments, p.in_shardings) for p in programs if p.name == "step")
    if what in ("prepare", "teacher-samples"):
        others = {p.name: p for p in programs if p.name != program.name}.values()
        return sum(_held(p.arguments[:1], p.in_shardings[:1]) for p in others)
    return 0.0


def _held(arguments: Any, places: Any) -> float:
    """GiB of a device's memory that arguments take."""
    leaves = zip(jax.tree.leaves(arguments), jax.tree.leaves(jax.tree.broadcast(places, arguments)), strict=True)
    return sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in leaves) / GIB


def _advice(config: DistillConfig, common: dict[str, Any]) -> str:
    if common["argument_gib"] > common["hbm_gib"] / 2:
        whole = " (and --config.compute.whole_teacher=False)" * config.compute.whole_teacher
        return f"It is the state that fills the chip: a larger fsdp or context in --mesh{whole} shares it out further"
    if ("vae" in common["program"] or "decode" in common["program"]) and config.compute.vae_chunk != 1:
        return "Decode fewer frames at a time: --config.compute.vae_chunk=1"
    if common["program"] == "step" and config.compute.remat == "none":
        return "Keep less of each block for the backward pass: --config.compute.remat=attention, or full"
    rows = config.batch_size // config.accumulation // (common["mesh"]["data"] * common["mesh"]["fsdp"])
    if rows > 1:
        return "Take fewer videos at a time: a larger --config.accumulation, or a smaller --config.batch_size"
    if common["program"] == "step" and config.compute.remat in ("dots", "qkv", "attention"):
        return "Keep less of each block for the backward pass: --config.compute.remat=full"
    return "Share each video over more chips: a larger context in --mesh"
