"""What a step of distillation is given and gives: networks and settings, its batch, and what is to be scored. The
registered classes cross between host and step, with arrays or, where a program is set up, their shapes or shardings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Float, Int

from dollar_jax import schedule as schedules
from dollar_jax.config import DistillConfig
from dollar_jax.sampling import Denoiser
from dollar_jax.schedule import Schedule
from dollar_jax.state import RewardStatistics
from dollar_jax.types import Apply, ImageCondition, Key, Latent, Params, PerSample, Time

if TYPE_CHECKING:
    from dollar_jax.rewards.pixels import PixelRewards

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The apply functions of the step: one diffusion transformer for all roles, the latent reward model, the JAX
    rewards of decoded latents, None without any, and the discriminator, on parameters of the fake score."""

    denoiser: Apply
    latent_reward: Any  # (params, latent, text) → [b]
    pixel_rewards: PixelRewards | None = None
    discriminator: Any = None  # (params, x_t, t, text, given frames, early=) → prediction and logit [b], or that alone


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What is fixed for a whole run. `score_real`: the data has latents that the latent reward model may learn from."""

    config: DistillConfig
    networks: Networks
    schedule: Schedule
    score_real: bool = True

    def reading(self, teacher: Params) -> Distillation:
        """With the teacher for the latent reward model, where that reads its features."""
        if self.config.reward.head.depth is None:
            return self
        latent_reward = functools.partial(self.networks.latent_reward, teacher=teacher)
        return dataclasses.replace(self, networks=dataclasses.replace(self.networks, latent_reward=latent_reward))

    def start(self, clip: Latent, key: Key) -> Latent:
        """Noise, with the given frames of `clip`: where sampling starts."""
        return schedules.keep_given(self.schedule, clip, jax.random.normal(key, clip.shape))

    def logit(self, params: Params, batch: Batch, x_t: Latent, t: Time, early: bool = True) -> Any:
        """The discriminator's; not `early`, of the fake score's prediction and it."""
        told = {} if batch.image is None else {"image": batch.image}
        return self.networks.discriminator(params, x_t, t, batch.text, *self.schedule.given, early=early, **told)

    def denoiser(self, params: Params, batch: Batch, *guidance: Any) -> Denoiser:
        """For the batch's text and images; `guidance` is null text and weight."""
        return Denoiser(self.networks.denoiser, params, self.schedule, batch.text, *guidance, image=batch.image)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the step reads and never changes; an argument of the step, in no checkpoint."""

    teacher: Params
    null_text: Float[Any, "1 l d"]
    reward: Params = ()  # of decoder and JAX rewards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step takes. `tokens` are the prompts as integers, by the label of the JAX reward that reads them;
    `reward` is what the reward method has kept of earlier steps (`RewardMethod.inputs`), `image` a teacher's of I2V."""

    latent: Float[Any, "b t h w c"]
    text: Float[Any, "b l d"]
    tokens: Mapping[str, Int[Any, "b l"]] = dataclasses.field(default_factory=dict)
    reward: Any = None
    image: ImageCondition | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What the student generated on the way to its loss, and the raw rewards of it if those were needed there."""

    latent: Float[Any, "b t h w c"]
    reward: Float[Any, "n r"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardSamples:
    """What the host is to score: n prompts with g latents each, a generated one and for some methods a real one.
    `reward` is NaN where the host has to score. `predicted` is what the latent reward model says, NaN without one, and
    `scale` what a unit of each trained reward counts. `states` are the last ones of a rollout."""

    latent: Float[Any, "n g t h w c"]
    reward: Float[Any, "n g r"]
    predicted: Float[Any, "n g"]
    scale: Float[Any, "n k"] | None = None
    states: Float[Any, "n s t h w c"] | None = None


@dataclasses.dataclass(frozen=True)
class References:
    """What the student's loss is measured against; nothing in it gets a gradient."""

    ema: Params
    fake_score: Params
    latent_reward: Params
    reward_statistics: RewardStatistics
    frozen: Frozen
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class StudentPass:
    """One forward pass of the student from x_t at `t` to the `generated` clean latent. `segments` are the times of
    L_CD's teacher from x_t on, where that loss shares the pass."""

    params: Params
    references: References
    batch: Batch
    x_t: Latent
    t: Time
    segments: Float[Array, "m b"] | None
    generated: Latent


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the student's loss, `weight(config) * scale(config, step) * mean(loss)`. `loss(distillation,
    student_pass, key)` → one number per sample, and fields of `Generated` that were found on the way; None where the
    reward method adds the gradient itself. The metric `name` is `sign` times the mean. `symbol` is the weight's in
    DOLLAR eq. (8.12), `label` names the term and `curve` its metric to people."""

    name: str
    symbol: str
    label: str
    curve: str
    weight: Callable[[DistillConfig], float]
    loss: Callable[[Distillation, StudentPass, Key], tuple[PerSample, dict[str, Array]]] | None
    scale: Callable[[DistillConfig, Array], float | Float[Array, ""]] = lambda config, step: 1.0
    sign: int = 1
