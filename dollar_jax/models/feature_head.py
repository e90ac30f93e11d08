"""A score of each video from a transformer's tokens: learned queries attend to them, an MLP reads what they found."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dollar_jax.models.attention import attention
from dollar_jax.models.layers import Linear, layer_norm


class FeatureHead(nnx.Module):
    """fp32, and 0 at the start; keys and values, of `width` channels, are in `dtype`."""

    def __init__(self, dim: int, width: int, rngs: nnx.Rngs, dtype: DTypeLike = "float32", queries: int = 4) -> None:
        self.queries = nnx.Param(0.02 * jax.random.normal(rngs.params(), (queries, width)))
        self.to_k, self.to_v = (Linear(dim, width, rngs=rngs, dtype=dtype) for _ in range(2))
        self.hidden = Linear(queries * width, width, rngs=rngs)
        self.score = Linear(width, 1, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, " b"]:
        x = layer_norm(tokens, 1e-6)
        k, v = self.to_k(x), self.to_v(x)
        q = jnp.broadcast_to(self.queries[...].astype(k.dtype), (len(x), *self.queries.shape))
        found = attention(*(a[:, :, None] for a in (q, k, v)), implementation="xla")
        return self.score(jax.nn.silu(self.hidden(found.reshape(len(x), -1))))[:, 0]
