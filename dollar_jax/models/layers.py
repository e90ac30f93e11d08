"""What the transformers share: dense layers, norms, attention, and a stack of equal layers run by a scan."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dollar_jax.models import activation_sharding
from dollar_jax.models.attention import GIVEN, NAME, ContextParallel, Implementation, attention
from dollar_jax.models.embeddings import Rotary, rotate

Remat = Literal["none", "full", "dots", "attention", "qkv"]
Initializer = Callable[..., Array]
Block = TypeVar("Block", bound=nnx.Module)
Tokens = Float[Array, "b n d"]

xavier = nnx.initializers.xavier_uniform()
_small = nnx.initializers.normal(0.02)
_ALL = slice(None)


class Adapter(nnx.Module):
    """scale · x D U of low rank (LoRA, arXiv 2106.09685), zero at first: D [*l, in, rank], U [*l, rank, out]."""

    def __init__(self, layers: tuple, dim_in: int, dim_out: int, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        bound = dim_in**-0.5
        self.down = nnx.Param(jax.random.uniform(rngs.params(), (*layers, dim_in, rank), float, -bound, bound))
        self.up = nnx.Param(jnp.zeros((*layers, rank, dim_out)))
        self.scale = scale

    def __call__(self, x: Float[Array, "*b i"], precision: jax.lax.PrecisionLike) -> Float[Array, "*b o"]:
        inner = jnp.matmul(x, self.down[...].astype(x.dtype), precision=precision)
        return self.scale * jnp.matmul(inner, self.up[...].astype(x.dtype), precision=precision)


class Linear(nnx.Module):
    """x W + b in `dtype`, rounded to `out_dtype` if given, with W [in, out] in `param_dtype`; plus an adapter's."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        kernel_init: Initializer = xavier,
        dtype: DTypeLike = "float32",
        param_dtype: DTypeLike = "float32",
        precision: jax.lax.PrecisionLike = None,
        out_dtype: DTypeLike | None = None,
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (dim_in, dim_out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim_out,), param_dtype)) if bias else None
        self.dtype, self.precision, self.out_dtype = dtype, precision, out_dtype or dtype
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*b i"], heads: int | None = None, axes: int = 1) -> Array:
        """[*b o]; with `heads` [*b, heads, o / heads], and of [*b, heads, i / heads] with 2 `axes`: so a TPU writes and
        reads a head's rows by themselves, as attention does, and does not move them before or after."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        kernel = kernel.reshape(*x.shape[x.ndim - axes :], *([] if heads is None else [heads]), -1)
        out = jnp.tensordot(x, kernel, axes, precision=self.precision, preferred_element_type=self.out_dtype)
        if self.adapter is not None:
            out += self.adapter(x.reshape(*x.shape[: x.ndim - axes], -1), self.precision).reshape(out.shape)
        return out if self.bias is None else out + self.bias[...].astype(self.out_dtype).reshape(kernel.shape[axes:])


def layer_norm(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """Zero mean and unit variance over the last axis, computed and returned in fp32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and bias; fp32."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike = "float32") -> None:
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale: no mean is subtracted; fp32. Over the last axis, or the heads and channels [h d]
    that have a scale each."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike = "float32") -> None:
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x, axes = x.astype(jnp.float32), (-1,) if x.shape[-1] == self.scale.size else (-2, -1)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + self.eps)
        return x * inverse * self.scale[...].reshape([x.shape[axis] for axis in axes])


Norm = LayerNorm | RMSNorm


class MLP(nnx.Module):
    """Two dense layers named as in diffusers' embedders, `linear_1` and `linear_2`."""

    def __init__(self, dim_in: int, dim: int, act: Callable[[Array], Array], **dense: Any) -> None:
        self.linear_1 = Linear(dim_in, dim, kernel_init=_small, **dense)
        self.linear_2 = Linear(dim, dim, kernel_init=_small, **dense)
        self.act = act

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.linear_2(self.act(self.linear_1(x)))


