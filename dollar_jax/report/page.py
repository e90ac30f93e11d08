"""A page that opens offline, from a template in templates/: tables, and numbers as a person writes them."""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from dollar_jax.files import write_file

MINUS = "\N{MINUS SIGN}"
_LAYOUT = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
_TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("dollar_jax.report"), autoescape=True, **_LAYOUT)


def write_page(path: str | os.PathLike[str], template: str, **context: Any) -> None:
    """Writes one HTML file that needs no network; every text of the context is escaped."""
    write_file(path, _TEMPLATES.get_template(template).render(context))


class Cell(NamedTuple):
    """A table's cell: its text, smaller text below, a mark in the colour of its kind, a bar of `bar` percent."""

    text: str = ""
    small: str = ""
    mark: str = ""
    kind: str = "soft"  # "best", "worst" or "soft"
    bar: float | None = None


class Table(NamedTuple):
    """The first cell of a row is its heading."""

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        lines = [self.head, [Cell("---")] * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(cell.text or cell.mark for cell in line)} |\n" for line in lines)


def cells(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if real and math.isfinite(value) else None


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", MINUS)


def general(value: float) -> str:
    """Up to six significant digits, without trailing zeros."""
    return f"{value:.6g}".replace("-", MINUS)


def significant(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return figure(value, 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.2e}".replace("-", MINUS)


def times(value: float) -> str:
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 60:
        return f"{significant(seconds)} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
