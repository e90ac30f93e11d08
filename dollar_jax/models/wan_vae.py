"""The causal video VAEs of Wan 2.1 and 2.2, structured and named as diffusers' `AutoencoderKLWan`. The first frame has
a latent frame of its own, every further four share one: 1 + 4n frames become 1 + n. Every convolution in time looks
backwards only. `encode` and `decode` take the whole clip, or `chunk` latent frames at a time in the memory of a chunk,
with the same result: layers that look back get the last frames they saw from `CausalCache`. The temporal strided
convolution passes the first frame through, and the temporal upsampling neither doubles nor sees it. With `is_residual`,
as in Wan 2.2, a shortcut without parameters goes around every level."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dollar_jax.models.attention import attention
from dollar_jax.models.chunks import CausalCache, ChunkedVAE

_SIDE_BY_SIDE = 64  # channels of all of a convolution's taps that are one product: of 24 less than half the time


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Fields as in diffusers' `AutoencoderKLWan` config; `dtype` and `param_dtype` are ours."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            found, levels = len(self.temperal_downsample), len(self.dim_mult)
            raise ValueError(f"temperal_downsample has {found} entries and needs one less than dim_mult's {levels}")
        if self.attn_scales:
            raise ValueError("attn_scales must be empty: attention is in the middle blocks only")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim = {self.z_dim} entries each")
        time = 2 ** sum(self.temperal_downsample)
        space = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        factors = self.scale_factor_temporal, self.scale_factor_spatial
        if factors != (time, space):
            found = f"scale_factor_temporal {factors[0]} and scale_factor_spatial {factors[1]} do not fit this VAE"
            made = f"temperal_downsample {self.temperal_downsample} makes {time}, dim_mult {self.dim_mult}"
            raise ValueError(f"{found}: {made} and patch_size {self.patch_size} make {space}")
        if self.is_residual:
            times = (*self.temperal_downsample, None)
            for dim_in, dim_out, time in zip((1, *self.dim_mult), self.dim_mult, times, strict=False):
                if dim_in * (1 if time is None else 8 if time else 4) % dim_out:
                    raise ValueError(f"dim_mult {self.dim_mult} cannot be averaged from {dim_in} to {dim_out}")

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of the latent of a clip; raises ValueError when the clip does not divide."""
        time, space = self.scale_factor_temporal, self.scale_factor_spatial
        if (frames - 1) % time or height % space or width % space:
            wanted = f"frames must be 1 + a multiple of {time}, height and width multiples of {space}"
            raise ValueError(f"a clip of {frames}×{height}×{width} does not fit this VAE: {wanted}")
        return (frames - 1) // time + 1, height // space, width // space, self.z_dim


_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as PyTorch's


class _Conv(nnx.Module):
    """Parameters of a channels-last convolution: kernel [*kernel, in, out] and bias [out]."""

    def __init__(self, kernel: tuple[int, ...], dim_in: int, dim_out: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(c.dtype)
        self.kernel = nnx.Param(_uniform(rngs.params(), (*kernel, dim_in, dim_out), c.param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim_out,), c.param_dtype))

    def parameters(self) -> tuple[Array, Array]:
        return self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)


class Conv2d(_Conv):
    """A 3×3 (or 1×1) convolution of every frame. Stride 2 pads below and to the right only."""

    def __init__(self, dim_in: int, dim_out: int, size: int, c: WanVAEConfig, rngs: nnx.Rngs, stride: int = 1):
        super().__init__((size, size), dim_in, dim_out, c, rngs)
        self.stride = stride

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 d"]:
        kernel, bias = self.parameters()
        return _conv2d(x.astype(self.dtype), kernel, self.stride) + bias


