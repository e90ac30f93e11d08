"""`report.html` of a run: measures, videos side by side, training curves, settings, in one file."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dollar_jax.objectives import TERMS
from dollar_jax.report.charts import line_chart
from dollar_jax.report.clips import embed
from dollar_jax.report.measures import MEASURES, kind_and_steps, of_samplers
from dollar_jax.report.page import Cell, Table, cells, duration, figure, number, significant, steps, times, write_page

COLUMNS = ("alignment", "reward", "vendi", "flicker", "nfe", "diffusion_seconds", "total_seconds")
KINDS = {"teacher": ("Teacher", "guided"), "student": ("Student", "distilled")}
KINDS |= {"undistilled": ("Undistilled", "teacher in the student’s place")}
# Where a metric of the training is drawn, under which heading: the first pattern that is the whole of its name.
# What is in no group is folded away.
CURVES = {
    "Losses": {
        "student_loss": "Student, total loss",
        **{term.name: term.curve for term in TERMS if term.sign > 0},
        "fake_score": "Fake score, denoising loss",
        "discriminator": "Discriminator, loss",
        "reward_regression": "Latent reward model, regression loss",
    },
    "Rewards": {
        "reward_generated": "Reward of the student’s samples",
        r"reward_(.+)_generated": "Reward of the student’s samples, {}",
        **{term.name: term.curve for term in TERMS if term.sign < 0},
        "reward_mean": "Reward, running mean",
        r"reward_mean_(.+)": "Reward, running mean, {}",
    },
    "More curves": {
        "reward_real": "Reward of the data’s videos",
        r"reward_(.+)_real": "Reward of the data’s videos, {}",
        "reward_std": "Reward, running deviation",
        "reward_correlation": "Latent against true reward, correlation",
        "latent_mean": "Latents’ mean",
        "latent_std": "Latents’ deviation",
    },
}


class SamplerRow(NamedTuple):
    """A sampler as the report names it; `key` is its name in metrics.json and among the videos."""

    key: str
    label: str
    detail: str = ""


def sampler_rows(keys: Iterable[str]) -> list[SamplerRow]:
    """Rows for keys `<kind>_<steps>`: the teacher at its most steps, then students, then the rest."""
    parsed = [(key, *kind_and_steps(key)) for key in dict.fromkeys(keys)]
    most = max((count for _, kind, count in parsed if kind == "teacher"), default=0)
    ranked = []
    for key, kind, count in parsed:
        name, detail = KINDS.get(kind, (kind.replace("_", " ").capitalize(), ""))
        first = kind == "teacher" and count == most
        order = (0 if first else 1 if kind == "student" else 2 if kind in KINDS else 3, kind, -count)
        ranked.append((order, SamplerRow(key, f"{name}, {steps(count)}" if count else name, detail)))
    return [row for _, row in sorted(ranked, key=lambda item: item[0])]


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
) -> None:
    """Writes one HTML file, under 6 MB, that needs no network: tables, videos, curves, settings. `metrics` are as in
    metrics.json, see `measures.of_samplers`; `videos` of each sampler are uint8 [prompts, t, h, w, 3], else ValueError;
    `history` has a mapping for each logged step, `timings` seconds by name, `notes` paragraphs below the table."""
    for key, clips in videos.items():
        if clips.dtype != np.uint8 or clips.ndim != 5 or len(clips) != len(prompts):
            wanted = f"uint8 [{len(prompts)} prompts, t, h, w, 3]"
            raise ValueError(f"the videos of {key} must be {wanted}, not {clips.dtype} of shape {clips.shape}")
    samplers = of_samplers(metrics)
    rows = sampler_rows([*samplers, *videos])
    measured = [row for row in rows if row.key in samplers]
    tables = {"measures": _measures(samplers, measured), "more_measures": _more_measures(samplers, measured)}
    tables["timings"] = _timings(timings or {})
    shown = {"videos": embed(prompts, videos, {row.key: row.label for row in rows}), "curves": _curves(history)}
    tiles = _tiles(metrics, samplers, measured)
    write_page(path, "run.html", tiles=tiles, notes=notes, settings=config_text, **tables, **shown)


def _reference(rows: Sequence[SamplerRow]) -> str | None:
    """The sampler others are compared with: the teacher at its most steps."""
    return rows[0].key if rows and kind_and_steps(rows[0].key)[0] == "teacher" else None


def _tiles(metrics: Mapping[str, Any], samplers: Mapping[str, Any], rows: Sequence[SamplerRow]) -> list[Any]:
    """(figure, what it is of)."""
    tiles = []
    for key, value in metrics.items():
        kind, count = kind_and_steps(key)
        if kind == "speedup" and (speedup := number(value)) is not None:
            tiles.append((times(speedup), f"faster diffusion, {steps(count)} against the teacher"))
    student = next((row.key for row in rows if kind_and_steps(row.key)[0] == "student"), None)
    ours, theirs = (number(samplers[key].get("alignment")) if key else None for key in (student, _reference(rows)))
    if ours is not None and theirs is not None:
        tiles.append((figure(ours, 3), f"alignment with the prompt, against the teacher’s {figure(theirs, 3)}"))
    if (seconds := number(metrics.get("seconds"))) is not None:
        tiles.append((duration(seconds), "for the whole run"))
    return tiles


def _measures(samplers: Mapping[str, Any], rows: Sequence[SamplerRow]) -> Table | None:
    if not rows:
        return None
    reference = _reference(rows)
    head, columns = [Cell("Sampler")], []
    for name in COLUMNS:
        values = {row.key: number(samplers[row.key].get(name)) for row in rows}
        if any(value is not None for value in values.values()):
            head.append(Cell(MEASURES[name].heading, MEASURES[name].hint))
            columns.append({row.key: _cell(name, values, row.key, reference) for row in rows})
    return Table(head, [[Cell(row.label, row.detail), *(column[row.key] for column in columns)] for row in rows])


def _cell(name: str, values: Mapping[str, float | None], key: str, reference: str | None) -> Cell:
    measure, value = MEASURES[name], values[key]
    if value is None:
        return Cell(mark="not measured")
    base = values[reference] if reference and reference != key else None
    small = measure.compare(value, base) if measure.compare and base is not None else ""
    known = [other for other in values.values() if other is not None]
    mark, kind = "", "soft"
    if measure.ranked and min(known) < max(known):
        marks = {min(known): ("▼ worst", "worst"), max(known): ("▲ best", "best")}
        mark, kind = marks.get(value, (mark, kind))
    return Cell(measure.show(value), small, mark, kind)


def _more_measures(samplers: Mapping[str, Mapping[str, Any]], rows: Sequence[SamplerRow]) -> Table | None:
    values = {row.key: {k: v for k, x in samplers[row.key].items() if (v := number(x)) is not None} for row in rows}
    if not (names := [name for name in dict.fromkeys(itertools.chain(*values.values())) if name not in COLUMNS]):
        return None
    head = ["Sampler", *(MEASURES[name].heading if name in MEASURES else _words(name) for name in names)]
    shown = {key: [significant(found[n]) if n in found else "" for n in names] for key, found in values.items()}
    return Table(cells(*head), [cells(row.label, *shown[row.key]) for row in rows])


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ").capitalize()


def _place(name: str) -> tuple[int, str, str]:
    """The place of a training metric among all curves, its group and its heading."""
    rows = [(group, *row) for group, patterns in CURVES.items() for row in patterns.items()]
    for place, (group, pattern, heading) in enumerate(rows):
        if match := re.fullmatch(pattern, name):
            return place, group, heading.format(*match.groups())
    return len(rows), "More curves", _words(name)


def _curves(history: Sequence[Mapping[str, float]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    names = dict.fromkeys(name for entry in history for name in entry if name != "step")
    for _, group, heading, name in sorted(((*_place(name), name) for name in names), key=lambda row: row[0]):
        numbers = [(number(entry.get("step", i)), number(entry.get(name))) for i, entry in enumerate(history)]
        if not (points := [(step, value) for step, value in numbers if step is not None and value is not None]):
            continue
        x, y = np.array(points, np.float64).T
        logarithmic = group == "Losses" and y.min() > 0 and y.max() / y.min() > 8
        curve = {"name": heading, "note": "log scale" if logarithmic else "", "chart": line_chart(x, y, logarithmic)}
        groups.setdefault(group, []).append(curve)
    return groups


def _timings(timings: Mapping[str, float]) -> Table | None:
    if not timings:
        return None
    longest = max(timings.values()) or 1.0
    rows = [[*cells(_words(n), duration(s)), Cell(bar=max(100 * s / longest, 0.5))] for n, s in timings.items()]
    return Table(cells("Part", "Time", ""), rows)
