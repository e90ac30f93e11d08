"""What every way from rewards to the student has in common: weights, statistics, and what is scored."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from dollar_jax.config import DistillConfig, RewardConfig
from dollar_jax.distillation import Batch, Distillation, Generated, Metrics, References, RewardSamples, Term
from dollar_jax.state import Optimisers, RewardStatistics, TrainState
from dollar_jax.types import Key, Latent, Params, PerSample, TextStates

Shape = tuple[int, ...]
Full = Callable[[Params], Params]  # adapters → all of a network's parameters
Gradient = tuple[Params, TrainState, Metrics]
Candidates = tuple[list[Latent], Float[Array, "n s t h w c"] | None]
Learned = tuple[TrainState, RewardSamples, Metrics]


class Scored(NamedTuple):
    """What a method learns from: `Batch.reward`, and this step's samples with their text [n l d]."""

    inputs: Any
    text: TextStates
    samples: RewardSamples


class Memory(Protocol):
    """What the host keeps of earlier steps for one shape of latents. `state` is checkpointed."""

    state: dict[str, np.ndarray]

    def add(self, samples: RewardSamples, text: np.ndarray, reward: np.ndarray) -> None:
        """Takes in what was scored, in NumPy: text [n l d] and trained rewards [n g k], NaN where none came."""

    def take(self, step: int) -> Any:
        """What a step is given, in the shapes of `RewardMethod.inputs`."""


class RewardMethod:
    """Rewards that are only measured. A method overrides what it does otherwise. `inputs` crosses from host to step as
    `Batch.reward`; `add_gradient`, `candidates`, `predict` and `learn` are its part of the jitted step; `memory` is its
    part of the host, checkpointed under the name `stored_as`."""

    term: ClassVar[Term | None] = None
    differentiates_pixels: ClassVar[bool] = False
    predicts: ClassVar[bool] = False  # whether there is a latent reward model
    keeps_images: ClassVar[bool] = True  # of the rows it comes back to in a later step
    stored_as: ClassVar[str] = ""

    def __init__(self, config: DistillConfig):
        self.config, self.settings = config, config.reward

    def check(self) -> None:
        """Raises ValueError for settings that do not suit the method."""
        if self.settings.guard.min_correlation is not None and not self.predicts:
            raise ValueError("config.reward.guard.min_correlation needs a latent reward model: set it to None")

    def forwards(self, student: float) -> float:
        """Forwards of the teacher per video and step that only the method makes; a backward counts 2, and one of the
        `student` its share of a forward."""
        return 0.0

    def inputs(self, latent: Shape, text: Shape) -> Any:
        """Shapes of `Batch.reward` for latents [t h w c] and text [l d]."""
        return None

    def inputs_sharding(self, mesh: Mesh, samples: NamedSharding) -> NamedSharding | None:
        """That of `inputs`; `samples` is that of what the step gives to be scored."""
        return None

    def memory(self, latent: Shape, text: Shape) -> Memory | None:
        """An empty memory, or None for a method that keeps nothing."""
        return None

    def add_gradient(self, d: Distillation, full: Full, state: TrainState, inputs: Any, grads: Params) -> Gradient:
        """The student's gradient with what does not come from its batch, and the state with new statistics."""
        return grads, state, {}

    def candidates(self, d: Distillation, student: Params, rows: Batch, generated: Latent, key: Key) -> Candidates:
        """The latents to be scored, each [n t h w c], and the last states of a rollout."""
        return [generated], None

    def predict(self, d: Distillation, params: Params, latent: Latent, text: TextStates) -> PerSample:
        """What the latent reward model says of latents, NaN without one."""
        return jnp.full(len(latent), jnp.nan)

    def samples(
        self, d: Distillation, student: Params, references: References, rows: Batch, generated: Generated, key: Key
    ) -> RewardSamples:
        """What is to be scored of `rows`, with what the JAX rewards and the latent reward model say of it."""
        keys = jax.random.split(key)
        ours = scored_rows(generated.latent, self.settings.samples)
        latents, states = self.candidates(d, student, rows, ours, keys[0])
        latent = random_run(flat(jnp.stack(latents, 1)), self.settings.latent_frames, keys[1])
        text, tokens = jax.tree.map(lambda x: jnp.repeat(x, len(latents), 0), (rows.text, rows.tokens))
        reward, pixels = generated.reward, d.networks.pixel_rewards
        if reward is None and pixels is not None:
            reward = lax.stop_gradient(pixels(references.frozen.reward, latent, tokens))
        if reward is None:
            reward = jnp.full((len(latent), len(self.settings.rewards)), jnp.nan)
        predicted = self.predict(d, references.latent_reward, latent, text)
        grouped = (x.reshape(-1, len(latents), *x.shape[1:]) for x in (latent, reward, predicted))
        return RewardSamples(*grouped, states=states)

    def learn(self, d: Distillation, optimisers: Optimisers, state: TrainState, scored: Scored) -> Learned:
        """The state with new statistics and latent reward model, and the samples with the trained rewards' scale. A
        method that learns does so first, and then calls this."""
        c, statistics, samples = self.settings, state.reward_statistics, scored.samples
        if not c.trained:
            return state, samples, {}
        scale = jnp.broadcast_to(reward_scale(c, statistics), (c.samples, len(c.trained)))
        metrics = {"reward_weight": c.weight * reward_schedule(self.config, state.step)}
        for k, i in enumerate(c.trained):
            suffix = f"_{c.rewards[i].label}" if len(c.trained) > 1 else ""
            metrics[f"reward_mean{suffix}"] = statistics.mean[k]
            metrics[f"reward_std{suffix}"] = statistics.std[k]
        return state, dataclasses.replace(samples, scale=scale), metrics


