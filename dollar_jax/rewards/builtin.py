"""The rewards that come with the package. A new one is a function here and its row in the table below."""

import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from dollar_jax.rewards.reward import AnyReward, JaxReward, Reward
from dollar_jax.video import to_uint8

# --- on the host: black boxes without a gradient ----------------------------------------------------

COLOURED = 64  # of 255: the least HSV saturation of a pixel that has a colour
VIVID = 204  # of 255: the least saturation and value of a vivid one
QUALITY = 95  # of JPEG


def vivid(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The share of a clip's coloured pixels that are vivid, by their 8-bit HSV; 0 without colour; [b]."""
    del prompts
    rewards = []
    for clip in to_uint8(frames):
        image = Image.fromarray(clip.reshape(-1, clip.shape[2], 3)).convert("HSV")
        _, saturation, value = np.moveaxis(np.asarray(image), -1, 0)
        coloured = saturation > COLOURED
        rewards.append(np.sum(coloured & (saturation > VIVID) & (value > VIVID)) / max(coloured.sum(), 1))
    return np.array(rewards, np.float32)


def compressibility(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Minus the bits per pixel of a clip's frames, side by side in one JPEG; [b] (Black et al., arXiv 2305.13301). One
    file per clip, for a small frame's file is mostly header."""
    del prompts
    rewards = []
    for clip in to_uint8(frames):
        strip = np.concatenate(list(clip), axis=1)
        file = io.BytesIO()
        Image.fromarray(strip).save(file, "JPEG", quality=QUALITY, subsampling=0)
        rewards.append(-8 * file.tell() / (strip.shape[0] * strip.shape[1]))
    return np.array(rewards, np.float32)


SHARE = 0.03  # of a frame's pixels: about the smallest object of the default domain
WINDOW = 5  # pixels over which a motion is taken to be the same
_LUMA = (0.299, 0.587, 0.114)


def vividness(frames: jax.Array) -> Float[Array, " b"]:
    """Mean over a clip of max(rgb) - min(rgb), the chroma, of each frame's most coloured 3%; [b]."""
    x = jnp.asarray(frames, jnp.float32)
    chroma = (x.max(-1) - x.min(-1)).reshape(*x.shape[:2], -1)
    return jax.lax.top_k(chroma, max(1, round(SHARE * chroma.shape[-1])))[0].mean((1, 2))


def flicker(frames: Float[Array, "*b t h w 3"]) -> Float[Array, "*b"]:
    """1 - mean |f_{t+1} - f_t|: VBench's temporal flickering; 1 is a still picture."""
    return 1 - jnp.abs(jnp.diff(_moving(frames), axis=-4)).mean((-4, -3, -2, -1))


def smoothness(frames: Float[Array, "b t h w 3"]) -> Float[Array, " b"]:
    """1 - mean |f_t - (f_{t-1} + f_{t+1}) / 2|: how well a frame is what lies between its neighbours."""
    x = _moving(frames, least=3)
    return 1 - jnp.abs(x[:, 1:-1] - 0.5 * (x[:, :-2] + x[:, 2:])).mean((1, 2, 3, 4))


def motion(frames: Float[Array, "b t h w 3"]) -> Float[Array, " b"]:
    """Mean length of the optical flow in pixels per frame, where there is something to see move. A proxy of VBench's
    dynamic degree, and as easily misled: noise counts as motion. The flow is Lucas and Kanade's, least squares of
    brightness constancy over a window, so it sees motions of a pixel or two; pixels count by the weaker contrast."""
    dy, dx, weaker = optical_flow(frames)
    length = jnp.sqrt(jnp.square(dy) + jnp.square(dx) + 1e-12)
    weight = jax.lax.stop_gradient(jnp.maximum(weaker, 0.0))
    return (weight * length).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) + 1e-8)


def optical_flow(frames: Float[Array, "b t h w 3"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lucas and Kanade's flow down and right in pixels a frame, and its contrast; each [b, t - 1, h - 2, w - 2]."""
    x = _moving(frames) @ jnp.array(_LUMA)
    middle = 0.5 * (x[:, 1:] + x[:, :-1])
    down, right = (_central(middle, axis) for axis in (2, 3))
    change = x[:, 1:, 1:-1, 1:-1] - x[:, :-1, 1:-1, 1:-1]
    box, step = (1, 1, WINDOW, WINDOW), (1, 1, 1, 1)
    products = (down * down, down * right, right * right, down * change, right * change)
    yy, yx, xx, yt, xt = (jax.lax.reduce_window(x, 0.0, jax.lax.add, box, step, "SAME") for x in products)
    determinant, trace = yy * xx - yx * yx, yy + xx
    weaker = 0.5 * (trace - jnp.sqrt(jnp.square(yy - xx) + 4 * jnp.square(yx) + 1e-20))
    scale = -1 / (determinant + 1e-8)  # keeps plain regions still
    return scale * (xx * yt - yx * xt), scale * (yy * xt - yx * yt), weaker


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


REWARDS: dict[str, AnyReward] = {
    "vivid": Reward(vivid, "the share of coloured pixels that are bright and saturated"),
    "compressibility": Reward(compressibility, "how few bits per pixel JPEG needs: plain, calm backgrounds"),
    "vividness": JaxReward(lambda _, frames, __: vividness(frames), "mean chroma of the most coloured pixels"),
    "motion": JaxReward(lambda _, frames, __: motion(frames), "mean length of the optical flow, in pixels per frame"),
    "flicker": JaxReward(lambda _, frames, __: flicker(frames), "how little neighbouring frames differ"),
    "smoothness": JaxReward(lambda _, frames, __: smoothness(frames), "how well neighbours predict a frame"),
}

# Rewards that are read from a folder of weights: the function of `rewards` that reads them.
LOADERS = {"clip": "clip:clip_score", "viclip": "clip:clip_score", "hpsv2": "clip:hpsv2", "pickscore": "clip:pickscore"}
LOADERS |= {"aesthetic": "clip:aesthetic", "onnx": "blackbox:onnx_classifier"}
