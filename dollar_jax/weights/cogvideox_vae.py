"""diffusers' `AutoencoderKLCogVideoX` ↔ `CogVideoXVAE`."""

from collections.abc import Callable
from typing import Any, cast

from flax.traverse_util import flatten_dict

from dollar_jax.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import CONV, SAME, Params, Row, Transform

# Convolutions of one pixel: [out, in, 1, 1, 1] ↔ the dense [in, out].
_POINTWISE = Transform(lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None])


def cogvideox_vae_table(shapes: Params) -> list[Row]:
    """One row per parameter: names differ only in the leaves and the `conv` of single pixels' layers."""
    rows, arrays = [], cast(dict[str, Any], flatten_dict(shapes, sep="/"))
    for path, array in arrays.items():
        parent, leaf = path.rsplit("/", 1)
        source = parent.replace("/", ".")
        if parent.endswith(("conv_y", "conv_b")):
            source += ".conv"
        if leaf == "kernel":
            rows.append(Row(f"{source}.weight", path, CONV if len(array.shape) > 2 else _POINTWISE))
        else:
            rows.append(Row(f"{source}.{'weight' if leaf == 'scale' else 'bias'}", path, SAME))
    return rows


def _levels(block: str) -> Callable[[CogVideoXVAEConfig], list[str]]:
    return lambda config: [block] * len(config.block_out_channels)


_FIXED = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}
_FIXED |= {"use_quant_conv": False, "use_post_quant_conv": False}
_FIXED |= {"down_block_types": _levels("CogVideoXDownBlock3D"), "up_block_types": _levels("CogVideoXUpBlock3D")}
_MORE: Any = {"table": lambda config, shapes: cogvideox_vae_table(shapes), "fixed": _FIXED}
_MORE |= {"note": "only the VAE of the text-to-video models of CogVideoX 1.0 is supported"}
_MORE |= {"required": frozenset({"block_out_channels", "latent_channels", "layers_per_block", "scaling_factor"})}
_MORE |= {"extra": {"force_upcast": True, "invert_scale_latents": False}}  # how a pipeline may use it; ours does not
COGVIDEOX_VAE = Kind("diffusers", "AutoencoderKLCogVideoX", CogVideoXVAEConfig, CogVideoXVAE, **_MORE)
