"""VBench's dimensions that follow from what is here (Huang et al., arXiv 2311.17982), each for one video. Three are
VBench's own measure: temporal flickering, background consistency on CLIP ViT-B/32, aesthetic quality on LAION's
predictor. Three keep VBench's formula on a network of ours, and compare only among videos measured here: `…_ours`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np

from dollar_jax.evaluate.quality import temporal_flicker
from dollar_jax.models.clip import preprocess
from dollar_jax.program import Program
from dollar_jax.rewards.builtin import optical_flow
from dollar_jax.rewards.clip import aesthetic
from dollar_jax.video import unit_range
from dollar_jax.weights.clip import clip_tokenizer, load_clip
from dollar_jax.weights.pipeline import tokenize

OURS = {
    "motion_smoothness_ours": "the frame between is the mean of its neighbours, where VBench has AMT",
    "dynamic_degree_ours": "the flow is Lucas and Kanade's on frames of 64 pixels, where VBench has RAFT",
    "overall_consistency_ours": "the features are CLIP's, a mean over frames, where VBench has ViCLIP",
}
_SHORT = 64  # of a frame, for the flow: motion that VBench calls dynamic is then 1.5 pixels, which the flow can follow
_CONTRAST = 25 * (2 / 255) ** 2  # of a window of 5 x 5 pixels; with less a pixel counts as still


class Dimensions(NamedTuple):
    """`clip` maps frames uint8 [t h w 3] and a prompt to unit features [t d] and [d]; `beauty` frames to 1 ... 10."""

    clip: Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]] | None = None
    beauty: Callable[[np.ndarray], float] | None = None

    def __call__(self, frames: np.ndarray, prompt: str, fps: float) -> dict[str, float]:
        """The dimensions of a video uint8 [t >= 3 h w 3] at so many frames per second."""
        found = {"temporal_flickering": float(temporal_flicker(frames))}
        found["motion_smoothness_ours"] = motion_smoothness(frames)
        found["dynamic_degree_ours"] = float(dynamic_degree(frames, fps))
        if self.clip is not None:
            images, text = self.clip(frames, prompt)
            found["background_consistency"] = background_consistency(images)
            found["overall_consistency_ours"] = float(images.mean(0) @ text)
        if self.beauty is not None:
            found["aesthetic_quality"] = self.beauty(frames) / 10
        return found


def load_dimensions(clip: Path | None = None, beauty: Path | None = None) -> Dimensions:
    """With the weights in these folders: a CLIP, VBench's being ViT-B/32, and LAION's
    aesthetic predictor. Raises FileNotFoundError or ValueError naming what is wrong in them."""
    reward = None if beauty is None else aesthetic(beauty)
    return Dimensions(
        None if clip is None else _clip(clip),
        None if reward is None else lambda frames: float(reward(unit_range(frames)[None], [""])[0]),
    )


def _clip(folder: Path) -> Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]]:
    config, network, params, _ = load_clip(folder)
    tokenizer = clip_tokenizer(folder, config)

    def embed(params: object, frames: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = network.apply(params, preprocess(frames, config.image_size), method="embed_images")
        return images, network.apply(params, ids, method="embed_text")[0]

    program = Program("clip_features", embed)

    def features(frames: np.ndarray, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        ids = tokenize(tokenizer, [prompt], config.max_position_embeddings)[0]
        images, text = program(params, unit_range(frames), ids)
        return np.asarray(images), np.asarray(text)

    return features


def background_consistency(images: np.ndarray) -> float:
    """Mean over frames, unit features [t >= 2, d], of the cosines with the first and the one before, at least 0."""
    first, before = images[1:] @ images[0], (images[1:] * images[:-1]).sum(-1)
    return float((np.maximum(first, 0) + np.maximum(before, 0)).mean() / 2)


def motion_smoothness(frames: np.ndarray) -> float:
    """1 - how far every other frame is from the mean of its neighbours, of uint8 [t >= 3 h w 3]: VBench's formula."""
    if len(frames) < 3:
        raise ValueError(f"motion smoothness needs videos of at least 3 frames, not {len(frames)}")
    kept, left_out = frames[::2].astype(np.int16), frames[1::2].astype(np.int16)
    between = (kept[:-1] + kept[1:]) // 2
    return 1 - float(np.abs(between - left_out[: len(between)]).mean(dtype=np.float64)) / 255


def dynamic_degree(frames: np.ndarray, fps: float) -> bool:
    """Whether a video uint8 [t h w 3] moves: in a quarter of the pairs of frames at 8 fps, the fastest 5 % of the
    pixels move by more than 6 pixels in 256. VBench's formula; its flow is RAFT's."""
    frames = frames[:: max(1, round(fps / 8))]
    height, width = (round(edge * (_SHORT / min(frames.shape[1:3]))) for edge in frames.shape[1:3])
    flow = _flow((height, width))
    moving = 0
    for pair in zip(frames[:-1], frames[1:], strict=True):
        length = np.sort(np.ravel(flow(unit_range(np.stack(pair)))))
        moving += length[-max(1, int(0.05 * len(length))) :].mean() > 6 * _SHORT / 256
    return moving >= round(4 * len(frames) / 16)


@functools.cache
def _flow(size: tuple[int, int]) -> Program:
    def length(frames: jax.Array) -> jax.Array:
        small = jax.image.resize(frames, (len(frames), *size, 3), "linear", antialias=True)
        dy, dx, contrast = optical_flow(small[None])
        return jnp.where(contrast > _CONTRAST, jnp.hypot(dy, dx), 0.0)

    return Program("flow_length", length)


def read_fps(path: Path) -> float:
    """Frames per second of a video file."""
    with av.open(f"file:{path}") as container:
        return float(container.streams.video[0].average_rate or 8)