def _conv2d(x: Array, kernel: Array, stride: int = 1) -> Array:
    edge = kernel.shape[0] // 2
    pad = (edge, edge) if stride == 1 else (0, 1)
    frames = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(frames, kernel, (stride, stride), (pad, pad), None, None, ("NHWC", "HWIO", "NHWC"))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _see_only_now(kernel: Array) -> Array:
    """A fresh kernel that ignores the past, and of time alone repeats its input once or twice: an image VAE is then at
    once a video VAE of still frames, from which training on clips goes on."""
    now = kernel[-1]
    if kernel.shape[1:3] == (1, 1):
        dim_in, dim_out = kernel.shape[-2:]
        now = jnp.broadcast_to(jnp.tile(jnp.eye(dim_in), dim_out // dim_in), now.shape)
    return jnp.zeros_like(kernel).at[-1].set(now.astype(kernel.dtype))


class CausalConv3d(_Conv):
    """A 3D convolution that looks back in time: out[t] sees in[t-k+1 .. t], zeros before the clip. One 2D convolution
    per temporal tap, or of all at once if narrow: on XLA's CPU backend 4 to 5 times faster than its 3D one."""

    def __init__(
        self, dim_in: int, dim_out: int, kernel: tuple[int, int, int], c: WanVAEConfig, rngs: nnx.Rngs, stride: int = 1
    ):
        super().__init__(kernel, dim_in, dim_out, c, rngs)
        self.stride = stride
        if kernel[0] > 1:
            self.kernel[...] = _see_only_now(self.kernel[...])

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t h2 w2 d"]:
        seen = cache.extend(x, self.kernel.shape[0] - 1)
        if cache.first and x.shape[1] == 1:  # the taps before the last would see nothing but zeros
            seen = x
        return self.inside(seen)

    def inside(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        """The convolution without padding in time; a clip shorter than the kernel sees its last taps."""
        kernel, bias = self.parameters()
        x = x.astype(self.dtype)
        taps = min(kernel.shape[0], x.shape[1])
        last = x.shape[1] - taps
        seen, kernel = [x[:, tap : last + tap + 1 : self.stride] for tap in range(taps)], kernel[-taps:]
        if taps * x.shape[-1] <= _SIDE_BY_SIDE:
            return bias + _conv2d(jnp.concatenate(seen, -1), jnp.concatenate([*kernel], -2))
        return sum(map(_conv2d, seen, kernel), bias)  # from the bias on: the other way round takes 3 GiB more of a chip


class RMSNorm(nnx.Module):
    """x / |x| · √d · gamma over the channels, in fp32."""

    def __init__(self, dim: int, c: WanVAEConfig):
        self.gamma = nnx.Param(jnp.ones((dim,), c.param_dtype))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        y = x.astype(jnp.float32)
        # The floor inside the root keeps the gradient finite at x = 0; PyTorch's is outside, 1e-12.
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, -1, keepdims=True), 1e-24))
        return (y * (x.shape[-1] ** 0.5) * self.gamma[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, dim_in: int, dim_out: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(dim_in, c)
        self.conv1 = CausalConv3d(dim_in, dim_out, (3, 3, 3), c, rngs)
        self.norm2 = RMSNorm(dim_out, c)
        self.conv2 = CausalConv3d(dim_out, dim_out, (3, 3, 3), c, rngs)
        if dim_in != dim_out:
            self.conv_shortcut = CausalConv3d(dim_in, dim_out, (1, 1, 1), c, rngs)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t h w d"]:
        h = self.conv_shortcut.inside(x) if hasattr(self, "conv_shortcut") else x
        x = self.conv1(jax.nn.silu(self.norm1(x)), cache)
        return h + self.conv2(jax.nn.silu(self.norm2(x)), cache)


class AttentionBlock(nnx.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, c)
        self.to_qkv = Conv2d(dim, 3 * dim, 1, c, rngs)
        self.proj = Conv2d(dim, dim, 1, c, rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, _ = x.shape
        qkv = rearrange(self.to_qkv(self.norm(x)), "b t h w d -> (b t) (h w) 1 d")
        y = attention(*jnp.split(qkv, 3, -1))
        return x + self.proj(rearrange(y, "(b t) (h w) 1 d -> b t h w d", b=b, t=t, h=h, w=w))


class Downsample(nnx.Module):
    """Halves height and width, and with `time` also the frames after the first."""

    def __init__(self, dim: int, time: bool, c: WanVAEConfig, rngs: nnx.Rngs):
        self.resample = Conv2d(dim, dim, 3, c, rngs, stride=2)
        if time:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), c, rngs, stride=2)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 c"]:
        x = self.resample(x)
        if hasattr(self, "time_conv"):
            seen = cache.extend(x, 1)
            if not cache.first:
                x = self.time_conv.inside(seen)
            elif x.shape[1] > 1:
                x = jnp.concatenate([x[:, :1], self.time_conv.inside(x)], 1)
        return x


class Upsample(nnx.Module):
    """Doubles height and width; `time` doubles the frames after the first."""

    def __init__(self, dim: int, dim_out: int, time: bool, c: WanVAEConfig, rngs: nnx.Rngs):
        self.resample = Conv2d(dim, dim_out, 3, c, rngs)
        if time:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), c, rngs)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 d"]:
        if hasattr(self, "time_conv"):
            single = 1 if cache.first else 0
            seen = cache.extend(x[:, single:], 2)
            if x.shape[1] > single:
                pairs = self.time_conv.inside(seen)
                pairs = rearrange(pairs, "b t h w (two c) -> b (t two) h w c", two=2)
                x = jnp.concatenate([x[:, :single].astype(pairs.dtype), pairs], 1)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, 2), 2, 3))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(dim, dim, c, rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(dim, c, rngs)])

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