class FeedForward(nnx.Module):
    """The two dense layers of a transformer's block, with the tanh approximation of GELU between."""

    def __init__(self, dim: int, inner: int, **dense: Any) -> None:
        self.proj_in = Linear(dim, inner, **dense)
        self.proj_out = Linear(inner, dim, **dense)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.proj_out(jax.nn.gelu(self.proj_in(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What the configurations of video transformers share: fields of diffusers', and after the blank of ours. Raises
    ValueError naming the one of ours that is no choice."""

    patch_size: int | tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    num_layers: int

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    attention: Implementation = "auto"
    context_parallel: ContextParallel = "gather"

    def __post_init__(self) -> None:
        for name, kind in {"remat": Remat, "attention": Implementation, "context_parallel": ContextParallel}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be one of {get_args(kind)}")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (1, self.patch_size, self.patch_size)

    def grid(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """How many tokens a latent of shape [b t h w c] has in t, h and w; ValueError where it does not fit."""
        *size, channels = latent[1:]
        if channels != self.in_channels:
            raise ValueError(f"the latent has {channels} channels; in_channels is {self.in_channels}")
        if any(s % p for s, p in zip(size, self.patch, strict=True)):
            raise ValueError(f"a latent of t, h, w = {size} does not divide by patch_size={self.patch_size}")
        t, h, w = (s // p for s, p in zip(size, self.patch, strict=True))
        return t, h, w


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys go through a `norm`, of each head or, as wide as all of them, of all
    together; with `added`, keys and values of its own for an image's tokens."""

    def __init__(
        self, c: TransformerConfig, norm: Callable[[], Norm], rngs: nnx.Rngs, bias: bool = True, added: bool = False
    ) -> None:
        dense = {"rngs": rngs, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.to_q, self.to_k, self.to_v = (Linear(c.dim, c.dim, bias=bias, **dense) for _ in range(3))
        self.to_out = Linear(c.dim, c.dim, **dense)
        self.norm_q, self.norm_k = norm(), norm()
        if added:
            self.add_k_proj, self.add_v_proj = (Linear(c.dim, c.dim, **dense) for _ in range(2))
            self.norm_added_k = norm()
        self.config = c

    def __call__(
        self, x: Tokens, *context: Float[Array, "b _ d"], rotary: Rotary | None = None, length: int | None = None
    ) -> Tokens:
        """Attention to the `context`, a text and perhaps an image's tokens; without, self-attention, in which tokens
        from `length` on are padding."""
        c, parallel = self.config, None if context else self.config.context_parallel
        heads, (keys, *image) = c.num_attention_heads, context or (x,)
        q, k = self.norm_q(self.to_q(x, heads)).astype(c.dtype), self.norm_k(self.to_k(keys, heads)).astype(c.dtype)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        v = self.to_v(keys, heads)
        out = attention(q, k, v, length=length, implementation=c.attention, context=parallel)
        for tokens in image:
            k, v = self.norm_added_k(self.add_k_proj(tokens, heads)).astype(c.dtype), self.add_v_proj(tokens, heads)
            out += attention(q, k, v, implementation=c.attention)
        return self.to_out(out, axes=2)


def stack_blocks(build: Callable[[nnx.Rngs], Block], length: int, rngs: nnx.Rngs) -> Block:
    """`length` blocks as one module whose parameters have a leading axis of that length."""
    return nnx.vmap(build)(rngs.split(length))


def count_blocks(params: Any) -> int:
    """How many blocks have these stacked parameters, or shapes of them."""
    return jax.tree.leaves(params)[0].shape[0]


def keep_blocks(params: Any, count: int | None) -> Any:
    """A transformer's parameters with `count` of its stacked blocks, evenly spread from the first to the last (of one,
    the first); as they are if None. ValueError if it has fewer."""
    if count is None:
        return params
    if count > (there := count_blocks(params["blocks"])):
        raise ValueError(f"config.student.layers is {count}, but the teacher has only {there} blocks")
    kept = np.linspace(0, there - 1, count).round().astype(int)
    return {**params, "blocks": jax.tree.map(lambda p: p[kept], params["blocks"])}


def run_blocks(
    blocks: nnx.Module, x: Array, *args: Any, part: slice = _ALL, remat: Remat = "none", scan: bool = True
) -> Array:
    """x ← block(x, *args) for the stacked `blocks` in turn, or a `part` of them. `scan` compiles one block
    whatever their number; without it the loop is unrolled. `remat` says what the backward pass keeps of a block:
    everything ("none"), its input only ("full"), or with it what "attention" puts out, and besides that the outputs of
    dense layers ("dots") or what attention is given ("qkv")."""
    graphdef, params = nnx.split(blocks)
    if part != _ALL:
        params = jax.tree.map(lambda p: p[part], params)

    def body(x: Array, layer: nnx.State) -> tuple[Array, None]:
        return place(nnx.merge(graphdef, layer)(x, *args)), None

    def place(x: Array) -> Array:
        # What a scan carries has one placement throughout; left to itself XLA may choose a worse one.
        return activation_sharding.constrain(x, activation_sharding.CONTEXT, None)

    x = place(x)
    if remat != "none":
        policies = {"full": None, "attention": jax.checkpoint_policies.save_only_these_names(NAME)}
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policies["dots"] = jax.checkpoint_policies.save_from_both_policies(dots, policies["attention"])
        policies["qkv"] = jax.checkpoint_policies.save_only_these_names(NAME, GIVEN)
        # Inside a scan nothing can be merged across the checkpoint, so no barrier is needed.
        body = jax.checkpoint(body, policy=policies[remat], prevent_cse=not scan)
    if scan:
        return jax.lax.scan(body, x, params)[0]
    for i in range(count_blocks(params)):
        x, _ = body(x, jax.tree.map(lambda p, i=i: p[i], params))
    return x


def run_tapped(
    c: TransformerConfig, blocks: nnx.Module, x: Array, *args: Any, tap: float | None = None, early: bool = False
) -> tuple[Array, Array]:
    """`run_blocks`, and x after the share `tap` of the blocks; `early`, no block after those runs."""
    run = functools.partial(run_blocks, blocks, remat=c.remat, scan=c.scan_layers)
    block = 0 if tap is None else max(1, round(tap * count_blocks(nnx.state(blocks))))
    features = run(x, *args, part=slice(block)) if block else x
    return features if early else run(features, *args, part=slice(block or None, None)), features
