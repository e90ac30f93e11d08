"""CogVideoX's text-to-video diffusion transformer, named as diffusers' `CogVideoXTransformer3DModel`. Text and video
are one sequence in every block; they share all weights but the modulation. The parts that condition on an image are
left out, and so are the patches in time of version 1.5. As in our Wan, norms, modulation, rotary embedding, timestep
embedding and the residual sums are fp32 whatever `dtype` is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dollar_jax.models import activation_sharding, embeddings
from dollar_jax.models.attention import ContextParallel, Implementation, attention
from dollar_jax.models.embeddings import Rotary, rotate
from dollar_jax.models.layers import MLP, FeedForward, LayerNorm, Linear, Remat, check_compute, run_tapped, stack_blocks

_zeros = nnx.initializers.zeros
Tokens = Float[Array, "b n d"]
Time = Float[Array, "b e"]
IsText = Bool[Array, "n 1"]


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Fields and defaults as in diffusers' `CogVideoXTransformer3DModel`; those after the blank are ours. The defaults
    are the 2B model, whose positions are sinusoids added to the video's tokens. The 5B model has 42 layers, 48 heads
    and rotary embeddings. The samples' sizes are latent ones, but for the frames."""

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

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    attention: Implementation = "auto"
    context_parallel: ContextParallel = "gather"

    def __post_init__(self) -> None:
        check_compute(self)
        # A quarter of the channels is for time, three eighths each for height and width, all in pairs.
        rotary = self.use_rotary_positional_embeddings
        name, dim = ("attention_head_dim", self.attention_head_dim) if rotary else ("the width", self.dim)
        if dim % 16:
            raise ValueError(f"{name} is {dim}; it must be a multiple of 16 to hold positions in t, h and w")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""
        return 1, self.patch_size, self.patch_size

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


class Attention(nnx.Module):
    """Multi-head self-attention with layer norms over the queries and keys of each head."""

    def __init__(self, c: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        dense = {"rngs": rngs, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.to_q, self.to_k, self.to_v = (Linear(c.dim, c.dim, bias=c.attention_bias, **dense) for _ in range(3))
        self.to_out = Linear(c.dim, c.dim, **dense)
        self.norm_q = LayerNorm(c.attention_head_dim, 1e-6, param_dtype=c.param_dtype)
        self.norm_k = LayerNorm(c.attention_head_dim, 1e-6, param_dtype=c.param_dtype)
        self.config = c

    def __call__(self, x: Tokens, rotary: Rotary | None, length: int) -> Tokens:
        """Tokens from `length` on are padding."""
        c = self.config
        q, k, v = (f(x).reshape(*x.shape[:2], c.num_attention_heads, -1) for f in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.astype(c.dtype), k.astype(c.dtype)
        out = attention(q, k, v, length=length, implementation=c.attention, context=c.context_parallel)
        return self.to_out(out.reshape(x.shape))


class CogVideoXBlock(nnx.Module):
    def __init__(self, c: CogVideoXConfig, rngs: nnx.Rngs) -> None:
        self.norm1 = Modulation(c, rngs)
        self.attn1 = Attention(c, rngs)
        self.norm2 = Modulation(c, rngs)
        self.ff = FeedForward(c.dim, 4 * c.dim, rngs=rngs, dtype=c.dtype, param_dtype=c.param_dtype)
        self.dtype = c.dtype

    def __call__(self, x: Tokens, time: Time, is_text: IsText, rotary: Rotary | None, length: int) -> Tokens:
        y, gate = self.norm1(x, time, is_text)
        x = (x + gate * self.attn1(y, rotary, length)).astype(self.dtype)
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
        self.blocks = stack_blocks(lambda rngs: CogVideoXBlock(c, rngs), c.num_layers, rngs)
        self.norm_final = LayerNorm(c.dim, c.norm_eps, param_dtype=c.param_dtype)
        self.norm_out = OutputNorm(c, rngs)
        last = {"kernel_init": _zeros, "out_dtype": "float32"}
        self.proj_out = Linear(c.dim, c.patch_size**2 * c.out_channels, **last, **dense)

    def __call__(self, x: Float[Array, "b t h w c"], t: Float[Array, " b"], text: Array, **tap: Any) -> Any:
        """`t` in [0, 999]; every row of `text` is attended to, as in CogVideoX those of padding are; `tap` is Wan's."""
        c = self.config
        grid, patch = self._grid(x.shape[1:]), c.patch
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
        y = activation_sharding.pad_tokens(y, axis=1)
        rotary = jax.tree.map(lambda table: activation_sharding.pad_tokens(table, axis=0), rotary)
        is_text = jnp.arange(y.shape[1])[:, None] < length
        compute = {"length": c.num_layers, "remat": c.remat, "scan": c.scan_layers}
        y, features = run_tapped(self.blocks, y, time, is_text, rotary, tokens, **compute, **tap)
        if tap.get("early"):
            return features[:, length:tokens]
        y = self.norm_out(self.norm_final(y[:, length:tokens]), time)
        v = embeddings.unpatchify(self.proj_out(y), grid, patch)
        return (v, features[:, length:tokens]) if tap else v

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        c, (t, h, w, channels) = self.config, shape
        if channels != c.in_channels:
            raise ValueError(f"the latent has {channels} channels; in_channels is {c.in_channels}")
        if h % c.patch_size or w % c.patch_size:
            raise ValueError(f"a latent of h, w = {h}, {w} does not divide by {c.patch_size=}")
        return t, h // c.patch_size, w // c.patch_size


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
