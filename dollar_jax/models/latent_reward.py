"""DOLLAR's latent reward model, which predicts a pixel reward from the latent (tables 8.9 to 8.11, eqs. 8.10 and 8.11).
Every latent frame is scored alone and the scores are averaged, or a video is convolved over time too; or a head reads
the tokens of a transformer, as a discriminator does."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dollar_jax.models.attention import attention
from dollar_jax.models.layers import Linear, layer_norm


class LatentRewardModel(nnx.Module):
    """One fp32 score per video by the settings `c`, config.reward.head: of the latent alone, or, with a `text_dim`, of
    its agreement with text of that width. The paper averages the text before the attention, but a softmax over a single
    key is 1, and the score ignores the latent; here the feature attends over the text's tokens, and their sum is
    scored. With 12 channels and the published kernels the image model has 189,441 parameters, the other 763,009."""

    def __init__(self, c: Any, channels: int, text_dim: int | None, rngs: nnx.Rngs, dtype: str = "float32") -> None:
        self.config, self.text_dim, self.dtype = c, text_dim, jnp.dtype(dtype)
        types = {"dtype": self.dtype, "rngs": rngs}

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

        self.conv1 = conv(channels, c.stem_kernel, c.stem_stride, c.stem_padding)
        self.norm1 = norm()
        self.conv2 = conv(c.width, c.second_kernel, c.second_stride, c.second_padding)
        self.norm2 = norm()
        # A 1×1 convolution of a pooled feature is a dense layer.
        self.feature = Linear(c.width, c.width, **types)
        self.score = Linear(c.width, 1, **types)
        if text_dim is None:
            return
        self.text_proj = Linear(text_dim, c.width, **types)
        # A token that is always there, so that an empty prompt is defined. The table counts 524,544
        # parameters for the text projection, which are these and the 4096 → 128 layer's 524,416.
        self.null_token = nnx.Param(jnp.zeros((c.width,)))
        self.to_q, self.to_k, self.to_v = (Linear(c.width, c.width, **types) for _ in range(3))

    def __call__(self, latent: Float[Array, "b t h w c"], text: Float[Array, "b l d"] | None = None) -> Array:
        """Rows of `text` that are all zero are padding and do not count."""
        if (text is None) != (self.text_dim is None):
            given = "no text" if text is None else "text"
            raise ValueError(f"the latent reward model got {given}; text_dim is {self.text_dim}")
        features = self._frames(latent)
        if text is not None:
            features = features + self._attend(features, text)
        return self.score(features)[..., 0].astype(jnp.float32).mean(axis=1)

    def _frames(self, latent: Float[Array, "b t h w c"]) -> Float[Array, "b t width"]:
        x = latent if self.config.temporal_kernel > 1 else latent.reshape(-1, *latent.shape[2:])
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x)
            x = jax.nn.silu(x if norm is None else norm(x)).astype(self.dtype)
        if not x.size:
            raise ValueError(f"a latent of h, w = {latent.shape[2:4]} is too small for this stem")
        return self.feature(x.mean(axis=(-3, -2))).reshape(*latent.shape[:2], -1)

    def _attend(self, features: Float[Array, "b t width"], text: Float[Array, "b l d"]) -> Float[Array, "b t width"]:
        tokens = self.text_proj(text)
        null = jnp.broadcast_to(self.null_token[...], (*tokens.shape[:1], 1, tokens.shape[-1]))
        tokens = jnp.concatenate([null.astype(tokens.dtype), tokens], axis=1)
        real = jnp.pad(jnp.any(text != 0, axis=-1), ((0, 0), (1, 0)), constant_values=True)
        q, k, v = self.to_q(features), self.to_k(tokens), self.to_v(tokens)
        return attention(*(a[:, :, None] for a in (q, k, v)), mask=real[:, None, None, :])[:, :, 0]


class FeatureHead(nnx.Module):
    """A score of each video from a transformer's tokens: learned queries attend to them, an MLP reads what they found.
    fp32, and 0 at the start; keys and values, of `width` channels, are in `dtype`."""

    def __init__(self, dim: int, width: int, rngs: nnx.Rngs, dtype: DTypeLike = "float32", queries: int = 4) -> None:
        self.queries = nnx.Param(0.02 * jax.random.normal(rngs.params(), (queries, width)))
        self.to_k, self.to_v = (Linear(dim, width, rngs=rngs, dtype=dtype) for _ in range(2))
        self.hidden = Linear(queries * width, width, rngs=rngs)
        self.score = Linear(width, 1, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, " b"]:
        x = layer_norm(tokens, 1e-6)
        k, v = self.to_k(x), self.to_v(x)
        q = jnp.broadcast_to(self.queries[...].astype(k.dtype), (len(x), *self.queries.shape))
        found = attention(*(a[:, :, None] for a in (q, k, v)), implementation="xla")
        return self.score(jax.nn.silu(self.hidden(found.reshape(len(x), -1))))[:, 0]
