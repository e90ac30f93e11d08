"""Optimisers by optax: AdamW with a schedule and clipping, and one update with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dollar_jax.config import OptimiserConfig
from dollar_jax.types import Params

Optimiser = optax.GradientTransformation


def make_optimiser(config: OptimiserConfig, steps: int) -> Optimiser:
    """AdamW for a network that is updated `steps` times; weight decay on kernels and embeddings only."""
    c, rate = config, learning_rate(config, steps)
    adamw = optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=_decayed)
    return adamw if c.clip_norm is None else optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw)


def learning_rate(config: OptimiserConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates so far."""
    peak = config.learning_rate
    if config.schedule == "cosine":
        length = max(steps, config.warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, length, config.final_ratio * peak)
    if config.warmup_steps:
        return optax.warmup_constant_schedule(0.0, peak, config.warmup_steps)
    return optax.constant_schedule(peak)  # optax's warm-up of no steps never leaves its start, 0


def apply_gradient(
    optimiser: Optimiser, grads: Params, carry: tuple[Params, Any], good: Any = True, most: float | None = None
) -> tuple[tuple[Params, Any], jax.Array, jax.Array]:
    """New (parameters, optimiser state), the gradient's norm, and whether it was taken: the old stay where the norm is
    not finite or above `most`, or not `good`. Element by element, so that no second copy is held."""
    params, state = carry
    norm = optax.tree.norm(grads)
    good = good & (norm < jnp.inf if most is None else norm <= most)
    updates, state = optimiser.update(grads, state, params)
    return select(good, (optax.apply_updates(params, updates), state), carry), norm, good


def select(good: Any, new: Any, old: Any) -> Any:
    """The tree `new` where the scalar `good` is true, else `old`."""
    return jax.tree.map(functools.partial(jnp.where, good), new, old)


def _decayed(params: Params) -> Any:
    """By name, for stacked layers give their biases and scales a second axis."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
