"""transformers' `UMT5EncoderModel` ↔ `UMT5Encoder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.weights.table import TRANSPOSE, Row

CLASS_NAME = "UMT5EncoderModel"
# Fields of UMT5Config that are no part of config.json.
_OURS = ("dtype", "param_dtype", "scan_layers")

UMT5_TABLE = [
    Row("shared.weight", "shared/embedding"),
    # Tied to `shared`; most files leave it out.
    Row("encoder.embed_tokens.weight", None),
    Row(
        "encoder.block.{i}.layer.0.SelfAttention.{p}.weight",
        "blocks/attention/{p:q|k|v|o}/kernel",
        TRANSPOSE,
    ),
    Row(
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks/attention/relative_attention_bias/embedding",
    ),
    Row("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/attention_norm/scale"),
    Row(
        "encoder.block.{i}.layer.1.DenseReluDense.{p}.weight",
        "blocks/{p:wi_0|wi_1|wo}/kernel",
        TRANSPOSE,
    ),
    Row("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/ffn_norm/scale"),
    Row("encoder.final_layer_norm.weight", "final_layer_norm/scale"),
]


def umt5_config(fields: Mapping[str, Any], **ours: Any) -> UMT5Config:
    """From a component's config.json; `ours` are dtype, param_dtype and scan_layers."""
    names = {f.name for f in dataclasses.fields(UMT5Config)} - set(_OURS)
    if missing := sorted(names - fields.keys()):
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is not a {CLASS_NAME}'s")
    return UMT5Config(**{name: fields[name] for name in names}, **ours)


def umt5_config_json(config: UMT5Config) -> dict[str, Any]:
    """The fields of config.json with which transformers builds the same model."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    return {
        "architectures": [CLASS_NAME],
        "model_type": "umt5",
        **fields,
        "tie_word_embeddings": True,
    }
