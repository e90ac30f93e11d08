"""What a page that opens offline is made of: its frame and style, numbers, videos and charts in it."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from dollar_jax.files import write_file
from dollar_jax.video import encode_mp4, encode_webp

VIDEO_LIMIT = 4_500_000  # bytes of all videos in a page, as base64
escape = html.escape


def write_page(
    path: str | os.PathLike[str], title: str, introduction: str, tiles: str, sections: Sequence[str]
) -> None:
    """Writes one HTML file; `tiles` and `sections` are HTML, the other texts are escaped."""
    page = _PAGE.substitute(
        title=escape(title), introduction=escape(introduction), style=_STYLE, tiles=tiles, sections="\n".join(sections)
    )
    write_file(path, page)


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="lede">$introduction</p>
$tiles
</header>
$sections
</main>
</body>
</html>
""")

_STYLE = """
:root { --page: #fbfbf9; --card: #fff; --ink: #1b1c1e; --soft: #62666d; --line: #e2e2dc;
  --accent: #2457c5; --good: #146c3a; --bad: #a8321f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131416; --card: #1b1d20; --ink: #e9e9e6; --soft: #a0a4ab; --line: #32353a;
    --accent: #8fb3ff; --good: #6fd69b; --bad: #ff9d8a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 72rem; margin: 0 auto;
  padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 .8rem; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.lede { font-size: 1.08rem; }
.soft, small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0 0; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: .8rem 1rem; }
.tiles dt { color: var(--soft); font-size: .86rem; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.wide, pre, .charts figure { background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; }
.wide, pre { overflow-x: auto; }
.wide + p { margin-top: .7rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .94rem; }
th, td { padding: .5rem .8rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { vertical-align: bottom; font-size: .85rem; line-height: 1.35; }
thead th small { display: block; font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
td small, tbody th small { display: block; font-weight: 400; font-size: .8rem; }
.best, .worst { display: block; font-size: .78rem; font-weight: 650; }
.best { color: var(--good); }
.worst { color: var(--bad); }
.prompt { margin: 1.4rem 0 0; }
.prompt > figcaption { margin-bottom: .45rem; }
.clips { display: grid; gap: .7rem; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.clips div { font-size: .78rem; line-height: 1.3; color: var(--soft); max-width: 22rem; }
.clips img, .clips video { display: block; width: 100%; height: auto; border-radius: .35rem;
  background: var(--line); margin-bottom: .25rem; }
.pixels { image-rendering: pixelated; }
@media (max-width: 46rem) {
  .clips { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); } }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.charts figure { margin: 0; padding: .7rem .9rem .4rem; }
.charts figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem; }
.charts b { font-weight: 600; }
.charts small { white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); }
svg .raw, svg .mean { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg .raw { opacity: .3; stroke-width: 1; }
svg .mean { stroke-width: 2; }
svg .dot { fill: var(--accent); }
.bar { width: 45%; }
.bar span { display: block; height: .6rem; margin-top: .45rem; border-radius: .3rem;
  background: var(--accent); }
svg .whisker { stroke: var(--accent); stroke-width: 2; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
details .wide, details .charts { margin-top: .8rem; }
pre { padding: 1rem; font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""


# --- numbers --------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def significant(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return figure(value, digits)
    return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")


def times(value: float) -> str:
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


# --- videos ---------------------------------------------------------------------------------------


def videos_section(
    prompts: Sequence[str], videos: Mapping[str, np.ndarray], labels: Mapping[str, str], fps: float
) -> str:
    """The videos uint8 [prompts, t, h, w, 3] of those in `labels`, in its order, side by side by prompt."""
    shown = [(key, label) for key, label in labels.items() if key in videos]
    if not shown or not prompts:
        return ""
    clips = _fitting_clips({key: videos[key] for key, _ in shown}, fps)
    count = min(len(column) for column in clips.values())
    body = ""
    for i, prompt in enumerate(prompts[:count]):
        cells = ""
        for key, label in shown:
            h, w = videos[key].shape[2:4]
            name = escape(f"{label}: {prompt}")
            cells += f"<div>{_media(clips[key][i], w, h, name)}{escape(label)}</div>"
        body += (
            f'<figure class="prompt" style="margin-inline:0"><figcaption><b>{escape(prompt)}</b>'
            f'</figcaption><div class="clips" style="--columns:{len(shown)}">{cells}</div></figure>'
        )
    left_out = len(prompts) - count
    note = f'<p class="soft">{left_out} more prompts are left out to keep this file small.</p>'
    return f"<section><h2>Videos</h2>{body}{note if left_out else ''}</section>"


def _fitting_clips(videos: Mapping[str, np.ndarray], fps: float) -> dict[str, list[tuple[str, bytes]]]:
    """(media type, file) of the clips, as good as VIDEO_LIMIT allows; maybe of the first few only.

    Small clips become lossless WebP: exact pixels, and an image to every browser, H.264 or not.
    """
    largest = max(clips.shape[2] * clips.shape[3] for clips in videos.values())
    shrinks = [None] if largest <= 128 * 128 else []
    shrinks += [1, 2, 4]

    def encode(clip: np.ndarray, shrink: int | None) -> tuple[str, bytes]:
        if shrink is None:
            return "image/webp", encode_webp(clip, fps)
        return "video/mp4", encode_mp4(_shrunk(clip, shrink), fps, crf=28)

    count = max(len(clips) for clips in videos.values())
    while True:
        for shrink in shrinks:
            encoded, size = {}, 0
            for key, clips in videos.items():
                encoded[key] = [encode(clip, shrink) for clip in clips[:count]]
                size += sum(len(data) * 4 // 3 for _, data in encoded[key])
                if size > VIDEO_LIMIT:
                    break
            else:
                return encoded
        count //= 2  # zero clips always fit


def _shrunk(clip: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return clip
    size = max(2, clip.shape[2] // factor), max(2, clip.shape[1] // factor)
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, box)) for frame in clip])


def _media(clip: tuple[str, bytes], width: int, height: int, name: str) -> str:
    kind, data = clip
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    common = f'width="{width}" height="{height}" src="{uri}"'
    pixels = ' class="pixels"' if max(width, height) <= 128 else ""
    if kind.startswith("image/"):
        return f'<img alt="{name}"{pixels} decoding="sync" {common}>'
    return f'<video aria-label="{name}"{pixels} autoplay loop muted playsinline controls {common}></video>'


# --- charts ----------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 46, 10, 10, 22


def chart(x: np.ndarray, y: np.ndarray, logarithmic: bool, name: str) -> str:
    """An SVG line chart of values y at steps x, both [n]."""
    x, y = _thinned(x, y)
    height = np.log10(y) if logarithmic else y
    low, high = float(height.min()), float(height.max())
    pad = 0.06 * (high - low) or max(abs(high), 1e-3) * 0.1
    low, high = low - pad, high + pad
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high, 4)
    start, end = float(x.min()), float(x.max())
    span = (end - start) or 1.0

    def place(steps: Any, heights: Any) -> tuple[Any, Any]:
        across = LEFT + (np.asarray(steps) - start) / span * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - np.asarray(heights)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return across, down

    parts = []
    for tick in ticks:
        _, down = place(start, tick)
        label = f"{10**tick if logarithmic else tick:.6g}".replace("-", "\N{MINUS SIGN}")
        parts.append(
            f'<path class="rule" d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in _ticks(start, end, 4) if end > start else [start]:
        across, _ = place(tick, low)
        anchor = "end" if across > WIDTH - 30 else "middle"
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{tick:.6g}</text>')
    if len(x) == 1:
        across, down = place(x[0], height[0])
        parts.append(f'<circle class="dot" cx="{across:.1f}" cy="{down:.1f}" r="3"/>')
    elif len(x) < 12:
        parts.append(_line("mean", *place(x, height)))
    else:
        parts.append(_line("raw", *place(x, height)))
        parts.append(_line("mean", *place(x, _smoothed(height))))
    last = significant(float(y[-1]))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)}, last {last}">{"".join(parts)}</svg>'
    )


def dots(rows: Sequence[tuple[str, float, float]], name: str) -> str:
    """An SVG of (label, mean, deviation), a row each: a dot, and a whisker of a deviation to either side."""
    left, height = 120, TOP + 22 * len(rows) + BOTTOM
    low = min(mean - std for _, mean, std in rows)
    high = max(mean + std for _, mean, std in rows)
    pad = 0.06 * (high - low) or max(abs(high), 1e-3) * 0.1
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    parts = []
    for tick in _ticks(low, high, 4):
        text = f"{tick:.6g}".replace("-", "\N{MINUS SIGN}")
        parts.append(
            f'<path class="rule" d="M{place(tick):.1f} {TOP}V{height - BOTTOM}"/>'
            f'<text x="{place(tick):.1f}" y="{height - 5}" text-anchor="middle">{text}</text>'
        )
    for i, (label, mean, std) in enumerate(rows):
        y = TOP + 22 * i + 11
        parts.append(
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
            f'<path class="whisker" d="M{place(mean - std):.1f} {y}H{place(mean + std):.1f}"/>'
            f'<circle class="dot" cx="{place(mean):.1f}" cy="{y}" r="4"/>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _line(kind: str, across: np.ndarray, down: np.ndarray) -> str:
    points = " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    pick = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).round().astype(int))
    return x[pick], y[pick]


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the points, cut off at the ends."""
    reach = max(1, len(y) // 20)
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(y))
    return (total[last] - total[first]) / (last - first)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 5) if m * power >= raw * 0.999), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of the powers of ten in [low, high], with 2s and 5s where those are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, math.ceil((high - low) / 5))
    factors = (1,) if high - low > 2 else (1, 2, 5)
    ticks = [p + math.log10(f) for p in powers if p % every == 0 for f in factors]
    return [tick for tick in ticks if low <= tick <= high]


# --- settings --------------------------------------------------------------------------------------


def settings(text: str) -> str:
    """The settings, folded away."""
    if not text.strip():
        return ""
    return (
        "<section><h2>Settings</h2><details><summary>All settings of this run</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )
