"""Pixel-space rewards behind one protocol: (frames [b t h w 3] in [0, 1], prompts) → rewards [b].

Two kinds. A host reward (`Reward`) is any Python callable: PyTorch, ONNX, a subprocess, a remote scorer;
it sees decoded frames as NumPy, off the training's critical path. A `JaxReward` runs inside the jitted
step on frames decoded there. Neither is differentiated, unless the method asks for it.

A reward is named by a key of REWARDS or LOADERS, or by the place of one's own: `module:name` or
`path/to/file.py:name`, where the name is a function (frames, prompts) → [b], a `Reward` or a `JaxReward`. A function
that gives several numbers a video, {part: [b]}, is named for each that counts, `module:name.part`, and called once."""

import functools
import importlib
import runpy
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.config import RewardTerm
from dollar_jax.rewards.builtin import LOADERS, REWARDS
from dollar_jax.rewards.reward import AnyReward, JaxReward, Reward, WrongShape, calls

__all__ = ["LOADERS", "REWARDS", "AnyReward", "JaxReward", "Reward", "WrongShape", "get_reward", "load_rewards"]


def get_reward(name: str, folder: str | None = None) -> AnyReward:
    """The reward of that name (see the module), its weights read from `folder` if it has any. Raises ValueError or
    OSError with one sentence when there is no such reward or weights."""
    if name in LOADERS:
        if folder is None:
            raise ValueError(f"the reward {name!r} needs its weights: give their folder in the term's `folder`")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"the reward {name!r} was to be read from {folder}, which is not a folder")
        module, _, function = LOADERS[name].partition(":")  # which is slow to import
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(Path(folder))
    if folder is not None:
        raise ValueError(f"the reward {name!r} has no weights to read; set its `folder` to None")
    if name in REWARDS:
        return REWARDS[name]
    where, _, attribute = name.rpartition(":")
    if not where:
        known = ", ".join([*REWARDS, *LOADERS])
        own = "your own as module:function or path.py:function"
        raise ValueError(f"there is no reward {name!r}; there are {known}, and {own}")
    attribute, _, part = attribute.partition(".")
    found = getattr(_module(name, where), attribute, None)
    if isinstance(found, AnyReward) and not part:
        return found
    if isinstance(found, AnyReward) or not callable(found):
        raise ValueError(f"the reward {name!r} cannot be used: {where} has no function {attribute!r}")
    meaning = (found.__doc__ or attribute).strip().splitlines()[0]
    return Reward(found, f"{part}, {meaning}" if part else meaning, (part,) if part else ())


def _module(name: str, where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not Path(where).is_file():
            raise FileNotFoundError(f"there is no file {where}")
        return _file(Path(where).resolve(), Path(where).read_bytes())
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is run
        raise ValueError(f"the reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error


@functools.cache
def _file(path: Path, content: bytes) -> Any:
    """What a file defines, once for all the rewards it has while its `content` is the same."""
    return types.SimpleNamespace(**runpy.run_path(str(path)))


def load_rewards(terms: Sequence[RewardTerm]) -> list[AnyReward]:
    """The terms' rewards, in order; raises as `get_reward`."""
    return [get_reward(term.name, term.folder) for term in terms]


def weighted_sum(terms: Sequence[RewardTerm], rewards: Sequence[AnyReward]) -> Reward | None:
    """Σ weight · raw reward over the trained terms as one host reward, for measuring; None without any."""
    if not (pairs := [(t, r) for t, r in zip(terms, rewards, strict=True) if t.weight]):
        return None
    together = calls([r for _, r in pairs])
    weights = np.array([t.weight for t, _ in pairs], np.float32)

    def total(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        answers = ((r(frames, prompts).reshape(len(frames), -1), list(columns)) for columns, r in together.items())
        return sum((x @ weights[columns] for x, columns in answers), np.zeros(len(frames), np.float32))

    if len(pairs) == 1 and pairs[0][0].weight == 1:
        return Reward(total, pairs[0][1].meaning)
    return Reward(total, " + ".join(f"{t.weight:g} × ({r.meaning})" for t, r in pairs))
