"""Where activations live on the mesh of `jax.sharding.use_abstract_mesh`; without one nothing happens. Axes: `data` and
`fsdp` share the rows of a batch, `context` the tokens of a sequence, `tensor` heads and channels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

ROWS = ("data", "fsdp")
CONTEXT = "context"
TENSOR = "tensor"
# The kernels of attention work on blocks of so many tokens.
BLOCK = 128


def mesh() -> AbstractMesh | None:
    """The mesh that is traced for, or None where it is absent or a single device."""
    here = jax.sharding.get_abstract_mesh()
    return None if here.empty or here.size == 1 else here


def platform() -> str:
    """What the traced program will run on: the mesh's platform, which need not be this machine's."""
    here = jax.sharding.get_abstract_mesh()
    device = None if here.empty else here.abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(axis: str | tuple[str, ...]) -> int:
    here = mesh()
    return 1 if here is None else math.prod(here.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def rows(batch: int) -> tuple[str, ...] | None:
    """The axes that share a batch of so many rows: none of them unless it divides."""
    return ROWS if batch % axis_size(ROWS) == 0 else None


def constrain(x: Array, *axes: str | None) -> Array:
    """`x` [b, ...] with its rows over ROWS and the following axes over those named; None is whole."""
    if mesh() is None:
        return x
    named = (axis if axis and x.shape[i] % axis_size(axis) == 0 else None for i, axis in enumerate(axes, 1))
    return jax.lax.with_sharding_constraint(x, P(rows(x.shape[0]), *named))


def row_by_row(function: Callable[[Array], PyTree], x: Array) -> PyTree:
    """function(x) of rows that know nothing of each other: each device takes its own one after another."""
    shards = axis_size(ROWS) if rows(x.shape[0]) else 1
    if x.shape[0] == shards:
        return function(x)
    parts = x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1)
    y = jax.lax.map(lambda part: jax.tree.map(constrain, function(constrain(part))), parts)
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:]), y)


def block_size(tokens: int, most: int = 8) -> int:
    """Of the attention's kernels the block, of at most `most` times 128 tokens, that wastes the least padding."""
    if tokens <= min(4, most) * BLOCK:
        return -(-tokens // BLOCK) * BLOCK
    return min(range(most * BLOCK, (most // 2 - 1) * BLOCK, -BLOCK), key=lambda size: -(-tokens // size) * size)


def padded_length(tokens: int, attention: str = "auto") -> int:
    """Tokens of a sequence once it is padded: to whole blocks where a TPU's kernel of `attention` would do it in every
    layer; over a context axis to divide by it, in whole blocks when long."""
    if (parts := axis_size(CONTEXT)) == 1:
        block = block_size(tokens) if platform() == "tpu" and attention != "xla" else 1
        return -(-tokens // block) * block
    step = parts * BLOCK if tokens >= 4 * parts * BLOCK else parts
    return -(-tokens // step) * step


def pad_tokens(x: Array, attention: str) -> Array:
    """`x` [..., n, d] with zeros after the tokens n, up to their `padded_length`."""
    count = padded_length(x.shape[-2], attention) - x.shape[-2]
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, count), (0, 0)]) if count else x
