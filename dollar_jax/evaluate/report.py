"""What a run leaves to look at: report.html, one file that opens offline, and metrics.json."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from dollar_jax.evaluate.video import encode_mp4, encode_webp, replace_file

VIDEO_LIMIT = 4_500_000  # bytes of all videos in a report, as base64
_escape = html.escape


# --- metrics.json ---------------------------------------------------------------------------------


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes metrics as JSON, whole or not at all.

    Values are mappings, sequences, strings, numbers (NumPy and JAX scalars too), booleans, None.

    Raises:
        ValueError: a number is NaN or infinite, or a value is of another type; names it. Nothing is
            written, and what `path` held is left as it was.
    """
    text = json.dumps(_plain(metrics, "metrics"), indent=2, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where} is {value}: a measurement failed, and metrics are not written with it"
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where} is of type {type(value).__name__}, which JSON has no place for")


# --- samplers -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplerRow:
    """A sampler as the report names it; `key` is its name in metrics.json and among the videos."""

    key: str
    label: str
    detail: str = ""


_FAMILIES = {
    "teacher": ("Teacher", "guided"),
    "student": ("Student", "distilled"),
    "undistilled": ("Undistilled", "teacher forced to few steps"),
}


def sampler_rows(keys: Iterable[str]) -> list[SamplerRow]:
    """Rows for keys `<family>_<steps>`: the teacher, then students, then the rest."""
    parsed = []
    for key in dict.fromkeys(keys):
        match = re.fullmatch(r"(.+)_(\d+)", key)
        parsed.append((key, *((match[1], int(match[2])) if match else (key, 0))))
    most = max((steps for _, family, steps in parsed if family == "teacher"), default=0)
    ranked = []
    for key, family, steps in parsed:
        if family == "teacher" and steps < most:
            family = "undistilled"
        name, detail = _FAMILIES.get(family, (family.replace("_", " ").capitalize(), ""))
        count = "1 step" if steps == 1 else f"{steps} steps"
        row = SamplerRow(key, f"{name}, {count}" if steps else name, detail)
        order = list(_FAMILIES).index(family) if family in _FAMILIES else len(_FAMILIES)
        ranked.append((order, -steps, row))
    return [row for *_, row in sorted(ranked, key=lambda item: item[:2])]


def _measured(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, Mapping) and "alignment" in value
    }


# --- the page -------------------------------------------------------------------------------------

INTRODUCTION = (
    "A text-to-video diffusion model, the teacher, takes many small denoising steps. The student "
    "was distilled from it to need only a few, by variational score distillation (VSD), "
    "consistency distillation (CD) and a latent reward model (LRM). Below, both were given the "
    "same prompts, beside the undistilled teacher forced to as few steps as the student."
)


