"""What the transformers share: dense layers, norms, and a stack of equal layers run by a scan."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dollar_jax.models import activation_sharding
from dollar_jax.models.attention import ContextParallel, Implementation

Remat = Literal["none", "full", "dots", "attention"]
Initializer = Callable[..., Array]
Block = TypeVar("Block", bound=nnx.Module)

xavier = nnx.initializers.xavier_uniform()
_small = nnx.initializers.normal(0.02)


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

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        x = x.astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        out = jnp.matmul(x, kernel, precision=self.precision, preferred_element_type=self.out_dtype)
        if self.adapter is not None:
            out += self.adapter(x, self.precision)
        return out if self.bias is None else out + self.bias[...].astype(self.out_dtype)


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
    """x / √(mean x² + eps) · scale over the last axis: no mean is subtracted; fp32."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike = "float32") -> None:
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * inverse * self.scale[...]


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


def check_compute(config: Any) -> None:
    """Raises ValueError naming the one of these settings of a transformer that is no choice."""
    for name, kind in {"remat": Remat, "attention": Implementation, "context_parallel": ContextParallel}.items():
        if getattr(config, name) not in get_args(kind):
            raise ValueError(f"{name} is {getattr(config, name)!r}; it can be one of {get_args(kind)}")


def stack_blocks(build: Callable[[nnx.Rngs], Block], length: int, rngs: nnx.Rngs) -> Block:
    """`length` blocks as one module whose parameters have a leading axis of that length."""
    return nnx.vmap(build)(rngs.split(length))


def run_blocks(
    blocks: nnx.Module, x: Array, *args: Any, length: int, remat: Remat = "none", scan: bool = True, first: int = 0
) -> Array:
    """x ← block(x, *args) for the stacked `blocks` from `first` up to `length` in turn. `scan` compiles one block
    whatever their number; without it the loop is unrolled. `remat` says what the backward pass keeps of a block:
    everything ("none"), its input only ("full"), or with it the outputs of dense layers ("dots") or "attention"."""
    graphdef, params = nnx.split(blocks)
    if first or length < len(jax.tree.leaves(params)[0]):
        params = jax.tree.map(lambda p: p[first:length], params)

    def body(x: Array, layer: nnx.State) -> tuple[Array, None]:
        return place(nnx.merge(graphdef, layer)(x, *args)), None

    def place(x: Array) -> Array:
        # What a scan carries has one placement throughout; left to itself XLA may choose a worse one.
        return activation_sharding.constrain(x, activation_sharding.CONTEXT, None)

    x = place(x)
    if remat != "none":
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        policies["attention"] = jax.checkpoint_policies.save_only_these_names("attention")
        # Inside a scan nothing can be merged across the checkpoint, so no barrier is needed.
        body = jax.checkpoint(body, policy=policies[remat], prevent_cse=not scan)
    if scan:
        return jax.lax.scan(body, x, params)[0]
    for i in range(length - first):
        x, _ = body(x, jax.tree.map(lambda p, i=i: p[i], params))
    return x


def run_tapped(
    blocks: nnx.Module, x: Array, *args: Any, length: int, tap: float | None = None, early: bool = False, **how: Any
) -> tuple[Array, Array]:
    """`run_blocks`, and x after the share `tap` of the blocks; `early`, no block after those runs."""
    block = 0 if tap is None else max(1, round(tap * length))
    features = run_blocks(blocks, x, *args, length=block, **how) if block else x
    return features if early else run_blocks(blocks, features, *args, length=length, first=block, **how), features
