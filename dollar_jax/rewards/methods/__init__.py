"""How rewards reach the student: one file and one class per `config.reward.method`."""

from dollar_jax.config import DistillConfig
from dollar_jax.rewards.methods.base import RewardMethod
from dollar_jax.rewards.methods.ddpo import DDPO
from dollar_jax.rewards.methods.direct import Direct
from dollar_jax.rewards.methods.lrm import LatentReward

METHODS: dict[str, type[RewardMethod]] = {"lrm": LatentReward, "direct": Direct, "ddpo": DDPO}


def method_of(config: DistillConfig) -> RewardMethod:
    """The method of a run; rewards that are all held out are only measured, by the base class."""
    return (METHODS[config.reward.method] if config.reward.trained else RewardMethod)(config)
