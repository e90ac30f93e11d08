"""Pixels as bytes."""

from __future__ import annotations

import numpy as np


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1], clipped, rounded to 0 ... 255."""
    return np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)
