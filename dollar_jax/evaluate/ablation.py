"""The ablation's page, its CSV and its Markdown table: means and deviations over seeds, and the paper's claims."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.evaluate.page import dots, duration, escape, figure, settings, signed, videos_section, write_page
from dollar_jax.files import write_file

INTRODUCTION = (
    "The ablation of DOLLAR (arXiv 2412.15689) in kind: the default domain's teacher, distilled by "
    "variational score distillation (VSD), consistency distillation (CD), both, and both with a reward, by a "
    "latent reward model (LRM) or by policy gradients (DDPO), each student sampled in 4, 2 and 1 steps. Figures "
    "are means over the seeds, with the deviation between seeds after ±."
)
MEASURES: dict[str, tuple[str, int]] = {  # measure → heading, decimals
    "alignment": ("Alignment", 3),
    "reward": ("Reward", 3),
    "vendi": ("Vendi, pixels", 2),
    "vendi_network": ("Vendi, VAE", 2),
    "frechet": ("Fréchet video distance, VAE", 3),
    "flicker": ("Flicker score", 3),
    "motion": ("Motion", 3),
    "nfe": ("NFE", 0),
}
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
    table = summary(results, labels)
    claims = paper_claims(results, speed)
    write_file(workdir / "reproduction.csv", _csv(results))
    write_file(workdir / "reproduction.md", _markdown(table, claims, labels, speed))
    seeds = len({result.seed for result in results})
    path = workdir / "reproduction.html"
    write_page(
        path,
        "The ablation, reproduced in kind",
        INTRODUCTION,
        _tiles(claims, seeds, seconds),
        [
            _claims_section(claims),
            _table_section(table, labels),
            _speed_section(speed),
            *(_plots_section(table, labels, steps) for steps in (4, 1)),
            _videos_section(prompts, videos, labels, 4),
            "<section><h2>Commands</h2><details><summary>The training of every cell</summary>"
            f"<pre>{escape(chr(10).join(commands))}</pre></details></section>",
            settings(config_text),
        ],
    )
    return path


Table = dict[tuple[str, str], dict[str, tuple[float, float]]]
Speed = Mapping[str, Mapping[str, Any]]  # sampler → what `measure.seconds_side_by_side` says of it


def summary(results: Sequence[Result], labels: Mapping[str, str]) -> Table:
    """(method, sampler) → measure → mean and deviation (n - 1) over the seeds; in the labels' order."""
    table: Table = {}
    for method in labels:
        cells = [result.rows for result in results if result.method == method]
        for sampler in dict.fromkeys(name for rows in cells for name in rows):
            measures = table.setdefault((method, sampler), {})
            for measure in MEASURES:
                values = [rows[sampler][measure] for rows in cells if measure in rows.get(sampler, {})]
                if values:
                    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                    measures[measure] = float(np.mean(values)), spread
    return table


def paper_claims(results: Sequence[Result], speed: Speed) -> list[Claim]:
    """The claims that the cells there are can speak to, seed by seed; those of speed round by round."""
    cells = {(result.method, result.seed): result.rows for result in results}
    seeds = sorted({result.seed for result in results})
    teacher = max(cells["teacher", seeds[0]], key=lambda name: int(name.rpartition("_")[2]))

    def difference(measure: str, a: tuple[str, str], b: tuple[str, str]) -> list[float]:
        pairs = [(cells.get((a[0], s)), cells.get((b[0], s))) for s in seeds]
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
    steps = int(sampler.rpartition("_")[2])
    return f"{labels[method]}, {steps} {'step' if steps == 1 else 'steps'}"


def _tiles(claims: Sequence[Claim], seeds: int, seconds: float) -> str:
    held = sum(claim.verdict == "yes" for claim in claims)
    tiles = {
        "of the paper’s claims hold with every seed": f"{held} of {len(claims)}",
        "per method": f"{seeds} seed{'s' if seeds > 1 else ''}",
        "for what was not there yet": duration(seconds),
    }
    body = "".join(f"<div><dd>{escape(v)}</dd><dt>{escape(k)}</dt></div>" for k, v in tiles.items())
    return f'<dl class="tiles">{body}</dl>'


def _row(measures: Mapping[str, tuple[float, float]]) -> list[str]:
    """Mean ± deviation of every measure, a dash where there is none."""
    cells = []
    for name, (_, digits) in MEASURES.items():
        if name not in measures:
            cells.append("–")
        elif name == "nfe":
            cells.append(f"{measures[name][0]:g}")
        else:
            cells.append(" ± ".join(figure(value, digits) for value in measures[name]))
    return cells


