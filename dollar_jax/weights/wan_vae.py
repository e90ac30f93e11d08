"""diffusers' `AutoencoderKLWan` ↔ `WanVAE`."""

from typing import Any

from flax.traverse_util import flatten_dict

from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import CONV, SAME, Params, Row, Transform


def wan_vae_table(shapes: Params) -> list[Row]:
    """One row per parameter; names differ only in the leaves and the layers of `resample`."""
    rows = []
    for path in flatten_dict(shapes, sep="/"):
        parent, leaf = path.rsplit("/", 1)
        source = parent.replace("/", ".")
        if source.endswith("resample"):
            source += ".1"  # [0] is the padding or the nearest-neighbour upsampling
        if leaf == "gamma":
            in_attention = "attentions" in parent or parent.endswith("/norm")
            rows.append(Row(f"{source}.gamma", path, _gamma(2 if in_attention else 3)))
        else:
            name, transform = {"kernel": ("weight", CONV), "bias": ("bias", SAME)}[leaf]
            rows.append(Row(f"{source}.{name}", path, transform))
    return rows


def _gamma(axes: int) -> Transform:
    return Transform(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *[1] * axes))


_MORE: Any = {"table": lambda config, shapes: wan_vae_table(shapes), "fixed": {"dropout": 0.0}}
_MORE |= {"note": "only the VAEs of Wan 2.1 and Wan 2.2 are supported"}
_MORE |= {"required": frozenset({"base_dim", "z_dim", "dim_mult", "latents_mean", "latents_std"})}
WAN_VAE = Kind("diffusers", "AutoencoderKLWan", WanVAEConfig, WanVAE, **_MORE)
