"""diffusers' `AutoencoderKLWan` ↔ `WanVAE`, and its `AutoencoderKLCogVideoX` ↔ `CogVideoXVAE`."""

from collections.abc import Callable
from typing import Any, cast

from flax.traverse_util import flatten_dict

from dollar_jax.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import CONV, SAME, Params, Row, Transform

# Convolutions of one pixel: [out, in, 1, 1, 1] ↔ the dense [in, out].
_POINTWISE = Transform(lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None])
# What the file has inside of these; `resample.0` is the padding or the nearest-neighbour upsampling.
_INSIDE = {"resample": ["1"], "conv_y": ["conv"], "conv_b": ["conv"]}


def vae_table(shapes: Params) -> list[Row]:
    """One row per parameter; names differ only in the leaves and in the layers that hold one more."""
    rows = []
    for path, array in cast(dict[str, Any], flatten_dict(shapes, sep="/")).items():
        *modules, leaf = path.split("/")
        transform = SAME
        if leaf == "gamma":
            ones = [1] * (2 if "attentions" in modules else 3)
            transform = Transform(lambda x: x.reshape(-1), lambda x, ones=ones: x.reshape(-1, *ones))
        elif leaf == "kernel":
            transform = CONV if len(array.shape) > 2 else _POINTWISE
        theirs = "weight" if leaf in ("kernel", "scale") else leaf
        rows.append(Row(".".join([*modules, *_INSIDE.get(modules[-1], ()), theirs]), path, transform))
    return rows


def _levels(block: str) -> Callable[[CogVideoXVAEConfig], list[str]]:
    return lambda config: [block] * len(config.block_out_channels)


_MORE: Any = {"table": lambda config, shapes: vae_table(shapes), "fixed": {"dropout": 0.0}}
_MORE |= {"note": "only the VAEs of Wan 2.1 and Wan 2.2 are supported"}
_MORE |= {"required": frozenset({"base_dim", "z_dim", "dim_mult", "latents_mean", "latents_std"})}
WAN_VAE = Kind("diffusers", "AutoencoderKLWan", WanVAEConfig, WanVAE, **_MORE)

_FIXED = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}
_FIXED |= {"use_quant_conv": False, "use_post_quant_conv": False}
_FIXED |= {"down_block_types": _levels("CogVideoXDownBlock3D"), "up_block_types": _levels("CogVideoXUpBlock3D")}
_MORE |= {"fixed": _FIXED, "note": "only the VAE of the text-to-video models of CogVideoX 1.0 is supported"}
_MORE |= {"required": frozenset({"block_out_channels", "latent_channels", "layers_per_block", "scaling_factor"})}
_MORE |= {"extra": {"force_upcast": True, "invert_scale_latents": False}}  # how a pipeline may use it; ours does not
COGVIDEOX_VAE = Kind("diffusers", "AutoencoderKLCogVideoX", CogVideoXVAEConfig, CogVideoXVAE, **_MORE)
