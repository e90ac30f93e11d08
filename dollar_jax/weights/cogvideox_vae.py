"""diffusers' `AutoencoderKLCogVideoX` ↔ `CogVideoXVAE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dollar_jax.models.cogvideox_vae import CogVideoXVAEConfig
from dollar_jax.weights.table import CONV, SAME, Params, Row, Transform, flatten

CLASS_NAME = "AutoencoderKLCogVideoX"
_LEVELS = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}
# Fields of config.json with the values this VAE has.
_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Fields that say how a pipeline uses the VAE, of which ours uses none.
_UNUSED = {"force_upcast": True, "invert_scale_latents": False}
_OURS = ("dtype", "param_dtype")
# Convolutions of one pixel: [out, in, 1, 1, 1] ↔ the dense [in, out].
_POINTWISE = Transform(lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None])


def cogvideox_vae_table(shapes: Params) -> list[Row]:
    """One row per parameter: names differ only in the leaves and the `conv` of single pixels' layers."""
    rows = []
    for path, array in flatten(shapes).items():
        parent, leaf = path.rsplit("/", 1)
        source = parent.replace("/", ".")
        if parent.endswith(("conv_y", "conv_b")):
            source += ".conv"
        if leaf == "kernel":
            rows.append(Row(f"{source}.weight", path, CONV if len(array.shape) > 2 else _POINTWISE))
        else:
            rows.append(Row(f"{source}.{'weight' if leaf == 'scale' else 'bias'}", path, SAME))
    return rows


def cogvideox_vae_config(fields: Mapping[str, Any], **ours: Any) -> CogVideoXVAEConfig:
    """From a component's config.json; `ours` are dtype and param_dtype."""
    required = {"block_out_channels", "latent_channels", "layers_per_block", "scaling_factor"}
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is not an {CLASS_NAME}'s")
    levels = len(fields["block_out_channels"])
    expected = _FIXED | {name: [kind] * levels for name, kind in _LEVELS.items()}
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"config.json has {name} = {fields[name]!r}, but only an {CLASS_NAME} with {value!r} is supported"
            )
    # Files written before a field existed lack it, and mean its default.
    names = {f.name for f in dataclasses.fields(CogVideoXVAEConfig)} - set(_OURS)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in names}
    return CogVideoXVAEConfig(**known, **ours)


def cogvideox_vae_config_json(config: CogVideoXVAEConfig) -> dict[str, Any]:
    """The fields of config.json with which diffusers builds the same model."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    levels = {name: [kind] * len(config.block_out_channels) for name, kind in _LEVELS.items()}
    return {"_class_name": CLASS_NAME, **fields, **_FIXED, **_UNUSED, **levels}
