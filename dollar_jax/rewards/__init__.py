"""Pixel-space rewards behind one protocol: (frames [b t h w 3] in [0, 1], prompts) → rewards [b].

A reward is a black box to the training: it is called on the host with decoded frames, and only the
latent reward model that imitates it is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dollar_jax.rewards.colour import vividness
from dollar_jax.rewards.jpeg import compressibility
from dollar_jax.rewards.vivid import vivid

RewardFunction = Callable[[np.ndarray, Sequence[str]], np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True)
class Reward:
    """`differentiable` says that the function could be differentiated too; the training never does."""

    function: RewardFunction
    differentiable: bool
    meaning: str

    def __call__(self, frames: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Float32 [b]; raises ValueError when the function answers with another shape."""
        rewards = np.asarray(self.function(frames, prompts), np.float32)
        if rewards.shape != (len(frames),):
            raise ValueError(
                f"the reward gave shape {rewards.shape} for {len(frames)} videos; it must give one "
                "number per video"
            )
        return rewards


REWARDS = {
    "vivid": Reward(vivid, False, "the share of coloured pixels that are bright and saturated"),
    "compressibility": Reward(
        compressibility, False, "how few bits per pixel JPEG needs: plain, calm backgrounds"
    ),
    "vividness": Reward(vividness, True, "mean colour saturation of the most coloured pixels"),
}


def get_reward(name: str) -> Reward:
    """The reward of that name; raises ValueError listing the names there are."""
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; there are {', '.join(REWARDS)}")
    return REWARDS[name]
