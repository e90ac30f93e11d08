"""Where the parts of a chart lie, in pixels; templates/parts.html draws them as SVG."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dollar_jax.report.page import general, significant

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 46, 10, 10, 22
ROW = 22  # height of a row of dots


def line_chart(x: np.ndarray, y: np.ndarray, logarithmic: bool) -> dict[str, Any]:
    """Values y at steps x, both [n]: all of them, and where there are many their moving average."""
    pick = np.unique(np.linspace(0, len(x) - 1, min(len(x), 400)).round().astype(int))
    x, y = x[pick], y[pick]
    height = np.log10(y) if logarithmic else y
    low, high = _padded(height.min(), height.max())
    start, end = float(x.min()), float(x.max())

    def across(step: Any) -> Any:
        return np.round(LEFT + (step - start) / ((end - start) or 1.0) * (WIDTH - LEFT - RIGHT), 1)

    def down(value: Any) -> Any:
        return np.round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def points(values: np.ndarray) -> str:
        return " ".join(f"{a},{d}" for a, d in zip(across(x).tolist(), down(values).tolist(), strict=True))

    lines = [("mean", points(height))] if len(x) > 1 else []
    if len(x) >= 12:  # with a centred moving average over a tenth of the points, cut off at the ends
        window = np.ones(2 * max(1, len(x) // 20) + 1)
        mean = np.convolve(height, window, "same") / np.convolve(np.ones(len(x)), window, "same")
        lines = [("raw", points(height)), ("mean", points(mean))]
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    rules = [(general(10**tick if logarithmic else tick), float(down(tick))) for tick in ticks]
    steps = [(general(tick), float(across(tick))) for tick in (_ticks(start, end) if end > start else [start])]
    dot = (float(across(x[0])), float(down(height[0]))) if len(x) == 1 else None
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "rules": rules, "steps": steps}
    return {**frame, "lines": lines, "dot": dot, "last": significant(float(y[-1]))}


def dot_chart(rows: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """(label, mean, deviation), a row each: a dot, and a whisker of a deviation to either side."""
    left, bottom = 120, TOP + ROW * len(rows)
    low, high = _padded(min(mean - std for _, mean, std in rows), max(mean + std for _, mean, std in rows))

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (WIDTH - left - RIGHT), 1)

    rules = [(general(tick), across(tick)) for tick in _ticks(low, high)]
    at = ((across(mean - std), across(mean), across(mean + std)) for _, mean, std in rows)
    dots = [(label, TOP + ROW * i + ROW // 2, *x) for i, ((label, _, _), x) in enumerate(zip(rows, at, strict=True))]
    frame = {"width": WIDTH, "height": bottom + BOTTOM, "left": left, "top": TOP, "bottom": bottom}
    return {**frame, "rules": rules, "rows": dots}


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - pad), float(high + pad)


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers in [low, high]."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 5) if m * power >= raw * 0.999), 10)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of the powers of ten in [low, high], with 2s and 5s where those are few."""
    every = max(1, math.ceil((high - low) / 5))
    factors = (1,) if high - low > 2 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [p + math.log10(f) for p in powers if p % every == 0 for f in factors]
    return [tick for tick in ticks if low <= tick <= high]
