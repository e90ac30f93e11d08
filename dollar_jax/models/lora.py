"""Low-rank adapters (LoRA, arXiv 2106.09685): an `adapter` in each adapted dense layer of a network's nested dict."""

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dollar_jax.models.layers import Adapter, Linear
from dollar_jax.models.network import Network, make_network
from dollar_jax.types import Params

NAME = "adapter"


def adapt(network: Network, rank: int, alpha: float, targets: Sequence[str]) -> Network:
    """The network with adapters of `rank`, scaled by alpha / rank, on the dense layers whose whole path, such as
    `blocks/attn1/to_q`, a regular expression of `targets` matches; ValueError for one that matches none."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = network.build(rngs)
        layers = {"/".join(map(str, path)): part for path, part in nnx.iter_modules(module)}
        dense = {path: part for path, part in layers.items() if isinstance(part, Linear)}
        for target in targets:
            try:
                found = [part for path, part in dense.items() if re.fullmatch(target, path)]
            except re.error as error:
                raise ValueError(f"config.lora.targets: {target!r} is no regular expression: {error}") from error
            if not found:
                known = ", ".join(sorted(dense))
                raise ValueError(f"config.lora.targets: {target!r} names no dense layer; there are {known}")
            for part in found:
                *stack, dim_in, dim_out = part.kernel.shape
                if rank > min(dim_in, dim_out):
                    raise ValueError(f"config.lora.rank {rank} is more than a layer of {dim_in} × {dim_out} has")
                part.adapter = Adapter(tuple(stack), dim_in, dim_out, rank, alpha / rank, rngs)
        return module

    return make_network(build)


def adapters(params: Params) -> Params:
    """Only the adapters of parameters that have some."""
    return unflatten_dict({path: value for path, value in flatten_dict(params).items() if NAME in path})


def combine(params: Params, adapters: Params) -> Params:
    """The network's own parameters with the adapters put in."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapters))


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """fp32 parameters without adapters that compute the same: W + scale · D U; `scale` is alpha / rank."""
    merged: dict[str, Any] = {}
    for name, value in params.items():
        inside = adapters.get(name, {})
        merged[name] = merge(value, inside, scale) if isinstance(value, dict) else jnp.asarray(value, "float32")
    if NAME in adapters:
        low = adapters[NAME]
        merged["kernel"] += scale * jnp.matmul(low["down"], low["up"], precision="highest")
    return merged
