"""Vivid colours, counted: a black box without a gradient, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dollar_jax.video import to_uint8

COLOURED = 64  # of 255: the least HSV saturation of a pixel that has a colour
VIVID = 204  # of 255: the least saturation and value of a vivid one


def vivid(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The share of a clip's coloured pixels that are vivid, by their 8-bit HSV; 0 without colour; [b]."""
    del prompts
    rewards = []
    for clip in to_uint8(frames):
        image = Image.fromarray(clip.reshape(-1, clip.shape[2], 3)).convert("HSV")
        _, saturation, value = np.moveaxis(np.asarray(image), -1, 0)
        coloured = saturation > COLOURED
        count = np.sum(coloured & (saturation > VIVID) & (value > VIVID))
        rewards.append(count / max(coloured.sum(), 1))
    return np.array(rewards, np.float32)
