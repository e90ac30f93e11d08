"""CogVideoX's causal video VAE, structured and named as diffusers' `AutoencoderKLCogVideoX`. A clip is taken 8 frames,
or 2 latent frames, at a time, and every convolution in time gets the last frames it saw from the chunk before
(`CausalCache`). Unlike Wan's, this is not how the whole clip would be computed: a group norm runs over the frames of
its chunk, so the chunks' length is part of the model. The first takes the frames left over; its first stands alone."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dollar_jax.models.chunks import CausalCache, ChunkedVAE
from dollar_jax.models.layers import Linear

Video = Float[Array, "b t h w c"]
# What is encoded and decoded at a time; a part of the model.
FRAME_CHUNK, LATENT_CHUNK = 8, 2


@dataclasses.dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Fields and defaults as in diffusers' `AutoencoderKLCogVideoX`; those after the blank are ours. `sample_height`
    and `sample_width` are what the VAE was made for; nothing here depends on them."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426

    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            groups = f"{self.norm_num_groups=} groups"
            raise ValueError(f"block_out_channels {self.block_out_channels} do not divide into {groups}")
        # Downsamplers halve time in the first levels; there is none after the last level.
        ratio, possible = self.temporal_compression_ratio, [2**i for i in range(len(self.block_out_channels))]
        if ratio not in possible:
            levels = f"with {len(possible)} levels it must be a power of 2 up to {possible[-1]}"
            raise ValueError(f"temporal_compression_ratio is {ratio}; {levels}")

    @property
    def latents_mean(self) -> tuple[float, ...]:
        return (0.0,) * self.latent_channels

    @property
    def latents_std(self) -> tuple[float, ...]:
        """Of the raw latents: the transformer sees them times `scaling_factor`."""
        return (1 / self.scaling_factor,) * self.latent_channels

    @property
    def scale_factor_spatial(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latent of a clip; ValueError when it does not divide. The decoder takes latent frames in
        pairs after the first three, so that an even number of them would become more frames than were encoded."""
        time, space = self.temporal_compression_ratio, self.scale_factor_spatial
        if (frames - 1) % (LATENT_CHUNK * time) or height % space or width % space:
            wanted = f"frames must be 1 + a multiple of {LATENT_CHUNK * time}, height and width multiples of {space}"
            raise ValueError(f"a clip of {frames}×{height}×{width} does not fit this VAE: {wanted}")
        return (frames - 1) // time + 1, height // space, width // space, self.latent_channels


