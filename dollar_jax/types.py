"""Shape vocabulary shared by every module: `b` batch, `t h w c` latent video, `l d` text tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jaxtyping
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Latent = Float[Array, "b t h w c"]
LatentSteps = Float[Array, "n b t h w c"]
TextStates = Float[Array, "b l d"]
# The empty prompt may be given once for the whole batch.
NullText = Float[Array, "#b l d"]
# Network timesteps, in [0, num_train_timesteps]; negative is the clean end.
Time = Float[Array, " b"]
TimeSteps = Float[Array, "n b"]
PerSample = Float[Array, " b"]
# One number for the batch, or one per sample.
Weight = int | float | Float[Array, "..."]
Key = PRNGKeyArray
# One key for the batch, or one per sample.
Keys = PRNGKeyArray | jaxtyping.Key[Array, " b"]
Params = PyTree
# (params, x_t, t, text); the number of given frames where there are some, and an `image` where one is the condition.
Apply = Callable[..., Latent]


class ImageCondition(NamedTuple):
    """What a network is told of a clip's first frame: latents of it and grey ones, perhaps an encoder's tokens."""

    latent: Float[Any, "b t h w c"]
    tokens: Float[Any, "b m d"] | None = None
