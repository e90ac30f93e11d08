"""CogVideoX's video VAE against diffusers' in PyTorch, on random weights that went through a file."""

import functools
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from dollar_jax.models.network import make_network
from dollar_jax.models.wan_vae import denormalise, normalise
from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component
from dollar_jax.weights.table import export_stream, import_params
from dollar_jax.weights.vae import COGVIDEOX_VAE, vae_table

torch.set_num_threads(1)

TOLERANCE = 1e-4
# Many small convolutions: to compile them well takes longer than to run them badly.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def levels(count: int) -> dict[str, Any]:
    return {"down_block_types": ["CogVideoXDownBlock3D"] * count, "up_block_types": ["CogVideoXUpBlock3D"] * count}


CONFIGS: dict[str, dict[str, Any]] = {
    # Four levels as in the published VAE, and two of which time is halved in one.
    "full": {
        **levels(4),
        "block_out_channels": [4, 8, 8, 12],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 0.7,
    },
    "small": {
        **levels(2),
        "block_out_channels": [6, 6],
        "latent_channels": 3,
        "layers_per_block": 2,
        "norm_num_groups": 3,
        "temporal_compression_ratio": 2,
        "norm_eps": 1e-3,
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per configuration a folder, diffusers' model and ours, every parameter random."""
    loaded = {}
    for name, fields in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = diffusers.AutoencoderKLCogVideoX(**fields).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn_like(parameter) * scale)
            model.decoder.conv_out.conv.weight.mul_(0.2)
        model.save_pretrained(folder)
        loaded[name] = (folder, model, *load(folder))
    return loaded


def load(folder):
    config = COGVIDEOX_VAE.read(read_config(folder))
    network = make_network(lambda rngs: CogVideoXVAE(config, rngs))
    params = import_params(vae_table(network.shapes), read_tensors(folder), network.shapes)
    return config, Jitted(network), jax.tree.map(jnp.asarray, params)


class Jitted:
    """A VAE's functions, compiled once for all tests."""

    def __init__(self, network):
        self.network = network
        self.encode = jit(functools.partial(network.apply, method="encode"))
        self.decode = jit(functools.partial(network.apply, method="decode"))


def clip(frames, height=16, width=24):
    x = np.random.default_rng(frames).uniform(-1, 1, (2, frames, height, width, 3))
    return x.astype(np.float32)


def noise(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def to_torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)


def to_numpy(x):
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


# 5 and 9 frames are one chunk, 17 and 25 are several; an even number of latent frames has no single first.
@pytest.mark.parametrize("name, frames", [("full", 1), ("full", 5), ("full", 9), ("full", 17), ("small", 25)])
def test_encode_and_decode_match(saved, name, frames):
    _, model, config, vae, params = saved[name]
    video = clip(frames)
    with torch.no_grad():
        posterior = model.encode(to_torch(video)).latent_dist
        latent = noise(*to_numpy(posterior.mean).shape)
        decoded = to_numpy(model.decode(to_torch(latent)).sample)
    mean, log_variance = vae.encode(params, video)
    assert relative(mean, to_numpy(posterior.mean)) < TOLERANCE
    assert relative(log_variance, to_numpy(posterior.logvar)) < TOLERANCE

    decoded = np.clip(decoded, -1, 1)
    assert np.mean(np.abs(decoded) < 1) > 0.5, "clipping hides what is compared"
    ours = vae.decode(params, latent)
    assert relative(ours, decoded) < TOLERANCE
    if frames != 5:
        assert ours.shape == video.shape
        assert config.latent_shape(*video.shape[1:4]) == latent.shape[1:]


def test_gradient_of_decode_matches(saved):
    _, model, config, vae, params = saved["small"]
    latent = noise(2, *config.latent_shape(9, 4, 6))
    weight = noise(2, 9, 4, 6, 3)
    z = to_torch(latent).requires_grad_()
    (model.decode(z).sample * to_torch(weight)).sum().backward()

    def weighted(z, params):
        return (vae.network.apply(params, z, method="decode", clip=False) * weight).sum()

    assert relative(jit(jax.grad(weighted))(latent, params), to_numpy(z.grad)) < TOLERANCE


def test_chunks_after_the_first_are_compiled_once(saved):
    _, _, config, vae, params = saved["small"]

    def lines(frames):
        latent = jax.ShapeDtypeStruct((1, *config.latent_shape(frames, 4, 4)), jnp.float32)
        return len(jax.jit(functools.partial(vae.network.apply, method="decode")).lower(params, latent).as_text())

    assert lines(17) < 1.01 * lines(13)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_is_bit_identical(saved, tmp_path, name):
    _, model, config, vae, params = saved[name]
    tensors = dict(export_stream(vae_table(vae.network.shapes), params))
    theirs = {key: value.numpy() for key, value in model.state_dict().items()}
    assert tensors.keys() == theirs.keys()
    write_component(tmp_path, COGVIDEOX_VAE.write(config), tensors)
    again = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[key], err_msg=key)
    names = {key for key in model.config if not key.startswith("_")}
    assert {key: again.config[key] for key in names} == {key: model.config[key] for key in names}
    assert COGVIDEOX_VAE.read(read_config(tmp_path)) == config


def test_latents_are_scaled_as_the_pipeline_does(saved):
    config = saved["full"][2]
    z = noise(2, 3, 2, 3, 4)
    raw = 1 / config.scaling_factor * z
    np.testing.assert_allclose(denormalise(jnp.asarray(z), config), raw, rtol=1e-6)
    np.testing.assert_allclose(normalise(jnp.asarray(raw), config), z, rtol=1e-6)


def test_the_published_vae_builds_without_memory():
    config = CogVideoXVAEConfig()
    network = make_network(lambda rngs: CogVideoXVAE(config, rngs))
    count = sum(leaf.size for leaf in jax.tree.leaves(network.shapes))
    assert 2.1e8 < count < 2.2e8, "it has 215.6 million parameters"
    assert config.latent_shape(49, 480, 720) == (13, 60, 90, 16)


@pytest.mark.parametrize("size", [(48, 16, 24), (13, 16, 24), (17, 12, 24), (17, 16, 25)])
def test_clips_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="×".join(map(str, size)) + ".*multiple of 8, .* multiples of 8"):
        CogVideoXVAEConfig().latent_shape(*size)


def test_chunks_of_another_length_are_refused(saved):
    _, _, _, vae, params = saved["small"]
    with pytest.raises(ValueError, match="takes 2 latent frames at a time, not 3"):
        vae.network.apply(params, jnp.zeros((1, 5, 2, 2, 3)), method="decode", chunk=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_quant_conv": True}, "use_quant_conv = True"),
        ({"latents_mean": [0.0]}, r"latents_mean = \[0.0\]"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types = .*DownBlock2D"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio is 3"),
        ({"temporal_compression_ratio": 16}, "temporal_compression_ratio is 16"),
        ({"norm_num_groups": 5}, "do not divide into"),
        ({"latent_channels": None}, "lacks latent_channels"),
    ],
)
def test_foreign_configurations_are_refused(saved, change, message):
    fields = {**read_config(saved["full"][0]), **change}
    with pytest.raises(ValueError, match=message):
        COGVIDEOX_VAE.read({k: v for k, v in fields.items() if k != "latent_channels" or v})
