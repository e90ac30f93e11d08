"""A dense layer's rounding; which blocks a shorter network keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dollar_jax.models.layers import Linear, keep_blocks


def test_a_layer_of_bf16_operands_can_keep_its_fp32_sums():
    kept = Linear(256, 8, rngs=nnx.Rngs(0), dtype="bfloat16", out_dtype="float32")
    rounded = Linear(256, 8, rngs=nnx.Rngs(0), dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (64, 256))
    operands = (np.asarray(value.astype(jnp.bfloat16), np.float64) for value in (x, kept.kernel[...]))
    exact = np.matmul(*operands)
    errors = [np.abs(np.asarray(layer(x), np.float64) - exact).max() / np.abs(exact).max() for layer in (kept, rounded)]
    assert kept(x).dtype == jnp.float32 and rounded(x).dtype == jnp.bfloat16
    assert errors[0] < 1e-6 and errors[1] > 1e-3


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        (4, [0]),
        (4, [0, 3]),
        (4, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (5, [0, 2, 4]),
        (30, [0, 10, 19, 29]),
        (30, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]),
        (40, [0, 39]),
    ],
)
def test_blocks_are_kept_from_the_first_to_the_last(of, kept):
    params = {"blocks": {"a": np.arange(of), "b": {"c": np.eye(of)}}, "proj_out": np.ones(of)}
    found = keep_blocks(params, len(kept))
    assert found["blocks"]["a"].tolist() == kept and found["proj_out"] is params["proj_out"]
    np.testing.assert_array_equal(found["blocks"]["b"]["c"].argmax(1), kept)
    assert keep_blocks(params, None) is params
    with pytest.raises(ValueError, match=f"config.student.layers is 41, but the teacher has only {of} blocks"):
        keep_blocks(params, 41)
