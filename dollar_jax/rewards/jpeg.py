"""JPEG compressibility (Black et al., arXiv 2305.13301, section 5.1): a true black box, on the host."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dollar_jax.video import to_uint8

QUALITY = 95


def compressibility(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Minus the bits per pixel of a clip's frames, side by side in one JPEG; [b].

    One file per clip, for a small frame's file is mostly header.
    """
    del prompts
    rewards = []
    for clip in to_uint8(frames):
        strip = np.concatenate(list(clip), axis=1)
        file = io.BytesIO()
        Image.fromarray(strip).save(file, "JPEG", quality=QUALITY, subsampling=0)
        rewards.append(-8 * file.tell() / (strip.shape[0] * strip.shape[1]))
    return np.array(rewards, np.float32)
