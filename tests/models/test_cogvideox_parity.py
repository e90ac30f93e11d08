"""The DiT against diffusers' in PyTorch, on random weights that went through a file."""

import dataclasses
import types
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer, positions
from dollar_jax.models.network import make_network
from dollar_jax.weights.cogvideox import COGVIDEOX_TRANSFORMER, cogvideox_table
from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component
from dollar_jax.weights.table import export_stream, import_params

torch.set_num_threads(1)

LENGTH = 5  # diffusers' model with sinusoids takes prompts of exactly its max_text_seq_length
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 6,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": LENGTH,
    "num_layers": 1,
}
SINUSOIDS = {
    "plain": {},
    "deep": {"num_layers": 3, "num_attention_heads": 3, "spatial_interpolation_scale": 1.3},
    "odd": {"patch_size": 1, "attention_bias": False, "temporal_interpolation_scale": 1.7},
}
ROTARY = {"rotary": {"num_layers": 3}, "wide": {"attention_head_dim": 32, "num_attention_heads": 1, "norm_eps": 1e-3}}


def reference(folder, **fields):
    """A saved diffusers model in which no parameter keeps a special value such as 0 or 1."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**(TINY | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return model


def load(folder, **ours):
    config = COGVIDEOX_TRANSFORMER.read(read_config(folder), **ours)
    network = make_network(lambda rngs: CogVideoXTransformer(config, rngs))
    return config, network, import_params(cogvideox_table(config), read_tensors(folder), network.shapes)


def inputs(shape, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *shape, TINY["in_channels"]), np.float32)
    text = rng.standard_normal((2, length, TINY["text_embed_dim"]), np.float32)
    return jnp.asarray(x), jnp.array([999.0, 251.0]), jnp.asarray(text)


def to_torch(x):
    return torch.tensor(np.asarray(x))


def rotary_of(model, frames, height, width):
    """The tables that CogVideoXPipeline makes for a latent of this size."""
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    pipeline = types.SimpleNamespace(vae_scale_factor_spatial=1, transformer=model)
    return prepare(pipeline, height, width, frames, torch.device("cpu"))


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def check(folder, fields, sizes):
    """Output and gradient with respect to the latent for each (t, h, w, text length)."""
    model = reference(folder, **fields)
    _, network, params = load(folder)
    for *shape, length in sizes:
        x, t, text = inputs(shape, length)
        tables = rotary_of(model, *shape) if fields.get("use_rotary_positional_embeddings") else None
        x_torch = to_torch(x).permute(0, 1, 4, 2, 3).requires_grad_()
        out = model(x_torch, to_torch(text), to_torch(t), image_rotary_emb=tables)
        out = out.sample.permute(0, 1, 3, 4, 2)
        weight = np.random.default_rng(1).standard_normal(out.shape, np.float32)
        (out * torch.tensor(weight)).sum().backward()

        def weighted(x, t=t, text=text, weight=weight):
            out = network.apply(params, x, t, text)
            return (out * weight).sum(), out

        ours_grad, ours = jax.jit(jax.grad(weighted, has_aux=True))(x)
        assert relative(ours, out.detach().numpy()) < 1e-4
        assert relative(ours_grad, x_torch.grad.permute(0, 1, 3, 4, 2).numpy()) < 1e-4


# The first is the size the model was made for, whose positions diffusers keeps.
@pytest.mark.parametrize("name", SINUSOIDS)
def test_forward_and_gradient_match_with_sinusoids(tmp_path, name):
    check(tmp_path, SINUSOIDS[name], [(3, 6, 8, LENGTH), (5, 8, 4, LENGTH), (2, 4, 10, LENGTH)])


@pytest.mark.parametrize("name", ROTARY)
def test_forward_and_gradient_match_with_rotary_embeddings(tmp_path, name):
    fields = {**ROTARY[name], "use_rotary_positional_embeddings": True}
    check(tmp_path, fields, [(3, 6, 8, 5), (1, 12, 4, 7), (4, 4, 14, 1)])


@pytest.mark.parametrize("grid", [(30, 45), (45, 30), (24, 40), (60, 90), (17, 3)])
def test_positions_at_real_size_match_the_pipeline(grid):
    model = types.SimpleNamespace(
        config=diffusers.CogVideoXTransformer3DModel(**(TINY | {"sample_height": 60, "sample_width": 90})).config
    )
    cos, sin = rotary_of(model, 13, 2 * grid[0], 2 * grid[1])
    theirs = torch.atan2(sin, cos).reshape(13, *grid, -1)
    ours = positions((13, *grid), CogVideoXConfig(sample_height=60, sample_width=90))
    # The first frequency of each axis is 1: its angle is the position.
    for axis, (rows, first) in enumerate(zip(ours, (0, 4, 10), strict=True)):
        index = [0, 0, 0, first]
        index[axis] = slice(None)
        turn = theirs[tuple(index)].numpy() - rows
        np.testing.assert_allclose(turn, 2 * np.pi * np.round(turn / (2 * np.pi)), atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_features_are_the_hidden_states_after_the_same_block(tmp_path, scan, assert_tapped):
    """Of 3 blocks at 0.7 the second's; the prediction beside them is the one without a tap."""
    model, seen = reference(tmp_path, num_layers=3), []
    _, network, params = load(tmp_path, scan_layers=scan)
    x, t, text = inputs((3, 4, 6))
    model.transformer_blocks[1].register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    with torch.no_grad():
        model(to_torch(x).permute(0, 1, 4, 2, 3), to_torch(text), to_torch(t))

    assert_tapped(network, params, (x, t, text), seen[0].numpy())


