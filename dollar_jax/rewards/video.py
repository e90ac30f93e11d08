"""Rewards of a clip's movement, without networks: motion magnitude, temporal flicker, smoothness."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WINDOW = 5  # pixels over which a motion is taken to be the same
_LUMA = (0.299, 0.587, 0.114)


def flicker(frames: Float[Array, "*b t h w 3"]) -> Float[Array, "*b"]:
    """1 - mean |f_{t+1} - f_t|: VBench's temporal flickering; 1 is a still picture."""
    return 1 - jnp.abs(jnp.diff(_moving(frames), axis=-4)).mean((-4, -3, -2, -1))


def smoothness(frames: Float[Array, "b t h w 3"]) -> Float[Array, " b"]:
    """1 - mean |f_t - (f_{t-1} + f_{t+1}) / 2|: how well a frame is what lies between its neighbours."""
    x = _moving(frames, least=3)
    return 1 - jnp.abs(x[:, 1:-1] - 0.5 * (x[:, :-2] + x[:, 2:])).mean((1, 2, 3, 4))


def motion(frames: Float[Array, "b t h w 3"]) -> Float[Array, " b"]:
    """Mean length of the optical flow in pixels per frame, where there is something to see move.

    A proxy of VBench's dynamic degree, and as easily misled: noise counts as motion. The flow is Lucas
    and Kanade's, least squares of brightness constancy over a window, so it sees motions of a pixel or two
    per frame; pixels count by the weaker of the window's two directions of contrast.
    """
    x = _moving(frames) @ jnp.array(_LUMA)
    middle = 0.5 * (x[:, 1:] + x[:, :-1])
    down, right = (_central(middle, axis) for axis in (2, 3))
    change = x[:, 1:, 1:-1, 1:-1] - x[:, :-1, 1:-1, 1:-1]
    yy, yx, xx, yt, xt = map(_window, (down * down, down * right, right * right, down * change, right * change))
    determinant, trace = yy * xx - yx * yx, yy + xx
    weaker = 0.5 * (trace - jnp.sqrt(jnp.square(yy - xx) + 4 * jnp.square(yx) + 1e-20))
    scale = -1 / (determinant + 1e-8)  # keeps plain regions still
    dy, dx = scale * (xx * yt - yx * xt), scale * (yy * xt - yx * yt)
    length = jnp.sqrt(jnp.square(dy) + jnp.square(dx) + 1e-12)
    weight = jax.lax.stop_gradient(jnp.maximum(weaker, 0.0))
    return (weight * length).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) + 1e-8)


def _moving(frames: jax.Array, least: int = 2) -> jax.Array:
    if frames.shape[-4] < least:
        raise ValueError(f"this reward needs clips of at least {least} frames, not {frames.shape[-4]}")
    return jnp.asarray(frames, jnp.float32)


def _central(x: Float[Array, "b t h w"], axis: int) -> Float[Array, "b t h2 w2"]:
    """Central differences along an axis, one pixel in from every edge."""
    inner = {2: x[:, :, :, 1:-1], 3: x[:, :, 1:-1]}[axis]
    size = inner.shape[axis]
    ahead, behind = (jax.lax.slice_in_dim(inner, i, size - 2 + i, axis=axis) for i in (2, 0))
    return 0.5 * (ahead - behind)


def _window(x: Float[Array, "b t h w"]) -> Float[Array, "b t h2 w2"]:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, WINDOW, WINDOW), (1, 1, 1, 1), "SAME")
