"""Optimisers by optax: AdamW or Muon with a schedule and clipping, and one update with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dollar_jax.config import OptimiserConfig
from dollar_jax.types import Params

Optimiser = optax.GradientTransformation


def make_optimiser(config: OptimiserConfig, steps: int) -> Optimiser:
    """For a network that is updated `steps` times; weight decay on kernels, and AdamW's on embeddings too."""
    c, rate = config, learning_rate(config, steps)
    if c.name == "muon":
        update = muon(rate, rate, weight_decay=c.weight_decay, adam_b1=c.b1, adam_b2=c.b2, eps=c.eps)
    else:
        update = optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=_decayed)
    return update if c.clip_norm is None else optax.chain(optax.clip_by_global_norm(c.clip_norm), update)


def muon(learning_rate: optax.Schedule, adam_learning_rate: optax.Schedule, **more: Any) -> Optimiser:
    """Muon of convolutions and of the kernels of stacked layers, Adam of all else, both with Nesterov's momentum; the
    updates are as large as Adam's whatever the matrix's shape (arXiv 2502.16982, equation 4)."""
    more |= {"adam_learning_rate": adam_learning_rate, "consistent_rms": 0.2}
    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=_matrices, **more)


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


def _matrices(params: Params) -> Any:
    """Which weights Muon takes, and as what matrix."""

    def dimensions(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or x.ndim < 3:
            return None
        inputs = tuple(range(x.ndim - 1)) if x.ndim > 3 else (1,)  # [*kernel, in, out]; [layer, in, out]
        return optax.contrib.MuonDimensionNumbers(inputs, x.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)
