"""CLIP's image and text towers, structured as transformers' `CLIPModel`; the base of most image rewards. Radford et
al., arXiv 2103.00020. Images come as frames in [0, 1]; `preprocess` makes of them what the image tower expects."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dollar_jax.models.attention import attention
from dollar_jax.models.embeddings import patchify
from dollar_jax.models.layers import LayerNorm, Linear, Remat, run_blocks, stack_blocks

Activation = Literal["gelu", "quick_gelu"]
Fit = Literal["crop", "pad", "stretch"]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One tower's transformer, pre-norm with a causal mask in the text's; fields as in transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: Activation
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """`text` None leaves out the text tower; `frames` attend to one another (ViCLIP, arXiv 2307.06942)."""

    vision: TowerConfig
    text: TowerConfig | None
    projection_dim: int
    patch_size: int = 14
    image_size: int = 224
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    frames: int = 1

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """An image tower alone, as transformers' `CLIPVisionModel`; `dtype` and `param_dtype` are ours."""

    patch_size: int = 14
    image_size: int = 224
    dtype: str = "float32"
    param_dtype: str = "float32"


# LAION's, of HPSv2 and PickScore.
VIT_H_14 = CLIPConfig(TowerConfig(1280, 5120, 32, 16, "gelu"), TowerConfig(1024, 4096, 24, 16, "gelu"), 1024)


def _dense(c: CLIPConfig, dim_in: int, dim_out: int, rngs: nnx.Rngs, bias: bool = True) -> Linear:
    return Linear(dim_in, dim_out, bias=bias, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)


class CLIPBlock(nnx.Module):
    def __init__(self, c: CLIPConfig, tower: TowerConfig, rngs: nnx.Rngs) -> None:
        dim, eps = tower.hidden_size, tower.layer_norm_eps
        self.layer_norm1 = LayerNorm(dim, eps, param_dtype=c.param_dtype)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_dense(c, dim, dim, rngs) for _ in range(4))
        self.layer_norm2 = LayerNorm(dim, eps, param_dtype=c.param_dtype)
        self.fc1 = _dense(c, dim, tower.intermediate_size, rngs)
        self.fc2 = _dense(c, tower.intermediate_size, dim, rngs)
        self.heads, self.quick = tower.num_attention_heads, tower.hidden_act == "quick_gelu"

    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "1 1 n n"] | None) -> Float[Array, "b n d"]:
        y = self.layer_norm1(x)
        q, k, v = (f(y).reshape(*y.shape[:2], self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attention(q, k, v, mask=mask).reshape(y.shape))
        y = self.fc1(self.layer_norm2(x))
        y = y * jax.nn.sigmoid(1.702 * y) if self.quick else jax.nn.gelu(y, approximate=False)
        return x + self.fc2(y)


def _table(c: CLIPConfig, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, c.param_dtype))


class VisionTower(nnx.Module):
    def __init__(self, c: CLIPConfig, rngs: nnx.Rngs) -> None:
        tower = c.vision
        dim, patches = tower.hidden_size, (c.image_size // c.patch_size) ** 2
        self.class_embedding = _table(c, rngs, dim)
        # Of the patch's pixels in order (row, column, colour): a convolution without overlap.
        self.patch_embedding = _dense(c, 3 * c.patch_size**2, dim, rngs, bias=False)
        self.position_embedding = _table(c, rngs, patches + 1, dim)
        self.temporal_embedding = _table(c, rngs, c.frames, dim) if c.frames > 1 else None
        self.pre_layrnorm = LayerNorm(dim, tower.layer_norm_eps, param_dtype=c.param_dtype)
        self.blocks = stack_blocks(lambda r: CLIPBlock(c, tower, r), tower.num_hidden_layers, rngs)
        self.post_layernorm = LayerNorm(dim, tower.layer_norm_eps, param_dtype=c.param_dtype)
        self.config = c

    def __call__(self, pixels: Float[Array, "n s s 3"]) -> Float[Array, "b d"]:
        return self.post_layernorm(self.states(pixels)[:, 0])

    def states(self, pixels: Float[Array, "n s s 3"], left_out: int = 0) -> Float[Array, "b m d"]:
        """The tokens after all blocks but so many of the last."""
        c = self.config
        x = self.patch_embedding(patchify(pixels[:, None], (1, c.patch_size, c.patch_size)))
        place = self.position_embedding[...].astype(x.dtype)
        x = (x + place[1:]).reshape(-1, c.frames, *x.shape[1:])
        if self.temporal_embedding is not None:
            x += self.temporal_embedding[...].astype(x.dtype)[:, None]
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype) + place[0], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x.reshape(len(x), -1, x.shape[-1])], 1)
        x = self.pre_layrnorm(x).astype(c.dtype)
        return run_blocks(self.blocks, x, None, part=slice(-left_out or None), remat=c.remat, scan=not left_out)


