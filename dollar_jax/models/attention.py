"""The one place that computes attention: which kernel, and on a mesh which device computes what."""

import functools
import math
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dollar_jax.models import activation_sharding
from dollar_jax.models.activation_sharding import BLOCK, CONTEXT, TENSOR, axis_size
from dollar_jax.models.embeddings import UNASKED

Implementation = Literal["auto", "splash", "cudnn", "xla"]
Kernel = Literal["splash", "cudnn", "xla"]
ContextParallel = Literal["gather", "ulysses"]
# A rematerialisation policy may keep these: attention's output, the dearest value to recompute, and what it is given.
NAME, GIVEN = "attention", "qkv"
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    *,
    mask: Bool[Array, "#b #heads #n m"] | None = None,
    bias: Float[Array, "#b heads n m"] | None = None,
    scale: float | None = None,
    length: int | None = None,
    implementation: Implementation = "auto",
    context: ContextParallel | None = None,
) -> Float[Array, "b n heads d"]:
    """softmax(q kᵀ · scale + bias) v with the softmax in fp32; `scale` is 1/√d unless given. Keys where `mask` is
    False, and those from `length` on, get no weight; a query without any key averages all of them. "auto" is Pallas'
    splash attention on TPU, cuDNN's flash attention on GPU in 16 bits, and XLA elsewhere and wherever there is a mask
    or bias.

    On a mesh with a `context` axis (see `models.activation_sharding`) queries are shared over it. So are keys in
    self-attention, whose `context` says how they meet: "gather" collects all keys on every device, "ulysses" trades
    tokens for heads; ValueError when heads or tokens do not divide over the mesh. With None the keys are whole
    everywhere, as those of a text are, and queries or heads that do not divide over the mesh are too."""
    masked = mask is not None or bias is not None
    kind = implementation if implementation != "auto" else _choose(q, masked)
    if masked and kind != "xla":
        raise ValueError(f"attention by {kind!r} takes no mask and no bias; 'xla' does")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    length = k.shape[1] if length is None else length
    q = q * scale if kind == "splash" else q  # whose kernel knows no scale
    local = functools.partial(_local, kind=kind, scale=scale, length=length, mask=mask, bias=bias)
    if masked or activation_sharding.mesh() is None:
        return local(q, k, v)
    if context is not None:
        _check(q, k, context)
    if kind == "xla" and (context is None or axis_size(CONTEXT) == 1):
        # XLA shares its own operations out as well as we could, but for convolutions (a VAE's) of 2 rows on 2 devices,
        # which it gets wrong: so few tokens are not shared.
        few = q.shape[1] < BLOCK * axis_size(CONTEXT)
        q = activation_sharding.constrain(q, None if context or few else CONTEXT, TENSOR)
        return local(q, *(activation_sharding.constrain(x, None, TENSOR) for x in (k, v)))
    over = activation_sharding.rows(q.shape[0])
    heads = TENSOR if q.shape[2] % axis_size(TENSOR) == 0 else None
    tokens = P(over, CONTEXT if q.shape[1] % axis_size(CONTEXT) == 0 else None, heads)
    keys = P(over, CONTEXT if context else None, heads)
    inner = functools.partial(_shared, local=local, context=context)
    return jax.shard_map(inner, in_specs=(tokens, keys, keys), out_specs=tokens, check_vma=False)(q, k, v)


def _choose(q: Array, masked: bool) -> Kernel:
    platform = activation_sharding.platform()
    if platform == "tpu" and not masked:
        return "splash"
    return "cudnn" if not masked and platform in ("cuda", "gpu") and q.dtype.itemsize == 2 else "xla"


def _check(q: Array, k: Array, context: ContextParallel) -> None:
    heads, parts = q.shape[2], axis_size(TENSOR)
    if heads % parts:
        raise ValueError(f"{heads} heads do not divide over the mesh's tensor axis of {parts}")
    share = axis_size(CONTEXT)
    if context == "ulysses" and heads // parts % share:
        wrong = f"{heads // parts} heads per device do not divide over the mesh's context axis of {share}"
        raise ValueError(f"{wrong}, as 'ulysses' needs; 'gather' does not")
    if left := [tokens for tokens in (q.shape[1], k.shape[1]) if tokens % share]:
        raise ValueError(f"{left[0]} tokens do not divide over the mesh's context axis of {share}")


def _shared(q: Array, k: Array, v: Array, *, local: Any, context: ContextParallel | None) -> Array:
    """Attention of this device's queries, and keys if they are shared, as part of that over the context axis."""
    if context == "gather":
        k, v = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k, v))
    if context != "ulysses":
        return local(q, k, v)
    # What goes to a device lies together, and gradients are moved before they become fp32.
    parts = jax.lax.optimization_barrier((q, k, v))
    parts = [einops.rearrange(x, "b n (to heads) d -> to b heads n d", to=axis_size(CONTEXT)) for x in parts]
    parts = [jax.lax.all_to_all(x, CONTEXT, 0, 0) for x in parts]
    parts = [einops.rearrange(x, "source b heads n d -> b (source n) heads d") for x in parts]
    out = einops.rearrange(local(*parts), "b (to n) heads d -> to b heads n d", to=axis_size(CONTEXT))
    return einops.rearrange(jax.lax.all_to_all(out, CONTEXT, 0, 0), "source b heads n d -> b n (source heads) d")


