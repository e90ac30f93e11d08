"""`dollar plan`: the very program that will run, compiled for TPU chips that need not be there.

Memory is what the compiler assigns. The time is a bound, not a forecast: the slowest of matrix products
at the chip's peak, of memory traffic and of collectives at their bandwidths, as if all three overlapped.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, MeshConfig
from dollar_jax.data.clip import MOVING_SHAPES, clip_size
from dollar_jax.flops import count_flops
from dollar_jax.hlo import Cost, cost
from dollar_jax.plan.chips import Chip, chips
from dollar_jax.plan.teachers import architecture_of, weightless_generator
from dollar_jax.program import Program
from dollar_jax.programs import train_programs
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.weights.families import Architecture

What = Literal["train", "sample", "decode", "text", "import"]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Per chip and step. What could not be compiled for want of memory has no operations and no time."""

    what: str
    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    host_gib: float  # of arguments in the host's memory
    argument_gib: float
    output_gib: float
    temp_gib: float
    peak_gib: float
    hbm_gib: float
    fits: bool
    model_tflops: float
    compiled_tflops: float | None
    collective_gib: float | None
    collectives_gib: dict[str, float] | None
    roofline_seconds: float | None
    bound: str | None
    compile_seconds: float
    largest_buffers: list[str]
    advice: str | None


