"""The DiT against diffusers' in PyTorch, on random weights that went through a file."""

import dataclasses
import math
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax.models.embeddings import patchify, unpatchify
from dollar_jax.models.layers import keep_blocks
from dollar_jax.models.network import make_network
from dollar_jax.models.wan import WanConfig, WanTransformer
from dollar_jax.types import ImageCondition
from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component
from dollar_jax.weights.table import export_stream, import_params
from dollar_jax.weights.wan import WAN_TRANSFORMER, wan_table

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 6,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "rope_max_seq_len": 64,
}


def reference(folder, **fields):
    """A saved diffusers model in which no parameter keeps a special value such as 0 or 1."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**{**TINY, **fields}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return model


def load(folder, **ours):
    config = WAN_TRANSFORMER.read(read_config(folder), **ours)
    network = make_network(lambda rngs: WanTransformer(config, rngs))
    return config, network, import_params(wan_table(config), read_tensors(folder), network.shapes)


def inputs(shape, length, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *shape, TINY["in_channels"]), np.float32)
    text = rng.standard_normal((2, length, TINY["text_dim"]), np.float32)
    return jnp.asarray(x), jnp.array([999.0, 251.5]), jnp.asarray(text)


def to_torch(x):
    return torch.tensor(np.asarray(x))


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "layers, cross_attn_norm, given, kept",
    [(1, True, 0, None), (3, True, 0, None), (3, False, 0, None), (3, True, 1, None), (3, True, 0, [0, 2])],
)
def test_forward_and_gradient_match(tmp_path, layers, cross_attn_norm, given, kept):
    """With a given frame diffusers is told the time of every token: 0 for those of the frame. `kept`: of the blocks."""
    model = reference(tmp_path, num_layers=layers, cross_attn_norm=cross_attn_norm)
    _, network, params = load(tmp_path)
    if kept:
        model.blocks = torch.nn.ModuleList(model.blocks[i] for i in kept)
        params = keep_blocks(params, len(kept))
    for shape, length in [((3, 4, 6), 5), ((5, 8, 4), 7)]:
        x, t, text = inputs(shape, length)
        x_torch = to_torch(x).permute(0, 4, 1, 2, 3).requires_grad_()
        times = to_torch(t)
        if given:
            times = times[:, None] * (torch.arange(math.prod(shape) // 4) >= shape[1] * shape[2] // 4)
        out = model(x_torch, times, to_torch(text)).sample.permute(0, 2, 3, 4, 1)
        weight = np.random.default_rng(1).standard_normal(out.shape, np.float32)
        (out * torch.tensor(weight)).sum().backward()
        theirs, theirs_grad = out.detach().numpy(), x_torch.grad.permute(0, 2, 3, 4, 1).numpy()

        def weighted(x, t=t, text=text, weight=weight):
            out = network.apply(params, x, t, text, given)
            return (out * weight).sum(), out

        ours_grad, ours = jax.jit(jax.grad(weighted, has_aux=True))(x)
        assert relative(ours, theirs) < 1e-4
        assert relative(ours_grad, theirs_grad) < 1e-4


@pytest.mark.parametrize("scan", [True, False])
def test_features_are_the_hidden_states_after_the_same_block(tmp_path, scan, assert_tapped):
    """Of 3 blocks at 0.7 the second's; the prediction beside them is the one without a tap."""
    model, seen = reference(tmp_path, num_layers=3), []
    _, network, params = load(tmp_path, scan_layers=scan)
    x, t, text = inputs((3, 4, 6), 5)
    model.blocks[1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        model(to_torch(x).permute(0, 4, 1, 2, 3), to_torch(t), to_torch(text))

    assert_tapped(network, params, (x, t, text), seen[0].numpy())


@pytest.mark.parametrize("image_dim", [None, 20])
def test_a_conditioned_transformer_matches(tmp_path, image_dim):
    """I2V: x of 2 channels, a mask of 2, 1 in the first frame, the image of 2; and its tokens, which come first in
    diffusers. That takes 512 tokens of text for granted."""
    fields = {"num_layers": 3, "out_channels": 2, "image_dim": image_dim, "added_kv_proj_dim": image_dim and 32}
    model = reference(tmp_path, **fields)
    _, network, params = load(tmp_path)
    x, t, text = inputs((3, 4, 6), 512)
    x, latent, rng = x[..., :2], x[..., 2:4], np.random.default_rng(2)
    tokens = None if image_dim is None else jnp.asarray(rng.standard_normal((2, 7, image_dim), np.float32))
    first = (torch.arange(3) == 0).float()[None, None, :, None, None].expand(2, 2, 3, 4, 6)
    ours = [array for array in (x, latent, tokens) if array is not None]
    theirs = [to_torch(array).requires_grad_() for array in ours]
    channels = torch.cat([theirs[0].permute(0, 4, 1, 2, 3), first, theirs[1].permute(0, 4, 1, 2, 3)], 1)
    out = model(channels, to_torch(t), to_torch(text), *theirs[2:]).sample.permute(0, 2, 3, 4, 1)
    weight = rng.standard_normal(out.shape, np.float32)
    (out * torch.tensor(weight)).sum().backward()

    def weighted(arrays):
        x, *image = arrays
        out = network.apply(params, x, t, text, image=ImageCondition(*image))
        return (out * weight).sum(), out

    grads, found = jax.jit(jax.grad(weighted, has_aux=True))(ours)
    assert relative(found, out.detach().numpy()) < 1e-4
    for ours_grad, array in zip(grads, theirs, strict=True):
        assert relative(ours_grad, array.grad.numpy()) < 1e-4
    with pytest.raises(ValueError, match="the latent has 2 channels; in_channels is 6"):
        network.apply(params, x, t, text)


def test_patch_in_time(tmp_path):
    model = reference(tmp_path, num_layers=1, patch_size=(2, 2, 1))
    config, network, params = load(tmp_path)
    x, t, text = inputs((4, 4, 3), 5)
    with torch.no_grad():
        theirs = model(to_torch(x).permute(0, 4, 1, 2, 3), to_torch(t), to_torch(text)).sample.permute(0, 2, 3, 4, 1)
    assert config.patch_size == (2, 2, 1)
    assert relative(jax.jit(network.apply)(params, x, t, text), theirs.numpy()) < 1e-4


def test_bf16_stays_close_to_fp32(tmp_path):
    reference(tmp_path, num_layers=3)
    args = inputs((3, 4, 6), 5)
    _, network, params = load(tmp_path)
    _, half, _ = load(tmp_path, dtype="bfloat16")
    exact, rounded = (jax.jit(n.apply)(params, *args) for n in (network, half))
    assert rounded.dtype == jnp.float32  # of the last layer
    assert 0 < relative(rounded, np.asarray(exact)) < 0.05


def test_bf16_is_no_worse_than_diffusers_bf16(tmp_path):
    model = reference(tmp_path, num_layers=3)
    x, t, text = inputs((3, 4, 6), 5)
    torch_args = to_torch(x).permute(0, 4, 1, 2, 3), to_torch(t), to_torch(text)
    half = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model(*torch_args).sample.permute(0, 2, 3, 4, 1).numpy()
        theirs = half(torch_args[0].bfloat16(), torch_args[1], torch_args[2].bfloat16()).sample
    theirs = theirs.float().permute(0, 2, 3, 4, 1).numpy()
    config, network, params = load(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    ours = jax.jit(network.apply)(params, x, t, text).astype(jnp.float32)
    assert relative(ours, exact) < 1.5 * relative(theirs, exact)
    kept = {k for k, v in half.state_dict().items() if v.dtype == torch.float32}
    exported = dict(export_stream(wan_table(config), params))
    assert {k for k, v in exported.items() if v.dtype == np.float32} == kept


def equations(jaxpr):
    """Every equation, those of loops and calls within included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_bf16_products_and_fp32_norms_modulation_and_embeddings():
    config = WanConfig(**TINY, num_layers=2, dtype="bfloat16", param_dtype="bfloat16")
    network = make_network(lambda rngs: WanTransformer(config, rngs))
    jaxpr = jax.make_jaxpr(network.apply)(network.shapes, *inputs((3, 4, 4), 5)).jaxpr
    found = [(e.primitive.name, {v.aval.dtype.name for v in e.invars}) for e in equations(jaxpr)]
    # Norms and the timestep embedding; the rotary tables are made by numpy.
    for name in ("rsqrt", "cos", "sin"):
        assert {"float32"} == set().union(*(kinds for n, kinds in found if n == name)), name
    products = [kinds for name, kinds in found if name == "dot_general"]
    # time_embedder's two and time_proj; all others, of the block once and of the rest, are bf16.
    assert products.count({"float32"}) == 3
    assert products.count({"bfloat16"}) == len(products) - 3 > 12
    (scan,) = (e for e in equations(jaxpr) if e.primitive.name == "scan")
    assert scan.outvars[0].aval.dtype == jnp.bfloat16


def test_round_trip_through_our_own_file(tmp_path):
    model = reference(tmp_path / "theirs", num_layers=3)
    config, _, params = load(tmp_path / "theirs")
    tensors = dict(export_stream(wan_table(config), params))
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    assert tensors.keys() == theirs.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)

    write_component(tmp_path / "ours", WAN_TRANSFORMER.write(config), tensors)
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[name], err_msg=name)
    assert load(tmp_path / "ours")[0] == config


def test_sharded_folder_reads_the_same(tmp_path):
    model = reference(tmp_path / "one", num_layers=3)
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = load(tmp_path / "one")[2], load(tmp_path / "many")[2]
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_scan_and_remat_change_nothing():
    base = WanConfig(**TINY, num_layers=2)
    x, t, text = inputs((3, 4, 4), 5)
    init = make_network(lambda rngs: WanTransformer(base, rngs)).init
    params = jax.jit(init)(jax.random.key(0))
    # The zeros of the last layer would hide every gradient but its own.
    params["proj_out"]["kernel"] = params["proj_out"]["kernel"] + 0.1

    def value_and_grad(scan, remat):
        config = dataclasses.replace(base, scan_layers=scan, remat=remat)
        network = make_network(lambda rngs: WanTransformer(config, rngs))

        def loss(params, x):
            return jnp.square(network.apply(params, x, t, text)).mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    first = value_and_grad(True, "none")
    for variant in [(True, "full"), (True, "dots"), (False, "attention")]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, value_and_grad(*variant)
        )


def test_patches_round_trip():
    x = jnp.arange(2 * 2 * 4 * 6 * 3.0).reshape(2, 2, 4, 6, 3)
    np.testing.assert_array_equal(unpatchify(patchify(x, (2, 2, 3)), (1, 2, 2), (2, 2, 3)), x)


def test_fresh_network_predicts_zero_and_takes_no_memory_before_init():
    network = make_network(lambda rngs: WanTransformer(WanConfig(num_layers=2), rngs))
    leaves = jax.tree.leaves(network.shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert network.shapes["blocks"]["ffn"]["proj_in"]["kernel"].shape == (2, 5120, 13824)

    tiny = make_network(lambda rngs: WanTransformer(WanConfig(**TINY, num_layers=2), rngs))
    params = jax.jit(tiny.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, tiny.shapes)
    kernel = params["blocks"]["attn1"]["to_q"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1]), "the layers share their initial values"
    assert not jnp.any(jax.jit(tiny.apply)(params, *inputs((3, 4, 4), 5)))


@pytest.mark.parametrize(
    "shape, message", [((3, 5, 4, 6), "does not divide"), ((3, 4, 4, 7), "7 channels"), ((65, 2, 2, 6), "longer")]
)
def test_wrong_latents_are_refused(shape, message):
    network = make_network(lambda rngs: WanTransformer(WanConfig(**TINY, num_layers=1), rngs))
    with pytest.raises(ValueError, match=message):
        args = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros((1, 3, 24))
        jax.eval_shape(network.apply, network.shapes, *args)


def test_image_to_video_and_foreign_configurations_are_refused():
    fields = WAN_TRANSFORMER.write(WanConfig())
    with pytest.raises(ValueError, match="pos_embed_seq_len = 514, .*FLF2V"):
        WAN_TRANSFORMER.read({**fields, "pos_embed_seq_len": 514})
    with pytest.raises(ValueError, match="lacks ffn_dim"):
        WAN_TRANSFORMER.read({k: v for k, v in fields.items() if k != "ffn_dim"})
    # A TypeError when shapes and types are checked at run time.
    with pytest.raises((ValueError, TypeError), match="some"):
        WanConfig(remat="some")  # pyright: ignore[reportArgumentType]
