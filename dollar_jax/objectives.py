"""What student and fake score are trained on: rng + schedule + networks, as apply functions, + losses → (scalar,
auxiliaries). The student's loss is the sum over a table of terms; a new one is a function here and a row in `terms`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dollar_jax import losses, sampling
from dollar_jax import schedule as schedules
from dollar_jax.config import ConsistencyConfig, DistillConfig, VSDConfig
from dollar_jax.distillation import Batch, Distillation, Generated, Metrics, References, StudentPass, Term
from dollar_jax.rewards.methods import METHODS, method_of
from dollar_jax.schedule import Schedule
from dollar_jax.types import Key, Latent, LatentSteps, Params, PerSample, Time, TimeSteps, Weight

SCORE_BINS = 4


def student_input(d: Distillation, params: Params, batch: Batch, key: Key) -> tuple[Latent, Time, Int[Array, " b"]]:
    """x_t at one of the student's own timesteps for each row or all of them, that time, and its index: the real latent
    noised ("forward"), or where the student itself gets to from noise ("backward")."""
    times, x0 = d.config.student.timesteps, batch.latent
    keys = jax.random.split(key, 3)
    rows = x0.shape[:1]
    drawn = rows if d.config.student.timestep_per == "sample" else ()
    index = jnp.broadcast_to(jax.random.randint(keys[0], drawn, 0, len(times)), rows)
    noise = d.start(x0, keys[1])
    if d.config.student.input == "forward":
        t = jnp.asarray(times, jnp.float32)[index]
        return schedules.add_noise(d.schedule, x0, noise, t), t, index
    ode = d.config.student.sampler == "ode"
    x_t, t, _ = sampling.simulate_backward(d.denoiser(params, batch), times, noise, index, keys[2], ode)
    return x_t, t, index


def student_rows(
    d: Distillation, params: Params, references: References, batch: Batch, key: Key
) -> tuple[Latent, list[tuple[Term, PerSample, dict[str, Array]]]]:
    """The generated latents, and the rows of each term of the student's loss with what was found on the way. One
    forward serves all terms; L_CD too at the student's own, forward-noised timesteps, or by itself."""
    c, rows = d.config, terms(d.config)
    keys = jax.random.split(key, 1 + len(rows))
    if c.vsd.weight or c.reward.rewards:
        x_t, t, index = student_input(d, params, batch, keys[0])
        shared = c.consistency.times == "student" and c.student.input == "forward"
        segments = student_segments(c, d.schedule)[:, index] if shared else None
    else:
        x_t, segments = consistency_input(d, batch.latent, keys[0])
        t = segments[0]
    generated = d.denoiser(params, batch).x0(x_t, t)
    forward = StudentPass(params, references, batch, x_t, t, segments, generated)
    used = [(term, k) for term, k in zip(rows, keys[1:], strict=True) if term and term.loss]
    return generated, [(term, *term.loss(d, forward, k)) for term, k in used if term.loss]


def student(
    d: Distillation, params: Params, references: References, batch: Batch, key: Key
) -> tuple[Float[Array, ""], tuple[Metrics, Generated]]:
    """L_VSD + β_CD L_CD + β_FT L_FT, DOLLAR eq. (8.12); also the metrics and the generated latents."""
    generated, rows = student_rows(d, params, references, batch, key)
    total, metrics, found = jnp.zeros(()), {}, {}
    for term, each, more in rows:
        value = each.mean()
        total = total + term.weight(d.config) * term.scale(d.config, references.step) * value
        metrics[term.name] = term.sign * value
        found |= more
    # Drift against the data is the first sign of collapse.
    metrics |= {"student_loss": total, "latent_mean": generated.mean(), "latent_std": generated.std()}
    metrics |= {"data_mean": batch.latent.mean(), "data_std": batch.latent.std()}
    return total, (metrics, Generated(lax.stop_gradient(generated), **found))


