"""DDPO, REINFORCE on the student's last two random steps (DOLLAR eq. (8.24)-(8.26)): rewards need no gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from dollar_jax import losses
from dollar_jax import schedule as schedules
from dollar_jax.distillation import Batch, Distillation, Metrics, RewardSamples
from dollar_jax.rewards.methods import base
from dollar_jax.rewards.methods.base import RewardMethod, Shape, combined_reward, reward_schedule, reward_term
from dollar_jax.state import TrainState
from dollar_jax.types import Key, Latent, Params, PerSample, TextStates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Scored rollouts of an earlier step: `states` at the last timesteps, raw rewards, NaN in rows to leave out."""

    states: Float[Any, "n s t h w c"]
    text: Float[Any, "n l d"]
    reward: Float[Any, "n k"]


def rollout(
    d: Distillation, params: Params, text: TextStates, clip: Latent, key: Key
) -> tuple[Float[Array, "b s t h w c"], Latent]:
    """The student from noise by the DDPM posterior, without gradient: its states at the last three timesteps, or two if
    there are no more, and the clean latent. `clip` gives shape and given frames."""
    params, batch = jax.lax.stop_gradient(params), Batch(clip, text)
    times = [jnp.full(len(text), t) for t in d.config.student.timesteps]
    keys = jax.random.split(key, len(times))
    states = [d.start(clip, keys[0])]
    for t, t_next, step_key in zip(times, times[1:], keys[1:], strict=False):
        x0 = d.denoiser(params, batch).x0(states[-1], t)
        mean, deviation = schedules.posterior(d.schedule, states[-1], x0, t, t_next)
        states.append(mean + deviation * jax.random.normal(step_key, mean.shape))
    return jnp.stack(states[-3:], 1), d.denoiser(params, batch).x0(states[-1], times[-1])


def policy(
    d: Distillation, params: Params, states: Float[Array, "b s t h w c"], text: TextStates, advantage: PerSample
) -> tuple[Float[Array, ""], Metrics]:
    """L_FT of DDPO: -A Σ log p_θ(x_next | x_t) over the steps between `states`, per element of the latent. No
    importance weight corrects for the rollouts' being a step or two old by the time their rewards are here."""
    times = [jnp.full(len(text), t) for t in d.config.student.timesteps[-states.shape[1] :]]
    total = jnp.zeros(())
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        x0 = d.denoiser(params, Batch(states[:, i], text)).x0(states[:, i], t)
        mean, deviation = schedules.posterior(d.schedule, states[:, i], x0, t, t_next)
        x_next, mean, deviation = schedules.generated(d.schedule, states[:, i + 1], mean, deviation)
        total += losses.policy_gradient(x_next, mean, deviation, advantage).mean()
    return total, {"policy": total}


class DDPO(RewardMethod):
    term = reward_term("policy", "policy gradient of the reward (DDPO)", "DDPO loss", None, sign=1)
    keeps_images = False
    stored_as = "walk"  # as version 0.1 named it

    def check(self) -> None:
        super().check()
        if self.config.expert:
            raise ValueError("config.reward.method 'ddpo' rolls out whole videos, and config.expert draws none")
        if len(self.config.student.timesteps) < 2:
            raise ValueError("config.reward.method 'ddpo' needs at least two of config.student.timesteps")
        if self.config.student.sampler == "ode":
            raise ValueError("config.reward.method 'ddpo' needs noise in each step: config.student.sampler 'renoise'")

    def forwards(self, student: float) -> float:
        n = len(self.config.student.timesteps)
        return student * self.settings.samples / self.config.batch_size * (3 * (min(n, 3) - 1) + n)

    def inputs(self, latent: Shape, text: Shape) -> Rollouts:
        n, states = self.settings.samples, min(3, len(self.config.student.timesteps))
        shapes = (n, states, *latent), (n, *text), (n, len(self.settings.trained))
        return Rollouts(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

    def inputs_sharding(self, mesh: Mesh, samples: NamedSharding) -> NamedSharding:
        return samples

    def memory(self, latent: Shape, text: Shape) -> "RolloutMemory":
        return RolloutMemory(self.inputs(latent, text))

    def add_gradient(
        self, d: Distillation, full: base.Full, state: TrainState, inputs: Rollouts, grads: Params
    ) -> base.Gradient:
        c = self.settings
        statistics = state.reward_statistics.updated(inputs.reward, jnp.ones(len(inputs.reward)), c.statistics_decay)
        advantage = combined_reward(c, statistics, inputs.reward)
        beta = c.weight * reward_schedule(self.config, state.step)
        loss = jax.grad(lambda p: policy(d, full(p), inputs.states, inputs.text, advantage), has_aux=True)
        reinforced, metrics = loss(state.student)
        grads = jax.tree.map(lambda g, r: g + beta * r, grads, reinforced)
        return grads, dataclasses.replace(state, reward_statistics=statistics), metrics

    def candidates(self, d: Distillation, student: Params, rows: Batch, generated: Latent, key: Key) -> base.Candidates:
        states, x0 = rollout(d, student, rows.text, rows.latent, key)
        return [x0], states


class RolloutMemory:
    """The rollouts of the last step, each given to one step only."""

    def __init__(self, shapes: Rollouts):
        self.state = {f"walk_{name}": np.zeros(shape.shape, np.float32) for name, shape in vars(shapes).items()}
        self.state["walk_reward"].fill(np.nan)

    def add(self, samples: RewardSamples, text: np.ndarray, reward: np.ndarray) -> None:
        good = np.isfinite(reward[:, 0]).all(1)
        # What is left out may be not finite, and 0 times that is not 0.
        rows = {"walk_states": (samples.states, 0), "walk_text": (text, 0), "walk_reward": (reward[:, 0], np.nan)}
        for name, (found, none) in rows.items():
            self.state[name] = np.array(found, np.float32)
            self.state[name][~good] = none

    def take(self, step: int) -> Rollouts:
        taken = Rollouts(**{name.removeprefix("walk_"): value for name, value in self.state.items()})
        self.state["walk_reward"] = np.full_like(taken.reward, np.nan)
        return taken
