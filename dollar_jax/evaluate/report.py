"""What a run leaves to look at: report.html, one file that opens offline, and metrics.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dollar_jax.evaluate.page import (
    chart,
    duration,
    escape,
    figure,
    number,
    settings,
    signed,
    significant,
    times,
    videos_section,
    write_page,
)
from dollar_jax.files import write_file

# --- metrics.json ---------------------------------------------------------------------------------


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes metrics as JSON, whole or not at all.

    Values are mappings, sequences, strings, numbers (NumPy and JAX scalars too), booleans, None.

    Raises:
        ValueError: a number is NaN or infinite, or a value is of another type; names it. Nothing is
            written, and what `path` held is left as it was.
    """
    text = json.dumps(_plain(metrics, "metrics"), indent=2, ensure_ascii=False)
    write_file(path, f"{text}\n")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a measurement failed, and metrics are not written with it")
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
    return {key: value for key, value in metrics.items() if isinstance(value, Mapping) and "alignment" in value}


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
    write_page(
        path,
        title,
        introduction,
        _tiles(metrics),
        [
            _table(metrics, rows),
            *(f"<p>{escape(note)}</p>" for note in notes),
            videos_section(prompts, videos, {row.key: row.label for row in rows}, fps),
            _curves(history),
            _timings(timings or {}),
            settings(config_text),
        ],
    )


def _reference(samplers: Mapping[str, Any]) -> str | None:
    """The sampler others are compared with: the teacher at its most steps."""
    rows = sampler_rows(key for key in samplers if re.fullmatch(r"teacher(_\d+)?", key))
    return rows[0].key if rows else None


def _tiles(metrics: Mapping[str, Any]) -> str:
    samplers = _measured(metrics)
    reference = _reference(samplers)
    tiles = []
    for key, value in metrics.items():
        match, speedup = re.fullmatch(r"speedup_(\d+)", key), number(value)
        if match and speedup is not None:
            steps = "1 step" if match[1] == "1" else f"{match[1]} steps"
            tiles.append((f"faster diffusion, {steps} against the teacher", times(speedup)))
    if reference:
        student = next((k for k in ("student_4", "student_2", "student_1") if k in samplers), None)
        ours = number(samplers.get(student, {}).get("alignment")) if student else None
        theirs = number(samplers[reference]["alignment"])
        if ours is not None and theirs is not None:
            label = f"alignment with the prompt, against the teacher’s {figure(theirs, 3)}"
            tiles.append((label, figure(ours, 3)))
    seconds = number(metrics.get("seconds"))
    if seconds is not None:
        tiles.append(("for the whole run", duration(seconds)))
    body = "".join(f"<div><dd>{escape(v)}</dd><dt>{escape(k)}</dt></div>" for k, v in tiles)
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
    return signed(value - reference, 3)


def _ratio(value: float, reference: float) -> str:
    return f"{100 * value / reference:.0f}%" if reference > 0 else ""


def _faster(value: float, reference: float) -> str:
    return f"{times(reference / value)} faster" if 0 < value < reference else ""


_COLUMNS = (
    _Column("alignment", "Alignment", "1 is perfect", lambda v: figure(v, 3), _difference, True),
    _Column("reward", "Reward", "higher is better", lambda v: figure(v, 3), _difference, True),
    _Column("vendi", "Vendi", "diversity", lambda v: figure(v, 2), _ratio),
    _Column("flicker", "Flicker score", "1 is frozen", lambda v: figure(v, 3), _difference),
    _Column("nfe", "NFE", "network calls", lambda v: f"{v:g}"),
    _Column("diffusion_seconds", "Diffusion", "time", duration, _faster),
    _Column("total_seconds", "Whole inference", "time", duration, _faster),
)


def _table(metrics: Mapping[str, Any], rows: Sequence[SamplerRow]) -> str:
    samplers = _measured(metrics)
    shown = [row for row in rows if row.key in samplers]
    if not shown:
        return ""
    reference = _reference(samplers)
    columns = []
    for column in _COLUMNS:
        values = {row.key: number(samplers[row.key].get(column.key)) for row in shown}
        if any(value is not None for value in values.values()):
            columns.append((column, values))
    head = "".join(f'<th scope="col">{column.heading}<small>{column.hint}</small></th>' for column, _ in columns)
    body = ""
    for row in shown:
        cells = "".join(_cell(column, values, row.key, reference) for column, values in columns)
        detail = f"<small>{escape(row.detail)}</small>" if row.detail else ""
        body += f'<tr><th scope="row">{escape(row.label)}{detail}</th>{cells}</tr>'
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


def _cell(column: _Column, values: Mapping[str, float | None], key: str, reference: str | None) -> str:
    value = values[key]
    if value is None:
        return '<td><span class="soft">not measured</span></td>'
    text = escape(column.show(value))
    base = values.get(reference) if reference and reference != key else None
    if column.compare and base is not None:
        text += f"<small>{escape(column.compare(value, base))}</small>"
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
        if name not in known and number(value) is not None
    )
    if not names:
        return ""
    head = "".join(f'<th scope="col">{escape(_words(name))}</th>' for name in names)
    body = ""
    for row in rows:
        numbers = [number(samplers[row.key].get(name)) for name in names]
        cells = "".join(f"<td>{'' if v is None else significant(v)}</td>" for v in numbers)
        body += f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>'
    return (
        '<details><summary>More measures</summary><div class="wide"><table><thead><tr>'
        f'<th scope="col">Sampler</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


def _words(name: str) -> str:
    return _NAMES.get(name) or name.replace("_", " ").replace("/", ", ").capitalize()


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
_ASIDE = re.compile(r"gradient|norm|std|correlation|weight|seconds|rate|bin|ratio|drift")


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for entry in history for name in entry if name != "step")
    groups: dict[str, list[str]] = {"Losses": [], "Rewards": [], "Other": []}
    for name in names:
        points = []
        for i, entry in enumerate(history):
            step, value = number(entry.get("step", i)), number(entry.get(name))
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
            f"<figure><figcaption><b>{escape(_words(name))}</b>{scale}</figcaption>"
            f"{chart(x, y, logarithmic, _words(name))}</figure>"
        )
    parts = ""
    for title in ("Losses", "Rewards"):
        if groups[title]:
            parts += f'<h3>{title}</h3><div class="charts">{"".join(groups[title])}</div>'
    if groups["Other"]:
        parts += (
            f'<details><summary>More curves</summary><div class="charts">{"".join(groups["Other"])}</div></details>'
        )
    if not parts:
        return ""
    hint = "By training step; the pale line is every value, the strong one a moving average."
    return f'<section><h2>Training</h2><p class="soft">{hint}</p>{parts}</section>'


# --- timings and settings -------------------------------------------------------------------------


def _timings(timings: Mapping[str, float]) -> str:
    known = {k: v for k, v in ((k, number(v)) for k, v in timings.items()) if v is not None}
    if not known:
        return ""
    longest = max(known.values()) or 1.0
    body = "".join(
        f'<tr><th scope="row">{escape(_words(name))}</th><td>{duration(seconds)}</td>'
        f'<td class="bar"><span style="width:{max(100 * seconds / longest, 0.5):.1f}%"></span></td>'
        "</tr>"
        for name, seconds in known.items()
    )
    return (
        '<section><h2>Where the time went</h2><div class="wide"><table><thead><tr>'
        '<th scope="col">Part</th><th scope="col">Time</th><td></td></tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )
