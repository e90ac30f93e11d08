"""The experiments in configs/: found by name from any folder, read, and made of one another."""

import dataclasses
import runpy
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from dollar_jax.config import DistillConfig, distill_config
from dollar_jax.fields import merged, unwrapped

LOSSES = ("vsd", "cd", "vsd+cd", "vsd+cd+lrm")
_PACKAGE = Path(__file__).parent
# In a wheel they lie in the package; in a checkout beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def experiment(base: str | None, variant: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The settings of `base`, a name in configs/ or a path, or the defaults, with `changes` by dotted paths or groups.
    `variant` is one of LOSSES; the others' weights are 0. The rewards of lrm may follow it, as in
    vsd+cd+lrm,hpsv2=FOLDER,vivid, unless `base` or `changes` name some."""
    losses, *rewards = variant.split(",")
    if losses not in LOSSES:
        raise ValueError(f"the variant :{losses} is unknown; there are {', '.join(LOSSES)}")
    fields = merged({} if base is None else dataclasses.asdict(load(base, variant)), changes)
    terms = losses.split("+")
    if "lrm" in terms and not rewards and not fields.get("reward", {}).get("rewards"):
        raise ValueError(f"the variant :{losses} lacks a reward: name one, as in :{losses},hpsv2=FOLDER")
    if rewards and "lrm" not in terms:
        raise ValueError(f"the variant :{variant} names a reward, which only lrm learns: write :{losses}+lrm,…")
    if rewards:
        pairs = (reward.partition("=") for reward in rewards)
        fields = merged(fields, {"reward.rewards": tuple({"name": n, "folder": f or None} for n, _, f in pairs)})
    # By itself L_CD has nothing to do in the steps between.
    no_vsd = {"vsd.weight": 0.0, "gan.weight": 0.0, "consistency.every": 1}
    for term, off in {"vsd": no_vsd, "cd": {"consistency.weight": 0.0}, "lrm": {"reward.rewards": ()}}.items():
        fields = fields if term in terms else merged(fields, off)
    return as_config_dict(distill_config(fields))


def load(name: str, *losses: str) -> DistillConfig:
    """The experiment `name`, of configs/ or the path of a file; raises ValueError or OSError naming the file."""
    path = find(name)
    try:
        if "get_config" not in (module := runpy.run_path(str(path))):
            raise ValueError("there is no function get_config in it")
        if not hasattr(config := module["get_config"](*losses), "items"):
            raise ValueError(f"get_config must return settings, not {config!r}")
        return distill_config(config)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{error}") from error


def find(name: str) -> Path:
    """The file of an experiment given by its name in configs/ or by its path."""
    path = CONFIGS / f"{name}.py" if Path(name).name == name and not name.endswith(".py") else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.py")))
        raise FileNotFoundError(f"there is no configuration {name}: give the path of a file, or one of {known}")
    return path


def as_config_dict(config: Any) -> ConfigDict:
    """A dataclass as a ConfigDict of the same fields; what is None takes a value of the field's own type."""
    fields = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        if dataclasses.is_dataclass(value := getattr(config, name)):
            value = as_config_dict(value)
        elif value is None and unwrapped(hint) in (int, float, str, bool):
            value = config_dict.placeholder(unwrapped(hint))
        elif isinstance(value, tuple):
            value = tuple(as_config_dict(v) if dataclasses.is_dataclass(v) else v for v in value)
        fields[name] = value
    return ConfigDict(fields)
