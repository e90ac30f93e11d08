"""Measures of a video by itself, uint8 or floating point in [0, 1], without captions and without networks."""

import jax.numpy as jnp
import numpy as np

from dollar_jax.rewards.builtin import flicker
from dollar_jax.video import unit_range


def temporal_flicker(videos: np.ndarray) -> np.ndarray:
    """VBench's temporal flickering of videos [..., t >= 2, h, w, c]: (255 - mean |f_{t+1} - f_t|) / 255, [...]. 1 is a
    frozen video: the score rewards stillness, so read it against the teacher's and not as the higher the better.
    VBench's own number is the mean over videos of static scenes, which it picks, and of 8-bit frames."""
    videos = np.asarray(videos)
    if videos.ndim < 4 or videos.shape[-4] < 2:
        raise ValueError(f"flicker needs videos [..., t >= 2, h, w, c], not shape {videos.shape}")
    return np.asarray(flicker(jnp.asarray(unit_range(videos))))


def net_change(videos: np.ndarray) -> np.ndarray:
    """How much further apart frames half a video away are than neighbours, as mean absolute difference. What moves
    leaves its place ever more; what only flickers differs from its neighbour as much as from any other frame. 0 for a
    frozen video and for independent noise; videos [..., t >= 3, h, w, c] give [...], at most 1."""
    videos = np.asarray(videos)
    if videos.ndim < 4 or videos.shape[-4] < 3:
        raise ValueError(f"net change needs videos [..., t >= 3, h, w, c], not shape {videos.shape}")
    x = np.moveaxis(unit_range(videos), -4, 0)
    half = max(len(x) // 2, 2)
    far, near = np.abs(x[half:] - x[:-half]), np.abs(x[1:] - x[:-1])
    axes = (0, -3, -2, -1)
    return far.mean(axes, dtype=np.float64) - near.mean(axes, dtype=np.float64)


def diversity(videos: np.ndarray) -> float:
    """Mean over the pairs of videos [n >= 2, t, h, w, c] of their root mean squared difference, in [0, 1]."""
    videos = np.asarray(videos)
    if videos.ndim != 5 or len(videos) < 2:
        raise ValueError(f"diversity needs videos [n >= 2, t, h, w, c], not shape {videos.shape}")
    x = unit_range(videos)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    return float(np.mean([np.sqrt(np.mean((x[i] - x[j]) ** 2, dtype=np.float64)) for i, j in pairs]))
