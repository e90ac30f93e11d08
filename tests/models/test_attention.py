"""Attention's kernels against plain matrices, and shared over a mesh against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dollar_jax.models import activation_sharding
from dollar_jax.models import attention as module
from dollar_jax.models.attention import attention
from dollar_jax.models.wan import WanConfig
from dollar_jax.sharding import with_mesh
from dollar_jax.weights.wan import WAN_TRANSFORMER

AXES = ("data", "fsdp", "context", "tensor")


def draw(n, m, batch=2, heads=2, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(n)
    return [jnp.asarray(rng.normal(size=(batch, s, heads, dim)), dtype) for s in (n, m, m)]


def exact(q, k, v, length):
    """The definition, in fp64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k[:, :length]) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v[:, :length])


def value_and_gradients(**options):
    """Jitted: the output, and the gradients of a loss that weighs its every element differently."""

    def loss(q, k, v):
        out = attention(q, k, v, **options)
        return (jnp.sin(out.astype(jnp.float32)) * jnp.arange(out.size).reshape(out.shape) / out.size).sum(), out

    return lambda *x: jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*x)


def spread(mesh, f):
    """`f` compiled for all devices of the mesh, its arguments whole on each."""
    return jax.jit(with_mesh(mesh, f), in_shardings=NamedSharding(mesh, PartitionSpec()))


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
    ("n", "m", "length", "dtype", "tolerance"),
    [
        (70, 200, 150, jnp.float32, 2e-6),
        (130, 128, None, jnp.bfloat16, 2e-2),
        (60, 5_120, 5_000, jnp.float32, 4e-6),
        (60, 5_120, None, jnp.bfloat16, 2e-2),
    ],
    ids=["padded", "bf16", "five parts of dq", "five parts of dq in bf16"],
)
def test_the_tpu_kernel_gives_the_numbers_of_xla(n, m, length, dtype, tolerance):
    """Interpreted, forward and gradient, where neither queries nor keys are whole blocks."""
    x = draw(n, m, dtype=dtype)
    ours = jax.jit(value_and_gradients(length=length, implementation="splash"))(*x)
    theirs = jax.jit(value_and_gradients(length=length, implementation="xla"))(*x)
    assert_close(ours, theirs, tolerance)
    assert ours[0][1].dtype == dtype
    assert_close(theirs[0][1], exact(*x, length), tolerance)
    if length is not None:
        assert not np.asarray(ours[1][1])[:, length:].any(), "padding must get no gradient"


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_the_backward_pass_of_whole_scores_is_jax_nns_derivative(dtype, tolerance, monkeypatch):
    """The values in fp32, whatever is given; and keys and queries of other numbers."""
    x = draw(70, 90, dtype=dtype)
    ours = jax.jit(value_and_gradients(implementation="xla"))(*x)
    monkeypatch.setattr(module, "_plain", lambda q, k, v, scale: jax.nn.dot_product_attention(q, k, v, scale=scale))
    theirs = jax.jit(value_and_gradients(implementation="xla"))(*(a.astype(jnp.float32) for a in x))
    assert_close(ours, theirs, tolerance)
    assert all(a.dtype == dtype for a in ours[1])


def test_blocks_waste_little():
    assert (
        activation_sharding.block_size(7_680) == 768
        and activation_sharding.block_size(32_760) in (512, 1024)
        and activation_sharding.block_size(512) == 512
    )
    assert activation_sharding.block_size(70) == 128 and activation_sharding.block_size(6_240, 4) == 256
    assert (
        activation_sharding.block_size(512, 2) == 256
        and activation_sharding.block_size(3_520, 2) == 256
        and activation_sharding.block_size(200, 2) == 256
    )
    for tokens in (4_095, 7_680, 17_776, 32_760, 75_600):
        block = activation_sharding.block_size(tokens)
        assert block % 128 == 0 and -tokens % block < 0.03 * tokens


