"""Measures of a video by itself, without captions and without networks."""

import numpy as np


def unit_range(videos: np.ndarray) -> np.ndarray:
    """Videos as floating point in [0, 1]: uint8 is divided by 255, floating point is passed on."""
    videos = np.asarray(videos)
    if videos.dtype == np.uint8:
        return videos.astype(np.float32) / 255
    if not np.issubdtype(videos.dtype, np.floating):
        raise ValueError(f"videos must be uint8 or floating point in [0, 1], not {videos.dtype}")
    return videos


def temporal_flicker(videos: np.ndarray) -> np.ndarray:
    """VBench's temporal flickering of each video: (255 - mean |f_{t+1} - f_t|) / 255.

    1 is a frozen video: the score rewards stillness, so read it against the teacher's and not as
    the higher the better. VBench's own number is the mean over videos of static scenes, which it
    picks beforehand, and is measured on 8-bit frames.

    Args:
        videos: [..., t, h, w, c], uint8 or floating point in [0, 1], at least two frames.

    Returns:
        [...], in [0, 1].
    """
    videos = np.asarray(videos)
    if videos.ndim < 4 or videos.shape[-4] < 2:
        raise ValueError(f"flicker needs videos [..., t >= 2, h, w, c], not shape {videos.shape}")
    change = np.abs(np.diff(unit_range(videos), axis=-4))
    return 1 - change.mean((-4, -3, -2, -1), dtype=np.float64)
