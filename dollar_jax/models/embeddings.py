"""What the video transformers share before their blocks: patches, times and positions."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

UNASKED = "unasked_for"  # the scope of products that no model asks for
Rotary = tuple[Float[Array, "n half"], Float[Array, "n half"]]


def patchify(x: Float[Array, "b t h w c"], patch: tuple[int, int, int]) -> Float[Array, "b n p"]:
    """One row per patch, in the order t, h, w; inside it pt, ph, pw, c."""
    pt, ph, pw = patch
    return rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: Float[Array, "b n p"], grid: tuple[int, ...], patch: tuple[int, ...]) -> Float[Array, "b t h w c"]:
    """Undoes `patchify` for a grid of so many patches in t, h and w."""
    x = x.reshape(x.shape[0], *grid, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], *(g * p for g, p in zip(grid, patch, strict=True)), -1)


def timestep_embedding(t: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Cosines, then sines, of t at dim/2 frequencies from 1 down to almost 1/10,000; fp32."""
    frequencies = np.exp(-math.log(10_000) * np.arange(dim // 2) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def axis_angles(position: np.ndarray, axis: int, dim: int) -> np.ndarray:
    """fp64 angles position × frequency, dim/2 of them from 1 to almost 1/10,000, to broadcast over a grid t, h, w."""
    shape = [1, 1, 1, dim // 2]
    shape[axis] = len(position)
    return np.outer(position, 10_000.0 ** -(np.arange(0, dim, 2) / dim)).reshape(shape)


def over_grid(parts: Sequence[np.ndarray], grid: tuple[int, int, int]) -> Float[Array, "n d"]:
    """Tables of single axes side by side for every token of the grid; fp32. The host makes the small tables only: one
    of all tokens would be a constant of many megabytes in the program."""
    full = [jnp.broadcast_to(p.astype(np.float32), (*grid, p.shape[-1])) for p in parts]
    return jnp.concatenate(full, axis=-1).reshape(-1, sum(p.shape[-1] for p in parts))


def rotary_tables(positions: tuple[np.ndarray, np.ndarray, np.ndarray], dims: tuple[int, int, int]) -> Rotary:
    """Cosine and sine of every token's rotation angles: channels first of t, then of h, then of w. `positions` are
    those of the rows of each axis, `dims` the head's channels that each axis turns."""
    grid = len(positions[0]), len(positions[1]), len(positions[2])
    angles = [axis_angles(p, i, d) for i, (p, d) in enumerate(zip(positions, dims, strict=True))]
    return over_grid([np.cos(a) for a in angles], grid), over_grid([np.sin(a) for a in angles], grid)


def rotate(x: Float[Array, "b n heads d"], rotary: Rotary) -> Float[Array, "b n heads d"]:
    """Turns each pair of neighbouring channels by the token's angle: in fp32, and rounded to x's type. Pairs are
    turned by 90° in a product, which is exact, as a TPU would move all of x to reach every second channel."""
    cos, sin = (jnp.repeat(a, 2, -1)[:, None] for a in rotary)
    quarter = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]).astype(x.dtype)
    with jax.named_scope(UNASKED):
        turned = jnp.matmul(x, quarter, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
