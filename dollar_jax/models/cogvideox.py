"""CogVideoX's text-to-video diffusion transformer, named as diffusers' `CogVideoXTransformer3DModel`. Text and video
are one sequence in every block; they share all weights but the modulation. The parts that condition on an image are
left out, and so are the patches in time of version 1.5. As in our Wan, norms, modulation, rotary embedding, timestep
embedding and the residual sums are fp32 whatever `dtype` is."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dollar_jax.models import activation_sharding, embeddings, layers
from dollar_jax.models.embeddings import Rotary
from dollar_jax.models.layers import MLP, Attention, FeedForward, LayerNorm, Linear, Tokens, TransformerConfig

_zeros = nnx.initializers.zeros
Time = Float[Array, "b e"]
IsText = Bool[Array, "n 1"]


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig(TransformerConfig):
    """Fields and defaults as in diffusers' `CogVideoXTransformer3DModel`. The defaults are the 2B model, whose
    positions are sinusoids added to the video's tokens. The 5B model has 42 layers, 48 heads and rotary embeddings. The
    samples' sizes are latent ones, but for the frames."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # A quarter of the channels is for time, three eighths each for height and width, all in pairs.
        rotary = self.use_rotary_positional_embeddings
        name, dim = ("attention_head_dim", self.attention_head_dim) if rotary else ("the width", self.dim)
        if dim % 16:
            raise ValueError(f"{name} is {dim}; it must be a multiple of 16 to hold positions in t, h and w")

    @property
    def text_dim(self) -> int:
        return self.text_embed_dim


