"""DOLLAR's latent reward model, which predicts a pixel reward from the latent (tables 8.9 to 8.11, eqs. 8.10 and 8.11).
Every latent frame is scored alone and the scores are averaged, or a video is convolved over time too.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dollar_jax.models.attention import attention
from dollar_jax.models.layers import Linear


@dataclasses.dataclass(frozen=True)
class LatentRewardConfig:
    """`text_dim` None scores the latent alone, else its agreement with text of that width. With 12 channels and the
    published kernels the image model has 189,441 parameters, the text-image model 763,009 without group norms.
    """

    channels: int = 16
    width: int = 128
    text_dim: int | None = None
    stem_kernel: int = 4
    stem_stride: int = 4
    stem_padding: int = 1
    second_kernel: int = 3
    second_stride: int = 2
    second_padding: int = 1
    temporal_kernel: int = 1  # more convolves over time too, with zeros before and after the clip
    group_norm: bool = True
    groups: int = 32
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.temporal_kernel < 1 or self.temporal_kernel % 2 == 0:
            raise ValueError(f"temporal_kernel must be odd and positive, not {self.temporal_kernel}")
        if self.group_norm and self.width % self.groups:
            raise ValueError(f"width {self.width} does not divide into {self.groups} groups")


class LatentRewardModel(nnx.Module):
    """One fp32 score per video. The paper averages the text before the attention, but a softmax over a single key is 1,
    and the score ignores the latent; here the feature attends over the text's tokens, and their sum is scored.
    """

    def __init__(self, config: LatentRewardConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        types = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype), "rngs": rngs}

        def conv(channels: int, kernel: int, stride: int, padding: int) -> nnx.Conv:
            size, strides = [kernel] * 2, [stride] * 2
            pads = [(padding, padding)] * 2
            if (time := c.temporal_kernel) > 1:
                size, strides, pads = [time, *size], [1, *strides], [(time // 2, time // 2), *pads]
            return nnx.Conv(channels, c.width, size, strides=strides, padding=pads, **types)

        def norm() -> nnx.GroupNorm | None:
            # Statistics in fp32, as everywhere.
            fp32 = {**types, "dtype": jnp.float32}
            return nnx.GroupNorm(c.width, num_groups=c.groups, **fp32) if c.group_norm else None

        self.conv1 = conv(c.channels, c.stem_kernel, c.stem_stride, c.stem_padding)
        self.norm1 = norm()
        self.conv2 = conv(c.width, c.second_kernel, c.second_stride, c.second_padding)
        self.norm2 = norm()
        # A 1×1 convolution of a pooled feature is a dense layer.
        self.feature = Linear(c.width, c.width, **types)
        self.score = Linear(c.width, 1, **types)
        if c.text_dim is None:
            return
        self.text_proj = Linear(c.text_dim, c.width, **types)
        # A token that is always there, so that an empty prompt is defined. The table counts 524,544
        # parameters for the text projection, which are these and the 4096 → 128 layer's 524,416.
        self.null_token = nnx.Param(jnp.zeros((c.width,), c.param_dtype))
        self.to_q = Linear(c.width, c.width, **types)
        self.to_k = Linear(c.width, c.width, **types)
        self.to_v = Linear(c.width, c.width, **types)

    def __call__(
        self, latent: Float[Array, "b t h w c"], text: Float[Array, "b l d"] | None = None
    ) -> Float[Array, " b"]:
        """Rows of `text` that are all zero are padding and do not count."""
        if (text is None) != (self.config.text_dim is None):
            given = "no text" if text is None else "text"
            raise ValueError(f"the latent reward model got {given}; text_dim is {self.config.text_dim}")
        features = self._frames(latent)
        if text is not None:
            features = features + self._attend(features, text)
        return self.score(features)[..., 0].astype(jnp.float32).mean(axis=1)

    def _frames(self, latent: Float[Array, "b t h w c"]) -> Float[Array, "b t width"]:
        x = latent if self.config.temporal_kernel > 1 else latent.reshape(-1, *latent.shape[2:])
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x)
            x = jax.nn.silu(x if norm is None else norm(x)).astype(self.config.dtype)
        if not x.size:
            raise ValueError(f"a latent of h, w = {latent.shape[2:4]} is too small for this stem")
        return self.feature(x.mean(axis=(-3, -2))).reshape(*latent.shape[:2], -1)

    def _attend(self, features: Float[Array, "b t width"], text: Float[Array, "b l d"]) -> Float[Array, "b t width"]:
        tokens = self.text_proj(text)
        null = jnp.broadcast_to(self.null_token[...], (*tokens.shape[:1], 1, tokens.shape[-1]))
        tokens = jnp.concatenate([null.astype(tokens.dtype), tokens], axis=1)
        real = jnp.pad(jnp.any(text != 0, axis=-1), ((0, 0), (1, 0)), constant_values=True)
        q, k, v = self.to_q(features), self.to_k(tokens), self.to_v(tokens)
        out = attention(*(a[:, :, None] for a in (q, k, v)), mask=real[:, None, None, :])
        return out[:, :, 0]
