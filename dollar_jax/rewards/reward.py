"""What a reward is: (frames [b t h w 3] in [0, 1], prompts) → rewards [b], on the host or in the jitted step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dollar_jax.program import Program
from dollar_jax.types import Params

LARGEST = 1e15  # beyond it a reward counts as not finite: its square has to be, in fp32 and summed
_AT_ONCE = 16  # clips that a JAX reward scores at once outside of the step


class WrongShape(ValueError):
    """A reward answered with something else than one number per video, of each part."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A host reward: `function` takes NumPy frames and the prompts; `parts`: those of its named rewards that count."""

    function: Callable[[np.ndarray, Sequence[str]], Any]
    meaning: str
    parts: tuple[str, ...] = ()

    def __call__(self, frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Float32 [b], or [b k] of k > 1 parts; raises WrongShape when the function answers otherwise."""
        answer = self.function(frames, prompts)
        if not self.parts:
            return _one_each(answer, len(frames))
        if not isinstance(answer, Mapping) or not answer.keys() >= {*self.parts}:
            raise WrongShape(f"the reward gave {str(answer)[:60]}; it must give {' and '.join(self.parts)} by name")
        columns = [_one_each(answer[part], len(frames)) for part in self.parts]
        return np.stack(columns, 1) if len(columns) > 1 else columns[0]


@dataclasses.dataclass(frozen=True, eq=False)
class JaxReward:
    """A reward inside the jitted step: `function(params, frames, tokens)` → [b], traceable. `params` are arguments of
    the step, not constants in it. `tokenize` turns prompts into the integers [b, l] or None, that it gets."""

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


def calls(rewards: Sequence[AnyReward]) -> dict[tuple[int, ...], AnyReward]:
    """What to call for all `rewards`, by the positions of those it gives: one function's parts come from one call."""
    found: dict[Any, tuple[tuple[int, ...], AnyReward]] = {}
    for i, reward in enumerate(rewards):
        key = reward.function if isinstance(reward, Reward) and reward.parts else i
        columns, call = found.get(key, ((), reward))
        if columns and isinstance(reward, Reward):
            call = dataclasses.replace(reward, parts=(*getattr(call, "parts", ()), *reward.parts))
        found[key] = (*columns, i), call
    return dict(found.values())


def _one_each(answer: Any, count: int) -> np.ndarray:
    if (rewards := np.asarray(answer, np.float32)).shape != (count,):
        raise WrongShape(f"the reward gave shape {rewards.shape} for {count} videos; it must give one number per video")
    return rewards