def score_times(config: VSDConfig, schedule: Schedule, key: Key, batch: int, above: Time | None = None) -> Time:
    """Random times at which scores are compared: uniform over `score_range`, cut by `above` and the range, shifted."""
    shifted = dataclasses.replace(schedule, shift=config.score_shift)
    low, high = config.score_range
    if schedule.expert:
        ends = schedules.uniform_from_time(shifted, jnp.array(schedule.time_range))
        low, high = jnp.clip(low, *ends), jnp.clip(high, *ends)
    if above is not None:
        low = jnp.clip(schedules.uniform_from_time(shifted, above), low, high)
    return schedules.time_from_uniform(shifted, low + (high - low) * jax.random.uniform(key, (batch,)))


def vsd_guidance(config: DistillConfig, student_t: Time, t: Time) -> Weight:
    """w of VSD for rows generated at the student's timesteps `student_t` and guided at `t`; a number if it is one."""
    c, weight = config.vsd, config.vsd.guidance_weight
    if c.guidance_by_step:
        nearest = jnp.argmin(jnp.abs(student_t[:, None] - jnp.asarray(config.student.timesteps)), 1)
        weight = weight * jnp.asarray(c.guidance_by_step)[nearest]
    low, high = c.guidance_range
    return weight if (low, high) == (0, 1000) else jnp.where((low <= t) & (t <= high), weight, 0.0)


def vsd(d: Distillation, p: StudentPass, key: Key) -> tuple[PerSample, dict[str, Array]]:
    """L_VSD of latents generated at the student's timesteps, DOLLAR eq. (8.7-8.9): guided teacher against fake score.
    With `guidance_time` "noisier" in the form of Decoupled DMD (arXiv 2511.22677, eq. (6)): the teacher
    without guidance is compared at one time, and w (x̂0_c - x̂0_∅) comes from another, with noise of its own."""
    c, frozen, batch = d.config.vsd, p.references.frozen, p.batch
    keys, x = jax.random.split(key), lax.stop_gradient(p.generated)
    t = score_times(c, d.schedule, keys[0], len(x))
    x_t = schedules.add_noise(d.schedule, x, jax.random.normal(keys[1], x.shape), t)
    if c.guidance_time == "score" or not c.guidance_weight:
        real = d.denoiser(frozen.teacher, batch, frozen.null_text, vsd_guidance(d.config, p.t, t)).x0(x_t, t)
    else:
        keys = jax.random.split(jax.random.fold_in(key, 2))
        noisier = score_times(c, d.schedule, keys[0], len(x), p.t)
        x_n = schedules.add_noise(d.schedule, x, jax.random.normal(keys[1], x.shape), noisier)
        null = dataclasses.replace(batch, text=jnp.broadcast_to(frozen.null_text, batch.text.shape))
        cond, uncond = (d.denoiser(frozen.teacher, b).x0(x_n, noisier) for b in (batch, null))
        guided = schedules.guide(cond, uncond, vsd_guidance(d.config, p.t, noisier)) - cond
        real = d.denoiser(frozen.teacher, batch).x0(x_t, t) + guided
    fake = d.denoiser(lax.stop_gradient(p.references.fake_score), batch).x0(x_t, t)
    generated, real, fake = schedules.generated(d.schedule, p.generated, real, fake)
    return losses.vsd(generated, real, fake, c.normalisation, c.floor, nan_to_zero=c.nan_to_zero), {}


def student_segments(config: DistillConfig, schedule: Schedule) -> Float[Array, "m n"]:
    """Column k: the `skip` + 1 times from the student's k-th timestep to its next, or to clean or an expert's end."""
    times = config.student.timesteps
    end = max(schedules.timestep_grid(schedule, 1)[-1], schedule.time_range[0])
    columns = [np.linspace(a, b, config.consistency.skip + 1) for a, b in zip(times, (*times[1:], end), strict=True)]
    grid = np.stack(columns, 1)
    return jnp.asarray(np.round(grid) if schedule.path == "ddpm" else grid, jnp.float32)


def grid_segments(c: ConsistencyConfig, schedule: Schedule, key: Key, batch: int) -> Float[Array, "m b"]:
    """t_{n+m}, ..., t_n on the teacher's grid with a random n per sample."""
    grid = jnp.asarray(schedules.timestep_grid(schedule, c.num_steps))
    first = jax.random.randint(key, (batch,), *grid_starts(c, schedule))
    return grid[first + jnp.arange(c.skip + 1)[:, None]]


