"""transformers' `UMT5EncoderModel` and `T5EncoderModel` ↔ `UMT5Encoder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.weights.table import TRANSPOSE, Row

CLASS_NAME = "UMT5EncoderModel"
T5_CLASS_NAME = "T5EncoderModel"
# Fields of UMT5Config that are no part of config.json.
_OURS = ("shared_position_bias", "dtype", "param_dtype", "scan_layers")
# Of config.json, and whether its layers share one position bias.
_MODEL_TYPES = {"umt5": False, "t5": True}

UMT5_TABLE = [
    Row("shared.weight", "shared/embedding"),
    # Tied to `shared`; most files leave it out.
    Row("encoder.embed_tokens.weight", None),
    Row("encoder.block.{i}.layer.0.SelfAttention.{p}.weight", "blocks/attention/{p:q|k|v|o}/kernel", TRANSPOSE),
    Row(
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks/attention/relative_attention_bias/embedding",
    ),
    # T5 keeps the one that its layers share in the first.
    Row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias/embedding"),
    Row("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/attention_norm/scale"),
    Row("encoder.block.{i}.layer.1.DenseReluDense.{p}.weight", "blocks/{p:wi_0|wi_1|wo}/kernel", TRANSPOSE),
    Row("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/ffn_norm/scale"),
    Row("encoder.final_layer_norm.weight", "final_layer_norm/scale"),
]


def umt5_config(fields: Mapping[str, Any], **ours: Any) -> UMT5Config:
    """From a component's config.json; `ours` are dtype, param_dtype and scan_layers."""
    model_type = fields.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"config.json has model_type = {model_type!r}; the text encoders known are {' and '.join(_MODEL_TYPES)}"
        )
    names = {f.name for f in dataclasses.fields(UMT5Config)} - set(_OURS)
    if missing := sorted(names - fields.keys()):
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is not a {CLASS_NAME}'s")
    shared = _MODEL_TYPES[model_type]
    return UMT5Config(**{name: fields[name] for name in names}, shared_position_bias=shared, **ours)


def umt5_config_json(config: UMT5Config) -> dict[str, Any]:
    """The fields of config.json with which transformers builds the same model."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    (model_type,) = (k for k, v in _MODEL_TYPES.items() if v == config.shared_position_bias)
    return {
        "architectures": [T5_CLASS_NAME if config.shared_position_bias else CLASS_NAME],
        "model_type": model_type,
        **fields,
        "tie_word_embeddings": True,
    }
