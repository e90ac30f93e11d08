"""Samplers over a `Denoiser`: the teacher's ODE, the student's few steps; pure, on fp32 latents, a `lax.scan` each."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dollar_jax import schedule as schedules
from dollar_jax import types
from dollar_jax.schedule import Schedule
from dollar_jax.types import Apply, Keys, Latent, LatentSteps, NullText, Params, TextStates, Time, TimeSteps, Weight


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network asked for one text: `apply(params, x_t, t, text)`, by classifier-free guidance (DOLLAR eq. (8.6)); a
    weight w of None or the Python number 0 is a single pass without `null_text`; two are those of two experts. Where
    frames are given, `apply` takes their number too, and an `image` in both passes."""

    apply: Apply
    params: Params
    schedule: Schedule
    text: TextStates
    null_text: NullText | None = None
    guidance_weight: Weight | tuple[float, float] | None = None
    image: types.ImageCondition | None = None

    def prediction(self, x_t: Latent, t: Time) -> Latent:
        """The two passes of guidance are one call on 2b rows. Raises ValueError for guidance without null_text."""
        text, weight, given = self.text, self.guidance_weight, self.schedule.given
        told = {} if self.image is None else {"image": self.image}
        if weight is None or (isinstance(weight, int | float) and weight == 0):
            return self.apply(self.params, x_t, t, text, *given, **told)
        if self.null_text is None:
            raise ValueError(f"guidance weight {weight!r} needs null_text; pass it, or use None.")
        null_text = jnp.broadcast_to(self.null_text, text.shape).astype(text.dtype)

        def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
            # Neighbours, not halves: a batch sharded over devices then stays where it is.
            return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

        x_t_twice, t_twice, told = jax.tree.map(lambda x: interleave(x, x), (x_t, t, told))
        both = self.apply(self.params, x_t_twice, t_twice, interleave(text, null_text), *given, **told)
        both = both.reshape(x_t.shape[0], 2, *both.shape[1:])
        if isinstance(weight, tuple):
            weight = jnp.where(t >= jnp.float32(self.schedule.boundary), *weight)
        return schedules.guide(both[:, 0], both[:, 1], weight)

    def x0(self, x_t: Latent, t: Time) -> Latent:
        return schedules.to_x0(self.schedule, self.prediction(x_t, t), x_t, t)


def ode_solve(denoiser: Denoiser, x_t: Latent, times: TimeSteps, eta: float = 0.0, key: Keys | None = None) -> Latent:
    """Takes x_t from times[0] to times[-1] in DDIM steps (DOLLAR eq. (8.14)). `times` is [steps + 1, b], descending,
    and may differ between samples: with m + 1 rows this is the Denoise^m of the consistency loss (DOLLAR eq. (8.5)).
    `key` is one for the batch, or [b]: each sample's noise then is its own. ValueError for eta > 0 without one."""
    if eta != 0 and key is None:
        raise ValueError(f"sampling with eta={eta!r} needs a key; pass one, or use eta=0.")
    keys = None if key is None else _split(key, times.shape[0] - 1)

    def step(x: Latent, inputs):
        t, t_next, step_key = inputs
        noise = None if eta == 0 else _noise(step_key, x)
        return schedules.ddim_step(denoiser.schedule, x, denoiser.x0(x, t), t, t_next, eta, noise), None

    return lax.scan(step, x_t.astype(jnp.float32), (times[:-1], times[1:], keys))[0]


def ode_sample(denoiser: Denoiser, noise: Latent, num_steps: int, eta: float = 0.0, key: Keys | None = None) -> Latent:
    """The teacher's sample from pure noise: `ode_solve` over `timestep_grid(num_steps)`."""
    grid = jnp.asarray(schedules.timestep_grid(denoiser.schedule, num_steps))
    return ode_solve(denoiser, noise, jnp.broadcast_to(grid[:, None], (num_steps + 1, noise.shape[0])), eta, key)


def unipc_sample(denoiser: Denoiser, noise: Latent, num_steps: int) -> Latent:
    """The teacher's sample by UniPC of order 2 (arXiv 2302.04867), the solver Wan is published with: as many network
    evaluations as `ode_sample`; each state is corrected by the prediction made there before the next is predicted."""
    schedule = denoiser.schedule
    times, sigmas = schedules.unipc_grid(schedule, num_steps)
    table = schedules.unipc_table(sigmas)

    def step(carry, inputs):
        x, y, m1, m2 = carry
        t, sigma, row, first = inputs
        time = jnp.full(x.shape[:1], t, jnp.float32)
        prediction = denoiser.prediction(x, time)
        # At the exact noise level: the network's time is rounded.
        m = schedules.to_x0(schedule, prediction, x, jnp.full_like(time, sigma * schedule.num_train_timesteps))
        x = jnp.where(first, x, row[0] * y + row[1] * m + row[2] * m1 + row[3] * m2)
        following = row[4] * x + row[5] * m + row[6] * m1
        return (schedules.keep_given(schedule, start, following), x, m, m1), None

    start = noise.astype(jnp.float32)
    zero = jnp.zeros_like(start)
    inputs = tuple(map(jnp.asarray, (times, sigmas[:-1], table, np.arange(num_steps) == 0)))
    return lax.scan(step, (start, start, zero, zero), inputs)[0][0]


