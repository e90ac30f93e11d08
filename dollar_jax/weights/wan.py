"""diffusers' `WanTransformer3DModel` ↔ `WanTransformer`."""

from typing import Any

from dollar_jax.models.wan import WanConfig, WanTransformer
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import BATCHED, DENSE, NORM, Row, module_rows, patch_kernel


def wan_table(config: WanConfig) -> list[Row]:
    """Rows for a transformer of this configuration (the patch embedding depends on the patch)."""
    attn, embed = "{a:attn1|attn2}", "condition_embedder/{e:time_embedder|text_embedder}"
    modules = [
        ("condition_embedder.{e}.{p}", embed + "/{p:linear_1|linear_2}", DENSE),
        ("condition_embedder.time_proj", "condition_embedder/time_proj", DENSE),
        ("condition_embedder.image_embedder.{p}", "condition_embedder/image_embedder/{p:norm[12]}", NORM),
        ("condition_embedder.image_embedder.ff.net.0.proj", "condition_embedder/image_embedder/proj_in", DENSE),
        ("condition_embedder.image_embedder.ff.net.2", "condition_embedder/image_embedder/proj_out", DENSE),
        ("blocks.{i}.{a}.{p}", f"blocks/{attn}/{{p:to_q|to_k|to_v|add_k_proj|add_v_proj}}", DENSE),
        ("blocks.{i}.{a}.to_out.0", f"blocks/{attn}/to_out", DENSE),
        ("blocks.{i}.{a}.{p}", f"blocks/{attn}/{{p:norm_q|norm_k|norm_added_k}}", NORM),
        ("blocks.{i}.norm2", "blocks/norm2", NORM),
        ("blocks.{i}.ffn.net.0.proj", "blocks/ffn/proj_in", DENSE),
        ("blocks.{i}.ffn.net.2", "blocks/ffn/proj_out", DENSE),
        ("proj_out", "proj_out", DENSE),
    ]
    return [
        Row("patch_embedding.weight", "patch_embedding/kernel", patch_kernel(config.patch_size, config.in_channels)),
        Row("patch_embedding.bias", "patch_embedding/bias"),
        Row("scale_shift_table", "scale_shift_table", BATCHED),
        Row("blocks.{i}.scale_shift_table", "blocks/scale_shift_table", BATCHED),
        *module_rows(modules),
    ]


_MORE: Any = {"table": lambda config, shapes: wan_table(config), "fixed": {"pos_embed_seq_len": None}}
_MORE |= {"note": "this model takes a first and a last frame (FLF2V), and none or a first one are supported"}
WAN_TRANSFORMER = Kind("diffusers", "WanTransformer3DModel", WanConfig, WanTransformer, **_MORE)

# Modules in diffusers → in Wan's own code, in ComfyUI, LightX2V and MaxDiffusion.
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_ATTENTION |= {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
_KINDS = {"attn1": "self_attn", "attn2": "cross_attn"}
_EMBEDDED, _IMAGE = ("text", "time"), {0: "norm1", 1: "ff.net.0.proj", 3: "ff.net.2", 4: "norm2"}
WAN_NATIVE = {
    **{f"blocks.{{i}}.{a}.{p}": f"blocks.{{i}}.{_KINDS[a]}.{_ATTENTION[p]}" for a in _KINDS for p in _ATTENTION},
    **{f"condition_embedder.{e}_embedder.linear_{1 + i // 2}": f"{e}_embedding.{i}" for e in _EMBEDDED for i in (0, 2)},
    **{f"condition_embedder.image_embedder.{layer}": f"img_emb.proj.{i}" for i, layer in _IMAGE.items()},
    "blocks.{i}.ffn.net.0.proj": "blocks.{i}.ffn.0",
    "blocks.{i}.ffn.net.2": "blocks.{i}.ffn.2",
    "blocks.{i}.norm2": "blocks.{i}.norm3",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
