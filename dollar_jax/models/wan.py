"""The video transformer of Wan 2.1 and 2.2, named as diffusers' `WanTransformer3DModel`. As in the reference,
norms, modulation, rotary and timestep embedding and residual sums are fp32 whatever `dtype` is, and the weights of
timestep embedder, residual stream's norms and modulation tables whatever `param_dtype` is."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dollar_jax.models import activation_sharding, layers
from dollar_jax.models.embeddings import Rotary, patchify, rotary_tables, timestep_embedding, unpatchify
from dollar_jax.models.layers import MLP, Attention, FeedForward, LayerNorm, Linear, RMSNorm, TransformerConfig
from dollar_jax.types import ImageCondition, Latent, TextStates, Time


@dataclasses.dataclass(frozen=True)
class WanConfig(TransformerConfig):
    """As diffusers' `WanTransformer3DModel`, with the 14B model's values."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None

    def __post_init__(self) -> None:
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm is {self.qk_norm!r}; Wan has only 'rms_norm_across_heads'")
        super().__post_init__()
        if self.attention_head_dim % 2 or self.freq_dim % 2:
            found = f"attention_head_dim {self.attention_head_dim} and freq_dim {self.freq_dim}"
            raise ValueError(f"{found} must be even, for rotations and for sine and cosine pairs")


class ImageEmbedder(nnx.Module):
    """The tokens of an image encoder, as wide as those of the text."""

    def __init__(self, c: WanConfig, width: int, rngs: nnx.Rngs) -> None:
        dense = {"rngs": rngs, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.norm1, self.norm2 = (LayerNorm(size, 1e-5, param_dtype="float32") for size in (width, c.dim))
        self.proj_in, self.proj_out = Linear(width, width, **dense), Linear(width, c.dim, **dense)

    def __call__(self, x: Float[Array, "b m i"]) -> Float[Array, "b m dim"]:
        return self.norm2(self.proj_out(jax.nn.gelu(self.proj_in(self.norm1(x)), approximate=False)))


class ConditionEmbedder(nnx.Module):
    def __init__(self, c: WanConfig, rngs: nnx.Rngs) -> None:
        # Exact fp32 products, for which accelerators' default is too low; these layers see one row per sample.
        exact = {"rngs": rngs, "param_dtype": c.param_dtype, "precision": "highest"}
        self.time_embedder = MLP(c.freq_dim, c.dim, jax.nn.silu, **{**exact, "param_dtype": "float32"})
        self.time_proj = Linear(c.dim, 6 * c.dim, **exact)
        self.text_embedder = MLP(c.text_dim, c.dim, jax.nn.gelu, rngs=rngs, dtype=c.dtype, param_dtype=c.param_dtype)
        self.image_embedder: Any = ImageEmbedder(c, c.image_dim, rngs) if c.image_dim else None
        self.freq_dim = c.freq_dim

    def __call__(
        self, t: Float[Array, "b s"], text: Float[Array, "b l d"]
    ) -> tuple[Float[Array, "b s dim"], Float[Array, "b s 6 dim"], Float[Array, "b l dim"]]:
        """The embedded times, the six modulations of each that every block starts from, and the text."""
        time = self.time_embedder(timestep_embedding(t.ravel(), self.freq_dim)).reshape(*t.shape, -1)
        # Whole rows: else XLA trades the whole of the next kernel for another part, and collects them in every block.
        time = activation_sharding.constrain(time, None, None)
        modulation = activation_sharding.constrain(self.time_proj(jax.nn.silu(time)), None, None)
        return time, modulation.reshape(*t.shape, 6, -1), self.text_embedder(text)


class WanBlock(nnx.Module):
    def __init__(self, c: WanConfig, rngs: nnx.Rngs) -> None:
        norm = functools.partial(RMSNorm, c.dim, c.eps, param_dtype=c.param_dtype)
        self.attn1 = Attention(c, norm, rngs)
        self.attn2 = Attention(c, norm, rngs, added=c.image_dim is not None)
        self.norm2 = LayerNorm(c.dim, c.eps, param_dtype="float32") if c.cross_attn_norm else None
        self.ffn = FeedForward(c.dim, c.ffn_dim, rngs=rngs, dtype=c.dtype, param_dtype=c.param_dtype)
        self.scale_shift_table = nnx.Param(_table(rngs, 6, c.dim))
        self.eps, self.dtype = c.eps, c.dtype

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: list[Float[Array, "b _ d"]],
        modulation: Float[Array, "b s 6 d"],
        rotary: Rotary,
        length: int,
        clean: int,
    ) -> Float[Array, "b n d"]:
        table = self.scale_shift_table[...] + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = _by_token(table, x.shape[1], clean)
        y = self._modulate(x, shift1, scale1)
        x = (x + self.attn1(y, rotary=rotary, length=length) * gate1).astype(self.dtype)
        y = x if self.norm2 is None else self.norm2(x).astype(self.dtype)
        x = x + self.attn2(y, *context)
        y = self._modulate(x, shift2, scale2)
        return (x + self.ffn(y) * gate2).astype(self.dtype)

    def _modulate(self, x: Array, shift: Array, scale: Array) -> Array:
        return (layers.layer_norm(x, self.eps) * (1 + scale) + shift).astype(self.dtype)


