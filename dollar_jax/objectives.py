"""What each network is trained on: rng + schedule + networks + losses → (scalar, auxiliaries).

Networks come in as apply functions. One function per network trained: `student`, `fake_score`,
`reward_head`; and `policy`, by which rewards reach the student without a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dollar_jax import losses, sampling
from dollar_jax import schedule as schedules
from dollar_jax.config import ConsistencyConfig, DistillConfig, RewardConfig, VSDConfig
from dollar_jax.schedule import Schedule
from dollar_jax.state import RewardStatistics
from dollar_jax.types import Apply, Key, Latent, Params, PerSample, TextStates, Time

Aux = dict[str, Any]
SCORE_BINS = 4
Fresh = dict[str, Array]  # what the student has just generated, and what is known of it
Tokens = dict[str, Array]  # prompts as integers, by the label of the reward that reads them


@dataclasses.dataclass(frozen=True)
class Networks:
    """The apply functions of the step: one diffusion transformer for all roles, the reward head, and
    the JAX rewards of decoded latents, None without any.

    `pixel_rewards(frozen.reward, latent, tokens)` → [b, n], one column per term of config.reward.rewards and
    NaN in those of host rewards; `tokens` are the prompts as the JAX rewards want them.
    """

    denoiser: Apply
    reward_head: Any
    pixel_rewards: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the step reads and never changes; an argument of the step, in no checkpoint."""

    teacher: Params
    null_text: Any  # Float[Array, "1 l d"], or while jit is set up its sharding
    reward: Any = ()  # the parameters of decoder and JAX rewards


def student_input(
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
    params: Params,
    x0: Latent,
    text: TextStates,
    key: Key,
) -> tuple[Latent, Time, Array]:
    """x_t at one of the student's own timesteps per sample, that time, and its index.

    "forward": the real latent, noised. "backward": where the student itself gets to from noise.
    """
    times = config.student.timesteps
    keys = jax.random.split(key, 3)
    index = jax.random.randint(keys[0], (x0.shape[0],), 0, len(times))
    noise = jax.random.normal(keys[1], x0.shape)
    if config.student.input == "forward":
        t = jnp.asarray(times, jnp.float32)[index]
        return schedules.add_noise(schedule, x0, noise, t), t, index
    x_t, t, _ = sampling.simulate_backward(networks.denoiser, params, schedule, times, noise, text, index, keys[2])
    return x_t, t, index


def student(
    params: Params,
    ema: Params,
    fake_score: Params,
    reward_head: Params,
    frozen: Frozen,
    x0: Latent,
    text: TextStates,
    reward_weight: Float[Array, ""],
    key: Key,
    *,
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
    statistics: RewardStatistics | None = None,
    tokens: Tokens | None = None,
) -> tuple[Float[Array, ""], tuple[Aux, Fresh]]:
    """L_VSD + β_CD L_CD + β_FT L_FT, DOLLAR eq. (8.12); also the metrics and the generated latents.

    One forward of the student serves all three where consistency is asked at the student's own,
    forward-noised timesteps. `reward_weight` is β_FT as of this step. L_FT is that of the latent reward
    model or, with config.reward.method "direct", of the pixels' own rewards, which need `statistics` and
    `tokens`; with "ddpo" it is not here but in `policy`.
    """
    c = config.consistency
    names = ("input", "vsd", "consistency", "cut")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    x_t, t, index = student_input(config, networks, schedule, params, x0, text, keys["input"])
    generated = sampling.student_prediction(networks.denoiser, params, schedule, x_t, t, text)

    total, metrics = jnp.zeros(()), {}
    if config.vsd.weight:
        value = vsd(config.vsd, networks, schedule, frozen, fake_score, generated, text, keys["vsd"]).mean()
        total, metrics["vsd"] = total + config.vsd.weight * value, value
    if c.weight:
        if c.times == "student" and config.student.input == "forward":
            times, prediction = student_segments(config, schedule)[:, index], generated
        else:
            noise_key, index_key = jax.random.split(keys["consistency"])
            if c.times == "grid":
                times = grid_segments(c, schedule, index_key, len(x0))
            else:
                index = jax.random.randint(index_key, t.shape, 0, len(config.student.timesteps))
                times = student_segments(config, schedule)[:, index]
            x_t = schedules.add_noise(schedule, x0, jax.random.normal(noise_key, x0.shape), times[0])
            prediction = sampling.student_prediction(networks.denoiser, params, schedule, x_t, times[0], text)
        value = consistency(c, networks, schedule, frozen, ema, prediction, x_t, times, text).mean()
        total, metrics["consistency"] = total + c.weight * value, value
    fresh = {"generated": jax.lax.stop_gradient(generated)}
    if config.reward.trained and config.reward.method == "lrm":
        score = networks.reward_head(jax.lax.stop_gradient(reward_head), generated, text)
        value = losses.latent_reward(score).mean()
        total, metrics["latent_reward"] = total + reward_weight * value, score.mean()
    elif config.reward.trained and config.reward.method == "direct":
        rows = functools.partial(scored_rows, count=config.reward.samples)
        cut = random_run(rows(generated), config.reward.latent_frames, keys["cut"])
        raw = networks.pixel_rewards(frozen.reward, cut, jax.tree.map(rows, tokens))
        assert statistics is not None
        score = combined_reward(config.reward, statistics, raw[:, np.array(config.reward.trained)])
        value = losses.latent_reward(score).mean()
        total, metrics["pixel_reward"] = total + reward_weight * value, score.mean()
        fresh["reward"] = jax.lax.stop_gradient(raw)
    # Drift against the data is the first sign of collapse.
    metrics |= {
        "student_loss": total,
        "latent_mean": generated.mean(),
        "latent_std": generated.std(),
        "data_mean": x0.mean(),
        "data_std": x0.std(),
    }
    return total, (metrics, fresh)


