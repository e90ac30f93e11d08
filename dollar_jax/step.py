"""The single update, Algorithm 29 of DOLLAR: student, fake score, latent reward model, average.

    x̂0      ← student(x_t)                     x_t: real latents noised, or the student's own way there
    student  ← ∇ [ L_VSD + β_CD L_CD + β_FT L_FT ]
    fake     ← ∇ L_denoising(student samples)   `fake_score.updates` times
    reward   ← ∇ L_LRM(real ∪ generated)        `reward.updates` times
    average  ← decay · average + (1 - decay) · student

Algorithm 29 takes a step on L_FT of its own; eq. (8.12), and this program, sum it with the others. What a reward
method adds is in its file of `rewards.methods`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dollar_jax import objectives
from dollar_jax.distillation import Batch, Distillation, Frozen, Metrics, References, RewardSamples
from dollar_jax.models import lora
from dollar_jax.optim import apply_gradient
from dollar_jax.rewards.methods import method_of
from dollar_jax.rewards.methods.base import scored_rows
from dollar_jax.state import Optimisers, TrainState
from dollar_jax.types import Key, Params

Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics, RewardSamples | None]]


def make_step(d: Distillation, optimisers: Optimisers, on_devices: Mapping[str, Any] = MappingProxyType({})) -> Step:
    """step(state, frozen, batch) → (state, metrics, what is to be scored); pure, to be jitted over a mesh.

    What is to be scored is None without rewards. `on_devices` has, for each field of the state that lies in
    host memory, where on the devices it goes when it is needed; what becomes of it stays there.
    """
    config, method = d.config, method_of(d.config)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics, RewardSamples | None]:
        student_key, fake_key, sample_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        micro = _micro_batches(dataclasses.replace(batch, reward=None), config.accumulation)
        full = functools.partial(_full_params, config.lora.rank, frozen.teacher)
        fetch = functools.partial(_fetch, state, on_devices)

        # The student
        ema = fetch("ema", after=state.step)
        references = References(
            full(ema), full(state.fake_score), state.latent_reward, state.reward_statistics, frozen, state.step
        )

        def student_loss(params: Params, rows: Batch, key: Key) -> tuple[jax.Array, Any]:
            return objectives.student(d, full(params), references, rows, key)

        grads, (metrics, generated) = _accumulated(student_loss, state.student, micro, student_key)
        grads, state, aux = method.add_gradient(d, full, state, batch.reward, grads)
        optimiser = fetch("student_optimiser", after=optax.tree.norm(grads))
        (student, student_optimiser), norm = apply_gradient(optimisers.student, grads, (state.student, optimiser))
        metrics |= aux | {"student_gradient": norm}

        # The fake score, on samples of the new student
        def fake_loss(params: Params, rows: Batch, key: Key) -> tuple[jax.Array, Any]:
            return objectives.fake_score(d, full(params), full(student), rows, key)

        def fake_update(carry: tuple[Params, Any], key: Key) -> tuple[tuple[Params, Any], Metrics]:
            grads, aux = _accumulated(fake_loss, carry[0], micro, key)
            carry, norm = apply_gradient(optimisers.fake_score, grads, carry)
            return carry, aux | {"fake_score_gradient": norm}

        start = state.fake_score, fetch("fake_score_optimiser", after=norm)
        fake, aux = lax.scan(fake_update, start, jax.random.split(fake_key, config.fake_score.updates))
        metrics |= {name: value.mean() for name, value in aux.items()}

        # What is to be scored, and the latent reward model
        samples = None
        if config.reward.rewards:
            rows = jax.tree.map(lambda x: scored_rows(x[-1], config.reward.samples), micro)
            samples = method.samples(d, full(student), state, frozen, rows, generated, sample_key)
            state, samples, aux = method.learn(d, optimisers, state, batch.reward, rows.text, samples)
            metrics |= aux

        new = dataclasses.replace(
            state,
            step=state.step + 1,
            student=student,
            ema=optax.incremental_update(student, ema, 1 - config.student.ema_decay),
            fake_score=fake[0],
            student_optimiser=student_optimiser,
            fake_score_optimiser=fake[1],
        )
        return new, metrics, samples

    return step


def _full_params(rank: int, teacher: Params, params: Params) -> Params:
    """Adapters together with the teacher's weights, which are on the devices anyway; other parameters as they are."""
    return lora.combine(teacher, params) if rank else params


def _fetch(state: TrainState, on_devices: Mapping[str, Any], field: str, after: Any) -> Any:
    """A field of the state, from host memory if it lies there."""
    value = getattr(state, field)
    if field not in on_devices:
        return value
    # Not before `after` is known: the compiler would have it on the devices throughout.
    value, _ = lax.optimization_barrier((value, after))
    return jax.device_put(value, on_devices[field])


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[count, b / count, ...]; every micro-batch takes from every device's share of a sharded batch."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(loss: Callable[..., Any], params: Params, micro: Any, key: jax.Array) -> tuple[Params, Any]:
    """Gradients and auxiliaries of `loss(params, rows, key)`, averaged over the micro-batches.

    An auxiliary array of the batch's latents is the last micro-batch's.
    """
    grad = jax.grad(loss, has_aux=True)
    count = jax.tree.leaves(micro)[0].shape[0]
    keys = jax.random.split(key, count)
    if count == 1:
        return grad(params, jax.tree.map(lambda x: x[0], micro), keys[0])

    def body(total: Params, inputs: Any) -> tuple[Params, Any]:
        grads, aux = grad(params, *inputs)
        return jax.tree.map(jnp.add, total, grads), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, aux = lax.scan(body, zeros, (micro, keys))
    return jax.tree.map(lambda g: g / count, total), jax.tree.map(lambda x: x.mean(0) if x.ndim == 1 else x[-1], aux)