def _local(
    q: Array, k: Array, v: Array, *, kind: Kernel, scale: float, length: int, bias: Array | None, mask: Array | None
) -> Array:
    """Attention on one device, of all keys to some queries or heads."""
    q, k, v = (checkpoint_name(x.swapaxes(1, 2) if kind == "splash" else x, GIVEN) for x in (q, k, v))
    if kind == "splash":
        return _splash(q, k, v, length)
    if kind == "xla" and bias is None and mask is None:
        return _plain(q, k[:, :length], v[:, :length], scale)
    end = None if length == k.shape[1] else jnp.full(k.shape[:1], length, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, key_value_seq_lengths=end, implementation=kind)
    return checkpoint_name(out, NAME)


def _plain_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    """By matrix products of whole scores; and what the backward pass needs, which makes two passes over them where
    XLA's derivative of a softmax makes five: weights come back from scores and the logarithm of their sum
    (FlashAttention, arXiv 2205.14135)."""
    queries, keys, values = _by_head(q * scale, k, v)
    scores = _product("bhnd,bhmd->bhnm", queries, keys)
    most = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    out = _product("bhnm,bhmd->bhnd", weights.astype(v.dtype), values) / total
    out, total = (checkpoint_name(x, NAME) for x in (out.swapaxes(1, 2).astype(v.dtype), most + jnp.log(total)))
    return out, (q, k, v, out, total)


def _plain_backward(scale: float, kept: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    """Scores are keys by queries here: so two of the three products of them read their rows."""
    q, k, v, out, total = kept
    inner = (g.astype(jnp.float32) * out).sum(-1).swapaxes(1, 2)[:, :, None]
    q, k, v, g = _by_head(q * scale, k, v, g)
    with jax.named_scope(UNASKED):  # made for the second time
        weights = jnp.exp(_product("bhmd,bhnd->bhmn", k, q) - total.swapaxes(2, 3))
    scores = (weights * (_product("bhmd,bhnd->bhmn", v, g) - inner)).astype(q.dtype)
    dq = _product("bhmd,bhmn->bhdn", k, scores).swapaxes(2, 3) * scale
    dk, dv = (_product("bhmn,bhnd->bhmd", *x) for x in ((scores, q), (weights.astype(v.dtype), g)))
    return tuple(x.astype(q.dtype).swapaxes(1, 2) for x in (dq, dk, dv))


def _by_head(*arrays: Array) -> tuple[Array, ...]:
    """[b h n d] of [b n h d], in memory too: a product that moves its operands on a CPU does it number by number."""
    return jax.lax.optimization_barrier(tuple(x.swapaxes(1, 2) for x in arrays))


_plain = jax.custom_vjp(lambda *x: _plain_forward(*x)[0], nondiff_argnums=(3,))
_plain.defvjp(_plain_forward, _plain_backward)


def _splash(q: Array, k: Array, v: Array, length: int) -> Array:
    """Pallas' kernel over sequences padded to whole blocks; interpreted where there is no TPU. It knows neither a batch
    nor a scale, which q comes with. Padding is a segment of its own, which no real query looks at."""
    n, m = q.shape[2], k.shape[2]
    # Wide fp32 heads, as a VAE's, would fill the 16 MiB of vector memory that v5p has for a program.
    width = q.shape[-1] * q.dtype.itemsize
    most = 8 if width <= 512 else 4 if width <= 2048 else 2
    block_q, block_k = (activation_sharding.block_size(tokens, most) for tokens in (n, m))
    pairs = (q, block_q), (k, block_k), (v, block_k)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0))) for x, block in pairs)
    queries, keys = q.shape[2], k.shape[2]
    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * q.shape[1])
    # One backward kernel makes five products where two make seven, and a part of dq for each of its blocks of keys, as
    # large as v5p's vector memory has room for.
    backward = {"block_q_dkv": block_q, "block_kv_dkv_compute": block_k, "use_fused_bwd_kernel": True}
    backward["block_kv_dkv"] = block_k if keys // block_k % 2 else 2 * block_k
    blocks = splash.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=block_k, **backward)
    how = {"head_shards": 1, "q_seq_shards": 1, "interpret": activation_sharding.platform() != "tpu"}
    kernel = splash.make_splash_mha(mask, block_sizes=blocks, residual_checkpoint_name=NAME, **how)
    segments = None
    if length < keys:
        padding = jnp.asarray(np.arange(keys) >= length, jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(queries, jnp.int32), kv=padding)
    out: Array = jax.vmap(kernel, (0, 0, 0, None))(q, k, v, segments)  # pyright: ignore[reportAssignmentType]
    return out[:, :, :n].swapaxes(1, 2)