class CausalConv3d(nnx.Module):
    """A 3×3×3 convolution of which out[t] sees in[t-2 .. t]."""

    def __init__(self, dim_in: int, dim_out: int, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        self.conv = _conv((dim_in, dim_out, (3, 3, 3)), ((0, 0), (1, 1), (1, 1)), c, rngs)

    def __call__(self, x: Video, cache: CausalCache) -> Float[Array, "b t h w d"]:
        return self.conv(cache.extend(x, 2, repeat=True))


def _conv(sizes: tuple[Any, ...], padding: Any, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> nnx.Conv:
    """`sizes` are channels in and out, the kernel and the stride."""
    dtypes = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    return nnx.Conv(*sizes, padding=padding, rngs=rngs, **dtypes)


def _pointwise(dim_in: int, dim_out: int, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(dim_in, dim_out, rngs=rngs, dtype=c.dtype, param_dtype=c.param_dtype)


def _group_norm(dim: int, eps: float, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Zero mean and unit variance per sample and group of channels, over frames and pixels; fp32 inside."""
    more = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype), "use_fast_variance": False}
    return nnx.GroupNorm(dim, num_groups=c.norm_num_groups, epsilon=eps, rngs=rngs, **more)


class SpatialNorm(nnx.Module):
    """A group norm whose scale and shift at every pixel are read from the latent (arXiv 2209.09002)."""

    def __init__(self, dim: int, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        self.norm_layer = _group_norm(dim, 1e-6, c, rngs)
        self.conv_y, self.conv_b = (_pointwise(c.latent_channels, dim, c, rngs) for _ in range(2))

    def __call__(self, x: Video, latent: Float[Array, "b t2 h2 w2 z"]) -> Video:
        # What is computed per latent pixel is enlarged afterwards; the reference does it the dear way round.
        scale, shift = (_enlarge(conv(latent), x.shape) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


def _enlarge(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeats pixels and frames up to the shape; the first of an odd number of frames stays single."""
    _, t, h, w, _ = shape
    single = t % 2
    x = jnp.repeat(jnp.repeat(x, h // x.shape[2], 2), w // x.shape[3], 3)
    if t == x.shape[1]:
        return x
    return jnp.concatenate([x[:, :single], jnp.repeat(x[:, single:], (t - single) // (x.shape[1] - single), 1)], 1)


class ResnetBlock(nnx.Module):
    """norm, SiLU, convolution, twice, around a shortcut; with `spatial` the norms read the latent."""

    def __init__(self, dim_in: int, dim_out: int, spatial: bool, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        def norm(dim: int) -> SpatialNorm | nnx.GroupNorm:
            return SpatialNorm(dim, c, rngs) if spatial else _group_norm(dim, c.norm_eps, c, rngs)

        self.norm1, self.conv1 = norm(dim_in), CausalConv3d(dim_in, dim_out, c, rngs)
        self.norm2, self.conv2 = norm(dim_out), CausalConv3d(dim_out, dim_out, c, rngs)
        self.conv_shortcut = None if dim_in == dim_out else _pointwise(dim_in, dim_out, c, rngs)
        self.spatial = spatial

    def __call__(self, x: Video, cache: CausalCache, latent: Array | None) -> Float[Array, "b t h w d"]:
        condition: tuple[Any, ...] = (latent,) if self.spatial else ()
        y = self.conv1(jax.nn.silu(self.norm1(x, *condition)), cache)
        y = self.conv2(jax.nn.silu(self.norm2(y, *condition)), cache)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Halves height and width, and with `time` first averages frames in pairs, a first odd one left alone."""

    def __init__(self, dim: int, time: bool, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        self.conv, self.time = _conv((dim, dim, (3, 3), 2), ((0, 1), (0, 1)), c, rngs), time

    def __call__(self, x: Video) -> Float[Array, "b t2 h2 w2 c"]:
        if self.time:
            single = x.shape[1] % 2
            pairs = rearrange(x[:, single:], "b (t two) h w c -> b t two h w c", two=2).mean(2)
            x = jnp.concatenate([x[:, :single], pairs], 1)
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, and with `time` the frames, but for a first odd one."""

    def __init__(self, dim: int, time: bool, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        self.conv, self.time = _conv((dim, dim, (3, 3)), ((1, 1), (1, 1)), c, rngs), time

    def __call__(self, x: Video) -> Float[Array, "b t2 h2 w2 c"]:
        b, t, h, w, c = x.shape
        frames = 2 * t - t % 2 if self.time else t
        return self.conv(_enlarge(x, (b, frames, 2 * h, 2 * w, c)))


class Block(nnx.Module):
    """The residual blocks of one resolution; then its change, in time too or not, if there is one."""

    def __init__(self, dims: tuple, spatial: bool, c: CogVideoXVAEConfig, rngs: nnx.Rngs, time: Any = None) -> None:
        self.resnets = nnx.List([ResnetBlock(*pair, spatial, c, rngs) for pair in itertools.pairwise(dims)])
        self.downsamplers = nnx.List([] if spatial or time is None else [Downsample(dims[-1], time, c, rngs)])
        self.upsamplers = nnx.List([Upsample(dims[-1], time, c, rngs)] if spatial and time is not None else [])

    def __call__(self, x: Video, cache: CausalCache, latent: Array | None = None) -> Float[Array, "b t2 h2 w2 d"]:
        for block in self.resnets:
            x = block(x, cache, latent)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


def _levels(dims: tuple[int, ...], layers: int, spatial: bool, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> Any:
    """A block for each resolution: the encoder's halve it, the decoder's, which are `spatial`, double it."""
    times = [*(2**i < c.temporal_compression_ratio for i in range(len(dims) - 1)), None]
    levels = zip((dims[0], *dims[:-1]), dims, times, strict=True)
    return nnx.List([Block((dim_in, *[dim] * layers), spatial, c, rngs, time) for dim_in, dim, time in levels])


class Encoder(nnx.Module):
    """Video to the moments of its latent."""

    def __init__(self, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        dims = c.block_out_channels
        self.conv_in = CausalConv3d(c.in_channels, dims[0], c, rngs)
        self.down_blocks = _levels(dims, c.layers_per_block, False, c, rngs)
        self.mid_block = Block((dims[-1],) * 3, False, c, rngs)
        self.norm_out = _group_norm(dims[-1], 1e-6, c, rngs)
        self.conv_out = CausalConv3d(dims[-1], 2 * c.latent_channels, c, rngs)

    def __call__(self, x: Video, cache: CausalCache) -> Float[Array, "b t2 h2 w2 z"]:
        x = self.conv_in(x, cache)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, cache)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class Decoder(nnx.Module):
    """Latent to video; every norm on the way reads the latent again."""

    def __init__(self, c: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        dims = c.block_out_channels[::-1]
        self.conv_in = CausalConv3d(c.latent_channels, dims[0], c, rngs)
        self.mid_block = Block((dims[0],) * 3, True, c, rngs)
        self.up_blocks = _levels(dims, c.layers_per_block + 1, True, c, rngs)
        self.norm_out = SpatialNorm(dims[-1], c, rngs)
        self.conv_out = CausalConv3d(dims[-1], c.out_channels, c, rngs)

    def __call__(self, latent: Float[Array, "b t h w z"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 c"]:
        x = self.conv_in(latent, cache)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x, cache, latent)
        return self.conv_out(jax.nn.silu(self.norm_out(x, latent)), cache)


class CogVideoXVAE(ChunkedVAE):
    """CogVideoX's video VAE. An odd number of latent frames begins with one that stands for a single frame."""

    def __init__(self, config: CogVideoXVAEConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)

    def encode_chunk(self, frames: Array, cache: CausalCache) -> Array:
        return self.encoder(frames, cache)

    def decode_chunk(self, latent: Array, cache: CausalCache) -> Array:
        return self.decoder(latent, cache)

    def sizes(self, count: int, latent: bool, chunk: int | None) -> tuple[int, int]:
        """Frames in the first chunk, which also takes those that are left over, and in others."""
        if chunk not in (None, LATENT_CHUNK):
            why = "its norms run over a chunk, so that the length is part of the model"
            raise ValueError(f"CogVideoX's VAE takes {LATENT_CHUNK} latent frames at a time, not {chunk}: {why}")
        size = LATENT_CHUNK if latent else FRAME_CHUNK
        return count if count < size else size + count % size, size
