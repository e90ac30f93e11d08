"""The JAX rewards of a run behind their decoder, as one pure function for the jitted step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dollar_jax.config import RewardConfig
from dollar_jax.rewards.methods import METHODS
from dollar_jax.rewards.reward import LARGEST, AnyReward, JaxReward
from dollar_jax.types import Latent, Params

Decode = Callable[[Params, Latent], jax.Array]  # parameters, latents → frames in [0, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class PixelRewards:
    """`columns` are the JAX rewards' positions among all `count` of them, `labels` their names."""

    decode: Decode
    rewards: tuple[JaxReward, ...]
    columns: tuple[int, ...]
    labels: tuple[str, ...]
    count: int
    remat: bool

    def tokens(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The prompts as integers [b, l], by label, for those rewards that read them."""
        readers = {name: r.tokenize for name, r in zip(self.labels, self.rewards, strict=True) if r.tokenize}
        return {name: np.asarray(tokenize(prompts), np.int32) for name, tokenize in readers.items()}

    def params(self, decoder: Params) -> Params:
        """What `__call__` takes, with the decoder's parameters."""
        params = {name: r.params for name, r in zip(self.labels, self.rewards, strict=True)}
        return {"decoder": decoder, "rewards": params}

    def __call__(self, params: Params, latent: Latent, tokens: Mapping[str, jax.Array]) -> Float[Array, "b n"]:
        """Rewards of the latents' frames; NaN in the columns of host rewards and for latents that are not finite. With
        `remat` the backward pass computes decoder and rewards again, one after the other, and keeps nothing of them."""
        keep = jax.checkpoint if self.remat else lambda function: function
        finite = jnp.isfinite(latent).all(axis=tuple(range(1, latent.ndim)))
        latent = jnp.where(finite.reshape(-1, *(1,) * (latent.ndim - 1)), latent, 0.0)
        frames = keep(self.decode)(params["decoder"], latent)
        columns = [jnp.full(len(latent), jnp.nan)] * self.count
        for i, name, reward in zip(self.columns, self.labels, self.rewards, strict=True):
            words = None if reward.tokenize is None else tokens[name]
            values = keep(reward.function)(params["rewards"][name], frames, words)
            if values.shape != (len(latent),):
                found = f"gave shape {values.shape} for {len(latent)} videos"
                raise ValueError(f"the reward {name!r} {found}; it must give one number per video")
            # A reward may give a finite number to anything, so what is not finite never counts.
            values = values.astype(jnp.float32)
            columns[i] = jnp.where(finite & (jnp.abs(values) <= LARGEST), values, jnp.nan)
        return jnp.stack(columns, -1)


def pixel_rewards(config: RewardConfig, rewards: Sequence[AnyReward], decode: Decode) -> PixelRewards | None:
    """The JAX ones among the terms' rewards, if any. Raises ValueError when a host reward is to be differentiated."""
    found = {i: reward for i, reward in enumerate(rewards) if isinstance(reward, JaxReward)}
    differentiated = METHODS[config.method].differentiates_pixels
    if differentiated and (host := [i for i in config.trained if i not in found]):
        name = config.rewards[host[0]].name
        mend = "config.reward.method must be 'lrm' or 'ddpo'"
        raise ValueError(f"the reward {name!r} is a host reward, without a gradient: {mend}")
    if not found:
        return None
    labels, remat = tuple(config.rewards[i].label for i in found), config.remat and differentiated
    return PixelRewards(decode, tuple(found.values()), tuple(found), labels, len(rewards), remat)
