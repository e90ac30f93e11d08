"""The measures of samples: how a table heads, shows and compares them."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dollar_jax.report.page import duration, figure, signed, times


class Measure(NamedTuple):
    """`compare` sets a value against the teacher's; the best and the worst of a ranked one are marked."""

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


_TWO, _THREE = (functools.partial(figure, digits=digits) for digits in (2, 3))
MEASURES = {  # the keys are those of a sampler in metrics.json
    "alignment": Measure("Alignment", "1 is perfect", _THREE, _difference, ranked=True),
    "reward": Measure("Reward", "higher is better", _THREE, _difference, ranked=True),
    "vendi": Measure("Vendi", "diversity", _TWO, _ratio),
    "vendi_network": Measure("Vendi of features", "diversity", _TWO, _ratio),
    "frechet": Measure("Fréchet distance", "lower is better", _THREE, _difference),
    "flicker": Measure("Flicker score", "1 is frozen", _THREE, _difference),
    "net_change": Measure("Net change", "over half a clip", _THREE, _difference),
    "nfe": Measure("NFE", "network calls", "{:g}".format),
    "diffusion_seconds": Measure("Diffusion", "time", duration, _faster),
    "total_seconds": Measure("Whole inference", "time", duration, _faster),
}


def kind_and_steps(sampler: str) -> tuple[str, int]:
    """The parts of `student_4`; 0 steps where a name says none."""
    match = re.fullmatch(r"(.+)_(\d+)", sampler)
    return (match[1], int(match[2])) if match else (sampler, 0)


def of_samplers(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The samplers' rows of a metrics.json by name, and not the other mappings in it; a manifest names its sampler."""
    rows = {name: row for name, row in metrics.items() if isinstance(row, Mapping) and "sampler" not in row}
    return {name: row for name, row in rows.items() if {"nfe", "alignment"} & row.keys()}
