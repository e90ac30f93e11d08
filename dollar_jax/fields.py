"""Fields of frozen dataclasses that explain and check themselves: reading, changing, describing and comparing them."""

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Bound = float | None
REQUIRED: Any = dataclasses.MISSING
"""In place of a default: the setting has to be given."""


def field(
    default: Any, meaning: str, *, low: Bound = None, high: Bound = None, above: Bound = None, resumable: bool = False
) -> Any:
    """A dataclass field that explains itself. `low` and `high` bound a number, or each of a tuple, inclusively, `above`
    exclusively. A run may be resumed with another value of a `resumable` setting, or of any in a group that is."""
    metadata = {"meaning": meaning, "low": low, "high": high, "above": above, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


def from_config(cls: type[T], config: Mapping[str, Any], where: str = "config") -> T:
    """The dataclass `cls` of a ConfigDict or mapping; ValueError naming what is missing, unknown or wrong."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in config:
        if key not in fields:
            raise ValueError(_unknown(key, hints, where))
    values, missing = {}, []
    for name, known in fields.items():
        if name in config:
            values[name] = convert(hints[name], config[name], f"{where}.{name}")
            _check(known, values[name], f"{where}.{name}")
        elif known.default is REQUIRED:
            missing.append(name)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    return cls(**values)


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with `changes` by dotted paths; a mapping is merged into one that is there."""
    result = dict(tree)
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            value = {rest: value}
        result[name] = merged(result.get(name) or {}, value) if isinstance(value, Mapping) else value
    return result


def check_path(cls: type, path: str, where: str = "config") -> None:
    """Raises ValueError, with the nearest name, when a dotted path is no setting of the dataclass `cls`."""
    part, _, rest = path.partition(".")
    name, indexed, _ = part.partition("[")
    if name not in (hints := typing.get_type_hints(cls)):
        raise ValueError(_unknown(name, hints, where))
    hint, where = unwrapped(hints[name]), f"{where}.{part}"
    if indexed and typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint) and rest:
        check_path(typing.cast(type, hint), rest, where)
    elif rest and typing.get_origin(hint) is not collections.abc.Mapping:
        raise ValueError(f"{where} is a single setting: there is no {where}.{rest}")


class Setting(NamedTuple):
    """One setting of a configuration, and what its field says of it."""

    path: str
    value: Any
    default: Any  # REQUIRED where there is none
    meaning: str
    allowed: str
    resumable: bool


def settings(config: Any, prefix: str = "", resumable: bool = False) -> Iterator[Setting]:
    """Every setting of a configuration, in the order of the fields."""
    hints = typing.get_type_hints(type(config))
    for known in dataclasses.fields(config):
        path, value = f"{prefix}{known.name}", getattr(config, known.name)
        may = resumable or known.metadata["resumable"]
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{path}.", may)
        else:
            allowed = _allowed(known, hints[known.name])
            yield Setting(path, value, known.default, known.metadata["meaning"], allowed, may)


def plain(value: Any) -> Any:
    """A setting's value as JSON gives it back."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)  # type: ignore[arg-type]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _unknown(key: str, hints: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches({"guidance_scale": "guidance_weight"}.get(key, key), hints, 1, 0.5)  # diffusers'
    hint = f"did you mean {where}.{near[0]}?" if near else f"its fields are {', '.join(sorted(hints))}"
    return f"{where} has no field {key!r}; {hint}"


def unwrapped(hint: Any) -> Any:
    """X of X | None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def convert(hint: Any, value: Any, where: str) -> Any:
    """A value as the type `hint`, lists as tuples; raises ValueError naming it by `where`."""
    if hint != unwrapped(hint):
        return None if value is None else convert(unwrapped(hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}, but must be one of {', '.join(map(repr, args))}")
        return value
    group = origin is collections.abc.Mapping
    if (group or dataclasses.is_dataclass(hint)) and not hasattr(value, "items"):
        raise ValueError(f"{where} must be a group of settings, not {value!r}")
    if group:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_config(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"{where} must be a sequence, not {value!r}")
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} needs {len(kinds)} values, not {len(value)}")
        return tuple(convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, but must be of type {hint.__name__}")
    return value


def _check(known: dataclasses.Field[Any], value: Any, where: str) -> None:
    """Raises ValueError for a number out of the field's range, and for one that is not finite."""
    for i, number in enumerate(value if isinstance(value, tuple) else (value,)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        low, high, above = (known.metadata[name] for name in ("low", "high", "above"))
        inside = math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)
        if not inside or (above is not None and number <= above):
            part = f"{where}[{i}]" if isinstance(value, tuple) else where
            raise ValueError(f"{part} must be {_allowed(known)}, not {number!r}")


def _allowed(known: dataclasses.Field[Any], hint: Any = None) -> str:
    """A field's values in words."""
    low, high, above = (known.metadata[name] for name in ("low", "high", "above"))
    hint = unwrapped(hint)
    choices: Any = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    if typing.get_origin(choices) is Literal:
        text = "one of " + ", ".join(typing.get_args(choices))
    elif low is not None:
        text = f"at least {low:g}" if high is None else f"from {low:g} to {high:.10g}"
    elif above is not None:
        text = ("positive" if above == 0 else f"above {above:g}") + ("" if high is None else f", at most {high:g}")
    else:
        text = "true or false" if hint is bool else "text" if hint is str else "finite"
    return text + (", or None" if "None" in str(known.type) else "")
