"""A causal VAE over a clip, chunk by chunk: what its layers remember, and the walk through the clip."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

Frames = Float[Array, "b t h w 3"]
Latent = Float[Array, "b t2 h2 w2 z"]


class CausalCache:
    """What causal layers remember between two chunks of a clip, in the order in which they run: `carried`, the last
    frames each saw in the chunk before, None at the start; `left` fills with those of this chunk."""

    def __init__(self, carried: list[Array] | None = None):
        self.first = carried is None
        self.left: list[Array] = []
        self._carried = iter(carried or ())

    def extend(self, x: Float[Array, "b t h w c"], frames: int, repeat: bool = False) -> Float[Array, "b t2 h w c"]:
        """x after the `frames` frames before it: at the start of the clip zeros, or with `repeat` the first frame."""
        if not self.first:
            before = next(self._carried)
        elif repeat:
            before = jnp.repeat(x[:, :1], frames, 1)
        else:
            before = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        seen = jnp.concatenate([before, x], 1)
        self.left.append(seen[:, seen.shape[1] - frames :])
        return seen


def in_chunks(
    run: Callable[[Array, CausalCache], Array], x: Float[Array, "b t h w c"], head: int, size: int
) -> Float[Array, "b t2 h2 w2 d"]:
    """run(x, cache) of the first `head` frames, then of `size` at a time, in a scan; they must divide."""
    cache = CausalCache()
    start = run(x[:, :head], cache)
    if x.shape[1] == head:
        return start

    def body(carried: list[Array], part: Array) -> tuple[list[Array], Array]:
        cache = CausalCache(carried)
        out = run(part, cache)
        return cache.left, out

    _, rest = jax.lax.scan(body, cache.left, rearrange(x[:, head:], "b (n t) h w c -> n b t h w c", t=size))
    return jnp.concatenate([start, rearrange(rest, "n b t h w c -> b (n t) h w c")], 1)


class ChunkedVAE(nnx.Module):
    """Frames in [-1, 1] ↔ raw latents, channels last. A model says what becomes of one chunk of frames or latent
    frames, and in `sizes` how many are in the first chunk and in the others."""

    encode_chunk: Callable[..., Array]
    decode_chunk: Callable[..., Array]
    sizes: Callable[..., tuple[int, int]]

    def encode(self, frames: Frames, chunk: int | None = None) -> tuple[Latent, Latent]:
        """Posterior mean and log-variance, `chunk` latent frames at a time, or as many as the model can."""
        moments = in_chunks(self.encode_chunk, frames, *self.sizes(frames.shape[1], False, chunk))
        mean, log_variance = jnp.split(moments, 2, -1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, latent: Latent, clip: bool = True, chunk: int | None = None) -> Frames:
        """Frames of a raw latent, in [-1, 1] with `clip`; `chunk` is as of `encode`."""
        x = in_chunks(self.decode_chunk, latent, *self.sizes(latent.shape[1], True, chunk))
        return jnp.clip(x, -1, 1) if clip else x

    def __call__(self, frames: Frames) -> Frames:
        return self.decode(self.encode(frames)[0])
