"""The ablation's page, its CSV and its Markdown table: means and deviations over seeds, and the paper's claims."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.files import write_file
from dollar_jax.report.charts import dot_chart
from dollar_jax.report.clips import Clips, embed
from dollar_jax.report.measures import MEASURES
from dollar_jax.report.page import Cell, Table, cells, duration, figure, signed, steps, write_page

INTRODUCTION = (
    "The ablation of DOLLAR (arXiv 2412.15689) in kind: the default domain's teacher, distilled by "
    "variational score distillation (VSD), consistency distillation (CD), both, and both with a reward, by a "
    "latent reward model (LRM) or by policy gradients (DDPO), each student sampled in 4, 2 and 1 steps. Figures "
    "are means over the seeds, with the deviation between seeds after ±."
)
COLUMNS = ("alignment", "reward", "vendi", "vendi_network", "frechet", "flicker", "net_change", "nfe")
PLOTTED = ("alignment", "reward", "vendi", "vendi_network", "frechet")


@dataclasses.dataclass(frozen=True)
class Result:
    """One cell: a method (or "teacher") with one seed, and its measures by sampler, `student_4` and so on."""

    method: str
    seed: int
    rows: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper's as a difference or ratio, one value per seed, and when it holds."""

    sentence: str
    values: list[float]
    holds: Callable[[float], bool]
    digits: int = 3
    ratio: bool = False  # the values are factors rather than differences

    def show(self, value: float) -> str:
        return f"×{figure(value, self.digits)}" if self.ratio else signed(value, self.digits)

    @property
    def spread(self) -> str:
        """Mean ± deviation over the seeds."""
        deviation = float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0
        return f"{self.show(float(np.mean(self.values)))} ± {figure(deviation, self.digits)}"

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
    speed: Speed,
    videos: Mapping[str, Mapping[str, np.ndarray]],
    prompts: Sequence[str],
    commands: Sequence[str],
    config_text: str,
    seconds: float,
) -> Path:
    """Writes `reproduction.html`, which opens offline, `reproduction.csv` and `reproduction.md`; the page's path.

    `labels` names the methods in their order; `speed` is of the teacher and any student; `videos` holds uint8
    [prompts, t, h, w, 3] by method and sampler.
    """
    means = summary(results, labels)
    claims = paper_claims(results, speed)
    tables = {"claims": _claims_table(claims), "measures": _measures_table(means, labels), "speed": _speed_table(speed)}
    write_file(workdir / "reproduction.csv", _csv(results))
    write_file(
        workdir / "reproduction.md", "\n".join(tables[name].markdown() for name in ("measures", "speed", "claims"))
    )
    path = workdir / "reproduction.html"
    count = len({result.seed for result in results})
    held = sum(claim.verdict == "yes" for claim in claims)
    write_page(
        path,
        "ablation.html",
        title="The ablation, reproduced in kind",
        introduction=INTRODUCTION,
        tiles=[
            (f"{held} of {len(claims)}", "of the paper’s claims hold with every seed"),
            (f"{count} seed{'s' if count > 1 else ''}", "per method"),
            (duration(seconds), "for what was not there yet"),
        ],
        **tables,
        plots={f"Students in {steps(n)}": plots for n in (4, 1) if (plots := _plots(means, labels, n))},
        videos=_videos(prompts, videos, labels, 4),
        commands="\n".join(commands),
        settings=config_text,
    )
    return path


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
                values = [rows[sampler][measure] for rows in cells if measure in rows.get(sampler, {})]
                if values:
                    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                    measures[measure] = float(np.mean(values)), spread
    return means