def average_down(x: Float[Array, "b t h w c"], dim: int, time: int, space: int) -> Float[Array, "b t2 h2 w2 d"]:
    """Means of `dim` groups of the channels of time × space × space blocks, zeros before the first frame."""
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t i) (h j) (w k) c -> b t h w (c i j k)", i=time, j=space, k=space)
    return x.reshape(*x.shape[:-1], dim, -1).mean(-1)


def repeat_up(x: Float[Array, "b t h w c"], dim: int, time: int, space: int, first: bool) -> Float[Array, "b _ _ _ d"]:
    """Every channel repeated over blocks of time × space × space values; the clip's `first` frame is not doubled."""
    values, share = time * space**2, max(1, x.shape[-1] // dim)  # channels that fill the block of one
    x = jnp.repeat(x, max(1, dim // x.shape[-1]), -1)
    # Slices of whole channels: a short last axis is 128 long on a TPU.
    parts = jnp.stack([x[..., i * share // values :: share] for i in range(values)])
    x = rearrange(parts, "(i j k) b t h w c -> b (t i) (h j) (w k) c", i=time, j=space, k=space)
    return x[:, time - 1 :] if first else x


class ResidualDownBlock(nnx.Module):
    """Residual blocks at one resolution, then, but for the last, a downsampling; around them `average_down`."""

    def __init__(self, dim_in: int, dim_out: int, time: bool | None, c: WanVAEConfig, rngs: nnx.Rngs):
        dims = [dim_in] + [dim_out] * (c.num_res_blocks - 1)
        self.resnets = nnx.List([ResidualBlock(dim, dim_out, c, rngs) for dim in dims])
        if time is not None:
            self.downsampler = Downsample(dim_out, time, c, rngs)
        self.dim, self.factors = dim_out, (2 if time else 1, 1 if time is None else 2)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 d"]:
        shortcut = average_down(x, self.dim, *self.factors)
        for block in self.resnets:
            x = block(x, cache)
        if hasattr(self, "downsampler"):
            x = self.downsampler(x, cache)
        return x + shortcut


class Encoder(nnx.Module):
    """Video to the moments of its latent, before `quant_conv`."""

    def __init__(self, c: WanVAEConfig, rngs: nnx.Rngs):
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        self.conv_in = CausalConv3d(c.in_channels, dims[0], (3, 3, 3), c, rngs)
        blocks: list[Any] = []
        times: list[bool | None] = [*c.temperal_downsample, None]
        for dim_in, dim_out, time in zip(dims[:-1], dims[1:], times, strict=True):
            if c.is_residual:
                blocks.append(ResidualDownBlock(dim_in, dim_out, time, c, rngs))
                continue
            for _ in range(c.num_res_blocks):
                blocks.append(ResidualBlock(dim_in, dim_out, c, rngs))
                dim_in = dim_out
            if time is not None:
                blocks.append(Downsample(dim_out, time, c, rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(dims[-1], c, rngs)
        self.norm_out = RMSNorm(dims[-1], c)
        self.conv_out = CausalConv3d(dims[-1], 2 * c.z_dim, (3, 3, 3), c, rngs)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 z"]:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x, cache))), cache)


class UpBlock(nnx.Module):
    """Residual blocks and, but for the last, an upsampling: around it `repeat_up`, or it halves the channels."""

    def __init__(self, dim_in: int, dim_out: int, time: bool | None, c: WanVAEConfig, rngs: nnx.Rngs):
        dims = [dim_in] + [dim_out] * c.num_res_blocks
        self.resnets = nnx.List([ResidualBlock(dim, dim_out, c, rngs) for dim in dims])
        self.dim, self.factors = dim_out, (2 if time else 1, 2)
        self.upsamplers = nnx.List([])
        if time is not None and c.is_residual:
            self.upsampler = Upsample(dim_out, dim_out, time, c, rngs)
        elif time is not None:
            self.upsamplers = nnx.List([Upsample(dim_out, dim_out // 2, time, c, rngs)])

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 d"]:
        start = x
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, cache)
        if hasattr(self, "upsampler"):
            x = self.upsampler(x, cache) + repeat_up(start, self.dim, *self.factors, cache.first)
        return x


class Decoder(nnx.Module):
    """Latent, after `post_quant_conv`, to video."""

    def __init__(self, c: WanVAEConfig, rngs: nnx.Rngs):
        base = c.decoder_base_dim or c.base_dim
        dims = [base * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])]
        times: list[bool | None] = [*c.temperal_downsample[::-1], None]
        self.conv_in = CausalConv3d(c.z_dim, dims[0], (3, 3, 3), c, rngs)
        self.mid_block = MidBlock(dims[0], c, rngs)
        self.up_blocks = nnx.List([])
        for dim_in, dim_out, time in zip(dims[:-1], dims[1:], times, strict=True):
            halved = self.up_blocks and not c.is_residual
            self.up_blocks.append(UpBlock(dim_in // 2 if halved else dim_in, dim_out, time, c, rngs))
        self.norm_out = RMSNorm(dims[-1], c)
        self.conv_out = CausalConv3d(dims[-1], c.out_channels, (3, 3, 3), c, rngs)

    def __call__(self, x: Float[Array, "b t h w c"], cache: CausalCache) -> Float[Array, "b t2 h2 w2 d"]:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), cache)


class WanVAE(ChunkedVAE):
    """Wan's video VAE."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.encoder = Encoder(c, rngs)
        self.quant_conv = CausalConv3d(2 * c.z_dim, 2 * c.z_dim, (1, 1, 1), c, rngs)
        self.post_quant_conv = CausalConv3d(c.z_dim, c.z_dim, (1, 1, 1), c, rngs)
        self.decoder = Decoder(c, rngs)

    def encode_chunk(self, frames: Array, cache: CausalCache) -> Array:
        p = self.config.patch_size or 1
        x = rearrange(frames, "b t (h p) (w q) c -> b t h w (c q p)", p=p, q=p)
        return self.quant_conv.inside(self.encoder(x, cache))

    def decode_chunk(self, latent: Array, cache: CausalCache) -> Array:
        p = self.config.patch_size or 1
        x = self.decoder(self.post_quant_conv.inside(latent), cache)
        return rearrange(x, "b t h w (c q p) -> b t (h p) (w q) c", p=p, q=p)

    def sizes(self, count: int, latent: bool, chunk: int | None) -> tuple[int, int]:
        """Of 1 + n · unit frames, how many are in the first chunk, with the remainder, and in the others."""
        unit = 1 if latent else self.config.scale_factor_temporal
        units = (count - 1) // unit
        if chunk is None or units <= chunk:
            return count, unit
        return 1 + unit * (units % chunk), unit * chunk


def normalise(latent: Float[Array, "b t h w z"], config: Any) -> Float[Array, "b t h w z"]:
    """Raw latents to what the DiT sees, (z - mean) / std per channel as the VAE's `config` gives them."""
    return (latent - jnp.array(config.latents_mean)) / jnp.array(config.latents_std)


def denormalise(latent: Float[Array, "b t h w z"], config: Any) -> Float[Array, "b t h w z"]:
    """The inverse of `normalise`."""
    return latent * jnp.array(config.latents_std) + jnp.array(config.latents_mean)
