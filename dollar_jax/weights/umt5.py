"""transformers' `UMT5EncoderModel` and `T5EncoderModel` ↔ `UMT5Encoder`."""

from typing import Any

from dollar_jax.models.umt5 import UMT5Config, UMT5Encoder
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.table import TRANSPOSE, Row

_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
UMT5_TABLE = [
    Row("shared.weight", "shared/embedding"),
    # Tied to `shared`; most files leave it out.
    Row("encoder.embed_tokens.weight", None),
    Row(f"{_ATTENTION}.{{p}}.weight", "blocks/attention/{p:q|k|v|o}/kernel", TRANSPOSE),
    Row(f"{_ATTENTION}.relative_attention_bias.weight", "blocks/attention/relative_attention_bias/embedding"),
    # T5 keeps the one that its layers share in the first.
    Row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias/embedding"),
    Row("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/attention_norm/scale"),
    Row("encoder.block.{i}.layer.1.DenseReluDense.{p}.weight", "blocks/{p:wi_0|wi_1|wo}/kernel", TRANSPOSE),
    Row("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/ffn_norm/scale"),
    Row("encoder.final_layer_norm.weight", "final_layer_norm/scale"),
]


def _encoder(class_name: str, model_type: str, shared_position_bias: bool) -> Kind:
    more: Any = {"table": lambda config, shapes: UMT5_TABLE, "fixed": {"model_type": model_type}}
    more |= {"note": "the text encoders known are umt5 and t5, for Wan and CogVideoX"}
    more |= {"given": {"shared_position_bias": shared_position_bias}, "extra": {"tie_word_embeddings": True}}
    return Kind("transformers", class_name, UMT5Config, UMT5Encoder, **more)


UMT5 = _encoder("UMT5EncoderModel", "umt5", shared_position_bias=False)
T5 = _encoder("T5EncoderModel", "t5", shared_position_bias=True)