def write_report(
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any],
    prompts: Sequence[str],
    videos: Mapping[str, np.ndarray],
    history: Sequence[Mapping[str, float]] = (),
    timings: Mapping[str, float] | None = None,
    config_text: str = "",
    notes: Sequence[str] = (),
    rows: Sequence[SamplerRow] | None = None,
    fps: float = 8,
    title: str = "Distillation report",
    introduction: str = INTRODUCTION,
) -> None:
    """Writes one HTML file, under 6 MB, that needs no network: tables, videos, curves, settings.

    Args:
        metrics: as in metrics.json; a mapping with "alignment" is a sampler's, `speedup_<steps>`
            and `seconds` are shown at the top.
        videos: for each sampler uint8 [prompts, t, h, w, 3], one video per prompt. Small ones are
            kept without loss; larger ones are shrunk, and at last left out with a note, to fit.
        history: one mapping per logged step, `step` and whatever was measured. Losses and rewards
            get charts by their names, the others are folded away; what is not finite is left out.
        timings: seconds by name.
        config_text: the settings, shown as they are.
        notes: paragraphs below the table.
        rows: samplers in order; None for all there are, see `sampler_rows`.

    Raises:
        ValueError: videos that are not uint8 [prompts, t, h, w, 3].
    """
    for key, clips in videos.items():
        if clips.dtype != np.uint8 or clips.ndim != 5 or len(clips) != len(prompts):
            raise ValueError(
                f"the videos of {key} must be uint8 [{len(prompts)} prompts, t, h, w, 3], "
                f"not {clips.dtype} of shape {clips.shape}"
            )
    if rows is None:
        rows = sampler_rows([*_measured(metrics), *videos])
    page = _PAGE.substitute(
        title=_escape(title),
        introduction=_escape(introduction),
        style=_STYLE,
        tiles=_tiles(metrics),
        table=_table(metrics, rows),
        notes="".join(f"<p>{_escape(note)}</p>" for note in notes),
        videos=_videos(prompts, videos, rows, fps),
        curves=_curves(history),
        timings=_timings(timings or {}),
        config=_config(config_text),
    )
    replace_file(path, page.encode())


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
$table
$notes
$videos
$curves
$timings
$config
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
details { margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
details .wide, details .charts { margin-top: .8rem; }
pre { padding: 1rem; font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""


# --- numbers --------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _significant(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return _figure(value, digits)
    return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")


def _times(value: float) -> str:
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{_significant(1000 * seconds)} ms"
    if seconds < 60:
        return f"{_significant(seconds)} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _reference(samplers: Mapping[str, Any]) -> str | None:
    """The sampler others are compared with: the teacher at its most steps."""
    rows = sampler_rows(key for key in samplers if re.fullmatch(r"teacher(_\d+)?", key))
    return rows[0].key if rows else None


def _tiles(metrics: Mapping[str, Any]) -> str:
    samplers = _measured(metrics)
    reference = _reference(samplers)
    tiles = []
    for key, value in metrics.items():
        match, speedup = re.fullmatch(r"speedup_(\d+)", key), _number(value)
        if match and speedup is not None:
            steps = "1 step" if match[1] == "1" else f"{match[1]} steps"
            tiles.append((f"faster diffusion, {steps} against the teacher", _times(speedup)))
    if reference:
        student = next((k for k in ("student_4", "student_2", "student_1") if k in samplers), None)
        ours = _number(samplers.get(student, {}).get("alignment")) if student else None
        theirs = _number(samplers[reference]["alignment"])
        if ours is not None and theirs is not None:
            label = f"alignment with the prompt, against the teacher’s {_figure(theirs, 3)}"
            tiles.append((label, _figure(ours, 3)))
    seconds = _number(metrics.get("seconds"))
    if seconds is not None:
        tiles.append(("for the whole run", _duration(seconds)))
    body = "".join(f"<div><dd>{_escape(v)}</dd><dt>{_escape(k)}</dt></div>" for k, v in tiles)
    return f'<dl class="tiles">{body}</dl>' if tiles else ""


@dataclasses.dataclass(frozen=True)
class _Column:
    """A measure: how it is shown and set against the teacher's; whether the best is marked."""

    key: str
    heading: str
    hint: str
    show: Callable[[float], str]
    compare: Callable[[float, float], str] | None = None
    ranked: bool = False


def _difference(value: float, reference: float) -> str:
    return _signed(value - reference, 3)


def _ratio(value: float, reference: float) -> str:
    return f"{100 * value / reference:.0f}%" if reference > 0 else ""


def _faster(value: float, reference: float) -> str:
    return f"{_times(reference / value)} faster" if 0 < value < reference else ""


_COLUMNS = (
    _Column("alignment", "Alignment", "1 is perfect", lambda v: _figure(v, 3), _difference, True),
    _Column("reward", "Reward", "higher is better", lambda v: _figure(v, 3), _difference, True),
    _Column("vendi", "Vendi", "diversity", lambda v: _figure(v, 2), _ratio),
    _Column("flicker", "Flicker score", "1 is frozen", lambda v: _figure(v, 3), _difference),
    _Column("nfe", "NFE", "network calls", lambda v: f"{v:g}"),
    _Column("diffusion_seconds", "Diffusion", "time", _duration, _faster),
    _Column("total_seconds", "Whole inference", "time", _duration, _faster),
)


def _table(metrics: Mapping[str, Any], rows: Sequence[SamplerRow]) -> str:
    samplers = _measured(metrics)
    shown = [row for row in rows if row.key in samplers]
    if not shown:
        return ""
    reference = _reference(samplers)
    columns = []
    for column in _COLUMNS:
        values = {row.key: _number(samplers[row.key].get(column.key)) for row in shown}
        if any(value is not None for value in values.values()):
            columns.append((column, values))
    head = "".join(
        f'<th scope="col">{column.heading}<small>{column.hint}</small></th>'
        for column, _ in columns
    )
    body = ""
    for row in shown:
        cells = "".join(_cell(column, values, row.key, reference) for column, values in columns)
        detail = f"<small>{_escape(row.detail)}</small>" if row.detail else ""
        body += f'<tr><th scope="row">{_escape(row.label)}{detail}</th>{cells}</tr>'
    small = ""
    if reference:
        small = "Small figures compare with the teacher at its most steps. "
    small += (
        "Vendi counts how many different videos a prompt yields; read it beside the alignment, "
        "since noise is diverse too. The flicker score is VBench’s and rewards stillness: it "
        "should be near the teacher’s."
    )
    return (
        "<section><h2>Measures</h2>"
        f'<div class="wide"><table><thead><tr><th scope="col">Sampler</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="soft">{small}</p>'
        f"{_more_measures(samplers, shown)}</section>"
    )


def _cell(
    column: _Column, values: Mapping[str, float | None], key: str, reference: str | None
) -> str:
    value = values[key]
    if value is None:
        return '<td><span class="soft">not measured</span></td>'
    text = _escape(column.show(value))
    base = values.get(reference) if reference and reference != key else None
    if column.compare and base is not None:
        text += f"<small>{_escape(column.compare(value, base))}</small>"
    known = [other for other in values.values() if other is not None]
    if column.ranked and min(known) < max(known):
        if value == max(known):
            text += '<span class="best">▲ best</span>'
        elif value == min(known):
            text += '<span class="worst">▼ worst</span>'
    return f"<td>{text}</td>"


def _more_measures(samplers: Mapping[str, Mapping[str, Any]], rows: Sequence[SamplerRow]) -> str:
    known = {column.key for column in _COLUMNS}
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in samplers[row.key].items()
        if name not in known and _number(value) is not None
    )
    if not names:
        return ""
    head = "".join(f'<th scope="col">{_escape(_words(name))}</th>' for name in names)
    body = ""
    for row in rows:
        numbers = [_number(samplers[row.key].get(name)) for name in names]
        cells = "".join(f"<td>{'' if v is None else _significant(v)}</td>" for v in numbers)
        body += f'<tr><th scope="row">{_escape(row.label)}</th>{cells}</tr>'
    return (
        '<details><summary>More measures</summary><div class="wide"><table><thead><tr>'
        f'<th scope="col">Sampler</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


def _words(name: str) -> str:
    return _NAMES.get(name) or name.replace("_", " ").replace("/", ", ").capitalize()


# --- videos ---------------------------------------------------------------------------------------


def _videos(
    prompts: Sequence[str],
    videos: Mapping[str, np.ndarray],
    rows: Sequence[SamplerRow],
    fps: float,
) -> str:
    shown = [row for row in rows if row.key in videos]
    if not shown or not prompts:
        return ""
    clips = _fitting_clips({row.key: videos[row.key] for row in shown}, fps)
    count = min(len(column) for column in clips.values())
    body = ""
    for i, prompt in enumerate(prompts[:count]):
        cells = ""
        for row in shown:
            h, w = videos[row.key].shape[2:4]
            name = _escape(f"{row.label}: {prompt}")
            cells += f"<div>{_media(clips[row.key][i], w, h, name)}{_escape(row.label)}</div>"
        body += (
            f'<figure class="prompt" style="margin-inline:0"><figcaption><b>{_escape(prompt)}</b>'
            f'</figcaption><div class="clips" style="--columns:{len(shown)}">{cells}</div></figure>'
        )
    left_out = len(prompts) - count
    note = f'<p class="soft">{left_out} more prompts are left out to keep this file small.</p>'
    return f"<section><h2>Videos</h2>{body}{note if left_out else ''}</section>"


def _fitting_clips(
    videos: Mapping[str, np.ndarray], fps: float
) -> dict[str, list[tuple[str, bytes]]]:
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
    return (
        f'<video aria-label="{name}"{pixels} autoplay loop muted playsinline controls {common}>'
        "</video>"
    )


# --- curves ---------------------------------------------------------------------------------------

_NAMES = {
    "student_loss": "Student, total loss",
    "vsd": "VSD loss",
    "consistency": "Consistency loss",
    "fake_score": "Fake score, denoising loss",
    "reward_regression": "Latent reward model, regression loss",
    "reward_correlation": "Latent against true reward, correlation",
    "latent_reward": "Latent reward of the student",
    "reward": "Reward of the student",
    "reward_mean": "Reward, running mean",
    "reward_std": "Reward, running deviation",
    "latent_mean": "Latents’ mean",
    "latent_std": "Latents’ deviation",
}
_LOSS = re.compile(r"(^|[_/])(loss|vsd|consistency|cd|fake_score|denoising|regression)([_/]|$)")
_ASIDE = re.compile(r"gradient|norm|std|correlation|weight|seconds|rate")


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for entry in history for name in entry if name != "step")
    groups: dict[str, list[str]] = {"Losses": [], "Rewards": [], "Other": []}
    for name in names:
        points = []
        for i, entry in enumerate(history):
            step, value = _number(entry.get("step", i)), _number(entry.get(name))
            if step is not None and value is not None:
                points.append((step, value))
        if not points:
            continue
        group = "Other"
        if not _ASIDE.search(name):
            group = "Losses" if _LOSS.search(name) else "Rewards" if "reward" in name else "Other"
        x, y = np.array(points, np.float64).T
        logarithmic = group == "Losses" and y.min() > 0 and y.max() / y.min() > 8
        scale = "<small>log scale</small>" if logarithmic else ""
        groups[group].append(
            f"<figure><figcaption><b>{_escape(_words(name))}</b>{scale}</figcaption>"
            f"{_chart(x, y, logarithmic, _words(name))}</figure>"
        )
    parts = ""
    for title in ("Losses", "Rewards"):
        if groups[title]:
            parts += f'<h3>{title}</h3><div class="charts">{"".join(groups[title])}</div>'
    if groups["Other"]:
        parts += (
            '<details><summary>More curves</summary><div class="charts">'
            f"{''.join(groups['Other'])}</div></details>"
        )
    if not parts:
        return ""
    hint = "By training step; the pale line is every value, the strong one a moving average."
    return f'<section><h2>Training</h2><p class="soft">{hint}</p>{parts}</section>'


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 190, 46, 10, 10, 22


def _chart(x: np.ndarray, y: np.ndarray, logarithmic: bool, name: str) -> str:
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
        across = _LEFT + (np.asarray(steps) - start) / span * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - np.asarray(heights)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return across, down

    parts = []
    for tick in ticks:
        _, down = place(start, tick)
        label = f"{10**tick if logarithmic else tick:.6g}".replace("-", "\N{MINUS SIGN}")
        parts.append(
            f'<path class="rule" d="M{_LEFT} {down:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in _ticks(start, end, 4) if end > start else [start]:
        across, _ = place(tick, low)
        anchor = "end" if across > _WIDTH - 30 else "middle"
        parts.append(
            f'<text x="{across:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{tick:.6g}</text>'
        )
    if len(x) == 1:
        across, down = place(x[0], height[0])
        parts.append(f'<circle class="dot" cx="{across:.1f}" cy="{down:.1f}" r="3"/>')
    elif len(x) < 12:
        parts.append(_line("mean", *place(x, height)))
    else:
        parts.append(_line("raw", *place(x, height)))
        parts.append(_line("mean", *place(x, _smoothed(height))))
    last = _significant(float(y[-1]))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_escape(name)}, last {last}">{"".join(parts)}</svg>'
    )


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


# --- timings and settings -------------------------------------------------------------------------


def _timings(timings: Mapping[str, float]) -> str:
    known = {k: v for k, v in ((k, _number(v)) for k, v in timings.items()) if v is not None}
    if not known:
        return ""
    longest = max(known.values()) or 1.0
    body = "".join(
        f'<tr><th scope="row">{_escape(_words(name))}</th><td>{_duration(seconds)}</td>'
        f'<td class="bar"><span style="width:{max(100 * seconds / longest, 0.5):.1f}%"></span></td>'
        "</tr>"
        for name, seconds in known.items()
    )
    return (
        '<section><h2>Where the time went</h2><div class="wide"><table><thead><tr>'
        '<th scope="col">Part</th><th scope="col">Time</th><td></td></tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _config(text: str) -> str:
    if not text.strip():
        return ""
    return (
        "<section><h2>Settings</h2><details><summary>All settings of this run</summary>"
        f"<pre>{_escape(text)}</pre></details></section>"
    )