def paper_claims(results: Sequence[Result], speed: Speed) -> list[Claim]:
    """The paper's claims, those whose cells there are: a value for each seed, and of speed for each round of timing."""
    rows_of = {(result.method, result.seed): result.rows for result in results}
    seeds = sorted({result.seed for result in results})
    teacher = max(rows_of["teacher", seeds[0]], key=lambda name: int(name.rpartition("_")[2]))

    def difference(measure: str, a: tuple[str, str], b: tuple[str, str]) -> list[float]:
        pairs = [(rows_of.get((a[0], s)), rows_of.get((b[0], s))) for s in seeds]
        return [x[a[1]][measure] - y[b[1]][measure] for x, y in pairs if x and y]

    def speedup(sampler: str) -> list[float]:
        return [a / b for a, b in zip(speed[teacher]["diffusion"], speed[sampler]["diffusion"], strict=True)]

    four, base = "student_4", ("teacher", teacher)
    full = ("vsd_cd_lrm", four)
    claims = [
        Claim(
            "VSD + CD is more diverse than VSD: Vendi of pixels in 4 steps, difference",
            difference("vendi", ("vsd_cd", four), ("vsd", four)),
            lambda v: v > 0,
            2,
        ),
        Claim(
            "The same by the Vendi of VAE features",
            difference("vendi_network", ("vsd_cd", four), ("vsd", four)),
            lambda v: v > 0,
            2,
        ),
        Claim(
            "CD with m = 5 is no worse than with m = 1: alignment in 4 steps, difference",
            difference("alignment", ("cd_m5", four), ("cd_m1", four)),
            lambda v: v >= 0,
        ),
        Claim(
            "With the latent reward model the reward is beyond the teacher’s: difference",
            difference("reward", full, base),
            lambda v: v > 0,
        ),
        Claim(
            "4-step alignment of VSD + CD within 2 points of the teacher’s: difference",
            difference("alignment", ("vsd_cd", four), base),
            lambda v: v >= -0.02,
        ),
        Claim(
            "4-step alignment of VSD + CD + LRM within 2 points of the teacher’s: difference",
            difference("alignment", full, base),
            lambda v: v >= -0.02,
        ),
        Claim(
            "4-step diffusion is faster by at least half of what evaluations allow (×25)",
            speedup(four),
            lambda v: v >= 12.5,
            1,
            True,
        ),
        Claim(
            "1-step diffusion is faster by at least half of what evaluations allow (×100)",
            speedup("student_1"),
            lambda v: v >= 50,
            1,
            True,
        ),
    ]
    return [claim for claim in claims if claim.values]


def name_of(method: str, sampler: str, labels: Mapping[str, str]) -> str:
    return f"{labels[method]}, {steps(_steps(sampler))}"


def _steps(sampler: str) -> int:
    return int(sampler.rpartition("_")[2])


def _claims_table(claims: Sequence[Claim]) -> Table:
    kinds = {"yes": "best", "no": "worst"}
    rows = [
        [
            Cell(claim.sentence),
            Cell(mark=claim.verdict, kind=kinds.get(claim.verdict, "soft")),
            *cells(claim.spread, ", ".join(map(claim.show, claim.values))),
        ]
        for claim in claims
    ]
    return Table(cells("Claim", "Holds", "Mean ± deviation", "One by one"), rows)


def _measures_table(means: Means, labels: Mapping[str, str]) -> Table:
    head = cells("Sampler", *(MEASURES[name].heading for name in COLUMNS))
    return Table(head, [[Cell(name_of(*key, labels)), *_mean_cells(found)] for key, found in means.items()])


def _mean_cells(found: Mapping[str, tuple[float, float]]) -> list[Cell]:
    """Mean ± deviation of every measure, a dash where there is none."""
    texts = []
    for name in COLUMNS:
        shown = [MEASURES[name].show(value) for value in found.get(name, ())]
        texts.append(" ± ".join(shown[:1] if name == "nfe" else shown) or "–")
    return cells(*texts)


def _speed_table(speed: Speed) -> Table:
    """The paper's table 8.4: medians over the rounds, beside the sampler that evaluates most."""
    medians = {name: {k: float(np.median(v)) for k, v in row.items()} for name, row in speed.items()}
    slowest = max(medians.values(), key=lambda row: row["nfe"])
    rows = [
        cells(
            f"{name.rpartition('_')[0].capitalize()}, {steps(_steps(name))}",
            f"{row['nfe']:g}",
            figure(row["diffusion"], 4),
            f"×{figure(slowest['diffusion'] / row['diffusion'], 1)}",
            figure(row["total"], 4),
            figure(100 * row["total"] / slowest["total"], 1),
        )
        for name, row in medians.items()
    ]
    seconds = ("Diffusion, s per video", "Times faster", "Whole inference, s per video", "Share of the teacher’s, %")
    return Table(cells("Sampler", "NFE", *seconds), rows)


def _plots(means: Means, labels: Mapping[str, str], count: int) -> list[dict[str, Any]]:
    """The teacher at its most steps, and the students in `count` steps, measure by measure."""
    keys = [key for key in means if key[0] == "teacher"][:1] + [key for key in means if key[1] == f"student_{count}"]
    figures = []
    for measure in PLOTTED:
        rows = [(labels[key[0]], *means[key][measure]) for key in keys if measure in means[key]]
        if rows:
            figures.append({"name": MEASURES[measure].heading, "note": "", "chart": dot_chart(rows)})
    return figures


def _videos(
    prompts: Sequence[str], videos: Mapping[str, Mapping[str, np.ndarray]], labels: Mapping[str, str], count: int
) -> Clips:
    shown = {}
    for method, samplers in videos.items():
        key = max(samplers, key=_steps) if method == "teacher" else f"student_{count}"
        if key in samplers:
            shown[method] = samplers[key]
    return embed(prompts, shown, labels)


def _csv(results: Sequence[Result]) -> str:
    """A row per method, seed and sampler, with every measure there is."""
    rows = [
        {"method": result.method, "seed": result.seed, "sampler": sampler, **measures}
        for result in results
        for sampler, measures in result.rows.items()
    ]
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
