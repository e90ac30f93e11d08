"""Measures of videos in a folder, whoever made them; only one prompt's videos are in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dollar_jax.data import shapes
from dollar_jax.evaluate import quality
from dollar_jax.evaluate.dimensions import Dimensions, read_fps
from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.files import find_videos
from dollar_jax.evaluate.vbench import DIMENSIONS
from dollar_jax.rewards import AnyReward
from dollar_jax.video import read_video, unit_range


def read_videos(paths: Mapping[str, Sequence[Path]], enlarged: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """(prompt, uint8 [n t h w 3]) of files by prompt, read one prompt at a time; of enlarged ones the pixels as they
    were. ValueError when a video differs from the first in shape."""
    first: tuple[Path, tuple[int, ...]] | None = None
    middle = slice(enlarged // 2, None, enlarged)
    with tqdm(total=sum(map(len, paths.values())), desc="measuring", unit="video") as bar:
        for prompt, files in paths.items():
            clips = []
            for path in files:
                clips.append(read_video(path)[:, middle, middle])
                first = first or (path, clips[-1].shape)
                if clips[-1].shape != first[1]:
                    found = f"{path} has t, h, w = {clips[-1].shape[:3]} and {first[0]} {first[1][:3]}"
                    raise ValueError(f"{found}: only videos of one shape can be compared")
                bar.update()
            yield prompt, np.stack(clips)


def measure_folder(
    folder: Path,
    features: Features | None = None,
    reference: Path | None = None,
    rewards: Mapping[str, AnyReward] | None = None,
    dimensions: Dimensions | None = None,
    enlarged: int = 1,
) -> dict[str, Any]:
    """Flicker and net change over all videos; diversity, Vendi and LPIPS within prompts with several; `rewards`' means;
    all of the videos as they were before each pixel became `enlarged` × `enlarged`. With `reference`, a folder of other
    videos, the Fréchet distance to them. The alignment where every prompt is a caption of the default domain and the
    videos are its 32 × 32 pixels, enlarged or not. With `dimensions` those under "dimensions", as VBench's result files
    have them, and which of VBench's are left out. Raises FileNotFoundError, or ValueError naming file or prompt."""
    if reference is not None and features is None:
        raise ValueError("a Fréchet distance needs a network's features: give --features or --workdir")
    paths = find_videos(folder)
    others = None if reference is None else read_videos(find_videos(reference))
    captions = _captions(list(paths))
    single: dict[str, list[float]] = {}  # one number per video
    within: dict[str, list[float]] = {}  # one per prompt with several videos
    measured: dict[str, list[dict[str, Any]]] = {}  # by dimension
    correct, vectors = [], []
    for prompt, videos in read_videos(paths, enlarged):
        if captions is not None and (small := _shrunk(videos)) is not None:
            correct += [shapes.verify(video).correct(captions[prompt]) for video in small]
        single.setdefault("flicker", []).extend(quality.temporal_flicker(videos))
        if videos.shape[1] > 2:
            single.setdefault("net_change", []).extend(quality.net_change(videos))
        if dimensions is not None:
            for path, video in zip(paths[prompt], videos, strict=True):
                for name, value in dimensions(video, prompt, read_fps(path)).items():
                    measured.setdefault(name, []).append({"video_path": path.name, "video_results": value})
        for name, reward in (rewards or {}).items():
            single.setdefault(name, []).extend(reward(unit_range(videos), [prompt] * len(videos)))
        if features is not None:
            vectors.append(features.vectors(videos))
        if len(videos) > 1:
            for name, value in variety(videos, features, vectors[-1] if vectors else None).items():
                within.setdefault(name, []).append(value)
    result: dict[str, Any] = {"videos": sum(map(len, paths.values())), "prompts": len(paths)}
    result |= {name: float(np.mean(values)) for name, values in single.items()}
    for name, values in within.items():
        result |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
    if measured:
        means = {name: float(np.mean([row["video_results"] for row in rows])) for name, rows in measured.items()}
        result["dimensions"] = {name: [means[name], rows] for name, rows in measured.items()}
        result["dimensions_left_out"] = [name for name in DIMENSIONS if name not in measured]
    if correct:
        result |= shapes.accuracies(np.stack(correct))
    if features is not None:
        result["features"] = features.name
        if others is not None:
            theirs = np.concatenate([features.vectors(videos) for _, videos in others])
            result["frechet"] = quality.frechet_distance(np.concatenate(vectors), theirs)
            result["frechet_reference_videos"] = len(theirs)
    return result


def variety(videos: np.ndarray, features: Features | None, vectors: np.ndarray | None) -> dict[str, float]:
    """How different the videos uint8 [n t h w 3] of one prompt are; `vectors` are their features [n d]."""
    result = {"vendi": quality.vendi_score(quality.pixel_features(videos)), "diversity": quality.diversity(videos)}
    if features is not None and vectors is not None:
        result["vendi_network"] = quality.vendi_score(vectors)
        if features.distance is not None:
            pairs = np.array([(i, j) for i in range(len(videos)) for j in range(i)])
            result["lpips"] = float(features.distance(videos[pairs[:, 0]], videos[pairs[:, 1]]).mean())
    return result


def _captions(prompts: Sequence[str]) -> dict[str, shapes.Caption] | None:
    """The captions of the default domain that all prompts are, or None."""
    try:
        return {prompt: shapes.Caption.parse(prompt) for prompt in prompts}
    except ValueError:
        return None


def _shrunk(videos: np.ndarray) -> np.ndarray | None:
    """Videos of a whole multiple of the default domain's size, at that size; None for others."""
    n, t, h, w, c = videos.shape
    scale, rest = divmod(h, shapes.SIZE)
    if rest or not scale or w != h:
        return None
    boxes = videos.reshape(n, t, shapes.SIZE, scale, shapes.SIZE, scale, c)
    return unit_range(videos) if scale == 1 else boxes.mean((3, 5)).astype(np.float32) / 255