def _claims_section(claims: Sequence[Claim]) -> str:
    body = ""
    for claim in claims:
        values = ", ".join(map(claim.show, claim.values))
        kind = {"yes": "best", "no": "worst"}.get(claim.verdict, "soft")
        body += (
            f'<tr><th scope="row">{escape(claim.sentence)}</th>'
            f'<td><span class="{kind}">{claim.verdict}</span></td><td>{claim.spread}</td><td>{values}</td></tr>'
        )
    return (
        '<section><h2>The paper’s claims</h2><div class="wide"><table><thead><tr><th scope="col">Claim</th>'
        '<th scope="col">Holds</th><th scope="col">Mean ± deviation</th><th scope="col">One by one</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div></section>"
    )


def _table_section(table: Table, labels: Mapping[str, str]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading, _ in MEASURES.values())
    body = ""
    for (method, sampler), measures in table.items():
        cells = "".join(f"<td>{text}</td>" for text in _row(measures))
        body += f'<tr><th scope="row">{escape(name_of(method, sampler, labels))}</th>{cells}</tr>'
    return (
        '<section><h2>Measures</h2><div class="wide"><table><thead><tr><th scope="col">Sampler</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="soft">Alignment is the share of frames and attributes that the domain’s verifier reads as '
        "the caption says. Vendi counts how many different videos a prompt yields; noise is diverse too, so "
        "read it beside the alignment. The Fréchet distance is to real clips: lower is better.</p></section>"
    )


SPEED_COLUMNS = (
    "NFE",
    "Diffusion, s per video",
    "Times faster",
    "Whole inference, s per video",
    "Share of the teacher’s, %",
)


def _speed_rows(speed: Speed) -> list[list[str]]:
    """The paper's table 8.4: medians over the rounds, beside the sampler that evaluates most."""
    middle = {name: {k: float(np.median(v)) for k, v in row.items()} for name, row in speed.items()}
    slowest = max(middle.values(), key=lambda row: row["nfe"])
    rows = []
    for name, row in middle.items():
        kind, _, steps = name.rpartition("_")
        rows.append(
            [
                f"{kind.capitalize()}, {steps} {'step' if steps == '1' else 'steps'}",
                f"{row['nfe']:g}",
                figure(row["diffusion"], 4),
                f"×{figure(slowest['diffusion'] / row['diffusion'], 1)}",
                figure(row["total"], 4),
                figure(100 * row["total"] / slowest["total"], 1),
            ]
        )
    return rows


def _speed_section(speed: Speed) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in SPEED_COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in _speed_rows(speed)
    )
    return (
        '<section><h2>Speed</h2><div class="wide"><table><thead><tr><th scope="col">Sampler</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="soft">Taken in turns in one process, on this machine; medians over the rounds. Whole inference '
        "is text encoder, diffusion and decoder.</p></section>"
    )


def _plots_section(table: Table, labels: Mapping[str, str], steps: int) -> str:
    figures = ""
    teacher = next((key for key in table if key[0] == "teacher"), None)
    for measure in PLOTTED:
        keys = [teacher, *(key for key in table if key[1] == f"student_{steps}")]
        rows = [(labels[key[0]], *table[key][measure]) for key in keys if key and measure in table[key]]
        if rows:
            heading = MEASURES[measure][0]
            figures += f"<figure><figcaption><b>{escape(heading)}</b></figcaption>{dots(rows, heading)}</figure>"
    title = f"Students in {steps} {'step' if steps == 1 else 'steps'}"
    return f'<section><h2>{title}</h2><div class="charts">{figures}</div></section>' if figures else ""


def _videos_section(
    prompts: Sequence[str], videos: Mapping[str, Mapping[str, np.ndarray]], labels: Mapping[str, str], steps: int
) -> str:
    shown, names = {}, {}
    for method, label in labels.items():
        samplers = videos[method]
        best = max(samplers, key=lambda name: int(name.rpartition("_")[2]))
        key = best if method == "teacher" else f"student_{steps}"
        if key in samplers:
            shown[method], names[method] = samplers[key], label
    return videos_section(prompts, shown, names, fps=8)


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


def _markdown(table: Table, claims: Sequence[Claim], labels: Mapping[str, str], speed: Speed) -> str:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(map(str, cells))} |\n"

    text = line(["sampler", *(heading for heading, _ in MEASURES.values())]) + line(["---"] * (len(MEASURES) + 1))
    for (method, sampler), measures in table.items():
        text += line([name_of(method, sampler, labels), *_row(measures)])
    text += "\n" + line(["sampler", *SPEED_COLUMNS]) + line(["---"] * (len(SPEED_COLUMNS) + 1))
    for row in _speed_rows(speed):
        text += line(row)
    text += "\n" + line(["claim", "mean ± deviation", "holds"]) + line(["---"] * 3)
    for claim in claims:
        text += line([claim.sentence, claim.spread, claim.verdict])
    return text