class Modulation(nnx.Module):
    """Layer norm, a shift and a scale by the time, and the gate of what follows; text has its own."""

    def __init__(self, c: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        # The highest precision keeps fp32 products exact on accelerators; the layer sees one row per sample.
        exact = {"rngs": rngs, "param_dtype": c.param_dtype, "precision": "highest"}
        self.linear = Linear(c.time_embed_dim, 6 * c.dim, kernel_init=_zeros, **exact)
        self.norm = LayerNorm(c.dim, c.norm_eps, param_dtype=c.param_dtype)
        self.dtype = c.dtype

    def __call__(self, x: Tokens, time: Time, is_text: IsText) -> tuple[Tokens, Tokens]:
        video, text = jnp.split(self.linear(jax.nn.silu(time))[:, None], 2, axis=-1)
        parts = zip(jnp.split(text, 3, axis=-1), jnp.split(video, 3, axis=-1), strict=True)
        shift, scale, gate = (jnp.where(is_text, of_text, of_video) for of_text, of_video in parts)
        return (self.norm(x) * (1 + scale) + shift).astype(self.dtype), gate


class CogVideoXBlock(nnx.Module):
    def __init__(self, c: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        self.norm1 = Modulation(c, rngs)
        norm = functools.partial(LayerNorm, c.attention_head_dim, 1e-6, param_dtype=c.param_dtype)
        self.attn1 = Attention(c, norm, rngs, bias=c.attention_bias)
        self.norm2 = Modulation(c, rngs)
        self.ff = FeedForward(c.dim, 4 * c.dim, rngs=rngs, dtype=c.dtype, param_dtype=c.param_dtype)
        self.dtype = c.dtype

    def __call__(self, x: Tokens, time: Time, is_text: IsText, rotary: Rotary | None, length: int) -> Tokens:
        y, gate = self.norm1(x, time, is_text)
        x = (x + gate * self.attn1(y, rotary=rotary, length=length)).astype(self.dtype)
        y, gate = self.norm2(x, time, is_text)
        return (x + gate * self.ff(y)).astype(self.dtype)


class OutputNorm(nnx.Module):
    """Layer norm, then a shift and a scale by the time; fp32."""

    def __init__(self, c: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        self.linear = Linear(c.time_embed_dim, 2 * c.dim, rngs=rngs, param_dtype=c.param_dtype, precision="highest")
        self.norm = LayerNorm(c.dim, c.norm_eps, param_dtype=c.param_dtype)

    def __call__(self, x: Tokens, time: Time) -> Tokens:
        shift, scale = jnp.split(self.linear(jax.nn.silu(time))[:, None], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer(nnx.Module):
    """v = a ε - b x0 of a noisy latent, given the time and the text."""

    def __init__(self, config: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        dense = {"rngs": rngs, "dtype": c.dtype, "param_dtype": c.param_dtype}
        exact = {"rngs": rngs, "param_dtype": c.param_dtype, "precision": "highest"}
        self.patch_embedding = Linear(c.patch_size**2 * c.in_channels, c.dim, **dense)
        self.text_proj = Linear(c.text_embed_dim, c.dim, **dense)
        self.time_embedding = MLP(c.dim, c.time_embed_dim, jax.nn.silu, **exact)
        self.blocks = layers.stack_blocks(lambda rngs: CogVideoXBlock(c, rngs), c.num_layers, rngs)
        self.norm_final = LayerNorm(c.dim, c.norm_eps, param_dtype=c.param_dtype)
        self.norm_out = OutputNorm(c, rngs)
        last = {"kernel_init": _zeros, "out_dtype": "float32"}
        self.proj_out = Linear(c.dim, c.patch_size**2 * c.out_channels, **last, **dense)

    def __call__(self, x: Float[Array, "b t h w c"], t: Float[Array, " b"], text: Array, **tap: Any) -> Any:
        """`t` in [0, 999]; every row of `text` is attended to, as in CogVideoX those of padding are; `tap` is Wan's."""
        c = self.config
        grid, patch = c.grid(x.shape), c.patch
        # Whole rows, as in Wan.
        time = activation_sharding.constrain(self.time_embedding(embeddings.timestep_embedding(t, c.dim)), None)
        video = self.patch_embedding(embeddings.patchify(x, patch))
        length = text.shape[1]
        rotary = None
        if c.use_rotary_positional_embeddings:
            cos, sin = embeddings.rotary_tables(positions(grid, c), _axes(c.attention_head_dim))
            before = ((length, 0), (0, 0))  # the text is turned by nothing
            rotary = jnp.pad(cos, before, constant_values=1.0), jnp.pad(sin, before)
        else:
            video = (video + sinusoids(grid, c)).astype(c.dtype)
        y = jnp.concatenate([self.text_proj(text), video], axis=1)
        tokens = y.shape[1]
        y, rotary = jax.tree.map(lambda a: activation_sharding.pad_tokens(a, c.attention), (y, rotary))
        is_text = jnp.arange(y.shape[1])[:, None] < length
        y, features = layers.run_tapped(c, self.blocks, y, time, is_text, rotary, tokens, **tap)
        if tap.get("early"):
            return features[:, length:tokens]
        y = self.norm_out(self.norm_final(y[:, length:tokens]), time)
        v = embeddings.unpatchify(self.proj_out(y), grid, patch)
        return (v, features[:, length:tokens]) if tap else v


def sinusoids(grid: tuple[int, int, int], c: CogVideoXConfig) -> Float[Array, "n d"]:
    """What is added to the video's tokens where there are no rotary embeddings; fp32. Sines, cosines; of t, w, h."""
    scales = (c.temporal_interpolation_scale, c.spatial_interpolation_scale, c.spatial_interpolation_scale)
    rows = [np.arange(size, dtype=np.float32) / np.float32(s) for size, s in zip(grid, scales, strict=True)]
    parts = []
    for axis in (0, 2, 1):
        angles = embeddings.axis_angles(rows[axis], axis, _axes(c.dim)[axis])
        parts += [np.sin(angles), np.cos(angles)]
    return embeddings.over_grid(parts, grid)


def positions(grid: tuple[int, int, int], c: CogVideoXConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the rotary embedding sees the rows of t, h and w. Frames are counted. A picture of another size than the
    training's is laid over it, as large as fits with its sides in proportion, in the middle, as CogVideoXPipeline."""
    t, h, w = grid
    base_h, base_w = c.sample_height // c.patch_size, c.sample_width // c.patch_size
    if h / w > base_h / base_w:
        size_h, size_w = base_h, round(base_h / h * w)
    else:
        size_h, size_w = round(base_w / w * h), base_w

    def rows(base: int, size: int, count: int) -> np.ndarray:
        first = round((base - size) / 2)
        return np.linspace(first, (first + size) * (count - 1) / count, count)

    return np.arange(t), rows(base_h, size_h, h), rows(base_w, size_w, w)


def _axes(dim: int) -> tuple[int, int, int]:
    """Channels for t, h and w."""
    return dim // 4, 3 * dim // 8, 3 * dim // 8
