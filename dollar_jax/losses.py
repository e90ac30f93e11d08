"""The losses of DOLLAR over predictions, never over networks: one fp32 number per sample, a mean over its elements.
Weighting and averaging over the batch are the caller's."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dollar_jax.types import Latent, PerSample, Time

Norm = Literal["dmd", "batch", "none"]
Distance = Literal["mse", "huber", "pseudo_huber"]
Boundary = Literal["lcm", "none"]


def vsd(
    x: Latent, real: Latent, fake: Latent, normalisation: Norm = "dmd", floor: float = 1e-6, nan_to_zero: bool = False
) -> PerSample:
    """Variational score distillation as a pseudo-target regression (DOLLAR eq. (8.7)-(8.9)). The value is mean(g^2) /
    2, which says nothing about sample quality, and its gradient, by `x` alone, is `vsd_gradient` / elements."""
    x = _fp32(x)
    g = vsd_gradient(x, real, fake, normalisation, floor, nan_to_zero)
    # Equal to x - stop_gradient(x - g), without rounding g away where |x| is much larger.
    return _per_sample(0.5 * jnp.square((x - jax.lax.stop_gradient(x)) + g))


def vsd_gradient(
    x: Latent, real: Latent, fake: Latent, normalisation: Norm = "dmd", floor: float = 1e-6, nan_to_zero: bool = False
) -> Latent:
    """g = (fake - real) / norm, a positive multiple of -(s_real - s_fake) (DOLLAR eq. (8.7)).

    Args:
        x: the generated latent, before it was noised.
        real: the guided teacher's clean prediction at the noised x.
        fake: the fake-score network's, without guidance.
        normalisation: "dmd" divides by each sample's mean |x - real|, "batch" by one such mean over the batch, "none"
            by 1; ValueError for another. The paper does not say; DMD's is usual.
        floor: smallest divisor.
        nan_to_zero: elements that are not finite become 0 instead of poisoning the step."""
    x, real, fake = (jax.lax.stop_gradient(_fp32(v)) for v in (x, real, fake))
    distance = jnp.abs(x - real)
    if normalisation == "dmd":
        norm = jnp.mean(distance, axis=tuple(range(1, x.ndim)), keepdims=True)
    elif normalisation == "batch":
        norm = jnp.mean(distance)
    elif normalisation == "none":
        norm = jnp.ones(())
    else:
        raise ValueError(f"normalisation must be dmd, batch or none, not {normalisation!r}.")
    g = (fake - real) / jnp.maximum(norm, floor)
    return jnp.where(jnp.isfinite(g), g, 0.0) if nan_to_zero else g


def consistency(student: Latent, target: Latent, distance: Distance = "mse", huber_c: float = 1e-3) -> PerSample:
    """Consistency distillation, lambda d(f_theta, f_theta-) (DOLLAR eq. (8.4), (8.5)). `target` is the EMA student at
    the point the teacher's steps led to; it carries no gradient. `distance`, elementwise with d = student - target:
    "mse" d^2; "huber" d^2 / 2 up to |d| = c and c (|d| - c / 2) beyond; "pseudo_huber" sqrt(d^2 + c^2) - c; ValueError
    for another, or a huber_c that is not positive. The paper does not say which."""
    if not 0 < huber_c < math.inf:
        raise ValueError(f"huber_c must be positive and finite, not {huber_c!r}.")
    d = _fp32(student) - jax.lax.stop_gradient(_fp32(target))
    if distance == "mse":
        values = jnp.square(d)
    elif distance == "huber":
        inside = jnp.clip(d, -huber_c, huber_c)
        values = inside * (d - 0.5 * inside)
    elif distance == "pseudo_huber":
        # sqrt(d^2 + c^2) - c, without its cancellation at small d.
        values = jnp.square(d) / (jnp.sqrt(jnp.square(d) + huber_c**2) + huber_c)
    else:
        raise ValueError(f"distance must be mse, huber or pseudo_huber, not {distance!r}.")
    return _per_sample(values)


def boundary_scalings(
    t: Time, kind: Boundary = "lcm", sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Time, Time]:
    """(c_skip, c_out) of f(x, t) = c_skip x + c_out x0_hat(x, t), [b] each (DOLLAR eq. (8.5)). "lcm", with s =
    timestep_scaling * t and t in timesteps: sigma_data^2 / (s^2 + sigma_data^2) and s / sqrt(s^2 + sigma_data^2), so f
    is the identity at t <= 0. "none": 0 and 1. ValueError for another kind."""
    t = _fp32(t)
    if kind == "none":
        return jnp.zeros_like(t), jnp.ones_like(t)
    if kind != "lcm":
        raise ValueError(f"kind must be lcm or none, not {kind!r}.")
    scaled = timestep_scaling * jnp.maximum(t, 0.0)
    total = jnp.square(scaled) + sigma_data**2
    return sigma_data**2 / total, scaled / jnp.sqrt(total)


def denoising(prediction: Latent, target: Latent) -> PerSample:
    """Diffusion loss of the fake-score network, mean squared error (DOLLAR eq. (8.13))."""
    return _per_sample(jnp.square(_fp32(prediction) - jax.lax.stop_gradient(_fp32(target))))


def latent_reward(reward: PerSample) -> PerSample:
    """L_FT = -R_phi(G(eps)) (DOLLAR eq. (8.11))."""
    return -_fp32(reward)


def policy_gradient(x_next: Latent, mean: Latent, std: Float[Array, "b #t 1 1 1"], advantage: PerSample) -> PerSample:
    """REINFORCE of a Gaussian step, -A log N(x_next; mean, std^2), up to a constant and per element (DOLLAR eq.
    (8.24)-(8.26)). Only `mean` carries a gradient; none does where the advantage is not finite."""
    difference = (jax.lax.stop_gradient(_fp32(x_next)) - _fp32(mean)) / _fp32(std)
    advantage = jax.lax.stop_gradient(_fp32(advantage))
    advantage = jnp.where(jnp.isfinite(advantage), advantage, 0.0)
    return advantage * _per_sample(0.5 * jnp.square(difference))


def reward_regression(predicted: PerSample, reward: PerSample, weight: PerSample) -> PerSample:
    """L_LRM = weight (R(Dec(x)) - R_phi(x))^2 (DOLLAR eq. (8.10)). A row whose reward is not finite or whose weight is
    0 has value and gradient 0, whatever was predicted: a failed reward call must not reach the parameters."""
    predicted, reward = _fp32(predicted), jax.lax.stop_gradient(_fp32(reward))
    weight = _fp32(weight)
    used = jnp.isfinite(reward) & (weight != 0)
    # Both the inputs and the result are selected: 0 * NaN in the backward pass is NaN.
    difference = jnp.where(used, predicted, 0.0) - jnp.where(used, reward, 0.0)
    return jnp.where(used, weight, 0.0) * jnp.square(difference)


def _fp32(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _per_sample(values: jax.Array) -> PerSample:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
