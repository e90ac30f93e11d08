"""The text encoders of Wan and CogVideoX: the encoder halves of UMT5 and of T5 1.1. Named as in transformers'
`UMT5EncoderModel` and `T5EncoderModel`. They differ in one thing: layers of UMT5 have position biases of their own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dollar_jax.models.attention import attention
from dollar_jax.models.layers import Linear, RMSNorm, run_blocks, stack_blocks

States = Float[Array, "b l d"]
Mask = Bool[Array, "b 1 1 l"]  # of the keys
Buckets = Int[Array, "l l"]  # of distances, by query and key
Bias = Float[Array, "1 heads l l"]


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Fields and defaults as in transformers' `UMT5Config`; those after the blank are ours. Wan uses UMT5-XXL: d_model
    4096, d_kv 64, d_ff 10240, 24 layers, 64 heads, vocabulary 256384. CogVideoX's T5: 32128, shared_position_bias."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    shared_position_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj is {self.feed_forward_proj!r}; UMT5 and T5 1.1 have only 'gated-gelu'")


def _dense(c: UMT5Config, rngs: nnx.Rngs, dim_in: int, dim_out: int, std: float) -> Linear:
    init = nnx.initializers.normal(std)
    return Linear(dim_in, dim_out, rngs=rngs, bias=False, kernel_init=init, dtype=c.dtype, param_dtype=c.param_dtype)


class PositionBias(nnx.Module):
    """What attention adds to its scores for the distance of a key from the query; fp32."""

    def __init__(self, c: UMT5Config, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(c.d_model**-0.5)
        shape = (c.relative_attention_num_buckets, c.num_heads)
        self.embedding = nnx.Param(init(rngs.params(), shape, jnp.dtype(c.param_dtype)))

    def __call__(self, buckets: Buckets) -> Bias:
        return self.embedding[...][buckets].transpose(2, 0, 1)[None].astype(jnp.float32)


class UMT5Attention(nnx.Module):
    def __init__(self, c: UMT5Config, rngs: nnx.Rngs) -> None:
        inner = c.num_heads * c.d_kv
        # The small queries of the initialisation stand in for the missing 1/√d_kv of the scores.
        self.q = _dense(c, rngs, c.d_model, inner, (c.d_model * c.d_kv) ** -0.5)
        self.k, self.v = (_dense(c, rngs, c.d_model, inner, c.d_model**-0.5) for _ in range(2))
        self.o = _dense(c, rngs, inner, c.d_model, inner**-0.5)
        self.relative_attention_bias = None if c.shared_position_bias else PositionBias(c, rngs)
        self.heads = c.num_heads

    def __call__(self, x: States, mask: Mask, buckets: Buckets, shared_bias: Bias | None) -> States:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        own = self.relative_attention_bias
        bias = shared_bias if own is None else own(buckets)
        return self.o(attention(q, k, v, mask=mask, bias=bias, scale=1.0).reshape(*x.shape[:2], -1))


class UMT5Block(nnx.Module):
    def __init__(self, c: UMT5Config, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, param_dtype=c.param_dtype)
        self.attention = UMT5Attention(c, rngs)
        self.ffn_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, param_dtype=c.param_dtype)
        self.wi_0, self.wi_1 = (_dense(c, rngs, c.d_model, c.d_ff, c.d_model**-0.5) for _ in range(2))
        self.wo = _dense(c, rngs, c.d_ff, c.d_model, c.d_ff**-0.5)

    def __call__(self, x: States, mask: Mask, buckets: Buckets, shared_bias: Bias | None) -> States:
        x = x + self.attention(self.attention_norm(x), mask, buckets, shared_bias)
        y = self.ffn_norm(x)
        return x + self.wo(jax.nn.gelu(self.wi_0(y)) * self.wi_1(y))


class UMT5Encoder(nnx.Module):
    def __init__(self, config: UMT5Config, rngs: nnx.Rngs) -> None:
        c = self.config = config
        init, dtype = nnx.initializers.normal(1.0), jnp.dtype(c.param_dtype)
        self.shared = nnx.Embed(c.vocab_size, c.d_model, embedding_init=init, param_dtype=dtype, rngs=rngs)
        self.blocks = stack_blocks(lambda rngs: UMT5Block(c, rngs), c.num_layers, rngs)
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, param_dtype=c.param_dtype)
        self.relative_attention_bias = PositionBias(c, rngs) if c.shared_position_bias else None

    def __call__(self, ids: Int[Array, "b l"], mask: Int[Array, "b l"]) -> States:
        """States in `dtype`; `mask` is 1 at tokens, 0 at padding, whose own rows mean nothing: see `zero_padding`."""
        c = self.config
        buckets = jnp.asarray(position_buckets(ids.shape[1], c))
        keys = mask.astype(bool)[:, None, None, :]
        x = self.shared.embedding[...][ids].astype(c.dtype)
        bias = None if self.relative_attention_bias is None else self.relative_attention_bias(buckets)
        x = run_blocks(self.blocks, x, keys, buckets, bias, scan=c.scan_layers)
        return self.final_layer_norm(x).astype(c.dtype)


def zero_padding(states: States, mask: Int[Array, "b l"]) -> States:
    """Rows of padding set to 0, as Wan's transformer, which attends to every row, expects them."""
    return jnp.where(mask[..., None] > 0, states, 0)


def position_buckets(length: int, c: UMT5Config) -> np.ndarray:
    """int32 [query, key]: the bucket of the distance key - query (Raffel et al., arXiv 1910.10683). Half of the buckets
    are for keys after the query. In each half, the near half stand for one distance each; the others widen
    logarithmically up to `relative_attention_max_distance`, beyond which all share the last."""
    half = c.relative_attention_num_buckets // 2
    near = half // 2
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(near)
    # fp32 as in the reference: the bucket's edges fall where its rounding puts them.
    ratio = np.log(far) / np.float32(math.log(c.relative_attention_max_distance / near))
    wide = near + (ratio * np.float32(half - near)).astype(np.int32)
    bucket = np.where(np.abs(distance) < near, np.abs(distance), np.minimum(wide, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)