def grid_starts(c: ConsistencyConfig, schedule: Schedule) -> tuple[int, int]:
    """The first index of the grid from which all `skip` steps are in the time range, and the last, exclusive."""
    inside = schedules.within(schedule, schedules.timestep_grid(schedule, c.num_steps))
    if not len(starts := np.flatnonzero(inside[: -c.skip] & inside[c.skip :])):
        raise ValueError(f"config.consistency.num_steps {c.num_steps} leaves no skip {c.skip} in the expert's range")
    return int(starts[0]), int(starts[-1]) + 1


def consistency(
    d: Distillation, references: References, prediction: Latent, x_t: Latent, times: TimeSteps, batch: Batch
) -> PerSample:
    """L_CD, DOLLAR eq. (8.4-8.6): f_θ(x_t) by `prediction` against f_θ⁻ after the teacher's steps."""
    c, frozen, schedule = d.config.consistency, references.frozen, d.schedule

    def f(x: Latent, t: Time, x0: Latent) -> Latent:
        skip, out = losses.boundary_scalings(t, c.boundary, c.sigma_data, c.timestep_scaling)
        return skip[:, None, None, None, None] * x + out[:, None, None, None, None] * x0

    teacher = d.denoiser(frozen.teacher, batch, frozen.null_text, c.guidance_weight)
    earlier = sampling.ode_solve(teacher, lax.stop_gradient(x_t), times)
    end = times[-1]
    target = d.denoiser(references.ema, batch).x0(earlier, end)
    # At the clean end f is the identity whatever the boundary scalings.
    clean = (end <= schedules.timestep_grid(schedule, 1)[-1])[:, None, None, None, None]
    target = jnp.where(clean, earlier, f(earlier, end, target))
    ours, target = schedules.generated(schedule, f(x_t, times[0], prediction), target)
    return losses.consistency(ours, target, c.distance, c.huber_c)


def consistency_input(d: Distillation, x0: Latent, key: Key) -> tuple[Latent, Float[Array, "m b"]]:
    """Real latents noised to times[0], and `times`: those of the teacher's steps from there."""
    c = d.config.consistency
    noise_key, index_key = jax.random.split(key)
    if c.times == "grid":
        times = grid_segments(c, d.schedule, index_key, len(x0))
    else:
        index = jax.random.randint(index_key, x0.shape[:1], 0, len(d.config.student.timesteps))
        times = student_segments(d.config, d.schedule)[:, index]
    return schedules.add_noise(d.schedule, x0, jax.random.normal(noise_key, x0.shape), times[0]), times


def consistency_term(d: Distillation, p: StudentPass, key: Key) -> tuple[PerSample, dict[str, Array]]:
    """`consistency` from the student's own pass where it can, else from another; 0 in steps that are not its turn."""
    batch, every = p.batch, d.config.consistency.every

    def loss() -> PerSample:
        if p.segments is not None:
            return consistency(d, p.references, p.generated, p.x_t, p.segments, batch)
        x_t, times = consistency_input(d, batch.latent, key)
        prediction = d.denoiser(p.params, batch).x0(x_t, times[0])
        return consistency(d, p.references, prediction, x_t, times, batch)

    if every == 1:
        return loss(), {}
    return lax.cond((p.references.step + 1) % every == 0, loss, lambda: jnp.zeros(len(batch.text))), {}


def rollout(d: Distillation, student_params: Params, batch: Batch, key: Key) -> LatentSteps:
    """The student's predictions at all its timesteps, on its own way from noise; without gradient."""
    (noise_key, key), student = jax.random.split(key), d.config.student
    denoiser = d.denoiser(lax.stop_gradient(student_params), batch)
    noise = d.start(batch.latent, noise_key)
    return sampling.few_step_predictions(denoiser, student.timesteps, noise, key, student.sampler == "ode")


