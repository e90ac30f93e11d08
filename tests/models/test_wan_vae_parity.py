"""The video VAE against diffusers' in PyTorch, on random weights that went through a file."""

import dataclasses
import functools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax.models.chunks import CausalCache
from dollar_jax.models.network import make_network
from dollar_jax.models.wan_vae import CausalConv3d, RMSNorm, WanVAE, WanVAEConfig, denormalise, normalise
from dollar_jax.weights.families import PUBLISHED
from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component
from dollar_jax.weights.table import export_stream, import_params
from dollar_jax.weights.vae import WAN_VAE, vae_table

TOLERANCE = 1e-4
# Many small convolutions: to compile them well takes longer than to run them badly.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
STATISTICS = {"z_dim": 4, "latents_mean": [0.3, -1.0, 0.0, 2.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
# The shipped teacher's, with fewer channels, Wan 2.1's own, and Wan 2.2's.
PATCHED: dict[str, Any] = {
    **STATISTICS,
    "base_dim": 4,
    "decoder_base_dim": 6,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
FULL: dict[str, Any] = {**STATISTICS, "base_dim": 8}
RESIDUAL: dict[str, Any] = {
    **STATISTICS,
    "base_dim": 4,
    "decoder_base_dim": 6,
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
CONFIGS = {"patched": PATCHED, "full": FULL, "residual": RESIDUAL}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per configuration a folder, diffusers' model and ours, every parameter random."""
    loaded = {}
    for name, fields in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = diffusers.AutoencoderKLWan(**fields).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        loaded[name] = (folder, model, *load(folder))
    return loaded


def load(folder):
    config = WAN_VAE.read(read_config(folder))
    network = make_network(lambda rngs: WanVAE(config, rngs))
    params = import_params(vae_table(network.shapes), read_tensors(folder), network.shapes)
    return config, Jitted(network), jax.tree.map(jnp.asarray, params)


class Jitted:
    """A VAE's functions, compiled once for all tests."""

    def __init__(self, network):
        self.network = network
        self.encode = jit(functools.partial(network.apply, method="encode"))
        self.decode = jit(functools.partial(network.apply, method="decode"))


def clip(frames, height=16, width=32):
    x = np.random.default_rng(frames).uniform(-1, 1, (2, frames, height, width, 3))
    return x.astype(np.float32)


def noise(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def to_torch(x):
    return torch.tensor(x).permute(0, 4, 1, 2, 3)


def to_numpy(x):
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_match(saved, name, frames):
    _, model, config, vae, params = saved[name]
    video = clip(frames)
    shape = config.latent_shape(*video.shape[1:4])
    space = 16 if name == "residual" else 8
    assert shape == ((frames + 3) // 4, 16 // space, 32 // space, 4)
    latent = noise(2, *shape)
    with torch.no_grad():
        posterior = model.encode(to_torch(video)).latent_dist
        decoded = to_numpy(model.decode(to_torch(latent)).sample)
    mean, log_variance = vae.encode(params, video)
    assert mean.shape == (2, *shape)
    assert relative(mean, to_numpy(posterior.mean)) < TOLERANCE
    assert relative(log_variance, to_numpy(posterior.logvar)) < TOLERANCE

    assert np.mean(np.abs(decoded) < 1) > 0.5, "clipping hides what is compared"
    ours = vae.decode(params, latent)
    assert ours.shape == video.shape
    assert relative(ours, decoded) < TOLERANCE


@pytest.mark.parametrize("name, chunk", [("patched", 1), ("patched", 3), ("full", 1), ("residual", 1)])
def test_chunks_make_the_same_numbers_as_the_whole_clip(saved, name, chunk):
    # 17 frames are 5 latent frames: 4 chunks of 1 after the first frame, or 2 + 3.
    _, model, config, vae, params = saved[name]
    video, latent = clip(17), noise(2, *config.latent_shape(17, 16, 32))
    parts = jit(functools.partial(vae.network.apply, method="encode", chunk=chunk))(params, video)
    for part, whole in zip(parts, vae.encode(params, video), strict=True):
        assert relative(part, np.asarray(whole)) < 1e-5
    parts = jit(functools.partial(vae.network.apply, method="decode", chunk=chunk))(params, latent)
    assert relative(parts, np.asarray(vae.decode(params, latent))) < 1e-5
    with torch.no_grad():
        assert relative(parts, to_numpy(model.decode(to_torch(latent)).sample)) < TOLERANCE


@pytest.mark.parametrize("method, frames, size", [("encode", 65, (64, 96, 3)), ("decode", 17, (8, 12, 4))])
def test_a_long_clip_costs_the_memory_of_a_chunk(saved, method, frames, size):
    _, _, _, vae, params = saved["full"]
    x = jax.ShapeDtypeStruct((1, frames, *size), np.float32)

    def temporary(chunk):
        run = jit(functools.partial(vae.network.apply, method=method, chunk=chunk))
        return run.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    # How much less depends on how leanly XLA schedules the whole: 0.32 where it takes one thing at a time.
    assert temporary(1) < 0.35 * temporary(None)


def test_gradient_of_decode_matches(saved):
    _, model, config, vae, params = saved["patched"]
    latent = noise(2, *config.latent_shape(5, 16, 32))
    weight = noise(2, 5, 16, 32, 3)
    z = to_torch(latent).requires_grad_()
    (model.decode(z).sample * to_torch(weight)).sum().backward()

    def weighted(z, params):
        return (vae.network.apply(params, z, method="decode") * weight).sum()

    assert relative(jit(jax.grad(weighted))(latent, params), to_numpy(z.grad)) < TOLERANCE


def test_the_past_does_not_see_the_future(saved):
    _, _, _, vae, params = saved["patched"]
    video = clip(9)
    changed = video.copy()
    changed[:, 6:] = -video[:, 6:]
    before, after = (vae.encode(params, x)[0] for x in (video, changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])  # frame 0; frames 1 to 4
    assert np.abs(before[:, 2] - after[:, 2]).max() > 0.01

    latent = noise(2, 3, 2, 3, 4)
    moved = latent.copy()
    moved[:, 2] += 1
    before, after = (vae.decode(params, z) for z in (latent, moved))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 0.01


def test_clipping_can_be_left_out(saved):
    _, _, _, vae, params = saved["patched"]
    latent = jnp.asarray(noise(2, 1, 2, 3, 4))
    out = params["decoder"]["conv_out"]
    wide = {**out, "bias": out["bias"] + jnp.linspace(-2, 2, 12)}
    params = {**params, "decoder": {**params["decoder"], "conv_out": wide}}
    free = jit(functools.partial(vae.network.apply, method="decode", clip=False))(params, latent)
    assert free.min() < -1.5 and free.max() > 1.5
    np.testing.assert_allclose(vae.decode(params, latent), np.clip(free, -1, 1), atol=1e-5)


def test_norms_have_a_finite_gradient_at_zero():
    network = make_network(lambda rngs: RMSNorm(4, WanVAEConfig()))
    total = lambda x: network.apply({"gamma": jnp.ones(4)}, x).sum()  # noqa: E731
    assert np.isfinite(jax.grad(total)(jnp.zeros((1, 1, 1, 1, 4)))).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_export_is_bit_identical(saved, tmp_path, name):
    _, model, config, vae, params = saved[name]
    tensors = dict(export_stream(vae_table(vae.network.shapes), params))
    theirs = {key: value.numpy() for key, value in model.state_dict().items()}
    assert tensors.keys() == theirs.keys()
    write_component(tmp_path, WAN_VAE.write(config), tensors)
    again = diffusers.AutoencoderKLWan.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[key], err_msg=key)
    names = {key for key in model.config if not key.startswith("_")}
    assert {key: again.config[key] for key in names} == {key: model.config[key] for key in names}
    assert WAN_VAE.read(read_config(tmp_path)) == config


def test_latents_are_normalised_as_the_pipeline_does(saved):
    _, model, config, _, _ = saved["patched"]
    z = noise(2, 3, 2, 3, 4)
    # As in WanPipeline, which keeps 1 / std.
    mean = torch.tensor(model.config.latents_mean).view(1, 4, 1, 1, 1)
    inverse = 1.0 / torch.tensor(model.config.latents_std).view(1, 4, 1, 1, 1)
    raw = to_numpy(to_torch(z) / inverse + mean)
    np.testing.assert_allclose(denormalise(jnp.asarray(z), config), raw, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalise(jnp.asarray(raw), config), z, rtol=1e-5, atol=1e-6)


def test_fresh_convolutions_in_time_repeat_the_present():
    build = {
        "same": lambda rngs: CausalConv3d(3, 3, (3, 1, 1), WanVAEConfig(), rngs),
        "twice": lambda rngs: CausalConv3d(3, 6, (3, 1, 1), WanVAEConfig(), rngs),
        "random": lambda rngs: CausalConv3d(3, 3, (3, 3, 3), WanVAEConfig(), rngs),
    }
    x = jnp.asarray(noise(1, 4, 2, 2, 3))
    out = {}
    for name, make in build.items():
        network = make_network(make)
        params = jit(network.init)(jax.random.key(0))
        assert not np.any(params["kernel"][:-1]), "a fresh network looks at the past"
        out[name] = network.apply(params, x, CausalCache())
    np.testing.assert_allclose(out["same"], x, atol=1e-6)
    np.testing.assert_allclose(out["twice"], np.concatenate([x, x], -1), atol=1e-6)
    assert np.std(out["random"]) > 0.1


def test_a_wide_convolution_is_summed_from_its_bias_on():
    """Tap by tap: with the bias at the end, Wan 2.2's decoder for rewards did not fit beside the state on a v6e."""
    network = make_network(lambda rngs: CausalConv3d(32, 4, (3, 3, 3), WanVAEConfig(), rngs))
    x = jax.ShapeDtypeStruct((1, 4, 4, 4, 32), jnp.float32)
    traced = jax.make_jaxpr(functools.partial(network.apply, method="inside"))(network.shapes, x)
    added = [[v.aval.size for v in e.invars] for e in traced.jaxpr.eqns if e.primitive.name == "add"]
    assert added == [[4, 128], [128, 128], [128, 128]]


@pytest.mark.parametrize("size", [(4, 16, 24), (16, 16, 24), (17, 12, 24), (17, 16, 25)])
def test_clips_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="×".join(map(str, size)) + ".* multiples of 8"):
        WanVAEConfig().latent_shape(*size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"is_residual": True, "dim_mult": [1, 3, 1]}, "dim_mult .* averaged from 1 to 3"),
        ({"dropout": 0.1}, "dropout = 0.1"),
        ({"attn_scales": [1.0]}, "attn_scales must be empty"),
        ({"temperal_downsample": [True]}, "temperal_downsample has 1 entries"),
        ({"latents_std": [1.0]}, "need z_dim = 4"),
        ({"scale_factor_spatial": 16}, r"scale_factor_spatial 16 do not fit .* make 8$"),
        ({"temperal_downsample": [False, True]}, r"scale_factor_temporal 4 .* makes 2, dim_mult"),
        ({"base_dim": None}, "lacks base_dim"),
    ],
)
def test_foreign_configurations_are_refused(saved, change, message):
    fields = {**read_config(saved["patched"][0]), **change}
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        WAN_VAE.read(fields)


def test_bad_shape_names_the_tensor(saved):
    _, _, _, vae, params = saved["patched"]
    table = vae_table(vae.network.shapes)
    tensors = dict(export_stream(table, params))
    name = "decoder.up_blocks.0.upsamplers.0.resample.1.weight"
    tensors[name] = tensors[name][:1]
    with pytest.raises(ValueError, match=name):
        import_params(table, tensors, vae.network.shapes)


@pytest.mark.parametrize("name", ["wan_1_3b", "wan22_5b"])
def test_a_published_vae_takes_a_narrower_decoder(name):
    config = dataclasses.replace(PUBLISHED[name].vae, decoder_base_dim=32)
    network = WAN_VAE.network(config)
    fields = {key: value for key, value in WAN_VAE.write(config).items() if key != "_class_name"}
    fields |= {key: list(value) for key, value in fields.items() if isinstance(value, tuple)}  # as of JSON
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**fields).state_dict()
    assert {row.source for row in vae_table(network.shapes)} == theirs.keys()
    sizes = sum(x.size for x in jax.tree.leaves(network.shapes))
    assert sizes == sum(x.numel() for x in theirs.values())
    latent = jax.ShapeDtypeStruct((1, 3, 4, 4, config.z_dim), jnp.float32)
    frames = jax.eval_shape(functools.partial(network.apply, method="decode"), network.shapes, latent)
    side = 4 * config.scale_factor_spatial
    assert frames.shape == (1, 9, side, side, 3)