def plan(config: DistillConfig, topology: str, what: What = "train", video: tuple[int, int, int] | None = None) -> Plan:
    """Compiles for a topology such as "v5p:2x2x2"; `video` is height, width and frames, unless the data's own.

    Raises ValueError when the TPU compiler is missing, or for a topology, mesh or teacher that cannot be.
    """
    devices, chip = chips(topology)
    architecture = architecture_of(config)
    clip = _clip(config, video)
    program = program_of(what, config, architecture, clip, devices)
    begun = time.perf_counter()
    compiled, failure = None, ""
    try:
        compiled = (
            program.trace()
            .lower()
            .compile(
                # Several times faster to compile, and hardly different in memory.
                compiler_options={"exec_time_optimization_effort": -1.0} if devices[0].platform == "tpu" else None
            )
        )
    except jax.errors.JaxRuntimeError as error:
        failure = str(error)
        if "RESOURCE_EXHAUSTED" not in failure:
            raise ValueError(f"the compiler refuses this program: {failure.splitlines()[0]}") from error
    seconds = time.perf_counter() - begun

    common: dict[str, Any] = {
        "what": what,
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(program.mesh.shape) if program.mesh else {},
        "remat": config.compute.remat,
        "hbm_gib": chip.hbm_gib,
        "compile_seconds": seconds,
        "model_tflops": _model_flops(what, config, architecture, clip) / len(devices) / 1e12,
    }
    if compiled is None:
        places = jax.tree.leaves(jax.tree.broadcast(program.in_shardings, program.arguments))
        pairs = zip(jax.tree.leaves(program.arguments), places, strict=True)
        held = sum(_local_bytes(x, where) for x, where in pairs if where.memory_kind != "pinned_host") / GIB
        return _too_large(config, failure, held, common)
    memory = compiled.memory_analysis()
    argument, temp = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    output = (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB
    used = cost(compiled.as_text())
    roofline, bound = _roofline(used, chip)
    return Plan(
        **common,
        host_gib=memory.host_argument_size_in_bytes / GIB,
        argument_gib=argument,
        output_gib=output,
        temp_gib=temp,
        peak_gib=getattr(memory, "peak_memory_in_bytes", 0) / GIB,
        fits=argument + output + temp <= chip.hbm_gib,
        compiled_tflops=used.flops / 1e12,
        collective_gib=sum(used.collective_bytes.values()) / GIB,
        collectives_gib={kind: value / GIB for kind, value in used.collective_bytes.items()},
        roofline_seconds=roofline,
        bound=bound,
        largest_buffers=[],
        advice=None,
    )


def search(
    config: DistillConfig, topology: str, what: What = "train", video: tuple[int, int, int] | None = None
) -> Iterator[Plan]:
    """Plans of every mesh that makes sense, and of the policies of rematerialisation, as they are compiled.

    Tensor parallelism is left out: rows, parameters and tokens shared out leave nothing for it to save.
    """
    count = len(chips(topology)[0])
    rows = config.batch_size // config.accumulation
    for context in (c for c in (1, 2, 4, 8, 16) if count % c == 0 and rows % (count // c) == 0):
        for remat in ("attention", "full") if what == "train" else (config.compute.remat,):
            yield plan(
                dataclasses.replace(
                    config,
                    mesh=MeshConfig(1, count // context, context, 1),
                    compute=dataclasses.replace(config.compute, remat=remat),
                ),
                topology,
                what,
                video,
            )


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """What fits first, the fastest bound first."""
    return sorted(plans, key=lambda p: (not p.fits, p.roofline_seconds or math.inf))


def parse_video(text: str) -> tuple[int, int, int]:
    """ "480x832x81": height, width, frames."""
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise ValueError(f"--video={text} is not HEIGHTxWIDTHxFRAMES")
    height, width, frames = (int(n) for n in text.split("x"))
    return height, width, frames


def table(plans: Sequence[Plan]) -> str:
    """The plans as lines of text, one column each."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    rows = [
        ("mesh", [",".join(f"{a}={n}" for a, n in p.mesh.items() if n > 1) or "1 chip" for p in plans]),
        ("remat", [p.remat for p in plans]),
        *(
            (f"{name}, GiB", [number(getattr(p, f"{name}_gib")) for p in plans])
            for name in ("host", "argument", "output", "temp", "peak", "hbm")
        ),
        ("fits", ["yes" if p.fits else "NO" for p in plans]),
        ("model, TFLOP", [number(p.model_tflops) for p in plans]),
        ("compiled, TFLOP", [number(p.compiled_tflops) for p in plans]),
        *(
            (f"{kind}, GiB", [number((p.collectives_gib or {}).get(kind)) for p in plans])
            for kind in sorted({kind for p in plans for kind in p.collectives_gib or {}})
        ),
        ("roofline, s", [number(p.roofline_seconds) for p in plans]),
        ("bound by", [p.bound or "–" for p in plans]),
        ("compiled in, s", [number(p.compile_seconds) for p in plans]),
    ]
    wide = max(max(len(cell) for _, cells in rows for cell in cells) + 2, 10)
    lines = [f"{name:20}" + "".join(f"{cell:>{wide}}" for cell in cells) for name, cells in rows]
    notes = [note for p in plans for note in (*p.largest_buffers, p.advice) if note]
    return "\n".join([*lines, *notes])


# --- what is compiled -----------------------------------------------------------------------------


def _clip(config: DistillConfig, video: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Frames, height, width; the data's own unless given."""
    if video is not None:
        height, width, frames = video
        return frames, height, width
    if config.data.name != MOVING_SHAPES and not Path(config.data.name).is_dir():
        raise ValueError(f"the data {config.data.name} is not there: give --video=HEIGHTxWIDTHxFRAMES")
    return clip_size(config.data)


def program_of(
    what: What, config: DistillConfig, architecture: Architecture, clip: tuple[int, int, int], devices: Sequence[Any]
) -> Program:
    """The very program that the run executes, for batches of config.batch_size; raises ValueError as that would."""
    mesh = sharding.make_mesh(config.mesh, devices)
    generator = weightless_generator(config, architecture, clip, mesh)
    pipeline, batch = generator.pipeline, config.batch_size
    if what in ("train", "import"):
        pixels = pixel_rewards(config.reward, load_rewards(config.reward.rewards), generator.frames)
        programs = train_programs(
            config,
            pipeline.transformer.network,
            pipeline.schedule,
            generator.latent_shape,
            generator.text_shape,
            devices,
            pixels,
            decoder=pipeline.vae.network.shapes,
        )
        # After an import: from the shards of the teacher, the state that training starts from.
        return programs.step if what == "train" else programs.init
    sharding.check_batch(mesh, "batch_size", batch)
    if what == "sample":
        return generator.student_sampler(config.student.timesteps).program(batch)
    if what == "decode":
        return generator.decode_program((batch, *generator.latent_shape), mesh)
    if what == "text":
        return generator.text_program(batch, mesh)
    raise ValueError(f"--what={what} is none of {', '.join(get_args(What))}")


def _model_flops(what: What, config: DistillConfig, a: Architecture, clip: tuple[int, int, int]) -> float:
    """Of all chips together: the program's own matrix products, none of them done twice."""
    plain = dataclasses.replace(
        config,
        mesh=MeshConfig(1, 1, 1, 1),
        compute=dataclasses.replace(config.compute, remat="none", attention="xla", vae_chunk=None),
    )
    program = program_of(what, plain, a, clip, jax.local_devices(backend="cpu")[:1])
    return count_flops(program.trace().jaxpr.jaxpr)


# --- what comes out -------------------------------------------------------------------------------


def _roofline(used: Cost, chip: Chip) -> tuple[float, str]:
    """Seconds of the slowest of the three, and which it is."""
    times = {
        "matrix products": used.flops / (chip.tflops * 1e12),
        "memory": used.memory_bytes / (chip.memory_gbps * 1e9),
        "collectives": sum(used.collective_bytes.values()) / (chip.link_gbps * 1e9),
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def _local_bytes(leaf: Any, where: Any) -> int:
    # A key's type has no size of its own.
    size = leaf.dtype.itemsize if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8
    return math.prod(where.shard_shape(leaf.shape)) * size


def _too_large(config: DistillConfig, failure: str, held: float, common: dict[str, Any]) -> Plan:
    """From the compiler's own account of what does not fit."""
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0}
    # It names all that is used, or the temporaries alone.
    everything = re.search(r"Used ([\d.]+)([KMG]) of", failure)
    found = everything or re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", failure)
    used = float(found[1]) * units[found[2]] if found else math.nan
    used += 0.0 if everything else held
    buffers = []
    for size, rest in re.findall(r"Size: ([\d.]+[KMG])(.*?)(?====|\Z)", failure, re.DOTALL):
        name, shape = re.search(r'op_name="([^"]*)"', rest), re.search(r"Shape: (\S+?)[{\s]", rest)
        buffers.append(f"{size:>8}  {shape[1] if shape else ''}  {name[1] if name else ''}".rstrip())
    return Plan(
        **common,
        host_gib=0.0,
        argument_gib=held,
        output_gib=0.0,
        temp_gib=used - held,
        peak_gib=used,
        fits=False,
        compiled_tflops=None,
        collective_gib=None,
        collectives_gib=None,
        roofline_seconds=None,
        bound=None,
        largest_buffers=buffers[:8],
        advice=_advice(config, held, common),
    )


def _advice(config: DistillConfig, held: float, common: dict[str, Any]) -> str:
    if held > common["hbm_gib"] / 2:
        return "It is the state that fills the chip: a larger fsdp or context in --mesh shares it out further"
    if common["what"] == "decode":
        return "Decode fewer frames at a time: --config.compute.vae_chunk=1"
    if common["what"] == "train" and config.compute.remat == "none":
        return "Keep less of each block for the backward pass: --config.compute.remat=attention, or full"
    rows = config.batch_size // config.accumulation // (common["mesh"]["data"] * common["mesh"]["fsdp"])
    if rows > 1:
        return "Take fewer videos at a time: a larger --config.accumulation, or a smaller --config.batch_size"
    if common["what"] == "train" and config.compute.remat in ("dots", "attention"):
        return "Keep less of each block for the backward pass: --config.compute.remat=full"
    return "Share each video over more chips: a larger context in --mesh"
