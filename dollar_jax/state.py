"""The train state: a plain pytree, made already sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dollar_jax.types import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardStatistics:
    """Running mean and variance of each raw reward that is trained on; `count` is the total decayed weight."""

    mean: Float[Array, " k"]
    variance: Float[Array, " k"]
    count: Float[Array, ""]

    @property
    def std(self) -> Float[Array, " k"]:
        return jnp.sqrt(jnp.maximum(self.variance, 1e-12))

    def updated(self, reward: Float[Array, "*b k"], weight: Float[Array, "*b"], decay: float) -> RewardStatistics:
        """With more rewards, the old ones' weight decayed once; unchanged when all of `weight` is 0.

        Chan et al.'s update of centred moments: a large mean costs the variance no precision. Rows of
        which a reward is not finite are left out.
        """
        weight = jnp.where(jnp.isfinite(reward).all(-1), weight, 0.0)[..., None]
        reward = jnp.where(weight > 0, reward, 0.0)
        rows = tuple(range(reward.ndim - 1))
        total = weight.sum()
        count = jnp.where(total > 0, decay * self.count + total, self.count)
        share = total / jnp.maximum(count, 1e-12)
        divisor = jnp.maximum(total, 1e-12)
        mean = jnp.sum(reward * weight, rows) / divisor
        variance = jnp.sum(jnp.square(reward - mean) * weight, rows) / divisor
        change = mean - self.mean
        return RewardStatistics(
            self.mean + share * change,
            (1 - share) * (self.variance + share * jnp.square(change)) + share * variance,
            count,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes. The teacher is not in it."""

    step: Int[Array, ""]
    key: Key
    student: Params
    ema: Params  # θ⁻: the consistency target, and what is sampled from
    fake_score: Params
    reward_head: Params
    reward_statistics: RewardStatistics
    student_optimiser: Any
    fake_score_optimiser: Any
    reward_head_optimiser: Any


@dataclasses.dataclass(frozen=True)
class Optimisers:
    student: optax.GradientTransformation
    fake_score: optax.GradientTransformation
    reward_head: optax.GradientTransformation


def init_state(key: Key, start: Params, reward_head: Params, optimisers: Optimisers, rewards: int) -> TrainState:
    """Student, its average and the fake score start as fp32 copies of `start`: the teacher, or new adapters.

    `rewards` counts those that are trained on.
    """
    master = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    none = jnp.zeros(max(rewards, 1))  # Orbax saves nothing that is empty
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        student=master,
        ema=jax.tree.map(jnp.copy, master),
        fake_score=jax.tree.map(jnp.copy, master),
        reward_head=reward_head,
        reward_statistics=RewardStatistics(none, none, jnp.zeros(())),
        student_optimiser=optimisers.student.init(master),
        fake_score_optimiser=optimisers.fake_score.init(master),
        reward_head_optimiser=optimisers.reward_head.init(reward_head),
    )


# The items of a checkpoint, and the fields of the state each holds.
ITEMS = {
    "student": ("student",),
    "ema": ("ema",),
    "fake_score": ("fake_score",),
    "reward_head": ("reward_head", "reward_statistics"),
    "optimisers": ("student_optimiser", "fake_score_optimiser", "reward_head_optimiser"),
    "progress": ("step", "key"),
}


def to_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as checkpoint items; the key as its raw data."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields["key"] = jax.random.key_data(state.key)
    return {item: {name: fields[name] for name in names} for item, names in ITEMS.items()}


def from_items(items: dict[str, dict[str, Any]]) -> TrainState:
    """Undoes `to_items`."""
    fields = {name: value for item in items.values() for name, value in item.items()}
    fields["key"] = jax.random.wrap_key_data(fields["key"])
    return TrainState(**fields)