def few_step_predictions(
    denoiser: Denoiser, timesteps: Sequence[float], noise: Latent, key: Keys, ode: bool = False
) -> LatentSteps:
    """The student's clean predictions [n b t h w c] on the way of its sample, which is the last: predict x0, noise it
    to the next timestep, repeat. `timesteps` is static and descending, (999, 749, 499, 249) in the paper; `noise` is
    taken to be the state at the first. `key` is one for the batch, or [b]: each sample's noise then does not depend
    on its neighbours. With `ode` the way to the next timestep is a DDIM step, without fresh noise. ValueError for
    timesteps that do not descend or are out of range."""
    times = _student_times(denoiser.schedule, timesteps)
    inputs = times[:-1], times[1:], _split(key, len(timesteps))
    return lax.scan(lambda x, now: _student_step(denoiser, x, *now, ode), noise.astype(jnp.float32), inputs)[1]


def simulate_backward(
    denoiser: Denoiser, timesteps: Sequence[float], noise: Latent, k: int | jax.Array, key: Keys, ode: bool = False
) -> tuple[Latent, Time, LatentSteps]:
    """The student's own input at its k-th timestep, without gradient (backward simulation, DMD2). `k`, one for the
    batch or [b], counts from 0 (pure noise at timesteps[0]). Gives x_t [b t h w c] at t = timesteps[k], that t [b], and
    the states [n b t h w c] at every timestep, those of `few_step_predictions` with this key and `ode`; a sample's
    stays at x_t after its k-th, and no network runs past max(k). Raises as that."""
    times = _student_times(denoiser.schedule, timesteps)
    last = len(timesteps) - 1
    k = jnp.broadcast_to(jnp.clip(jnp.asarray(k), 0, last), noise.shape[:1])
    # At the inputs rather than the result: nothing inside the loop is then differentiated at all.
    params, text, noise = lax.stop_gradient((denoiser.params, denoiser.text, noise))
    denoiser = dataclasses.replace(denoiser, params=params, text=text)
    keys = _split(key, len(timesteps))[:last]

    def step(x: Latent, inputs):
        index, t, t_next, step_key = inputs
        running = (index < k).reshape(-1, *(1,) * (x.ndim - 1))

        def advance(x: Latent) -> Latent:
            x_next, _ = _student_step(denoiser, x, t, t_next, step_key, ode)
            return jnp.where(running, x_next, x)

        return lax.cond(index < jnp.max(k), advance, lambda x: x, x), x

    inputs = (jnp.arange(last), times[:last], times[1 : last + 1], keys)
    x_t, states = lax.scan(step, noise.astype(jnp.float32), inputs)
    return x_t, times[k], jnp.concatenate([states, x_t[None]])


def _student_times(schedule: Schedule, timesteps: Sequence[float]) -> jax.Array:
    """[n + 1]: the timesteps, then the clean end."""
    steps = list(timesteps)
    top = schedule.num_train_timesteps - (schedule.path == "ddpm")
    descending = all(a > b for a, b in zip(steps, steps[1:], strict=False))
    if not (steps and descending and steps[-1] >= 0 and steps[0] <= top):
        wanted = f"strictly descending within 0..{top}, such as (999, 749, 499, 249)"
        raise ValueError(f"student timesteps must be {wanted}, not {steps}.")
    return jnp.asarray([*steps, schedules.CLEAN], jnp.float32)


def _student_step(
    denoiser: Denoiser, x: Latent, t: jax.Array, t_next: jax.Array, key: Keys, ode: bool
) -> tuple[Latent, Latent]:
    """The next state, and the prediction that it was made of."""
    t, t_next = (jnp.full(x.shape[:1], time, jnp.float32) for time in (t, t_next))
    x0 = denoiser.x0(x, t)
    if ode:
        return schedules.ddim_step(denoiser.schedule, x, x0, t, t_next), x0
    return schedules.add_noise(denoiser.schedule, x0, _noise(key, x), t_next), x0


def _split(key: Keys, count: int) -> jax.Array:
    """[count] keys, or [count, b] of one key per sample."""
    if key.ndim == 0:
        return jax.random.split(key, count)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(key, jnp.arange(count))


def _noise(key: Keys, x: Latent) -> Latent:
    if key.ndim == 0:
        return jax.random.normal(key, x.shape, x.dtype)
    return jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(key)
