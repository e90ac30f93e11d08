"""Optimisers by optax: AdamW with a schedule and clipping."""

from __future__ import annotations

import jax
import optax

from dollar_jax.config import OptimiserConfig


def make_optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for a network that is updated `steps` times; weight decay on matrices only."""
    peak = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, peak, config.warmup_steps, max(steps, config.warmup_steps + 1), config.final_ratio * peak
        )
    else:
        rate = optax.warmup_constant_schedule(0.0, peak, config.warmup_steps)
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
