"""Low-rank adapters against the kernels they stand for, and in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dollar_jax.models import lora
from dollar_jax.models.wan import WanConfig
from dollar_jax.weights.wan import WAN_TRANSFORMER

NETWORK = WAN_TRANSFORMER.network(
    WanConfig(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
)
TARGETS = ("blocks/attn1/to_(q|out)", "blocks/ffn/proj_in", "proj_out")
RANK, ALPHA = 3, 6.0


def random(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def adapted():
    return lora.adapt(NETWORK, RANK, ALPHA, TARGETS)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(9)
    x, text = (rng.normal(size=s).astype(np.float32) for s in ((2, 2, 4, 4, 4), (2, 3, 8)))
    return jnp.asarray(x), jnp.array([300.0, 900.0]), jnp.asarray(text)


def test_only_the_targets_have_adapters(adapted):
    shapes = {k: v.shape for k, v in flatten_dict(lora.adapters(adapted.shapes), sep="/").items()}
    assert shapes == {
        "blocks/attn1/to_q/adapter/down": (2, 16, 3),
        "blocks/attn1/to_q/adapter/up": (2, 3, 16),
        "blocks/attn1/to_out/adapter/down": (2, 16, 3),
        "blocks/attn1/to_out/adapter/up": (2, 3, 16),
        "blocks/ffn/proj_in/adapter/down": (2, 16, 3),
        "blocks/ffn/proj_in/adapter/up": (2, 3, 32),
        "proj_out/adapter/down": (16, 3),
        "proj_out/adapter/up": (3, 16),
    }


def test_fresh_adapters_change_nothing_and_can_learn(adapted, inputs):
    params, fresh = random(NETWORK.shapes, 0), lora.adapters(adapted.init(jax.random.key(1)))
    plain = NETWORK.apply(params, *inputs)
    np.testing.assert_array_equal(adapted.apply(lora.combine(params, fresh), *inputs), plain)

    grads = jax.jit(jax.grad(lambda a: jnp.square(adapted.apply(lora.combine(params, a), *inputs)).sum()))(fresh)
    for path, g in flatten_dict(grads, sep="/").items():
        assert np.abs(g).max() > 0 if path.endswith("up") else not np.any(g), path
    down = np.asarray(fresh["blocks"]["attn1"]["to_q"]["adapter"]["down"])
    assert 0.9 * 16**-0.5 < np.abs(down).max() <= 16**-0.5


def test_adapters_are_added_to_the_kernels(adapted, inputs):
    params, trained = random(NETWORK.shapes, 0), random(lora.adapters(adapted.shapes), 1)
    apart = adapted.apply(lora.combine(params, trained), *inputs)
    merged = lora.merge(params, trained, ALPHA / RANK)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(NETWORK.apply(merged, *inputs), apart, rtol=1e-4, atol=1e-4)
    assert np.abs(apart - NETWORK.apply(params, *inputs)).max() > 0.1
    low = trained["blocks"]["ffn"]["proj_in"]["adapter"]
    change = jax.tree.map(np.subtract, merged, params)["blocks"]["ffn"]
    expected = 2.0 * np.einsum("lir,lro->lio", low["down"], low["up"])
    np.testing.assert_allclose(change["proj_in"]["kernel"], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(change["proj_out"]["kernel"])


def test_adapters_keep_to_the_dtype_of_the_products():
    half = WAN_TRANSFORMER.network(
        WanConfig(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            dtype="bfloat16",
        )
    )
    shapes = lora.adapt(half, RANK, ALPHA, TARGETS).shapes
    assert {x.dtype for x in jax.tree.leaves(lora.adapters(shapes))} == {jnp.dtype("float32")}


def test_bad_targets_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'blocks/attn9' names no dense layer; .*blocks/attn1/to_q"):
        lora.adapt(NETWORK, RANK, ALPHA, ("blocks/attn9",))
