"""Videos inside a page, as good as its size allows."""

import base64
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dollar_jax.video import encode_mp4, encode_webp

VIDEO_LIMIT = 4_500_000  # bytes of all videos in a page, as base64
SMALL = 128  # pixels; up to here clips are kept exact, and shown with square pixels


class Clip(NamedTuple):
    label: str
    kind: str  # media type
    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        return max(self.width, self.height) <= SMALL


class Clips(NamedTuple):
    """Prompts with their clips side by side, and how many prompts are left out."""

    prompts: list[tuple[str, list[Clip]]]
    left_out: int = 0


def embed(prompts: Sequence[str], videos: Mapping[str, np.ndarray], labels: Mapping[str, str]) -> Clips:
    """The videos uint8 [prompts, t, h, w, 3] of the samplers in `labels`, in its order. Small clips become lossless
    WebP, exact pixels and an image to every browser, H.264 or not; larger ones H.264, fewer and smaller to fit."""
    if not (shown := {key: videos[key] for key in labels if key in videos}) or not len(prompts):
        return Clips([])
    exact = all(clips.shape[2] * clips.shape[3] <= SMALL**2 for clips in shown.values())
    count = len(prompts)
    while True:
        for shrink in (0, 1, 2, 4) if exact else (1, 2, 4):
            rows = [[_clip(labels[k], clips[i], shrink) for k, clips in shown.items()] for i in range(count)]
            if sum(len(clip.uri) for row in rows for clip in row) <= VIDEO_LIMIT:
                return Clips(list(zip(prompts[:count], rows, strict=True)), len(prompts) - count)
        count //= 2  # no clips always fit


def _clip(label: str, frames: np.ndarray, shrink: int) -> Clip:
    """Exact where `shrink` is 0, else H.264 of frames so many times smaller."""
    small = np.stack([np.asarray(Image.fromarray(frame).reduce(max(shrink, 1))) for frame in frames])
    kind, data = ("video/mp4", encode_mp4(small, crf=28)) if shrink else ("image/webp", encode_webp(small))
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Clip(label, kind, uri, frames.shape[2], frames.shape[1])