def test_bf16_stays_close_to_fp32(tmp_path):
    reference(tmp_path, num_layers=3)
    args = inputs((3, 4, 6))
    _, network, params = load(tmp_path)
    _, half, _ = load(tmp_path, dtype="bfloat16")
    exact, rounded = (jax.jit(n.apply)(params, *args) for n in (network, half))
    assert rounded.dtype == jnp.float32  # of the last layer
    assert 0 < relative(rounded, np.asarray(exact)) < 0.05


@pytest.mark.parametrize("fields", [{"num_layers": 2}, {"attention_bias": False, "patch_size": 1}])
def test_round_trip_through_our_own_file(tmp_path, fields):
    model = reference(tmp_path / "theirs", **fields)
    config, _, params = load(tmp_path / "theirs")
    tensors = dict(export_stream(cogvideox_table(config), params))
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    assert tensors.keys() == theirs.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)

    write_component(tmp_path / "ours", COGVIDEOX_TRANSFORMER.write(config), tensors)
    again = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours")
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[name], err_msg=name)
    names = {key for key in model.config if not key.startswith("_")}
    assert {key: again.config[key] for key in names} == {key: model.config[key] for key in names}
    assert load(tmp_path / "ours")[0] == config


def test_scan_and_remat_change_nothing():
    base = CogVideoXConfig(**(TINY | {"num_layers": 2, "use_rotary_positional_embeddings": True}))
    x, t, text = inputs((3, 4, 4))
    network = make_network(lambda rngs: CogVideoXTransformer(base, rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape, np.float32)), network.shapes)

    def value_and_grad(scan, remat):
        config = dataclasses.replace(base, scan_layers=scan, remat=remat)
        network = make_network(lambda rngs: CogVideoXTransformer(config, rngs))

        def loss(params, x):
            return jnp.square(network.apply(params, x, t, text)).mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        value_and_grad(True, "full"),
        value_and_grad(False, "none"),
    )


def test_real_sizes_build_without_memory():
    two = make_network(lambda rngs: CogVideoXTransformer(CogVideoXConfig(), rngs))
    count = sum(leaf.size for leaf in jax.tree.leaves(two.shapes))
    assert 1.6e9 < count < 1.8e9, "CogVideoX-2B has 1.69 billion parameters"
    size = CogVideoXConfig(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)
    five = make_network(lambda rngs: CogVideoXTransformer(size, rngs))
    count = sum(leaf.size for leaf in jax.tree.leaves(five.shapes))
    assert 5.5e9 < count < 5.7e9, "CogVideoX-5B has 5.57 billion parameters"
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 13, 60, 90, 16), (1,), (1, 226, 4096))]
    for network in (two, five):
        assert jax.eval_shape(network.apply, network.shapes, *args).shape == (1, 13, 60, 90, 16)


def test_fresh_network_predicts_zero():
    tiny = make_network(lambda rngs: CogVideoXTransformer(CogVideoXConfig(**TINY), rngs))
    params = jax.jit(tiny.init)(jax.random.key(0))
    assert not jnp.any(jax.jit(tiny.apply)(params, *inputs((3, 4, 4))))


@pytest.mark.parametrize("shape, message", [((3, 5, 4, 6), "does not divide"), ((3, 4, 4, 7), "7 channels")])
def test_wrong_latents_are_refused(shape, message):
    network = make_network(lambda rngs: CogVideoXTransformer(CogVideoXConfig(**TINY), rngs))
    with pytest.raises(ValueError, match=message):
        args = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros((1, 3, 20))
        jax.eval_shape(network.apply, network.shapes, *args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size_t": 2}, "patch_size_t = 2.*1.0"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings"),
        ({"ofs_embed_dim": 512}, "ofs_embed_dim = 512"),
        ({"num_layers": None}, "lacks num_layers"),
        ({"attention_head_dim": 24, "use_rotary_positional_embeddings": True}, "attention_head_dim is 24"),
        ({"attention_head_dim": 12}, "the width is 360"),
    ],
)
def test_foreign_configurations_are_refused(change, message):
    fields = {**COGVIDEOX_TRANSFORMER.write(CogVideoXConfig()), **change}
    with pytest.raises(ValueError, match=message):
        COGVIDEOX_TRANSFORMER.read({key: value for key, value in fields.items() if key != "num_layers" or value})