# --- rewards --------------------------------------------------------------------------------------


def reward_weight(config: DistillConfig, step: Array) -> Float[Array, ""]:
    """β_FT at a step: 0 before `start_step`, a linear rise over `ramp_steps`, then constant or a cosine."""
    c = config.reward
    since = jnp.asarray(step - c.start_step, jnp.float32)
    rise = jnp.clip((since + 1) / max(c.ramp_steps, 1), 0.0, 1.0)
    scale = jnp.where(since >= 0, rise, 0.0)
    if c.decay == "cosine":
        length = max(config.steps - c.start_step - c.ramp_steps, 1)
        done = jnp.clip((since - c.ramp_steps) / length, 0.0, 1.0)
        scale = scale * (c.final_ratio + (1 - c.final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done)))
    return c.weight * scale


def reward_scale(c: RewardConfig, statistics: RewardStatistics) -> Float[Array, " k"]:
    """What a unit of each trained reward counts: its weight, per standard deviation if so configured.

    0 while no deviation is known.
    """
    weights = jnp.array([c.rewards[i].weight for i in c.trained])
    return jnp.where(statistics.count > 0, weights / statistics.std, 0.0) if c.normalise else weights


def combined_reward(c: RewardConfig, statistics: RewardStatistics, raw: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """Σ weight · reward over the rewards that are trained on, each standardised if so configured."""
    return (raw - (statistics.mean if c.normalise else 0.0)) @ reward_scale(c, statistics)


def scored_rows(x: Array, count: int) -> Array:
    """`count` of the rows of a batch, evenly, so that every device's share of it has as many."""
    return x.reshape(count, -1, *x.shape[1:])[:, 0]


def random_run(latent: Latent, frames: int | None, key: Key) -> Latent:
    """A run of so many consecutive latent frames from a random one of each clip; None takes the whole.

    A causal VAE decodes the run as a clip of its own, whose first latent frame is one frame of pixels.
    """
    if frames is None or frames >= latent.shape[1]:
        return latent
    start = jax.random.randint(key, latent.shape[:1], 0, latent.shape[1] - frames + 1)
    return jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, frames))(latent, start)


