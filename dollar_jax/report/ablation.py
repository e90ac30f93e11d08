"""The ablation's page, its CSV and its Markdown table: means and deviations over seeds, and the paper's claims."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from operator import ge, gt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dollar_jax.files import write_file
from dollar_jax.report.charts import dot_chart
from dollar_jax.report.clips import Clips, embed
from dollar_jax.report.measures import MEASURES, kind_and_steps
from dollar_jax.report.page import Cell, Table, cells, duration, figure, signed, steps, write_page

COLUMNS = ("alignment", "reward", "vendi", "vendi_network", "frechet", "flicker", "net_change", "nfe")
PLOTTED = ("alignment", "reward", "vendi", "vendi_network", "frechet")


class Result(NamedTuple):
    """One cell: a method (or "teacher") with one seed, and its measures by sampler, `student_4` and so on."""

    method: str
    seed: int
    rows: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper's as a difference or a factor, one value per seed, which holds where it compares."""

    sentence: str
    values: list[float]
    compare: Callable[[float, float], bool]
    bound: float
    digits: int = 3
    ratio: bool = False  # the values are factors rather than differences

    def holds(self, value: float) -> bool:
        """Whether a value bears the claim out."""
        return self.compare(value, self.bound)

    def show(self, value: float) -> str:
        return f"×{figure(value, self.digits)}" if self.ratio else signed(value, self.digits)

    @property
    def spread(self) -> str:
        """Mean ± deviation over the seeds."""
        mean, deviation = mean_and_deviation(self.values)
        return f"{self.show(mean)} ± {figure(deviation, self.digits)}"

    @property
    def verdict(self) -> str:
        """ "yes" when it holds with every seed, "on average" when only their mean does, else "no"."""
        if all(map(self.holds, self.values)):
            return "yes"
        return "on average" if self.holds(float(np.mean(self.values))) else "no"


def write_ablation(
    workdir: Path,
    results: Sequence[Result],
    labels: Mapping[str, str],
    speed: "Speed",
    videos: Mapping[str, Mapping[str, np.ndarray]],
    prompts: Sequence[str],
    commands: Sequence[str],
    config_text: str,
    seconds: float,
) -> Path:
    """Writes `reproduction.html`, which opens offline, `reproduction.csv` and `reproduction.md`; the page's path.
    `labels` names the methods in their order; `speed` is of the teacher and any student; `videos` are [p t h w 3]."""
    means = summary(results, labels)
    claims = paper_claims(results, speed)
    tables = {"claims": _claims_table(claims), "measures": _measures_table(means, labels), "speed": _speed_table(speed)}
    path = workdir / "reproduction.html"
    write_file(path.with_suffix(".csv"), _csv(results))
    write_file(path.with_suffix(".md"), "\n".join(tables[name].markdown() for name in ("measures", "speed", "claims")))
    count = len({result.seed for result in results})
    held = sum(claim.verdict == "yes" for claim in claims)
    tiles = [(f"{held} of {len(claims)}", "of the paper’s claims hold with every seed")]
    tiles += [(f"{count} seed{'s' * (count > 1)}", "per method"), (duration(seconds), "for what was not there yet")]
    plots = {f"Students in {steps(n)}": plots for n in (4, 1) if (plots := _plots(means, labels, n))}
    shown = {"plots": plots, "videos": _videos(prompts, videos, labels), "commands": "\n".join(commands)}
    write_page(path, "ablation.html", tiles=tiles, settings=config_text, **tables, **shown)
    return path


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


Means = dict[tuple[str, str], dict[str, tuple[float, float]]]
Speed = Mapping[str, Mapping[str, Any]]  # sampler → `nfe`, and what `measure.draw_in_turns` says of its seconds


def summary(results: Sequence[Result], labels: Mapping[str, str]) -> Means:
    """(method, sampler) → measure → mean and deviation (n - 1) over the seeds; in the labels' order."""
    means: Means = {}
    for method in labels:
        cells = [result.rows for result in results if result.method == method]
        for sampler in dict.fromkeys(name for rows in cells for name in rows):
            measures = means.setdefault((method, sampler), {})
            for measure in COLUMNS:
                if values := [rows[sampler][measure] for rows in cells if measure in rows.get(sampler, {})]:
                    measures[measure] = mean_and_deviation(values)
    return means


_WITHIN = "4-step alignment of {} within 2 points of the teacher’s: difference"
# The claim; a measure of a method in 4 steps, less that of another or the teacher; how it must compare with what.
_DIFFERENCES = (
    ("VSD + CD is more diverse than VSD: Vendi of pixels in 4 steps, difference", "vendi", "vsd_cd", "vsd", gt, 0),
    ("The same by the Vendi of VAE features", "vendi_network", "vsd_cd", "vsd", gt, 0),
    ("CD with m = 5 no worse than with m = 1: alignment in 4 steps, difference", "alignment", "cd_m5", "cd_m1", ge, 0),
    ("The latent reward model takes the reward beyond the teacher’s: difference", "reward", "vsd_cd_lrm", None, gt, 0),
    (_WITHIN.format("VSD + CD"), "alignment", "vsd_cd", None, ge, -0.02),
    (_WITHIN.format("VSD + CD + LRM"), "alignment", "vsd_cd_lrm", None, ge, -0.02),
)
# The claim; the student; the least factor.
_SPEEDUPS = (
    ("4-step diffusion is faster by at least half of what evaluations allow (×25)", "student_4", 12.5),
    ("1-step diffusion is faster by at least half of what evaluations allow (×100)", "student_1", 50),
)


