"""`dollar plan`: the very program that will run, compiled for TPU chips that need not be there.

Memory is what the compiler assigns. The time is a bound, not a forecast: the slowest of matrix products
at the chip's peak, of memory traffic and of collectives at their bandwidths, as if all three overlapped.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dollar_jax import sampling, sharding
from dollar_jax.config import DistillConfig, MeshConfig
from dollar_jax.data.clip import MOVING_SHAPES, clip_size
from dollar_jax.flops import count_flops
from dollar_jax.generate import decode_frames, teacher_folder, transformer_options
from dollar_jax.hlo import Cost, cost
from dollar_jax.objectives import Frozen
from dollar_jax.program import build_program
from dollar_jax.rewards import load_rewards
from dollar_jax.rewards.pixels import pixel_rewards
from dollar_jax.weights.families import PUBLISHED, Architecture
from dollar_jax.weights.pipeline import read_architecture

What = Literal["train", "sample", "decode", "text", "import"]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip: memory its compiler hands out, bf16 peak, bandwidth of memory and of all its links."""

    hbm_gib: float
    tflops: float
    memory_gbps: float
    link_gbps: float


# https://cloud.google.com/tpu/docs/v5e, v5p and v6e; the memory as libtpu reports it.
CHIPS = {"v5e": Chip(15.75, 197, 819, 200), "v5p": Chip(95.74, 459, 2765, 600), "v6e": Chip(31.25, 918, 1640, 448)}


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
    architecture = _architecture(config)
    clip = _clip(config, video)
    function, arguments, placed, mesh = _program(what, config, architecture, clip, devices)
    begun = time.perf_counter()
    compiled, failure = None, ""
    try:
        compiled = function.lower(*arguments).compile(
            # Several times faster to compile, and hardly different in memory.
            compiler_options={"exec_time_optimization_effort": -1.0} if devices[0].platform == "tpu" else None
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
        "mesh": dict(mesh.shape),
        "remat": config.compute.remat,
        "hbm_gib": chip.hbm_gib,
        "compile_seconds": seconds,
        "model_tflops": _model_flops(what, config, architecture, clip) / len(devices) / 1e12,
    }
    if compiled is None:
        places = jax.tree.leaves(jax.tree.broadcast(placed, arguments))
        pairs = zip(jax.tree.leaves(arguments), places, strict=True)
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


def chips(topology: str) -> tuple[Sequence[Any], Chip]:
    """The devices of a topology, and what each can do."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise ValueError(f"--topology={topology} is none that is known: v5e:4x4, v6e:8x8 and v5p:2x2x2 are of its kind")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Otherwise a second process of this kind would end with an abort.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        raise ValueError(f"libtpu does not know --topology={topology}: {str(error).splitlines()[0]}") from error
    return description.devices, CHIPS[kind]


def parse_mesh(text: str) -> MeshConfig:
    """ "fsdp=16,context=4"; `data` takes the rest unless it is named, the others are 1."""
    sizes = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdigit():
            raise ValueError(f"--mesh={text}: {part!r} is not one of data, fsdp, context and tensor with its size")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


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


def _architecture(config: DistillConfig) -> Architecture:
    folder = teacher_folder(config.teacher)
    if (folder / "model_index.json").is_file():
        return read_architecture(folder)
    if folder.name not in PUBLISHED:
        raise ValueError(
            f"the teacher {config.teacher} is not there; without it only these can be planned: {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[folder.name]


def _clip(config: DistillConfig, video: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Frames, height, width; the data's own unless given."""
    if video is not None:
        height, width, frames = video
        return frames, height, width
    if config.data.name != MOVING_SHAPES and not Path(config.data.name).is_dir():
        raise ValueError(f"the data {config.data.name} is not there: give --video=HEIGHTxWIDTHxFRAMES")
    return clip_size(config.data)


def _program(
    what: What, config: DistillConfig, a: Architecture, clip: tuple[int, int, int], devices: Sequence[Any]
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], Any]:
    """The jitted function, the shapes it is called with, where these lie, and its mesh."""
    latent = a.vae.latent_shape(*clip)
    length, batch = config.data.max_text_length, config.batch_size
    text = (length, a.text_encoder.d_model)
    compute = config.compute
    # As `generate.load_teacher` builds it.
    computed = {"param_dtype": compute.teacher_dtype, **transformer_options(compute)}
    transformer = a.family.transformer.network(dataclasses.replace(a.transformer, **computed))
    vae = a.family.vae.network(a.vae)
    frames = functools.partial(decode_frames, vae, a.vae, compute.vae_chunk)

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    if what in ("train", "import"):
        pixels = pixel_rewards(config.reward, load_rewards(config.reward.rewards), frames)
        p = build_program(config, transformer, a.schedule, latent, text, devices, pixels)
        if what == "import":  # from the shards of the imported teacher, the state that training starts from
            places = (sharding.replicated(p.mesh), p.frozen_sharding.teacher)
            arguments = (jax.eval_shape(jax.random.key, 0), transformer.shapes)
            return jax.jit(p.init, in_shardings=places, out_shardings=p.state_sharding), arguments, places, p.mesh
        reward = () if pixels is None else pixels.params(vae.shapes)
        reward = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), reward)
        frozen = Frozen(transformer.shapes, shape(1, *text), reward)
        places = (p.state_sharding, p.frozen_sharding, p.batch_sharding)
        return p.step, (p.state_shapes, frozen, p.batch_shapes), places, p.mesh

    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(mesh, "batch_size", batch)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    if what == "sample":

        def draw(params: Any, noise: Any, text: Any) -> Any:
            return sampling.few_step_sample(
                transformer.apply, params, a.schedule, config.student.timesteps, noise, text, jax.random.key(0)
            )

        weights, given = transformer.shapes, (shape(batch, *latent), shape(batch, *text))
        function, placed = draw, sharding.shard(mesh, weights)
    elif what == "decode":
        weights, given = vae.shapes, (shape(batch, *latent),)
        function, placed = frames, whole
    elif what == "text":
        encoder = a.family.text_encoder.network(dataclasses.replace(a.text_encoder, param_dtype=compute.teacher_dtype))
        weights, function = encoder.shapes, encoder.apply
        given = (shape(batch, length, dtype=jnp.int32),) * 2
        placed = sharding.shard(mesh, weights)
    else:
        raise ValueError(f"--what={what} is none of {', '.join(get_args(What))}")
    places = (placed, *[rows] * len(given))
    jitted = jax.jit(sharding.with_mesh(mesh, function), in_shardings=places, out_shardings=rows)
    return jitted, (weights, *given), places, mesh


def _model_flops(what: What, config: DistillConfig, a: Architecture, clip: tuple[int, int, int]) -> float:
    """Of all chips together: the program's own matrix products, none of them done twice."""
    plain = dataclasses.replace(
        config,
        mesh=MeshConfig(1, 1, 1, 1),
        compute=dataclasses.replace(config.compute, remat="none", attention="xla", vae_chunk=None),
    )
    function, arguments, *_ = _program(what, plain, a, clip, jax.local_devices(backend="cpu")[:1])
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


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
