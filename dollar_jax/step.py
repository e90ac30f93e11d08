"""The single update, Algorithm 29 of DOLLAR: student, fake score, latent reward model, average.

    x̂0      ← student(x_t)                     x_t: real latents noised, or the student's own way there
    student  ← ∇ [ L_VSD + β_CD L_CD + β_FT L_FT ]
    fake     ← ∇ L_denoising(student samples)   `fake_score.updates` times
    reward   ← ∇ L_LRM(real ∪ generated)        `reward.updates` times
    average  ← decay · average + (1 - decay) · student

Algorithm 29 steps L_FT on its own; eq. (8.12), and this program, sum it with the others. JAX rewards are
computed here, on latents decoded here; host rewards come in with a later batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dollar_jax import objectives
from dollar_jax.config import DistillConfig
from dollar_jax.models import lora
from dollar_jax.objectives import Fresh, Frozen, Networks
from dollar_jax.schedule import Schedule
from dollar_jax.state import Optimisers, TrainState
from dollar_jax.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_step(
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
    optimisers: Optimisers,
    score_real: bool = True,
    fetch: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics, Fresh]]:
    """step(state, frozen, batch) → (state, metrics, what is to be scored); pure, to be jitted over a mesh.

    `batch` holds `latent` [b t h w c] and `text` [b l d], and for each JAX reward that reads prompts
    `tokens_<label>` [b l]. With `reward.method` "lrm" it also holds the scored latents that the latent
    reward model learns from, one set per update: `scored_latent` [u r t h w c], `scored_text` [u r l d],
    `scored_reward` [u r k] for the k rewards trained on and `scored_weight` [u r], 0 in rows to leave out;
    with "ddpo" the scored walks of an earlier step, `walk_states` [n s t h w c], `walk_text` [n l d] and
    `walk_reward` [n k], NaN in rows to leave out.

    What is to be scored, empty without rewards, has `reward.samples` rows of g latents each: `latent`
    [n g t h w c], the generated one and, for the latent reward model with `score_real`, a real one;
    `predicted` [n g], the latent rewards; `reward` [n g r], NaN where the host has to score; `scale` [n k],
    what a unit of each trained reward counts; and for "ddpo" the `states` [n s t h w c] of the walk.

    `fetch` has, for each field of the state that lies in host memory, where on the devices it goes when it is
    needed; what becomes of it stays there.
    """
    parts: dict[str, Any] = {"config": config, "networks": networks, "schedule": schedule}
    c = config.reward
    trained = np.array(c.trained, int)
    method = c.method if c.trained else None

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics, Fresh]:
        def fetched(field: str, after: Any) -> Any:
            value = getattr(state, field)
            if field not in fetch:
                return value
            # Not before `after` is known: the compiler would have it on the devices throughout.
            value, _ = lax.optimization_barrier((value, after))
            return jax.device_put(value, fetch[field])

        key = jax.random.fold_in(state.key, state.step)
        student_key, fake_key, fresh_key = jax.random.split(key, 3)
        tokens = {k.removeprefix("tokens_"): v for k, v in batch.items() if k.startswith("tokens_")}
        micro = jax.tree.map(lambda x: _micro_batches(x, config.accumulation), (batch["latent"], batch["text"], tokens))
        statistics = state.reward_statistics
        # Of adapters the whole network is made with the teacher's weights, which are there anyway.
        whole = functools.partial(lora.combine, frozen.teacher) if config.lora.rank else _same
        average = fetched("ema", state.step)
        ema, fake_score = whole(average), whole(state.fake_score)
        beta = objectives.reward_weight(config, state.step)

        def student_loss(params: Params, latent: jax.Array, text: jax.Array, tokens: Any, key: jax.Array):
            return objectives.student(
                whole(params),
                ema,
                fake_score,
                state.reward_head,
                frozen,
                latent,
                text,
                beta,
                key,
                **parts,
                statistics=statistics,
                tokens=tokens,
            )

        grads, (metrics, generated) = _accumulated(student_loss, state.student, micro, student_key)
        if method == "ddpo":
            rewards = batch["walk_reward"]
            statistics = statistics.updated(rewards, jnp.ones(len(rewards)), c.statistics_decay)
            advantage = objectives.combined_reward(c, statistics, rewards)
            reinforced, aux = jax.grad(lambda p, *rest: objectives.policy(whole(p), *rest, **parts), has_aux=True)(
                state.student, batch["walk_states"], batch["walk_text"], advantage
            )
            grads = jax.tree.map(lambda g, r: g + beta * r, grads, reinforced)
            metrics |= aux
        student, student_optimiser, norm = _apply(
            optimisers.student, grads, fetched("student_optimiser", optax.tree.norm(grads)), state.student
        )
        metrics["student_gradient"] = norm

        def fake_update(carry, key):
            params, optimiser = carry
            grads, aux = _accumulated(
                lambda p, *rest: objectives.fake_score(whole(p), whole(student), *rest, **parts), params, micro[:2], key
            )
            params, optimiser, norm = _apply(optimisers.fake_score, grads, optimiser, params)
            return (params, optimiser), aux | {"fake_score_gradient": norm}

        (fake, fake_optimiser), aux = lax.scan(
            fake_update,
            (state.fake_score, fetched("fake_score_optimiser", norm)),
            jax.random.split(fake_key, config.fake_score.updates),
        )
        metrics |= _mean(aux)

        fresh: Fresh = {}
        if c.rewards:
            fresh, text = _to_be_scored(
                config, networks, schedule, state, whole(student), frozen, micro, generated, fresh_key, score_real
            )
            if method == "direct":
                raw = fresh["reward"][..., trained]
                statistics = statistics.updated(raw, jnp.ones(raw.shape[:-1]), c.statistics_decay)

        head, head_optimiser = state.reward_head, state.reward_head_optimiser
        if method == "lrm":
            scored = tuple(batch[f"scored_{k}"] for k in ("latent", "text", "reward", "weight"))
            if networks.pixel_rewards is not None and set(trained) <= set(networks.pixel_rewards.columns):
                # Nothing to wait for: what has just been scored is learned from in every update.
                rows = [_flat(fresh["latent"]), text, _flat(fresh["reward"])[:, trained]]
                rows.append(jnp.ones(len(text)))
                scored = tuple(
                    jnp.concatenate([old, jnp.broadcast_to(new, (c.updates, *new.shape))], 1)
                    for old, new in zip(scored, rows, strict=True)
                )
            statistics = statistics.updated(scored[2], scored[3], c.statistics_decay)

            def head_update(carry, scored):
                params, optimiser = carry
                latent, text, reward, weight = scored
                reward = objectives.combined_reward(c, statistics, reward)
                loss = functools.partial(objectives.reward_head, networks=networks)
                grads, aux = jax.grad(loss, has_aux=True)(params, latent, text, reward, weight)
                params, optimiser, norm = _apply(optimisers.reward_head, grads, optimiser, params)
                return (params, optimiser), aux | {"reward_head_gradient": norm}

            # Unrolled: small as they are, XLA:CPU's convolutions are many times slower inside a loop.
            (head, head_optimiser), aux = lax.scan(head_update, (head, head_optimiser), scored, unroll=True)
            metrics |= _mean(aux)
        if method is not None:
            fresh["scale"] = jnp.broadcast_to(objectives.reward_scale(c, statistics), (c.samples, len(trained)))
            metrics["reward_weight"] = beta
            for k, i in enumerate(trained):
                suffix = f"_{c.rewards[i].label}" if len(trained) > 1 else ""
                metrics[f"reward_mean{suffix}"] = statistics.mean[k]
                metrics[f"reward_std{suffix}"] = statistics.std[k]

        new = TrainState(
            step=state.step + 1,
            key=state.key,
            student=student,
            ema=optax.incremental_update(student, average, 1 - config.student.ema_decay),
            fake_score=fake,
            reward_head=head,
            reward_statistics=statistics,
            student_optimiser=student_optimiser,
            fake_score_optimiser=fake_optimiser,
            reward_head_optimiser=head_optimiser,
        )
        return new, metrics, fresh

    return step


def _to_be_scored(
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
    state: TrainState,
    student: Params,
    frozen: Frozen,
    micro: Any,
    generated: Fresh,
    key: jax.Array,
    score_real: bool,
) -> tuple[Fresh, jax.Array]:
    """Some rows of the last micro-batch with what the JAX rewards and the latent one say of them; their text."""
    c = config.reward
    keys = jax.random.split(key)
    rows = functools.partial(objectives.scored_rows, count=c.samples)
    real, text, tokens = jax.tree.map(lambda x: rows(x[-1]), micro)
    fresh: Fresh = {}
    if c.trained and c.method == "ddpo":
        states, x0 = objectives.rollout(config, networks, schedule, student, text, real.shape[1:], keys[0])
        fresh, latents = {"states": states}, [x0]
    elif c.trained and c.method == "lrm" and score_real:
        latents = [rows(generated["generated"]), real]
    else:
        latents = [rows(generated["generated"])]
    latent = _flat(jnp.stack(latents, 1))
    latent = objectives.random_run(latent, c.latent_frames, keys[1])
    text, tokens = jax.tree.map(lambda x: jnp.repeat(x, len(latents), 0), (text, tokens))
    if "reward" in generated:  # direct: its gradient needed them already
        reward = generated["reward"]
    elif networks.pixel_rewards is None:
        reward = jnp.full((len(latent), len(c.rewards)), jnp.nan)
    else:
        reward = lax.stop_gradient(networks.pixel_rewards(frozen.reward, latent, tokens))
    fresh |= {"latent": latent, "reward": reward}
    if c.trained and c.method == "lrm":
        fresh["predicted"] = networks.reward_head(state.reward_head, latent, text)
    else:
        fresh["predicted"] = jnp.full(len(latent), jnp.nan)
    grouped = ("latent", "reward", "predicted")
    fresh |= {k: fresh[k].reshape(c.samples, len(latents), *fresh[k].shape[1:]) for k in grouped}
    return fresh, text


def _same(params: Params) -> Params:
    return params


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _apply(
    optimiser: optax.GradientTransformation, grads: Params, state: Any, params: Params
) -> tuple[Params, Any, jax.Array]:
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, optax.tree.norm(grads)


def _micro_batches(x: jax.Array, count: int) -> jax.Array:
    """[count, b / count, ...]; every micro-batch takes from every device's share of a sharded batch."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _accumulated(loss: Callable[..., Any], params: Params, micro: Any, key: jax.Array) -> tuple[Params, Any]:
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
    return jax.tree.map(lambda g: g / count, total), jax.tree.map(lambda x: x.mean(0) if x.ndim == 1 else x[-1], aux)


def _mean(metrics: Metrics) -> Metrics:
    return {name: value.mean() for name, value in metrics.items()}
