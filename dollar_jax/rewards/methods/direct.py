"""Rewards by their own gradient, through the decoder: an upper bound to compare a latent reward model with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dollar_jax import losses
from dollar_jax.distillation import Distillation, StudentPass
from dollar_jax.rewards.methods import base
from dollar_jax.state import Optimisers, TrainState
from dollar_jax.types import Key, PerSample


def pixel_reward(d: Distillation, p: StudentPass, key: Key) -> tuple[PerSample, dict[str, Array]]:
    """-R(Dec(x̂0)) on some of the batch's rows, standardised and weighted; and the raw rewards."""
    c, pixels = d.config.reward, d.networks.pixel_rewards
    assert pixels is not None
    rows = functools.partial(base.scored_rows, count=c.samples)
    cut = base.random_run(rows(p.generated), c.latent_frames, key)
    raw = pixels(p.references.frozen.reward, cut, jax.tree.map(rows, p.batch.tokens))
    score = base.combined_reward(c, p.references.reward_statistics, raw[:, np.array(c.trained)])
    return losses.latent_reward(score), {"reward": jax.lax.stop_gradient(raw)}


class Direct(base.RewardMethod):
    curve = "Reward of the student, by gradients"
    term = base.reward_term("pixel_reward", "reward through the decoder", curve, pixel_reward)
    differentiates_pixels = True

    def learn(self, d: Distillation, optimisers: Optimisers, state: TrainState, scored: base.Scored) -> base.Learned:
        raw = base.flat(scored.samples.reward)[:, np.array(self.settings.trained)]
        statistics = state.reward_statistics.updated(raw, jnp.ones(len(raw)), self.settings.statistics_decay)
        return super().learn(d, optimisers, dataclasses.replace(state, reward_statistics=statistics), scored)