def fake_score(
    d: Distillation, params: Params, student_params: Params, batch: Batch, key: Key, samples: LatentSteps | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The denoising loss (8.13) of the fake-score network on samples of the student: new ones, or one of n per row. The
    metrics hold its sum and count in each of SCORE_BINS equal parts of the timesteps too, for an average hides a
    network that has lost track at one end. -log D(real) - log(1 - D(generated)) is added with a discriminator."""
    c, schedule = d.config, d.schedule
    keys = jax.random.split(key, 3)
    if samples is None:
        student_params = lax.stop_gradient(student_params)
        x_t, t, _ = student_input(d, student_params, batch, keys[0])
        generated = d.denoiser(student_params, batch).x0(x_t, t)
    else:
        chosen = jax.random.randint(keys[0], batch.text.shape[:1], 0, len(samples)) == jnp.arange(len(samples))[:, None]
        # Not by an index, which would gather a sharded batch.
        generated = jnp.where(chosen[..., None, None, None, None], samples, 0.0).sum(0)
    t = score_times(c.vsd, schedule, keys[1], len(generated))
    eps = jax.random.normal(keys[2], generated.shape)
    x_t = schedules.add_noise(schedule, generated, eps, t)
    aux, more = {}, 0.0
    if c.gan.weight:
        prediction, logit = d.logit(params, batch, x_t, t, early=False)
        real = d.logit(params, batch, schedules.add_noise(schedule, batch.latent, eps, t), t)
        aux["discriminator"] = (jax.nn.softplus(-real) + jax.nn.softplus(logit)).mean()
        more = c.gan.fake_score_weight * aux["discriminator"]
    else:
        prediction = d.denoiser(params, batch).prediction(x_t, t)
    if c.fake_score.loss == "x0":
        prediction, goal = schedules.to_x0(schedule, prediction, x_t, t), generated
    else:
        goal = schedules.target(schedule, generated, eps, t)
    each = losses.denoising(*schedules.generated(schedule, prediction, goal))
    bins = jnp.clip(t * SCORE_BINS / schedule.num_train_timesteps, 0, SCORE_BINS - 1).astype(jnp.int32)
    aux["fake_score"] = each.mean()
    for k in range(SCORE_BINS):
        inside = bins == k
        aux[f"fake_score_sum_{k}"] = jnp.where(inside, each, 0.0).sum()
        aux[f"fake_score_count_{k}"] = inside.sum().astype(jnp.float32)
    return each.mean() + more, lax.stop_gradient(aux)


def gan_term(d: Distillation, p: StudentPass, key: Key) -> tuple[PerSample, dict[str, Array]]:
    """-log D of the generated latents, noised; non-saturating, as in DMD2 (arXiv 2405.14867)."""
    keys = jax.random.split(key)
    t = score_times(d.config.vsd, d.schedule, keys[0], len(p.t))
    x_t = schedules.add_noise(d.schedule, p.generated, jax.random.normal(keys[1], p.x_t.shape), t)
    return jax.nn.softplus(-d.logit(lax.stop_gradient(p.references.fake_score), p.batch, x_t, t)), {}


VSD = Term("vsd", "", "variational score distillation (VSD)", "VSD loss", lambda config: config.vsd.weight, vsd)
_CD = "consistency", "β_CD", "consistency distillation (CD)", "Consistency loss"
CONSISTENCY = Term(*_CD, lambda c: c.consistency.weight, consistency_term, scale=lambda c, step: c.consistency.every)


def terms(config: DistillConfig) -> tuple[Term | None, ...]:
    """Rows of the table for a run. A term draws from the key of its place, so that new ones go to the end."""
    vsd, cd = VSD if config.vsd.weight else None, CONSISTENCY if config.consistency.weight else None
    return vsd, cd, method_of(config).term, *((GAN,) if config.gan.weight else ())


GAN = Term("gan", "", "adversarial loss (GAN)", "Adversarial loss", lambda config: config.gan.weight, gan_term)
TERMS = (VSD, CONSISTENCY, *(method.term for method in METHODS.values() if method.term is not None), GAN)