def reward_term(name: str, label: str, curve: str, loss: Any, sign: int = -1) -> Term:
    """The term β_FT L_FT by which a method's rewards reach the student; its metric is the reward itself."""
    return Term(name, "β_FT", label, curve, lambda config: config.reward.weight, loss, scale=reward_schedule, sign=sign)


def reward_schedule(config: DistillConfig, step: Array) -> Float[Array, ""]:
    """β_FT's share of its weight: 0 before `start_step`, a linear rise over `ramp_steps`, then constant or a cosine."""
    c = config.reward
    since = jnp.asarray(step - c.start_step, jnp.float32)
    scale = jnp.where(since >= 0, jnp.clip((since + 1) / max(c.ramp_steps, 1), 0.0, 1.0), 0.0)
    if c.decay == "cosine":
        length = max(config.steps - c.start_step - c.ramp_steps, 1)
        done = jnp.clip((since - c.ramp_steps) / length, 0.0, 1.0)
        scale = scale * (c.final_ratio + (1 - c.final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done)))
    return scale


def reward_scale(c: RewardConfig, statistics: RewardStatistics) -> Float[Array, " k"]:
    """What a unit of each trained reward counts: its weight; `normalise`d, per deviation, and 0 while none is known."""
    weights = jnp.array([c.rewards[i].weight for i in c.trained])
    return jnp.where(statistics.count > 0, weights / statistics.std, 0.0) if c.normalise else weights


def combined_reward(c: RewardConfig, statistics: RewardStatistics, raw: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """Σ weight · reward over the rewards that are trained on, each standardised if so configured."""
    return (raw - (statistics.mean if c.normalise else 0.0)) @ reward_scale(c, statistics)


def scored_rows(x: Array, count: int) -> Array:
    """`count` of the rows of a batch, evenly, so that every device's share of it has as many."""
    return x.reshape(count, -1, *x.shape[1:])[:, 0]


def random_run(latent: Latent, frames: int | None, key: Key) -> Latent:
    """A run of so many consecutive latent frames from a random one of each clip, or for None the whole. A causal VAE
    decodes the run as a clip of its own, whose first latent frame is one frame of pixels."""
    if frames is None or frames >= latent.shape[1]:
        return latent
    start = jax.random.randint(key, latent.shape[:1], 0, latent.shape[1] - frames + 1)
    return jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, frames))(latent, start)


def flat(x: Any) -> Any:
    """An array [n g ...], on devices or on the host, as [n g, ...]."""
    return x.reshape(-1, *x.shape[2:])
