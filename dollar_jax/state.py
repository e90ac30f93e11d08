"""The train state: a plain pytree, made already sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dollar_jax.models.layers import keep_blocks
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

    def updated(self, reward: Float[Array, "*b k"], weight: Float[Array, "*b"], decay: float) -> "RewardStatistics":
        """With more rewards [..., k], those not finite left out, the old ones' weight decayed once; unchanged when all
        of `weight` is 0. Chan et al.'s centred moments: a large mean costs the variance no precision."""
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
        variance = (1 - share) * (self.variance + share * jnp.square(change)) + share * variance
        return RewardStatistics(self.mean + share * change, variance, count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes. The teacher is not in it."""

    step: Int[Array, ""]
    key: Key
    student: Params
    ema: Params  # θ⁻: the consistency target, and what is sampled from
    fake_score: Params
    latent_reward: Params
    reward_statistics: RewardStatistics
    student_optimiser: Any
    fake_score_optimiser: Any
    latent_reward_optimiser: Any


@dataclasses.dataclass(frozen=True)
class Optimisers:
    student: optax.GradientTransformation
    fake_score: optax.GradientTransformation
    latent_reward: optax.GradientTransformation


GAN_HEAD = "gan_head"  # among the fake score's parameters: the discriminator's own


def init_state(
    key: Key,
    start: Params,
    latent_reward: Params,
    optimisers: Optimisers,
    rewards: int,
    gan_head: Params | None = None,
    layers: int | None = None,
) -> TrainState:
    """Student, average and fake score start as fp32 copies of `start`, the teacher or new adapters; the former two with
    so many `layers` of its blocks."""
    master = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    none = jnp.zeros(max(rewards, 1))  # Orbax saves nothing that is empty
    own = keep_blocks(master, layers)
    networks = {"student": own, "ema": jax.tree.map(jnp.copy, own), "fake_score": jax.tree.map(jnp.copy, master)}
    if gan_head is not None:
        networks["fake_score"] = networks["fake_score"] | {GAN_HEAD: gan_head}
    trained = {"student": own, "fake_score": networks["fake_score"], "latent_reward": latent_reward}
    states = {f"{name}_optimiser": getattr(optimisers, name).init(params) for name, params in trained.items()}
    begun = {"step": jnp.zeros((), jnp.int32), "reward_statistics": RewardStatistics(none, none, jnp.zeros(()))}
    return TrainState(**begun, **networks, **states, key=key, latent_reward=latent_reward)


# The items of a checkpoint and the fields in each, where the latent reward model is called reward head.
ITEMS = {
    **{name: (name,) for name in ("student", "ema", "fake_score")},
    "reward_head": ("latent_reward", "reward_statistics"),
    "optimisers": ("student_optimiser", "fake_score_optimiser", "latent_reward_optimiser"),
    "progress": ("step", "key"),
}


def as_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The fields of a state, or of a state of shapes or shardings, in the structure of a checkpoint."""
    return {k: {n.replace("latent_reward", "reward_head"): getattr(state, n) for n in v} for k, v in ITEMS.items()}


def to_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as checkpoint items; the key as its raw data."""
    return as_items(dataclasses.replace(state, key=jax.random.key_data(state.key)))


def from_items(items: dict[str, dict[str, Any]]) -> TrainState:
    """Undoes `to_items`."""
    stored = {name: value for parts in items.values() for name, value in parts.items()}
    state = TrainState(**{name.replace("reward_head", "latent_reward"): value for name, value in stored.items()})
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