def rollout(
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
    params: Params,
    text: TextStates,
    shape: tuple[int, ...],
    key: Key,
) -> tuple[Float[Array, "b s t h w c"], Latent]:
    """A walk of the student from noise by the DDPM posterior, without gradient: last states, clean end.

    The states are those at the last three timesteps, or two if there are no more, so that the steps
    between them, the last two whose outcome is random, can be reinforced: the step to the clean end has
    variance 0.
    """
    params = jax.lax.stop_gradient(params)
    times = [jnp.full(len(text), t) for t in config.student.timesteps]
    keys = jax.random.split(key, len(times))
    states = [jax.random.normal(keys[0], (len(text), *shape))]
    for t, t_next, step_key in zip(times, times[1:], keys[1:], strict=False):
        x0 = sampling.student_prediction(networks.denoiser, params, schedule, states[-1], t, text)
        mean, deviation = schedules.posterior(schedule, states[-1], x0, t, t_next)
        states.append(mean + deviation * jax.random.normal(step_key, mean.shape))
    x0 = sampling.student_prediction(networks.denoiser, params, schedule, states[-1], times[-1], text)
    return jnp.stack(states[-3:], 1), x0


def policy(
    params: Params,
    states: Float[Array, "b s t h w c"],
    text: TextStates,
    advantage: PerSample,
    *,
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
) -> tuple[Float[Array, ""], Aux]:
    """L_FT of DDPO, DOLLAR eq. (8.24-8.26): -A Σ log p_θ(x_next | x_t) over the steps between `states`.

    Per element of the latent. The walks are a step or two old by the time their rewards are here; no
    importance weight corrects for that.
    """
    times = [jnp.full(len(text), t) for t in config.student.timesteps[-states.shape[1] :]]
    total = jnp.zeros(())
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        x0 = sampling.student_prediction(networks.denoiser, params, schedule, states[:, i], t, text)
        mean, deviation = schedules.posterior(schedule, states[:, i], x0, t, t_next)
        total += losses.policy_gradient(states[:, i + 1], mean, deviation, advantage).mean()
    return total, {"policy": total}


# --- variational score distillation and consistency -----------------------------------------------


def score_times(config: VSDConfig, schedule: Schedule, key: Key, batch: int) -> Time:
    """Random times at which scores are compared: uniform over `score_range`, then shifted."""
    low, high = config.score_range
    u = low + (high - low) * jax.random.uniform(key, (batch,))
    shifted = dataclasses.replace(schedule, shift=config.score_shift)
    return schedules.time_from_uniform(shifted, u)


def vsd(
    config: VSDConfig,
    networks: Networks,
    schedule: Schedule,
    frozen: Frozen,
    fake_score: Params,
    generated: Latent,
    text: TextStates,
    key: Key,
) -> PerSample:
    """L_VSD of generated latents, DOLLAR eq. (8.7-8.9): guided teacher against fake score."""
    keys = jax.random.split(key)
    x = jax.lax.stop_gradient(generated)
    t = score_times(config, schedule, keys[0], len(x))
    x_t = schedules.add_noise(schedule, x, jax.random.normal(keys[1], x.shape), t)
    real = sampling.guided_prediction(
        networks.denoiser, frozen.teacher, x_t, t, text, frozen.null_text, config.guidance_weight
    )
    fake = networks.denoiser(jax.lax.stop_gradient(fake_score), x_t, t, text)
    return losses.vsd(
        generated,
        schedules.to_x0(schedule, real, x_t, t),
        schedules.to_x0(schedule, fake, x_t, t),
        config.normalisation,
        config.floor,
        nan_to_zero=config.nan_to_zero,
    )


def student_segments(config: DistillConfig, schedule: Schedule) -> Float[Array, "m n"]:
    """Column k: the `skip` + 1 times from the student's k-th timestep down to its next, or to clean."""
    times = config.student.timesteps
    end = schedules.timestep_grid(schedule, 1)[-1]
    skip = config.consistency.skip
    columns = [np.linspace(a, b, skip + 1) for a, b in zip(times, (*times[1:], end), strict=True)]
    grid = np.stack(columns, 1)
    return jnp.asarray(np.round(grid) if schedule.path == "ddpm" else grid, jnp.float32)


def grid_segments(c: ConsistencyConfig, schedule: Schedule, key: Key, batch: int) -> Float[Array, "m b"]:
    """t_{n+m}, ..., t_n on the teacher's grid with a random n per sample."""
    grid = jnp.asarray(schedules.timestep_grid(schedule, c.num_steps))
    first = jax.random.randint(key, (batch,), 0, c.num_steps - c.skip + 1)
    return grid[first + jnp.arange(c.skip + 1)[:, None]]


