"""Floating-point operations: what a device can do, what a program asks for, and the share of a run in between."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dollar_jax.models.embeddings import UNASKED

# Dense bf16 TFLOP/s per device, by JAX's name of the device, as its vendor states them; the TPUs' at
# https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, whose chips are two devices.
PEAK_TFLOPS = {"TPU v4": 275.0, "TPU v5 lite": 197.0, "TPU v5": 459.0, "TPU v6 lite": 918.0, "TPU7x": 1153.5}
PEAK_TFLOPS |= {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}

# What the TPU's compiler hands out of a device's memory, as libtpu says.
HBM_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}

# The share of a kernel's products that is not made for the second time: k qᵀ is.
NEW = {"splash_mha_dkv": 4 / 5}


class Throughput(NamedTuple):
    """`flops` of one step on all devices together; None where they, or the devices' peak, are not known."""

    batch_size: int
    flops: float | None
    peak: float | None  # FLOP/s of all devices together

    def __call__(self, seconds_per_step: float) -> dict[str, float]:
        """Rates per second, and the model FLOPs utilisation `mfu` in [0, 1] where it can be known."""
        rates = {"videos_per_second": self.batch_size / seconds_per_step}
        if self.flops and self.peak:
            rates["tflops_per_second"] = self.flops / seconds_per_step / 1e12
            rates["mfu"] = self.flops / seconds_per_step / self.peak
        return rates


def count_flops(jaxpr: Any) -> float:
    """Twice the multiplications of a jaxpr's matrix products and convolutions. A scan's body counts by its length, of a
    condition the dearest branch, a while loop's body once, what is mapped over shards on every device, a Pallas kernel
    by its grid; of splash attention's backward kernels, not the products that the forward one has made, and none of
    those in the scope `UNASKED`."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if UNASKED in str(eqn.source_info.name_stack):
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted], dtype=float)
            total += 2 * eqn.outvars[0].aval.size * depth
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec
            total += 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[spec[0]]
        elif eqn.primitive.name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = 1.0
            if eqn.primitive.name == "scan":
                times = eqn.params["length"]
            elif eqn.primitive.name == "shard_map":
                times = eqn.params["mesh"].size
            elif eqn.primitive.name == "pallas_call":
                times = math.prod(eqn.params["grid_mapping"].grid)
                times *= next((share for name, share in NEW.items() if name in str(eqn.params.get("name"))), 1.0)
            inner = [leaf for value in eqn.params.values() for leaf in jax.tree.leaves(value, is_leaf=_is_jaxpr)]
            total += times * sum(count_flops(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x))
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