@pytest.mark.parametrize(
    ("options", "n", "m"),
    [
        ({"context": "gather", "length": 30}, 32, 32),
        ({"context": "ulysses", "length": 30}, 32, 32),
        ({"context": None, "implementation": "xla"}, 32, 5),
        ({"context": "gather", "implementation": "splash"}, 32, 32),
        ({"context": "ulysses", "length": 30, "implementation": "splash"}, 32, 32),
    ],
    ids=["gather", "ulysses", "cross", "splash", "ulysses and splash"],
)
def test_a_mesh_changes_no_number(options, n, m):
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, (AxisType.Auto,) * 4)
    x, f = draw(n, m, heads=4), value_and_gradients(**options)
    assert_close(spread(mesh, f)(*x), jax.jit(f)(*x), 2e-6)


def test_devices_that_trade_tokens_for_two_heads_each_keep_their_order():
    mesh = jax.make_mesh((1, 2, 2, 1), AXES, (AxisType.Auto,) * 4, devices=jax.devices()[:4])
    x, f = draw(32, 32, heads=4), value_and_gradients(context="ulysses")
    assert_close(spread(mesh, f)(*x), jax.jit(f)(*x), 2e-6)


def test_a_sequence_that_does_not_divide_is_padded():
    """Twelve tokens over eight devices, through the whole transformer and back."""
    network = WAN_TRANSFORMER.network(
        WanConfig(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
        )
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), network.shapes)
    x, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 3, 4, 4, 4), (1, 3, 8)))

    def loss(params, x):
        out = network.apply(params, x, jnp.full(1, 500.0), text)
        return jnp.sin(out).sum(), out

    f = jax.value_and_grad(loss, (0, 1), has_aux=True)
    mesh = jax.make_mesh((1, 1, 8, 1), AXES, (AxisType.Auto,) * 4)
    ours, alone = spread(mesh, f)(params, x), jax.jit(f)(params, x)
    # The biases of keys change nothing: their gradients are rounding alone.
    for out in (ours, alone):
        for part in ("attn1", "attn2"):
            out[1][0]["blocks"][part]["to_k"]["bias"] *= 0
    assert_close(ours, alone, 1e-5)


def test_padding_is_little_and_in_whole_blocks(monkeypatch):
    for parts, tokens, padded in ((1, 32_760, 32_760), (8, 32_760, 32_768), (16, 32_760, 32_768), (8, 12, 16)):
        monkeypatch.setattr(activation_sharding, "axis_size", lambda axis, parts=parts: parts)
        assert activation_sharding.padded_length(tokens) == padded
    monkeypatch.setattr(activation_sharding, "platform", lambda: "tpu")
    for parts, tokens, padded in ((1, 32_760, 32_768), (1, 75_600, 75_776), (1, 600, 640), (8, 32_760, 32_768)):
        monkeypatch.setattr(activation_sharding, "axis_size", lambda axis, parts=parts: parts)
        assert activation_sharding.padded_length(tokens) == padded
        assert padded % activation_sharding.block_size(padded) == 0, "a kernel would pad it again"


@pytest.mark.parametrize(
    ("platform", "dtype", "masked", "kind"),
    [
        ("tpu", jnp.bfloat16, False, "splash"),
        ("tpu", jnp.float32, True, "xla"),
        ("cuda", jnp.bfloat16, False, "cudnn"),
        ("cuda", jnp.float32, False, "xla"),
        ("cpu", jnp.bfloat16, False, "xla"),
    ],
)
def test_the_platform_chooses_the_kernel(monkeypatch, platform, dtype, masked, kind):
    monkeypatch.setattr(activation_sharding, "platform", lambda: platform)
    assert module._choose(jnp.zeros((1, 2, 1, 8), dtype), masked) == kind


def test_bad_use_is_one_sentence():
    q, k, v = draw(4, 4)
    with pytest.raises(ValueError, match="'splash' takes no mask"):
        attention(q, k, v, mask=jnp.ones((1, 1, 4, 4), bool), implementation="splash")
    mesh = jax.make_mesh((1, 1, 8, 1), AXES, (AxisType.Auto,) * 4)
    with pytest.raises(ValueError, match="4 tokens do not divide over the mesh's context axis of 8"):
        jax.eval_shape(with_mesh(mesh, lambda *x: attention(*x, context="gather")), q, k, v)
    with pytest.raises(ValueError, match="attention is 'flash'; it can be one of"):
        WanConfig(attention="flash")  # pyright: ignore[reportArgumentType]
