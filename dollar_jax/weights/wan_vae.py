"""diffusers' `AutoencoderKLWan` ↔ `WanVAE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dollar_jax.models.wan_vae import WanVAEConfig
from dollar_jax.weights.table import CONV, SAME, Params, Row, Transform, flatten

CLASS_NAME = "AutoencoderKLWan"
# Fields of config.json with the values this VAE has: those of Wan 2.1's, not 2.2's.
_FIXED = {"is_residual": False, "dropout": 0.0}
_OURS = ("dtype", "param_dtype")


def wan_vae_table(shapes: Params) -> list[Row]:
    """One row per parameter; names differ only in the leaves and the layers of `resample`."""
    rows = []
    for path in flatten(shapes):
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


def wan_vae_config(fields: Mapping[str, Any], **ours: Any) -> WanVAEConfig:
    """From a component's config.json; `ours` are dtype and param_dtype."""
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"config.json has {name} = {fields[name]!r}: this is the VAE of Wan 2.2, "
                "and only that of Wan 2.1 is supported"
            )
    # Files written before a field existed lack it, and mean its default.
    names = {f.name for f in dataclasses.fields(WanVAEConfig)} - set(_OURS)
    known = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if name in names
    }
    required = {"base_dim", "z_dim", "dim_mult", "latents_mean", "latents_std"}
    if missing := sorted(required - set(known)):
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is not an {CLASS_NAME}'s")
    return WanVAEConfig(**known, **ours)


def wan_vae_config_json(config: WanVAEConfig) -> dict[str, Any]:
    """The fields of config.json with which diffusers builds the same model."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    return {"_class_name": CLASS_NAME, **fields, **_FIXED}
