"""Vividness: a differentiable reward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SHARE = 0.03  # of a frame's pixels: about the smallest object of the default domain


def vividness(frames: jax.Array) -> Float[Array, " b"]:
    """Mean over a clip of max(rgb) - min(rgb), the chroma, of each frame's most coloured 3%; [b]."""
    x = jnp.asarray(frames, jnp.float32)
    chroma = (x.max(-1) - x.min(-1)).reshape(*x.shape[:2], -1)
    count = max(1, round(SHARE * chroma.shape[-1]))
    return jax.lax.top_k(chroma, count)[0].mean((1, 2))
