"""A dense layer's rounding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dollar_jax.models.layers import Linear


def test_a_layer_of_bf16_operands_can_keep_its_fp32_sums():
    kept = Linear(256, 8, rngs=nnx.Rngs(0), dtype="bfloat16", out_dtype="float32")
    rounded = Linear(256, 8, rngs=nnx.Rngs(0), dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (64, 256))
    operands = (np.asarray(value.astype(jnp.bfloat16), np.float64) for value in (x, kept.kernel[...]))
    exact = np.matmul(*operands)
    errors = [np.abs(np.asarray(layer(x), np.float64) - exact).max() / np.abs(exact).max() for layer in (kept, rounded)]
    assert kept(x).dtype == jnp.float32 and rounded(x).dtype == jnp.bfloat16
    assert errors[0] < 1e-6 and errors[1] > 1e-3
