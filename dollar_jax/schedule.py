"""Diffusion paths and the conversions between everything a network may predict.

A path is `x_t = a_t x0 + b_t eps` (DOLLAR eq. (8.1)). Time `t` is always what the network is given,
in [0, num_train_timesteps]: on the rectified-flow path `b_t = sigma = t / num_train_timesteps`; on
the DDPM path `t` is the index 0..num_train_timesteps - 1, and any `t < 0` is the clean end, a = 1,
b = 0. Keep `t` in fp32: bf16 cannot tell 999 from 1000.

The first `given_frames` latent frames of every clip are given (an image's latent): their time is always the clean end,
a = 1 and b = 0, so that neither noise nor a prediction reaches them, in any function below.

Each prediction is a linear mix `m x0 + n eps`, so with x_t it makes a 2x2 system for (x0, eps);
every conversion below is a row of its inverse. Results are fp32 whatever the input precision."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dollar_jax.types import Latent, Time, Weight

Path = Literal["ddpm", "rf"]
Prediction = Literal["v", "eps", "x0", "velocity", "conjugate_velocity"]
BetaSchedule = Literal["linear", "scaled_linear"]

CLEAN = -1.0  # the time of a clean sample, valid on every path
_FLOOR = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A path and what the network predicts on it; hashable. Predictions: `v` = a eps - b x0 (CogVideoX), `eps`, `x0`,
    `velocity` = eps - x0 (Wan), `conjugate_velocity` = x0 - eps (DOLLAR eq. (8.13)). `shift` bends the rectified-flow
    time, u -> shift u / (1 + (shift - 1) u). The `beta` fields, `snr_shift_scale` (CogVideoX divides the
    signal-to-noise ratio by it) and `rescale_zero_snr` (pure noise at the last index; applied after the shift) shape
    the DDPM path only. DOLLAR does not publish its betas. `given_frames`: latent frames that are not generated, which
    the network is told of. `boundary`: the time that parts two networks, and `expert` which it is, the "high" one from
    there on, the "low" one below, or None for both. ValueError for a field out of range, or of the other path."""

    path: Path
    prediction: Prediction
    num_train_timesteps: int = 1000
    shift: float = 1.0
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_zero_snr: bool = False
    snr_shift_scale: float = 1.0
    given_frames: int = 0
    boundary: float | None = None
    expert: str | None = None

    @property
    def time_range(self) -> tuple[float, float]:
        """The network is for low <= t < high."""
        edge = self.boundary or 0.0
        return edge if self.expert == "high" else -math.inf, edge if self.expert == "low" else math.inf

    @property
    def given(self) -> tuple[int, ...]:
        """What a network takes after the text: the number of given frames, where there are some."""
        return (self.given_frames,) if self.given_frames else ()

    def __post_init__(self) -> None:
        for name, kind in {"path": Path, "prediction": Prediction, "beta_schedule": BetaSchedule}.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}.")
        if not (isinstance(self.num_train_timesteps, int) and self.num_train_timesteps > 1):
            raise ValueError(f"num_train_timesteps must be an integer above 1, not {self.num_train_timesteps!r}.")
        for name in ("shift", "snr_shift_scale"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {value!r}.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            given = f"{self.beta_start!r} and {self.beta_end!r}"
            raise ValueError(f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, not {given}.")
        if self.expert and self.boundary is None:
            raise ValueError(f"expert {self.expert!r} is of a teacher with two; this one has one: set it to None.")
        if self.path == "ddpm" and self.shift != 1:
            raise ValueError(f"shift={self.shift!r} needs path='rf'; leave it at 1 for 'ddpm'.")
        if self.path == "rf" and (self.rescale_zero_snr or self.snr_shift_scale != 1):
            raise ValueError("rescale_zero_snr and snr_shift_scale need path='ddpm', not 'rf'.")
        if self.rescale_zero_snr and self.prediction == "eps":
            why = "the noise says nothing about x0 at zero signal"
            raise ValueError(f"prediction='eps' cannot be used with rescale_zero_snr: {why}; use 'v'.")


def coefficients(schedule: Schedule, t: Time) -> tuple[Time, Time]:
    """(a_t, b_t) of DOLLAR eq. (8.1), fp32; DDPM times are rounded to the nearest index."""
    t = jnp.asarray(t, jnp.float32)
    if schedule.path == "rf":
        sigma = jnp.clip(t / schedule.num_train_timesteps, 0.0, 1.0)
        return 1.0 - sigma, sigma
    row = jnp.where(t < 0, 0, jnp.clip(jnp.round(t), 0, schedule.num_train_timesteps - 1).astype(jnp.int32) + 1)
    a, b = _ddpm_table(schedule)
    return jnp.asarray(a)[row], jnp.asarray(b)[row]


def generated(schedule: Schedule, *clips: jax.Array) -> list[jax.Array]:
    """Of each clip [b t ...] the frames that are not given."""
    return [x[:, schedule.given_frames :] for x in clips]


def keep_given(schedule: Schedule, clip: Float[Array, "b s h w c"], x: Latent) -> Latent:
    """`x` with the given frames of `clip`, which may hold no others."""
    k = schedule.given_frames
    return jnp.concatenate([clip[:, :k], x[:, k:]], 1) if k else x


def add_noise(schedule: Schedule, x0: Latent, eps: Latent, t: Time) -> Latent:
    """x_t = a_t x0 + b_t eps (DOLLAR eq. (8.1))."""
    a, b = _coefficients_like(schedule, t, x0)
    return a * x0 + b * eps


def target(schedule: Schedule, x0: Latent, eps: Latent, t: Time) -> Latent:
    """What the network is trained to predict at `add_noise(x0, eps, t)` (DOLLAR eq. (8.13))."""
    m, n = _mix(schedule, *_coefficients_like(schedule, t, x0))
    return m * x0 + n * eps


def to_x0(schedule: Schedule, prediction: Latent, x_t: Latent, t: Time) -> Latent:
    """The clean latent a prediction implies; DOLLAR eq. (8.15) for `conjugate_velocity`."""
    if schedule.prediction == "x0":
        return keep_given(schedule, x_t, _at_least_fp32(prediction))
    a, b = _coefficients_like(schedule, t, x_t)
    m, n = _mix(schedule, a, b)
    return (n * x_t - b * prediction) / _away_from_zero(a * n - b * m)


def guide(cond: Latent, uncond: Latent, weight: Weight) -> Latent:
    """Classifier-free guidance, v_c + w (v_c - v_0) (DOLLAR eq. (8.6)), diffusers' scale is w + 1; w may be [b]."""
    cond, uncond = _at_least_fp32(cond), _at_least_fp32(uncond)
    return cond + _like(jnp.asarray(weight, jnp.float32), cond) * (cond - uncond)


def ddim_step(
    schedule: Schedule, x_t: Latent, x0: Latent, t: Time, t_next: Time, eta: float = 0.0, noise: Latent | None = None
) -> Latent:
    """One step from t to the earlier t_next (DOLLAR eq. (8.14), with its sigma scaled by eta). eta = 0 is deterministic
    DDIM, which on the rectified-flow path is exactly the Euler step x + (sigma_next - sigma) velocity; eta = 1 draws
    from the posterior q(x_next | x_t, x0). Raises ValueError for eta > 0 without noise."""
    mean, sigma = posterior(schedule, x_t, x0, t, t_next, eta)
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"ddim_step with eta={eta!r} needs noise; pass it, or use eta=0.")
    return mean + sigma * noise


def posterior(
    schedule: Schedule, x_t: Latent, x0_hat: Latent, t: Time, t_next: Time, eta: float = 1.0
) -> tuple[Latent, jax.Array]:
    """Mean and, times eta, standard deviation [b 1 1 1 1] of q(x_next | x_t, x0_hat) (DOLLAR eq. (8.14)); the latter is
    0 where t_next is the clean end, and [b t 1 1 1] and 0 at given frames, if there are some."""
    a, b = _coefficients_like(schedule, t, x_t)
    a_next, b_next = _coefficients_like(schedule, t_next, x_t)
    eps = (x_t - a * x0_hat) / _away_from_zero(b)
    if eta == 0:
        return a_next * x0_hat + b_next * eps, jnp.zeros_like(b_next)
    # Written without a^2 + b^2 = 1, so that it holds off the variance-preserving path too.
    correlation = (a * b_next) / _away_from_zero(a_next * b)
    sigma = eta * b_next * jnp.sqrt(jnp.clip(1.0 - correlation**2, 0.0, 1.0))
    return a_next * x0_hat + jnp.sqrt(jnp.maximum(b_next**2 - sigma**2, 0.0)) * eps, sigma


def timestep_grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """[num_steps + 1] descending fp32 times: the inputs of each step, then the clean end. DDPM: "trailing" spacing,
    999, 979, ..., 19, -1 for 50 steps, as in DOLLAR. Rectified flow: `shift` applied to an even grid from 1 to 0, as in
    Wan. ValueError for num_steps outside 1..num_train_timesteps."""
    total = schedule.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and {total}, not {num_steps!r}.")
    if schedule.path == "rf":
        return (total * _shift(schedule, np.linspace(1.0, 0.0, num_steps + 1))).astype(np.float32)
    return np.append(np.round(total - np.arange(num_steps) * (total / num_steps)) - 1, CLEAN).astype(np.float32)


def unipc_grid(schedule: Schedule, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 network times [num_steps] and noise levels sigma [num_steps + 1], from almost 1 to 0, as diffusers'
    `UniPCMultistepScheduler` with `use_flow_sigmas` makes them, which Wan is published with: the grid ends one training
    step short of the clean end, and the network gets whole times. ValueError for another path or number."""
    total = schedule.num_train_timesteps
    if schedule.path != "rf" or not 1 <= num_steps <= total:
        raise ValueError(f"UniPC takes 1 to {total} steps on a rectified flow, not {num_steps!r} on {schedule.path!r}.")
    sigmas = _shift(schedule, np.linspace(1.0, 1.0 / total, num_steps + 1)[:-1])
    sigmas[0] = min(sigmas[0], 1 - _FLOOR)  # log(1 - sigma) has to be finite
    return np.trunc(total * sigmas).astype(np.float32), np.append(sigmas, 0.0).astype(np.float32)


def unipc_table(sigmas: np.ndarray) -> np.ndarray:
    """[n, 7]: what UniPC-2 with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 5-8) weighs its terms with.

    Step i has the state x_i that step i - 1 predicted, the state y before it, and the clean predictions
    m_i at x_i, m_{i-1} and m_{i-2}. Columns 0-3 correct x_i to `c0 y + c1 m_i + c2 m_{i-1} + c3 m_{i-2}`,
    and columns 4-6 predict x_{i+1} from the corrected state as `p0 y + p1 m_i + p2 m_{i-1}`; the first
    row's correction is to be left out. The first and last steps are of order 1."""
    sigma = np.asarray(sigmas, np.float64)
    alpha = 1.0 - sigma
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    steps = len(sigma) - 1
    orders = [min(2, steps - i, i + 1) for i in range(steps)]
    table = np.zeros((steps, 7))
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        grow = -np.expm1(-h)  # -B(h) in the data prediction's sign
        table[i, 4:6] = sigma[i + 1] / sigma[i], alpha[i + 1] * grow
        if orders[i] == 2:
            ratio = (lam[i - 1] - lam[i]) / h
            change = alpha[i + 1] * grow * 0.5 / ratio
            table[i, 5:] += -change, change
        if i == 0:
            continue
        h = lam[i] - lam[i - 1]
        grow = -np.expm1(-h)
        weights = np.array([0.0, 0.5])  # of m_{i-2} - m_{i-1} and of m_i - m_{i-1}
        if orders[i - 1] == 2:
            ratio = (lam[i - 2] - lam[i - 1]) / h
            second = grow / h - 1.0
            third = -second / h - 0.5
            matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
            weights = np.linalg.solve(matrix, np.array([second, 2.0 * third]) / -grow)
            weights[0] /= ratio
        older, now = alpha[i] * grow * weights
        table[i, :4] = sigma[i] / sigma[i - 1], now, alpha[i] * grow - older - now, older
    return table.astype(np.float32)


def time_from_uniform(schedule: Schedule, u: Time) -> Time:
    """Maps uniform u in [0, 1) to a training time in the range: shifted for rectified flow, else an index."""
    total, (low, high) = schedule.num_train_timesteps, schedule.time_range
    t = total * _shift(schedule, u) if schedule.path == "rf" else jnp.clip(jnp.floor(total * u), 0, total - 1)
    return jnp.clip(t, low, np.nextafter(np.float32(high), np.float32(0)))


def within(schedule: Schedule, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n] bool: which of the times are in the time range."""
    low, high = schedule.time_range
    return (np.asarray(times) >= low) & (np.asarray(times) < high)


def uniform_from_time(schedule: Schedule, t: Time) -> Time:
    """The u that `time_from_uniform` takes to t."""
    s = jnp.clip(t / schedule.num_train_timesteps, 0.0, 1.0)
    return s / (schedule.shift - (schedule.shift - 1.0) * s)


@functools.lru_cache
def _ddpm_table(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """fp32 (a, b) for t = -1, 0, ..., computed in fp64."""
    count = schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, count)
    else:
        betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, count) ** 2
    alphas = np.cumprod(1.0 - betas)
    scale = schedule.snr_shift_scale
    alphas = alphas / (scale + (1.0 - scale) * alphas)
    a = np.sqrt(alphas)
    if schedule.rescale_zero_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    a = np.append(1.0, a)
    return a.astype(np.float32), np.sqrt(1.0 - a**2).astype(np.float32)


def _mix(schedule: Schedule, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m, n) with prediction = m x0 + n eps."""
    zero, one = jnp.zeros_like(a), jnp.ones_like(a)
    flows = {"velocity": (-one, one), "conjugate_velocity": (one, -one)}
    return {"v": (-b, a), "eps": (zero, one), "x0": (one, zero), **flows}[schedule.prediction]


def _shift(schedule: Schedule, u):
    return schedule.shift * u / (1.0 + (schedule.shift - 1.0) * u)


def _coefficients_like(schedule: Schedule, t: Time, x: Latent) -> tuple[jax.Array, jax.Array]:
    a, b = (_like(value, x) for value in coefficients(schedule, t))
    if schedule.given_frames:
        given = (jnp.arange(x.shape[1]) < schedule.given_frames)[:, None, None, None]
        a, b = jnp.where(given, 1.0, a), jnp.where(given, 0.0, b)
    return a, b


def _like(value: jax.Array, x: jax.Array) -> jax.Array:
    """Appends axes, so that [b] broadcasts against [b t h w c]."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def _away_from_zero(value: jax.Array) -> jax.Array:
    return jnp.copysign(jnp.maximum(jnp.abs(value), _FLOOR), value)


def _at_least_fp32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