def consistency(
    c: ConsistencyConfig,
    networks: Networks,
    schedule: Schedule,
    frozen: Frozen,
    ema: Params,
    prediction: Latent,
    x_t: Latent,
    times: Float[Array, "m b"],
    text: TextStates,
) -> PerSample:
    """L_CD, DOLLAR eq. (8.4-8.6): f_θ(x_t) against f_θ⁻ after the guided teacher's steps through `times`.

    `prediction` is the student's x̂0 at x_t, times[0].
    """

    def f(x: Latent, t: Time, x0: Latent) -> Latent:
        skip, out = losses.boundary_scalings(t, c.boundary, c.sigma_data, c.timestep_scaling)
        return skip[:, None, None, None, None] * x + out[:, None, None, None, None] * x0

    earlier = sampling.ode_solve(
        networks.denoiser,
        frozen.teacher,
        schedule,
        jax.lax.stop_gradient(x_t),
        times,
        text,
        frozen.null_text,
        c.guidance_weight,
    )
    end = times[-1]
    target = sampling.student_prediction(networks.denoiser, ema, schedule, earlier, end, text)
    # At the clean end f is the identity whatever the boundary scalings.
    clean = (end <= schedules.timestep_grid(schedule, 1)[-1])[:, None, None, None, None]
    target = jnp.where(clean, earlier, f(earlier, end, target))
    return losses.consistency(f(x_t, times[0], prediction), target, c.distance, c.huber_c)


def fake_score(
    params: Params,
    student_params: Params,
    x0: Latent,
    text: TextStates,
    key: Key,
    *,
    config: DistillConfig,
    networks: Networks,
    schedule: Schedule,
) -> tuple[Float[Array, ""], Aux]:
    """The denoising loss (8.13) of the fake-score network on fresh samples of the student.

    The metrics hold its sum and count in each of SCORE_BINS equal parts of the timesteps too: an average
    hides a network that has lost track at one end.
    """
    keys = jax.random.split(key, 3)
    student_params = jax.lax.stop_gradient(student_params)
    x_t, t, _ = student_input(config, networks, schedule, student_params, x0, text, keys[0])
    generated = sampling.student_prediction(networks.denoiser, student_params, schedule, x_t, t, text)
    t = score_times(config.vsd, schedule, keys[1], len(generated))
    eps = jax.random.normal(keys[2], generated.shape)
    x_t = schedules.add_noise(schedule, generated, eps, t)
    prediction = networks.denoiser(params, x_t, t, text)
    if config.fake_score.loss == "x0":
        prediction = schedules.to_x0(schedule, prediction, x_t, t)
        goal = generated
    else:
        goal = schedules.target(schedule, generated, eps, t)
    each = losses.denoising(prediction, goal)
    bins = jnp.clip(t * SCORE_BINS / schedule.num_train_timesteps, 0, SCORE_BINS - 1).astype(jnp.int32)
    aux = {"fake_score": each.mean()}
    for k in range(SCORE_BINS):
        inside = bins == k
        aux |= {
            f"fake_score_sum_{k}": jnp.where(inside, each, 0.0).sum(),
            f"fake_score_count_{k}": inside.sum().astype(jnp.float32),
        }
    return each.mean(), jax.lax.stop_gradient(aux)


def reward_head(
    params: Params, latent: Latent, text: TextStates, reward: PerSample, weight: PerSample, *, networks: Networks
) -> tuple[Float[Array, ""], Aux]:
    """The regression of the latent reward model, DOLLAR eq. (8.10).

    Rows without a weight or a finite reward are left out.
    """
    good = jnp.isfinite(reward)
    reward, weight = jnp.where(good, reward, 0.0), jnp.where(good, weight, 0.0)
    predicted = networks.reward_head(params, latent, text)
    count = jnp.maximum(weight.sum(), 1.0)
    value = losses.reward_regression(predicted, reward, weight).sum() / count

    def centred(x: PerSample) -> PerSample:
        return jnp.where(weight > 0, x - jnp.sum(x * weight) / count, 0.0)

    a, b = centred(predicted), centred(reward)
    correlation = jnp.sum(a * b) * jax.lax.rsqrt(jnp.sum(a * a) * jnp.sum(b * b) + 1e-12)
    return value, {"reward_regression": value, "reward_correlation": correlation}
