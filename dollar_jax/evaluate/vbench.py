"""VBench (Huang et al., arXiv 2311.17982): its aggregate scores. Nothing here needs jax, so that it answers at once.
Normalisation and weights are those of VBench's own `scripts/constant.py`."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dollar_jax.files import read_json

# The least and the greatest value of each dimension, which are mapped to 0 and 1 without clipping.
QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    **dict.fromkeys(("dynamic_degree", "aesthetic_quality", "imaging_quality"), (0.0, 1.0)),
}
_OBJECTS = ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship")
SEMANTIC = {
    **dict.fromkeys(_OBJECTS, (0.0, 1.0)),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
_HALF = "dynamic_degree"  # the one dimension that counts half
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4, 1
_RESAMPLES = 2000


class VBenchScore(NamedTuple):
    """Percent. A group none of whose dimensions is there is None, and so then is the total."""

    quality: float | None
    semantic: float | None
    total: float | None
    dimensions: dict[str, float]  # as measured, before normalisation
    missing: list[str]


def aggregate(scores: Mapping[str, float], allow_missing: bool = False) -> VBenchScore:
    """Quality, Semantic and Total of shares in [0, 1] by dimension name; ValueError naming dimensions that are missing.
    With `allow_missing` the averages are over the dimensions that are there, and do not compare with published ones."""
    if (missing := [name for name in DIMENSIONS if name not in scores]) and not allow_missing:
        mend = "add their result files, or pass --allow_missing for averages over those given"
        listed = ", ".join(missing)
        raise ValueError(f"{len(missing)} of VBench's {len(DIMENSIONS)} dimensions are missing: {listed}; {mend}")

    def mean(ranges: Mapping[str, tuple[float, float]]) -> float | None:
        shares = {k: (scores[k] - low) / (high - low) for k, (low, high) in ranges.items() if k in scores}
        weights = {k: 0.5 if k == _HALF else 1.0 for k in shares}
        return 100 * sum(weights[k] * x for k, x in shares.items()) / sum(weights.values()) if shares else None

    quality, semantic, total = mean(QUALITY), mean(SEMANTIC), None
    if quality is not None and semantic is not None:
        total = (_QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic) / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT)
    percent = {name: 100 * scores[name] for name in DIMENSIONS if name in scores}
    return VBenchScore(quality, semantic, total, percent, missing)


def read_results(paths: Iterable[Path]) -> dict[str, float]:
    """The shares in [0, 1] that result files hold between them, by dimension name. A file is `{dimension: [score,
    ...]}`, as VBench writes it, or `{dimension: score}`; names may be spelt with spaces, hyphens or capitals. A file
    with a score above 1 is in percent throughout. Raises FileNotFoundError, or ValueError naming what is wrong."""
    found: dict[str, tuple[float, Path]] = {}
    for path in paths:
        for name, score in _shares(path, _read(path)).items():
            if found.setdefault(name, (score, path))[0] != score:
                raise ValueError(f"{found[name][1]} and {path} disagree on {name}: leave one of them out")
    return {name: score for name, (score, _) in found.items()}


def read_intervals(paths: Iterable[Path]) -> dict[str, list[float]]:
    """The bootstrap interval, in percent, of each dimension whose result file holds the scores of its videos."""
    found = {}
    for path in paths:
        content = _read(path)
        for name, score in _shares(path, content).items():
            if (interval := bootstrap(content[name], score)) is not None:
                found[name] = [100 * bound for bound in interval]
    return found


def bootstrap(value: Any, score: float) -> tuple[float, float] | None:
    """The middle 95 % of the mean score when prompts are drawn anew, with all their videos, as many as there are.
    Videos of one prompt resemble one another, so that drawing videos would give too narrow an interval. `value` is
    VBench's `[mean, [{"video_path", "video_results"}, ...]]`, `score` the mean as a share. None without such a list of
    at least two prompts, or where its mean is not the score: VBench weighs some dimensions otherwise."""
    rows = value[1] if isinstance(value, list) and len(value) > 1 and isinstance(value[1], list) else []
    prompts: dict[str, list[float]] = {}
    for row in rows:
        result = row.get("video_results") if isinstance(row, dict) else None
        if not isinstance(result, bool | int | float) or not np.isfinite(result):
            return None
        prompt = re.sub(r"-\d+$", "", Path(str(row.get("video_path", ""))).stem)
        prompts.setdefault(prompt, []).append(float(result))
    if len(prompts) < 2:
        return None
    sums, counts = (np.array([f(x) for x in prompts.values()], float) for f in (sum, len))
    if max(map(max, prompts.values())) > 1:
        sums = sums / 100  # imaging quality's videos are in percent
    if abs(sums.sum() / counts.sum() - score) > 0.01:
        return None
    draws = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), _RESAMPLES)
    low, high = np.quantile(draws @ sums / (draws @ counts), (0.025, 0.975))
    return float(low), float(high)


def _read(path: Path) -> dict[str, Any]:
    """A result file by dimension name; what `dollar vbench-score --json` wrote gives its dimensions."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give VBench's eval_results JSON files")
    content = read_json(path, object)
    if isinstance(content, dict) and isinstance(content.get("dimensions"), dict):
        content = {name: _score(path, name, value) / 100 for name, value in content["dimensions"].items()}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no VBench results: it must be an object of dimensions")
    values: dict[str, Any] = {}
    for key, value in content.items():
        if (name := re.sub(r"[\s_-]+", "_", key.strip().lower())) not in DIMENSIONS:
            raise ValueError(f"{path}: {key!r} is no dimension of VBench's; there are {', '.join(DIMENSIONS)}")
        if name in values:
            raise ValueError(f"{path} holds {name} twice")
        values[name] = value
    return values


def _shares(path: Path, values: Mapping[str, Any]) -> dict[str, float]:
    scores = {name: _score(path, name, value) for name, value in values.items()}
    if max(scores.values()) > 1:
        if small := [name for name, score in scores.items() if 0 < score <= 1]:
            pair = f"{max(scores.values()):g} cannot stand beside {small[0]} = {scores[small[0]]:g}"
            raise ValueError(f"{path} mixes percent with shares of 1: {pair}; write all of them as shares")
        scores = {name: score / 100 for name, score in scores.items()}
    return scores


def _score(path: Path, key: str, value: Any) -> float:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, bool) or not isinstance(first, int | float) or not 0 <= first <= 100:
        shown = json.dumps(first) if len(json.dumps(first)) < 40 else type(first).__name__
        raise ValueError(f"{path}: the score of {key} must be a number from 0 to 1, or in percent, not {shown}")
    return float(first)