def paper_claims(results: Sequence[Result], speed: Speed) -> list[Claim]:
    """The paper's claims, those whose cells there are: a value for each seed, and of speed for each round of timing."""
    found = {(result.method, result.seed): result.rows for result in results}
    seeds = sorted({result.seed for result in results})
    teacher = max(found["teacher", seeds[0]], key=lambda name: kind_and_steps(name)[1])
    claims = []
    for sentence, measure, method, other, compare, bound in _DIFFERENCES:
        second = (other, "student_4") if other else ("teacher", teacher)
        pairs = [(found.get((method, seed)), found.get((second[0], seed))) for seed in seeds]
        values = [x["student_4"][measure] - y[second[1]][measure] for x, y in pairs if x and y]
        claims.append(Claim(sentence, values, compare, bound, 2 if measure.startswith("vendi") else 3))
    for sentence, student, least in _SPEEDUPS:
        pairs = zip(speed[teacher]["diffusion"], speed[student]["diffusion"], strict=True)
        claims.append(Claim(sentence, [a / b for a, b in pairs], ge, least, 1, ratio=True))
    return [claim for claim in claims if claim.values]


def _claims_table(claims: Sequence[Claim]) -> Table:
    rows, kinds = [], {"yes": "best", "no": "worst"}
    for claim in claims:
        verdict = Cell(mark=claim.verdict, kind=kinds.get(claim.verdict, "soft"))
        rows.append([Cell(claim.sentence), verdict, *cells(claim.spread, ", ".join(map(claim.show, claim.values)))])
    return Table(cells("Claim", "Holds", "Mean ± deviation", "One by one"), rows)


def _measures_table(means: Means, labels: Mapping[str, str]) -> Table:
    """Mean ± deviation of every measure, a dash where there is none."""
    rows = []
    for (method, sampler), found in means.items():
        shown = {name: list(map(MEASURES[name].show, found.get(name, ()))) for name in COLUMNS}
        texts = [" ± ".join(values[:1] if name == "nfe" else values) or "–" for name, values in shown.items()]
        rows.append(cells(f"{labels[method]}, {steps(kind_and_steps(sampler)[1])}", *texts))
    return Table(cells("Sampler", *(MEASURES[name].heading for name in COLUMNS)), rows)


def _speed_table(speed: Speed) -> Table:
    """The paper's table 8.4: medians over the rounds, beside the sampler that evaluates most."""
    medians = {name: {k: float(np.median(v)) for k, v in row.items()} for name, row in speed.items()}
    slowest = max(medians.values(), key=lambda row: row["nfe"])
    rows = []
    for name, row in medians.items():
        kind, count = kind_and_steps(name)
        faster = f"×{figure(slowest['diffusion'] / row['diffusion'], 1)}"
        share = figure(100 * row["total"] / slowest["total"], 1)
        seconds = figure(row["diffusion"], 4), faster, figure(row["total"], 4), share
        rows.append(cells(f"{kind.capitalize()}, {steps(count)}", f"{row['nfe']:g}", *seconds))
    seconds = ("Diffusion, s per video", "Times faster", "Whole inference, s per video", "Share of the teacher’s, %")
    return Table(cells("Sampler", "NFE", *seconds), rows)


def _plots(means: Means, labels: Mapping[str, str], count: int) -> list[dict[str, Any]]:
    """The teacher at its most steps, and the students in `count` steps, measure by measure."""
    keys = [key for key in means if key[0] == "teacher"][:1] + [key for key in means if key[1] == f"student_{count}"]
    figures = []
    for measure in PLOTTED:
        if rows := [(labels[key[0]], *means[key][measure]) for key in keys if measure in means[key]]:
            figures.append({"name": MEASURES[measure].heading, "note": "", "chart": dot_chart(rows)})
    return figures


def _videos(prompts: Sequence[str], videos: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Clips:
    shown = {}
    for method, samplers in videos.items():
        key = max(samplers, key=lambda name: kind_and_steps(name)[1]) if method == "teacher" else "student_4"
        if key in samplers:
            shown[method] = samplers[key]
    return embed(prompts, shown, labels)


def _csv(results: Sequence[Result]) -> str:
    """A row per method, seed and sampler, with every measure there is."""
    cells = [(result, *row) for result in results for row in result.rows.items()]
    rows = [{"method": cell.method, "seed": cell.seed, "sampler": name, **values} for cell, name, values in cells]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
