"""DOLLAR's latent reward model (eq. (8.10)-(8.12)): learns the rewards of decoded latents, and is differentiated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from dollar_jax import losses, sharding
from dollar_jax.distillation import Batch, Distillation, Metrics, Networks, RewardSamples, StudentPass
from dollar_jax.optim import apply_gradient
from dollar_jax.rewards.methods import base
from dollar_jax.rewards.methods.base import RewardMethod, Scored, Shape, combined_reward, flat, reward_term
from dollar_jax.state import Optimisers, TrainState
from dollar_jax.types import Key, Latent, Params, PerSample, TextStates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredLatents:
    """What one step's updates learn from, a set for each: raw rewards, and weight 0 in rows to leave out."""

    latent: Float[Any, "u r t h w c"]
    text: Float[Any, "u r l d"]
    reward: Float[Any, "u r k"]
    weight: Float[Any, "u r"]


def predicted_reward(d: Distillation, p: StudentPass, key: Key) -> tuple[PerSample, dict[str, Array]]:
    """L_FT, DOLLAR eq. (8.11)."""
    params = jax.lax.stop_gradient(p.references.latent_reward)
    return losses.latent_reward(d.networks.latent_reward(params, p.generated, p.batch.text)), {}


def regression(networks: Networks, params: Params, rows: ScoredLatents) -> tuple[Float[Array, ""], Metrics]:
    """The regression of the latent reward model, DOLLAR eq. (8.10), on rows with a weight and a finite reward [r]."""
    good = jnp.isfinite(rows.reward)
    reward, weight = jnp.where(good, rows.reward, 0.0), jnp.where(good, rows.weight, 0.0)
    predicted = networks.latent_reward(params, rows.latent, rows.text)
    count = jnp.maximum(weight.sum(), 1.0)
    value = losses.reward_regression(predicted, reward, weight).sum() / count

    def centred(x: PerSample) -> PerSample:
        return jnp.where(weight > 0, x - jnp.sum(x * weight) / count, 0.0)

    a, b = centred(predicted), centred(reward)
    correlation = jnp.sum(a * b) * jax.lax.rsqrt(jnp.sum(a * a) * jnp.sum(b * b) + 1e-12)
    return value, {"reward_regression": value, "reward_correlation": correlation}


class LatentReward(RewardMethod):
    term = reward_term("latent_reward", "latent reward (LRM)", "Latent reward of the student", predicted_reward)
    predicts = True
    stored_as = "replay"

    def forwards(self, student: float) -> float:
        c = self.settings
        return (c.head.depth or 0.0) * (3 + (c.updates * c.batch_size + 2 * c.samples) / self.config.batch_size)

    def inputs(self, latent: Shape, text: Shape) -> ScoredLatents:
        c = self.settings
        rows = c.updates, c.batch_size
        text = (text[0] if c.use_text else 1, text[1])  # that is not read
        shapes = (*rows, *c.scored_shape(latent)), (*rows, *text), (*rows, len(c.trained)), rows
        return ScoredLatents(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

    def inputs_sharding(self, mesh: Mesh, samples: NamedSharding) -> NamedSharding:
        sharding.check_batch(mesh, "reward.batch_size", self.settings.batch_size)
        return sharding.batch_sharding(mesh, leading=1)

    def memory(self, latent: Shape, text: Shape) -> "Replay":
        return Replay(self.settings.replay, self.inputs(latent, text), self.config.seed)

    def candidates(self, d: Distillation, student: Params, rows: Batch, generated: Latent, key: Key) -> base.Candidates:
        return [generated, rows.latent] if d.score_real else [generated], None

    def predict(self, d: Distillation, params: Params, latent: Latent, text: TextStates) -> PerSample:
        return d.networks.latent_reward(params, latent, text)

    def learn(self, d: Distillation, optimisers: Optimisers, state: TrainState, scored: Scored) -> base.Learned:
        c, pixels, inputs = self.settings, d.networks.pixel_rewards, scored.inputs
        if pixels is not None and set(c.trained) <= set(pixels.columns):
            # JAX rewards are known at once: every update learns from what has just been scored, too.
            inputs = jax.tree.map(_beside, inputs, self._scored(scored.text, scored.samples))
        statistics = state.reward_statistics.updated(inputs.reward, inputs.weight, c.statistics_decay)
        inputs = dataclasses.replace(inputs, reward=combined_reward(c, statistics, inputs.reward))
        loss = functools.partial(regression, d.networks)

        def update(carry: tuple[Params, Any], rows: ScoredLatents) -> tuple[tuple[Params, Any], Metrics]:
            grads, metrics = jax.grad(loss, has_aux=True)(carry[0], rows)
            carry, norm, _ = apply_gradient(optimisers.latent_reward, grads, carry)
            return carry, metrics | {"reward_head_gradient": norm}

        # Unrolled: small as they are, XLA:CPU's convolutions are many times slower inside a loop.
        start = state.latent_reward, state.latent_reward_optimiser
        (params, optimiser), metrics = lax.scan(update, start, inputs, unroll=True)
        new = {"latent_reward": params, "latent_reward_optimiser": optimiser, "reward_statistics": statistics}
        state = dataclasses.replace(state, **new)
        state, samples, known = super().learn(d, optimisers, state, scored)
        return state, samples, {name: value.mean() for name, value in metrics.items()} | known

    def _scored(self, text: TextStates, samples: RewardSamples) -> ScoredLatents:
        """The samples of this step as rows [n g, ...]."""
        latent, reward = flat(samples.latent), flat(samples.reward)[:, np.array(self.settings.trained)]
        text = jnp.repeat(text if self.settings.use_text else text[:, :1], samples.latent.shape[1], 0)
        return ScoredLatents(latent, text, reward, jnp.ones(len(latent)))


def _beside(old: Array, new: Array) -> Array:
    """[u r ...] and the same rows [r2 ...] for every update as [u, r + r2, ...]."""
    return jnp.concatenate([old, jnp.broadcast_to(new, (len(old), *new.shape))], 1)


class Replay:
    """The newest `capacity` scored latents, given in `shapes`. What `take` draws depends on content, seed and step."""

    def __init__(self, capacity: int, shapes: ScoredLatents, seed: int):
        self.drawn, self.seed = shapes.weight.shape, seed
        self.state: dict[str, np.ndarray] = {
            name: np.zeros((capacity, *shape.shape[2:]), np.float32) for name, shape in vars(shapes).items()
        }
        self.state["added"] = np.zeros((), np.int64)

    def add(self, samples: RewardSamples, text: np.ndarray, reward: np.ndarray) -> None:
        """Over the oldest rows; rows of which a reward is not finite are left out."""
        good = np.isfinite(reward).all(-1).ravel()
        text = text[:, : self.state["text"].shape[1]].repeat(reward.shape[1], 0)
        rows = {"latent": flat(samples.latent), "text": text, "reward": flat(reward)}
        rows = {name: np.asarray(value)[good] for name, value in rows.items()}
        rows["weight"] = np.ones(good.sum(), np.float32)
        slots = (int(self.state["added"]) + np.arange(good.sum())) % len(self.state["weight"])
        for name, values in rows.items():
            self.state[name][slots] = values
        self.state["added"] = self.state["added"] + good.sum()

    def take(self, step: int) -> ScoredLatents:
        """Rows with replacement; weight 0 throughout while there are none."""
        size = min(int(self.state["added"]), len(self.state["weight"]))
        rows = np.random.default_rng([self.seed, step]).integers(max(size, 1), size=self.drawn)
        return ScoredLatents(*(self.state[field.name][rows] for field in dataclasses.fields(ScoredLatents)))