class TextTower(nnx.Module):
    def __init__(self, c: CLIPConfig, tower: TowerConfig, rngs: nnx.Rngs) -> None:
        dim = tower.hidden_size
        self.token_embedding = _table(c, rngs, c.vocab_size, dim)
        self.position_embedding = _table(c, rngs, c.max_position_embeddings, dim)
        self.blocks = stack_blocks(lambda r: CLIPBlock(c, tower, r), tower.num_hidden_layers, rngs)
        self.final_layer_norm = LayerNorm(dim, tower.layer_norm_eps, param_dtype=c.param_dtype)
        self.config = c

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b d"]:
        x = self.token_embedding[...][ids] + self.position_embedding[...][: ids.shape[1]]
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]
        x = run_blocks(self.blocks, x.astype(self.config.dtype), causal)
        # What follows the first end of text is padding, which a causal mask keeps out of it.
        end = jnp.argmax(ids == self.config.eos_token_id, axis=1)
        return self.final_layer_norm(x[jnp.arange(len(ids)), end])


class CLIP(nnx.Module):
    """Embeddings of unit length, fp32; logits are `exp(logit_scale)` times their inner products, cosines."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        self.vision_model = VisionTower(c, rngs)
        self.visual_projection = _dense(c, c.vision.hidden_size, c.projection_dim, rngs, bias=False)
        if c.text is not None:
            self.text_model = TextTower(c, c.text, rngs)
            self.text_projection = _dense(c, c.text.hidden_size, c.projection_dim, rngs, bias=False)
            self.logit_scale = nnx.Param(jnp.full((), 2.6592, c.param_dtype))

    def embed_images(self, pixels: Float[Array, "n s s 3"]) -> Float[Array, "b p"]:
        """Of pixels made by `preprocess`, of `frames` of them each."""
        return _unit(self.visual_projection(self.vision_model(pixels)))

    def embed_text(self, ids: Int[Array, "b l"]) -> Float[Array, "b p"]:
        """Of token ids, padded after the end of text."""
        return _unit(self.text_projection(self.text_model(ids)))

    def __call__(self, pixels: Float[Array, "b s s 3"], ids: Int[Array, "n l"]) -> Float[Array, "b n"]:
        """Logits of every image with every text."""
        cosines = self.embed_images(pixels) @ self.embed_text(ids).T
        return cosines * jnp.exp(self.logit_scale[...].astype(jnp.float32))


class CLIPVision(nnx.Module):
    """An image tower alone: the tokens before its last block, transformers' `hidden_states[-2]`."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        tower = CLIPConfig(c, None, 0, c.patch_size, c.image_size, dtype=c.dtype, param_dtype=c.param_dtype)
        self.vision_model = VisionTower(tower, rngs)

    def __call__(self, frames: Float[Array, "b h w 3"]) -> Float[Array, "b m d"]:
        """Of frames in [0, 1]."""
        return self.vision_model.states(preprocess(frames, self.config.image_size), left_out=1)


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True))


def preprocess(frames: Float[Array, "b h w 3"], size: int = 224, fit: Fit = "crop") -> Float[Array, "b s s 3"]:
    """Frames in [0, 1] as CLIP's image tower wants them: resized, cut or padded to a square, normalised. "crop" makes
    the shorter edge `size` and takes the middle, as transformers' `CLIPImageProcessor`; "pad" makes the longer edge
    `size` and puts black around it, as HPSv2 does. Bicubic with antialiasing, first along the rows, as PIL's, but
    without PIL's rounding to bytes after each of these two passes. "stretch" is ViCLIP's, bilinear."""
    if fit == "stretch":
        x = jax.image.resize(frames, (len(frames), size, size, 3), "linear", antialias=False)
        return (x - jnp.array(_IMAGENET[0])) / jnp.array(_IMAGENET[1])
    h, w = frames.shape[1:3]
    if fit == "crop":
        short = min(h, w)
        height, width = (size if edge == short else int(size * edge / short) for edge in (h, w))
    else:
        scale = size / max(h, w)
        height, width = round(h * scale), round(w * scale)
    x = jnp.asarray(frames, jnp.float32)
    for shape in ((len(x), h, width, 3), (len(x), height, width, 3)):
        # Bicubic overshoots at edges; PIL's bytes cannot, after either pass.
        x = jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), 0.0, 1.0)
    top, left = abs(height - size) // 2, abs(width - size) // 2
    if fit == "crop":
        x = x[:, top : top + size, left : left + size]
    else:
        x = jnp.pad(x, ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0)))
    return (x - jnp.array(MEAN)) / jnp.array(STD)
