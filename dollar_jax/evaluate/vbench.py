"""VBench (Huang et al., arXiv 2311.17982): the videos it asks for, and its aggregate scores.

Normalisation and weights are those of VBench's own `scripts/constant.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from dollar_jax.evaluate.files import read_prompts, video_name
from dollar_jax.generate import Generator, Sampler, draw_videos, video_keys
from dollar_jax.types import Params
from dollar_jax.video import write_video

# The least and the greatest value of each dimension, which are mapped to 0 and 1 without clipping.
QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
_HALF = "dynamic_degree"  # the one dimension that counts half
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4, 1


@dataclasses.dataclass(frozen=True)
class VBenchScore:
    """Percent. A group none of whose dimensions is there is None, and so then is the total."""

    quality: float | None
    semantic: float | None
    total: float | None
    dimensions: dict[str, float]  # as measured, before normalisation
    missing: list[str]


def aggregate(scores: Mapping[str, float], allow_missing: bool = False) -> VBenchScore:
    """Quality, Semantic and Total of shares in [0, 1] by dimension name.

    With `allow_missing` the averages are over the dimensions that are there, and do not compare with
    published ones.

    Raises ValueError naming the dimensions that are missing.
    """
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} of VBench's {len(DIMENSIONS)} dimensions are missing: {', '.join(missing)}; "
            "add their result files, or pass --allow_missing for averages over those given"
        )

    def mean(ranges: Mapping[str, tuple[float, float]]) -> float | None:
        rows = [
            (0.5 if name == _HALF else 1.0, (scores[name] - low) / (high - low))
            for name, (low, high) in ranges.items()
            if name in scores
        ]
        return 100 * sum(w * x for w, x in rows) / sum(w for w, _ in rows) if rows else None

    quality, semantic, total = mean(QUALITY), mean(SEMANTIC), None
    if quality is not None and semantic is not None:
        weighted = _QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic
        total = weighted / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT)
    percent = {name: 100 * scores[name] for name in DIMENSIONS if name in scores}
    return VBenchScore(quality, semantic, total, percent, missing)


def read_results(paths: Iterable[Path]) -> dict[str, float]:
    """The shares in [0, 1] that result files hold between them, by dimension name.

    A file is `{dimension: [score, ...]}`, as VBench writes it, or `{dimension: score}`; names may be
    spelt with spaces, hyphens or capitals. A file with a score above 1 is in percent throughout.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    found: dict[str, float] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        for name, score in _read(path).items():
            if found.setdefault(name, score) != score:
                raise ValueError(f"{origin[name]} and {path} disagree on {name}: leave one of them out")
            origin.setdefault(name, path)
    return found


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give VBench's eval_results JSON files")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no VBench results: it must be an object of dimensions")
    scores: dict[str, float] = {}
    for key, value in content.items():
        name = re.sub(r"[\s_-]+", "_", key.strip().lower())
        if name not in DIMENSIONS:
            raise ValueError(f"{path}: {key!r} is no dimension of VBench's; there are {', '.join(DIMENSIONS)}")
        if name in scores:
            raise ValueError(f"{path} holds {name} twice")
        scores[name] = _score(path, key, value)
    if max(scores.values()) > 1:
        small = [name for name, score in scores.items() if 0 < score <= 1]
        if small:
            raise ValueError(
                f"{path} mixes percent with shares of 1: {max(scores.values()):g} cannot stand beside "
                f"{small[0]} = {scores[small[0]]:g}; write all of them as shares"
            )
        scores = {name: score / 100 for name, score in scores.items()}
    return scores


def _score(path: Path, key: str, value: Any) -> float:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, bool) or not isinstance(first, int | float) or not 0 <= first <= 100:
        shown = json.dumps(first)
        raise ValueError(
            f"{path}: the score of {key} must be a number from 0 to 1, or in percent, not "
            f"{shown if len(shown) < 40 else type(first).__name__}"
        )
    return float(first)


def read_vbench_prompts(path: Path, num: int) -> dict[str, int]:
    """How many videos each prompt of a list needs: `num`, and five times as many for temporal flickering.

    The list is VBench's `VBench_full_info.json`, which says what each prompt is for, or a text file with a
    prompt per line, which does not.

    Raises FileNotFoundError, or ValueError naming what is wrong in the file.
    """
    if path.suffix != ".json":
        return dict.fromkeys(read_prompts(path), num)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must be VBench's VBench_full_info.json")
    try:
        rows = [(row["prompt_en"], row["dimension"]) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not like VBench_full_info.json: {error!r}") from error
    counts: dict[str, int] = {}
    for prompt, dimensions in rows:
        wanted = 5 * num if "temporal_flickering" in dimensions else num
        counts[prompt] = max(wanted, counts.setdefault(prompt, 0))
    return counts


def write_videos(
    folder: Path,
    counts: Mapping[str, int],
    generator: Generator,
    draw: Sampler,
    params: Params,
    seed: int,
    batch_size: int,
    fps: float = 8,
) -> int:
    """Draws what is missing of `{prompt}-{0...}.mp4` in `folder`; how many this process has drawn.

    Every process draws its own share, and video i of a prompt starts from the i-th noise of `seed`, so
    killed and started again, on as many or fewer hosts, the folder ends with the same videos.

    Raises ValueError for a prompt that cannot name a file.
    """
    everything = [(p, i, video_name(p, i)) for p, count in counts.items() for i in range(count)]
    mine = everything[jax.process_index() :: jax.process_count()]
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [row for row in mine if row[2] not in there]
    if not missing:
        return 0
    noise = video_keys(seed, max(counts.values()))
    keys = noise[jnp.array([i for _, i, _ in missing])]
    with tqdm(total=len(mine), initial=len(mine) - len(missing), desc="VBench", unit="video") as bar:
        names = iter(missing)
        prompts = [prompt for prompt, _, _ in missing]
        for frames in draw_videos(generator, draw, params, prompts, keys, batch_size, bar):
            for frame in frames:
                write_video(folder / next(names)[2], frame, fps)
    return len(missing)
