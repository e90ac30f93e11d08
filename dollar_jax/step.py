"""The single update, Algorithm 29 of DOLLAR: student, fake score, latent reward model, average.

    x̂0      ← student(x_t)                     x_t: real latents noised, or the student's own way there
    student  ← ∇ [ L_VSD + β_CD L_CD + β_FT L_FT ]
    fake     ← ∇ L_denoising(student samples)   `fake_score.updates` times
    reward   ← ∇ L_LRM(real ∪ generated)        `reward.updates` times
    average  ← decay · average + (1 - decay) · student

Algorithm 29 steps L_FT on its own; eq. (8.12), and this program, sum it with the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dollar_jax import objectives
from dollar_jax.config import DistillConfig
from dollar_jax.objectives import Frozen, Networks
from dollar_jax.schedule import Schedule
from dollar_jax.state import Optimisers, RewardStatistics, TrainState
from dollar_jax.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
JaxReward = Callable[[jax.Array, jax.Array], jax.Array]  # latents, text → rewards, decoding inside


def make_step(
    config: DistillConfig, networks: Networks, schedule: Schedule, optimisers: Optimisers
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics, jax.Array]]:
    """step(state, frozen, batch) → (state, metrics, generated latents); pure, to be jitted over a mesh.

    `batch` holds `latent` [b t h w c] and `text` [b l d], and with a reward the scored latents that the
    latent reward model learns from, one set per update: `scored_latent` [u r t h w c], `scored_text`
    [u r l d], `scored_reward` [u r] and `scored_weight` [u r], 0 in rows to leave out.
    """
    parts: dict[str, Any] = {"config": config, "networks": networks, "schedule": schedule}

    def step(
        state: TrainState, frozen: Frozen, batch: Batch
    ) -> tuple[TrainState, Metrics, jax.Array]:
        key = jax.random.fold_in(state.key, state.step)
        student_key, fake_key = jax.random.split(key)
        micro = jax.tree.map(
            lambda x: _micro_batches(x, config.accumulation), (batch["latent"], batch["text"])
        )
        scale = (state.step >= config.reward.start_step).astype(jnp.float32)

        def student_loss(params: Params, latent: jax.Array, text: jax.Array, key: jax.Array):
            return objectives.student(
                params, state.ema, state.fake_score, state.reward_head, frozen, latent, text,
                scale * config.reward.weight, key, **parts,
            )  # fmt: skip

        grads, (metrics, generated) = _accumulated(student_loss, state.student, micro, student_key)
        student, student_optimiser, norm = _apply(
            optimisers.student, grads, state.student_optimiser, state.student
        )
        metrics["student_gradient"] = norm

        def fake_update(carry, key):
            params, optimiser = carry
            grads, aux = _accumulated(
                lambda p, *rest: objectives.fake_score(p, student, *rest, **parts),
                params,
                micro,
                key,
            )
            params, optimiser, norm = _apply(optimisers.fake_score, grads, optimiser, params)
            return (params, optimiser), aux | {"fake_score_gradient": norm}

        (fake, fake_optimiser), aux = lax.scan(
            fake_update,
            (state.fake_score, state.fake_score_optimiser),
            jax.random.split(fake_key, config.fake_score.updates),
        )
        metrics |= _mean(aux)

        head, head_optimiser, statistics = (
            state.reward_head, state.reward_head_optimiser, state.reward_statistics,
        )  # fmt: skip
        if config.reward.name is not None:
            statistics = _update_statistics(statistics, batch, config.reward.statistics_decay)

            def head_update(carry, scored):
                params, optimiser = carry
                latent, text, reward, weight = scored
                reward = (reward - statistics.mean) / statistics.std
                loss = functools.partial(objectives.reward_head, networks=networks)
                grads, aux = jax.grad(loss, has_aux=True)(params, latent, text, reward, weight)
                params, optimiser, norm = _apply(optimisers.reward_head, grads, optimiser, params)
                return (params, optimiser), aux | {"reward_head_gradient": norm}

            scored = tuple(batch[f"scored_{k}"] for k in ("latent", "text", "reward", "weight"))
            (head, head_optimiser), aux = lax.scan(head_update, (head, head_optimiser), scored)
            metrics |= _mean(aux) | {"reward_mean": statistics.mean, "reward_std": statistics.std}

        new = TrainState(
            step=state.step + 1,
            key=state.key,
            student=student,
            ema=optax.incremental_update(student, state.ema, 1 - config.student.ema_decay),
            fake_score=fake,
            reward_head=head,
            reward_statistics=statistics,
            student_optimiser=student_optimiser,
            fake_score_optimiser=fake_optimiser,
            reward_head_optimiser=head_optimiser,
        )
        return new, metrics, generated

    return step


def _apply(
    optimiser: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any, jax.Array]:
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, optax.tree.norm(grads)


def _micro_batches(x: jax.Array, count: int) -> jax.Array:
    """[count, b / count, ...]; every micro-batch takes from every device's share of a sharded batch."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _accumulated(
    loss: Callable[..., Any], params: Params, micro: Any, key: jax.Array
) -> tuple[Params, Any]:
    """Gradients and auxiliaries of `loss(params, *micro_batch, key)`, averaged over the micro-batches.

    An auxiliary array of the batch's latents is the last micro-batch's.
    """
    grad = jax.grad(loss, has_aux=True)
    count = jax.tree.leaves(micro)[0].shape[0]
    keys = jax.random.split(key, count)
    if count == 1:
        return grad(params, *jax.tree.map(lambda x: x[0], micro), keys[0])

    def body(total: Params, inputs: Any) -> tuple[Params, Any]:
        parts, key = inputs
        grads, aux = grad(params, *parts, key)
        return jax.tree.map(jnp.add, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, aux = lax.scan(body, zeros, (micro, keys))
    return jax.tree.map(lambda g: g / count, total), jax.tree.map(
        lambda x: x.mean(0) if x.ndim == 1 else x[-1], aux
    )


def _mean(metrics: Metrics) -> Metrics:
    return {name: value.mean() for name, value in metrics.items()}


def _update_statistics(old: RewardStatistics, batch: Batch, decay: float) -> RewardStatistics:
    """Decayed mean and mean square of the step's raw rewards; unchanged when none was scored."""
    weight = jnp.where(jnp.isfinite(batch["scored_reward"]), batch["scored_weight"], 0.0)
    reward = jnp.where(weight > 0, batch["scored_reward"], 0.0)
    total = weight.sum()
    count = jnp.where(total > 0, decay * old.count + total, old.count)
    share = total / jnp.maximum(count, 1e-12)

    def blend(before: jax.Array, now: jax.Array) -> jax.Array:
        return before + share * (jnp.sum(now * weight) / jnp.maximum(total, 1e-12) - before)

    return RewardStatistics(blend(old.mean, reward), blend(old.square, reward**2), count)
