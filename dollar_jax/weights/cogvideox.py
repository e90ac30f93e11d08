"""diffusers' `CogVideoXTransformer3DModel` ↔ `CogVideoXTransformer`."""

from typing import Any

import numpy as np

from dollar_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import DENSE, NORM, Row, Transform, module_rows, patch_kernel


def cogvideox_table(config: CogVideoXConfig) -> list[Row]:
    """Rows for a transformer of this configuration (patches are laid out by their size)."""
    block, ours = "transformer_blocks.{i}", "blocks"
    modules = [
        ("patch_embed.text_proj", "text_proj", DENSE),
        ("time_embedding.{p}", "time_embedding/{p:linear_1|linear_2}", DENSE),
        (f"{block}.{{n}}.linear", f"{ours}/{{n:norm1|norm2}}/linear", DENSE),
        (f"{block}.{{n}}.norm", f"{ours}/{{n:norm1|norm2}}/norm", NORM),
        (f"{block}.attn1.{{p}}", f"{ours}/attn1/{{p:to_q|to_k|to_v}}", DENSE),
        (f"{block}.attn1.to_out.0", f"{ours}/attn1/to_out", DENSE),
        (f"{block}.attn1.{{p}}", f"{ours}/attn1/{{p:norm_q|norm_k}}", NORM),
        (f"{block}.ff.net.0.proj", f"{ours}/ff/proj_in", DENSE),
        (f"{block}.ff.net.2", f"{ours}/ff/proj_out", DENSE),
        ("norm_final", "norm_final", NORM),
        ("norm_out.linear", "norm_out/linear", DENSE),
        ("norm_out.norm", "norm_out/norm", NORM),
    ]
    order = _output(config)
    kernel = Transform(lambda x: order.forward(x).T, lambda x: order.inverse(x.T))
    return [
        Row("patch_embed.proj.weight", "patch_embedding/kernel", patch_kernel(config.patch[1:], config.in_channels)),
        Row("patch_embed.proj.bias", "patch_embedding/bias"),
        Row("proj_out.weight", "proj_out/kernel", kernel),
        Row("proj_out.bias", "proj_out/bias", order),
        *module_rows(modules),
    ]


def _output(config: CogVideoXConfig) -> Transform:
    """First axis (c ph pw) ↔ (ph pw c), the order of `unpatchify`."""
    p, c = config.patch_size, config.out_channels
    return Transform(
        lambda x: np.moveaxis(x.reshape(c, p, p, *x.shape[1:]), 0, 2).reshape(x.shape),
        lambda x: np.moveaxis(x.reshape(p, p, c, *x.shape[1:]), 2, 0).reshape(x.shape),
    )


_FIXED = {"flip_sin_to_cos": True, "freq_shift": 0, "ofs_embed_dim": None, "dropout": 0.0, "patch_size_t": None}
_FIXED |= {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "norm_elementwise_affine": True}
_FIXED |= {"use_learned_positional_embeddings": False, "patch_bias": True}
_MORE: Any = {"table": lambda config, shapes: cogvideox_table(config), "fixed": _FIXED}
_MORE |= {"note": "only the text-to-video models of CogVideoX 1.0 are supported"}
_MORE |= {"required": frozenset({"num_attention_heads", "attention_head_dim", "num_layers", "time_embed_dim"})}
COGVIDEOX_TRANSFORMER = Kind("diffusers", "CogVideoXTransformer3DModel", CogVideoXConfig, CogVideoXTransformer, **_MORE)
