"""The single update, Algorithm 29 of DOLLAR: student, fake score, latent reward model, average.

    x̂0      ← student(x_t)                     x_t: real latents noised, or the student's own way there
    student  ← ∇ [ L_VSD + β_CD L_CD + β_FT L_FT ]
    fake     ← ∇ L_denoising(student samples)   `fake_score.updates` times
    reward   ← ∇ L_LRM(real ∪ generated)        `reward.updates` times
    average  ← decay · average + (1 - decay) · student

Algorithm 29 takes a step on L_FT of its own; eq. (8.12), and this program, sum it with the others. What a reward
method adds is in its file of `rewards.methods`.

An update whose losses or gradient are not finite is not taken, nor is any after it in the step: a bad batch changes
nothing but the count of steps, and shows in the metrics (`skipped`)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dollar_jax import objectives
from dollar_jax.config import DistillConfig
from dollar_jax.distillation import Batch, Distillation, Frozen, Metrics, References, RewardSamples
from dollar_jax.models import lora
from dollar_jax.optim import apply_gradient, select
from dollar_jax.rewards.methods import method_of
from dollar_jax.rewards.methods.base import Scored, scored_rows
from dollar_jax.state import Optimisers, TrainState
from dollar_jax.types import Key, Params

Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics, RewardSamples | None]]


def make_step(d: Distillation, optimisers: Optimisers) -> Step:
    """step(state, frozen, batch) → (state, metrics, what is to be scored or None); pure, to be jitted over a mesh."""
    config, method = d.config, method_of(d.config)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics, RewardSamples | None]:
        student_key, fake_key, sample_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        micro = micro_batches(dataclasses.replace(batch, reward=None), config.accumulation)
        full = functools.partial(full_params, config.lora.rank, frozen.teacher)

        # The student
        reward = state.latent_reward, state.reward_statistics
        references = References(full(state.ema), full(state.fake_score), *reward, frozen, state.step)

        def student_loss(params: Params, rows: Batch, key: Key) -> tuple[jax.Array, Any]:
            return objectives.student(d, full(params), references, rows, key)

        grads, (metrics, generated) = _accumulated(student_loss, state.student, micro, student_key)
        old = state
        grads, state, aux = method.add_gradient(d, full, state, batch.reward, grads)
        before, finite = (state.student, state.student_optimiser), _finite(metrics | aux)
        updated = apply_gradient(optimisers.student, grads, before, finite, config.max_gradient_norm)
        (student, student_optimiser), norm, good = updated
        share = 1 - config.student.ema_decay
        if config.student.ema_start:
            share = jnp.where(state.step < config.student.ema_start, 1.0, share)
        average = optax.incremental_update(student, state.ema, share)
        metrics, average = metrics | aux | {"student_gradient": norm}, select(good, average, state.ema)

        # The fake score, where L_VSD asks for it: on new samples of the new student, or on those there are
        shared = generated.latent[:, None] if config.fake_score.samples == "student" else None
        if config.fake_score.samples == "rollout":
            fake_key, key = jax.random.split(fake_key)
            inputs = micro, jax.random.split(key, config.accumulation)
            shared = lax.map(lambda x: objectives.rollout(d, full(student), *x), inputs)
        updates = config.fake_score.updates if config.vsd.weight else 0

        def fake_loss(params: Params, inputs: tuple[Batch, Any], key: Key) -> tuple[jax.Array, Any]:
            return objectives.fake_score(d, full(params), full(student), inputs[0], key, inputs[1])

        def fake_update(carry: tuple[Any, jax.Array], key: Key) -> tuple[tuple[Any, jax.Array], Metrics]:
            fake, good = carry
            grads, aux = _accumulated(fake_loss, fake[0], (micro, shared), key)
            fake, norm, good = apply_gradient(optimisers.fake_score, grads, fake, good & _finite(aux))
            return (fake, good), aux | {"fake_score_gradient": norm}

        start = (state.fake_score, state.fake_score_optimiser), good
        (fake, good), aux = lax.scan(fake_update, start, jax.random.split(fake_key, updates))
        metrics |= {name: value.mean() for name, value in aux.items()} if updates else {}
        # What is to be scored, and the latent reward model
        samples = None
        if config.reward.rewards:
            rows = jax.tree.map(lambda x: scored_rows(x[-1], config.reward.samples), micro)
            generated = jax.tree.map(lambda x: x[-1], generated)
            samples = method.samples(d, full(student), references, rows, generated, sample_key)
            state, samples, aux = method.learn(d, optimisers, state, Scored(batch.reward, rows.text, samples))
            metrics |= aux
        # What is small is taken only after a step that was finite throughout.
        small = ("latent_reward", "latent_reward_optimiser", "reward_statistics")
        kept = select(good & _finite(metrics), *({name: getattr(s, name) for name in small} for s in (state, old)))
        kept |= {"student": student, "student_optimiser": student_optimiser, "ema": average}
        kept |= {"fake_score": fake[0], "fake_score_optimiser": fake[1]}
        return dataclasses.replace(state, step=state.step + 1, **kept), metrics, samples

    return step


def skipped(config: DistillConfig, metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of a step, as numbers, because of which updates were not taken; none of a healthy one."""
    most = math.inf if config.max_gradient_norm is None else config.max_gradient_norm
    return [k for k, v in metrics.items() if not math.isfinite(v) or (k == "student_gradient" and v > most)]


def _finite(metrics: Metrics) -> jax.Array:
    return jnp.isfinite(jnp.stack(list(metrics.values()))).all()


def full_params(rank: int, teacher: Params, params: Params) -> Params:
    """Adapters together with the teacher's weights, which are on the devices anyway; other parameters as they are."""
    return lora.combine(teacher, params) if rank else params


def micro_batches(batch: Batch, count: int) -> Batch:
    """[count, b / count, ...]; every micro-batch takes from every device's share of a sharded batch."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(loss: Callable[..., Any], params: Params, micro: Any, key: jax.Array) -> tuple[Params, Any]:
    """Gradients and auxiliary numbers of `loss(params, rows, key)`, averaged; arrays are [count, ...]."""
    grad = jax.grad(loss, has_aux=True)
    count = jax.tree.leaves(micro)[0].shape[0]
    keys = jax.random.split(key, count)
    if count == 1:
        grads, aux = grad(params, jax.tree.map(lambda x: x[0], micro), keys[0])
        return grads, jax.tree.map(lambda x: x[None] if x.ndim else x, aux)

    def body(total: Params, inputs: Any) -> tuple[Params, Any]:
        grads, aux = grad(params, *inputs)
        return jax.tree.map(jnp.add, total, grads), aux

    total, aux = lax.scan(body, jax.tree.map(jnp.zeros_like, params), (micro, keys))
    return jax.tree.map(lambda g: g / count, total), jax.tree.map(lambda x: x.mean(0) if x.ndim == 1 else x, aux)