class WanTransformer(nnx.Module):
    """Velocity ε - x0 of a noisy latent, given the time and the text (Wan's sign)."""

    def __init__(self, config: WanConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        patch = math.prod(c.patch_size)
        dense = {"rngs": rngs, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.patch_embedding = Linear(patch * c.in_channels, c.dim, **dense)
        self.condition_embedder = ConditionEmbedder(c, rngs)
        self.blocks = layers.stack_blocks(lambda rngs: WanBlock(c, rngs), c.num_layers, rngs)
        out = patch * (c.out_channels or c.in_channels)
        # Guidance multiplies what rounding leaves of the difference of two predictions.
        self.proj_out = Linear(c.dim, out, kernel_init=nnx.initializers.zeros, out_dtype="float32", **dense)
        self.scale_shift_table = nnx.Param(_table(rngs, 2, c.dim))

    def __call__(
        self, x: Latent, t: Time, text: TextStates, given: int = 0, image: ImageCondition | None = None, **tap: Any
    ) -> Any:
        """`t` in [0, 1000]; `text` comes with padded rows zeroed and, as in Wan, not masked. The tokens of the first
        `given` latent frames have the time 0 instead, as TI2V's of an image (a time for every token in diffusers). An
        `image` gives further channels after x's, a mask that is 1 in the first frame and the image's latents, and I2V's
        tokens to attend to. With a `tap` (of `run_tapped`) the tokens [b n dim] there come too, or alone, `early`."""
        c = self.config
        if image is not None:
            further = c.in_channels - x.shape[-1] - image.latent.shape[-1]
            mask = jnp.zeros((*x.shape[:-1], further), x.dtype).at[:, 0].set(1)
            x = jnp.concatenate([x, mask, image.latent.astype(x.dtype)], -1)
        if max(grid := c.grid(x.shape)) > c.rope_max_seq_len:
            raise ValueError(f"a grid of {grid} patches is longer than {c.rope_max_seq_len=}")
        # Height and width get 2⌊head_dim / 6⌋ channels each and time the rest.
        space = 2 * (c.attention_head_dim // 6)
        time_rows, rows, columns = (np.arange(size) for size in grid)
        rotary = rotary_tables((time_rows, rows, columns), (c.attention_head_dim - 2 * space, space, space))
        clean = given // c.patch_size[0] * grid[1] * grid[2]
        times = jnp.stack([t, jnp.zeros_like(t)], 1) if clean else t[:, None]
        time, modulation, *context = self.condition_embedder(times, text)
        if image is not None and image.tokens is not None:
            context.append(self.condition_embedder.image_embedder(image.tokens))
        y = patchify(x, c.patch_size)
        tokens = y.shape[1]
        y, rotary = jax.tree.map(lambda a: activation_sharding.pad_tokens(a, c.attention), (y, rotary))
        context = [activation_sharding.constrain(tokens, None, None) for tokens in context]
        y = self.patch_embedding(activation_sharding.constrain(y, activation_sharding.CONTEXT, None))
        y, features = layers.run_tapped(c, self.blocks, y, context, modulation, rotary, tokens, clean, **tap)
        if tap.get("early"):
            return features[:, :tokens]
        shift, scale = _by_token(self.scale_shift_table[...] + time[:, :, None], y.shape[1], clean)
        y = self.proj_out(layers.layer_norm(y, c.eps) * (1 + scale) + shift)
        y = activation_sharding.constrain(y, activation_sharding.CONTEXT, None)
        velocity = unpatchify(y[:, :tokens], grid, c.patch_size)
        return (velocity, features[:, :tokens]) if tap else velocity


def _by_token(table: Float[Array, "b s k d"], tokens: int, clean: int) -> list[Float[Array, "b #n d"]]:
    """Each of the k rows for the tokens: of the one time, or of the second one for the `clean` first tokens."""
    rows = jnp.unstack(table, axis=2)
    if not clean:
        return list(rows)
    first = jnp.arange(tokens)[:, None] < clean
    return [jnp.where(first, row[:, 1:], row[:, :1]) for row in rows]


def _table(rngs: nnx.Rngs, rows: int, dim: int) -> Array:
    return jax.random.normal(rngs.params(), (rows, dim), "float32") / math.sqrt(dim)
