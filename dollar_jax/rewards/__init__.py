"""Pixel-space rewards behind one protocol: (frames [b t h w 3] in [0, 1], prompts) → rewards [b].

Two kinds. A host reward (`Reward`) is any Python callable: PyTorch, ONNX, a subprocess, a remote scorer;
it sees decoded frames as NumPy, off the training's critical path. A `JaxReward` runs inside the jitted
step on frames decoded there. Neither is differentiated, unless the method asks for it.

A reward is named by a key of REWARDS or LOADERS, or by the place of one's own: `module:name` or
`path/to/file.py:name`, where the name is a function (frames, prompts) → [b], a `Reward` or a `JaxReward`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dollar_jax.config import RewardTerm
from dollar_jax.program import Program
from dollar_jax.rewards.colour import vividness
from dollar_jax.rewards.jpeg import compressibility
from dollar_jax.rewards.video import flicker, motion, smoothness
from dollar_jax.rewards.vivid import vivid
from dollar_jax.types import Params

_AT_ONCE = 16  # clips that a JAX reward scores at once outside of the step


class WrongShape(ValueError):
    """A reward answered with something else than one number per video."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A host reward: `function` takes NumPy frames and the prompts."""

    function: Callable[[np.ndarray, Sequence[str]], Any]
    meaning: str

    def __call__(self, frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Float32 [b]; raises WrongShape when the function answers with another shape."""
        return _one_each(self.function(frames, prompts), len(frames))


@dataclasses.dataclass(frozen=True, eq=False)
class JaxReward:
    """A reward inside the jitted step: `function(params, frames, tokens)` → [b], traceable.

    `params` are arguments of the step, not constants in it. `tokenize` turns prompts into the integers
    [b, l] that the function gets, for it cannot see text; without it `tokens` is None.
    """

    function: Callable[[Params, jax.Array, jax.Array | None], jax.Array]
    meaning: str
    params: Params = ()
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None

    @functools.cached_property
    def _program(self) -> Program:
        return Program("reward", self.function)

    def __call__(self, frames: np.ndarray | jax.Array, prompts: Sequence[str]) -> np.ndarray:
        """Float32 [b], as a host reward gives it, a few clips at a time: for measuring outside of the step."""
        frames, count = np.asarray(frames, np.float32), len(frames)
        tokens = None if self.tokenize is None else np.asarray(self.tokenize(prompts))
        rows = np.arange(-(-count // _AT_ONCE) * _AT_ONCE) % count
        rows = rows if count > _AT_ONCE else np.arange(count)
        answers = []
        for part in np.array_split(rows, -(-count // _AT_ONCE)):
            part_tokens = None if tokens is None else tokens[part]
            answers.append(_one_each(self._program(self.params, frames[part], part_tokens), len(part)))
        return np.concatenate(answers)[:count]


AnyReward = Reward | JaxReward


def _one_each(answer: Any, count: int) -> np.ndarray:
    rewards = np.asarray(answer, np.float32)
    if rewards.shape != (count,):
        raise WrongShape(f"the reward gave shape {rewards.shape} for {count} videos; it must give one number per video")
    return rewards


REWARDS: dict[str, AnyReward] = {
    "vivid": Reward(vivid, "the share of coloured pixels that are bright and saturated"),
    "compressibility": Reward(compressibility, "how few bits per pixel JPEG needs: plain, calm backgrounds"),
    "vividness": JaxReward(
        lambda params, frames, tokens: vividness(frames), "mean colour saturation of the most coloured pixels"
    ),
    "motion": JaxReward(
        lambda params, frames, tokens: motion(frames), "mean length of the optical flow, in pixels per frame"
    ),
    "flicker": JaxReward(lambda params, frames, tokens: flicker(frames), "how little neighbouring frames differ"),
    "smoothness": JaxReward(lambda params, frames, tokens: smoothness(frames), "how well neighbours predict a frame"),
}

# Rewards that are read from a folder of weights: the function of `rewards` that reads them.
LOADERS = {
    "clip": "clip:clip_score",
    "hpsv2": "clip:hpsv2",
    "pickscore": "clip:pickscore",
    "aesthetic": "clip:aesthetic",
    "onnx": "blackbox:onnx_classifier",
}


def get_reward(name: str, folder: str | None = None) -> AnyReward:
    """The reward of that name (see the module), its weights read from `folder` if it has any.

    Raises ValueError or OSError with one sentence when there is no such reward or weights.
    """
    if name in LOADERS:
        if folder is None:
            raise ValueError(f"the reward {name!r} needs its weights: give their folder in the term's `folder`")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"the reward {name!r} was to be read from {folder}, which is not a folder")
        return _ours(LOADERS[name])(Path(folder))
    if folder is not None:
        raise ValueError(f"the reward {name!r} has no weights to read; set its `folder` to None")
    if name in REWARDS:
        return REWARDS[name]
    where, _, attribute = name.rpartition(":")
    if not where:
        known = ", ".join([*REWARDS, *LOADERS])
        raise ValueError(
            f"there is no reward {name!r}; there are {known}, and your own as module:function or path.py:function"
        )
    found = getattr(_module(name, where), attribute, None)
    if isinstance(found, AnyReward):
        return found
    if not callable(found):
        raise ValueError(f"the reward {name!r} cannot be used: {where} has no function {attribute!r}")
    return Reward(found, (found.__doc__ or attribute).strip().splitlines()[0])


def _ours(place: str) -> Callable[..., AnyReward]:
    """A function of a module of this package that is slow to import."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)


def _module(name: str, where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not Path(where).is_file():
            raise FileNotFoundError(f"there is no file {where}")
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # whatever the user's file does when it is run
        raise ValueError(f"the reward {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def load_rewards(terms: Sequence[RewardTerm]) -> list[AnyReward]:
    """The terms' rewards, in order; raises as `get_reward`."""
    return [get_reward(term.name, term.folder) for term in terms]


def weighted_sum(terms: Sequence[RewardTerm], rewards: Sequence[AnyReward]) -> Reward | None:
    """Σ weight · raw reward over the trained terms as one host reward, for measuring; None without any."""
    pairs = [(t, r) for t, r in zip(terms, rewards, strict=True) if t.weight]
    if not pairs:
        return None

    def total(frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return sum((t.weight * r(frames, prompts) for t, r in pairs), np.zeros(len(frames), np.float32))

    if len(pairs) == 1 and pairs[0][0].weight == 1:
        return Reward(total, pairs[0][1].meaning)
    return Reward(total, " + ".join(f"{t.weight:g} × ({r.meaning})" for t, r in pairs))
