"""TPU chips that need not be there: what each can do, and the devices of a topology of them."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from dollar_jax.config import MeshConfig
from dollar_jax.files import first_line
from dollar_jax.flops import HBM_GIB, PEAK_TFLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one device, a chip or half of one: memory its compiler hands out, bf16 peak, memory bandwidth; what one of the
    chip's links carries one way, and whether its slices are made of cubes of 4 × 4 × 4 chips."""

    hbm_gib: float
    tflops: float
    memory_gbps: float
    link_gbps: float
    cubes: bool


# https://cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, whose chips are two devices. Of a chip's "bidirectional ICI
# bandwidth" each of four links, or six in three dimensions, has half its share one way.
CHIPS = {
    "v5e": Chip(HBM_GIB["TPU v5 lite"], PEAK_TFLOPS["TPU v5 lite"], 819, 400 / 4 / 2, False),
    "v5p": Chip(HBM_GIB["TPU v5"], PEAK_TFLOPS["TPU v5"], 2765, 1200 / 6 / 2, True),
    "v6e": Chip(HBM_GIB["TPU v6 lite"], PEAK_TFLOPS["TPU v6 lite"], 1640, 800 / 4 / 2, False),
    "tpu7x": Chip(HBM_GIB["TPU7x"], PEAK_TFLOPS["TPU7x"], 3690, 1200 / 6 / 2, True),
}


def chips(topology: str) -> tuple[Sequence[Any], Chip]:
    """The devices of a topology, and what each can do."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        known = "v5e:4x4, v6e:8x8, v5p:2x2x2 and tpu7x:2x2x1 are of its kind"
        raise ValueError(f"--topology={topology} is none that is known: {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[plan]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Otherwise a second process of this kind would end with an abort.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        raise ValueError(f"libtpu does not know --topology={topology}: {first_line(error)}") from error
    return description.devices, CHIPS[kind]


def host_devices(topology: str, devices: Sequence[Any]) -> Sequence[Any]:
    """The devices of one host, as a topology of their own: for some of a larger one libtpu 0.0.42 aborts."""
    if len({device.process_index for device in devices}) == 1:
        return devices
    kind, _, shape = topology.partition(":")
    return chips(f"{kind}:2x2{'x1' * (shape.count('x') - 1)}")[0]


def parse_mesh(text: str) -> MeshConfig:
    """ "fsdp=16,context=4"; `data` takes the rest unless it is named, the others are 1."""
    sizes = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if f"{axis}=" in text.partition(part)[0]:
            raise ValueError(f"--mesh={text} says {axis} twice")
        if axis not in sizes or not size.isdigit():
            raise ValueError(f"--mesh={text}: {part!r} is not one of data, fsdp, context and tensor with its size")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
