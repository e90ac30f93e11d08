"""metrics.json: what was measured."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from dollar_jax.files import write_file


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes metrics as JSON, whole or not at all: mappings, sequences, strings, booleans, None and numbers (NumPy and
    JAX scalars too). Raises ValueError naming a value of another type, or a number that is NaN or infinite."""
    write_file(path, json.dumps(_plain(metrics, "metrics"), indent=2, ensure_ascii=False) + "\n")


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
