"""AlexNet and LPIPS against PyTorch on the same random weights; the VAE's features by their formula."""

import numpy as np
import pytest
import torch

from dollar_jax.evaluate import features as f
from dollar_jax.weights.safetensors_io import write_component

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    out = {}
    for i, (index, shape) in enumerate(SHAPES.items()):
        scale = np.sqrt(2 / np.prod(shape[1:]))
        out[f"features.{index}.weight"] = (scale * rng.normal(size=shape)).astype(np.float32)
        out[f"features.{index}.bias"] = (0.1 * rng.normal(size=shape[0])).astype(np.float32)
        out[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, shape[0], 1, 1)).astype(np.float32)
    return out


def layers(weights, frames):
    """torchvision's `features`, its five rectified convolutions, of LPIPS's scaled input."""
    torch.set_num_threads(1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = ((2 * torch.from_numpy(frames) - 1 - shift) / scale).permute(0, 3, 1, 2)
    found = []
    for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if index in (3, 6):
            x = torch.nn.functional.max_pool2d(x, 3, 2)
        kernel, bias = (torch.from_numpy(weights[f"features.{index}.{k}"]) for k in ("weight", "bias"))
        x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, stride, padding))
        found.append(x)
    return found


def frames(seed, n=2):
    return np.random.default_rng(seed).uniform(size=(n, 67, 72, 3)).astype(np.float32)


def test_alexnet_is_torchs(weights):
    ours, theirs = f.alexnet(weights, frames(0)), layers(weights, frames(0))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.moveaxis(a, -1, 1), b.numpy(), rtol=1e-4, atol=1e-4)


def test_lpips_is_torchs(weights):
    a, b = frames(1), frames(2)
    heads = [weights[f"lin{i}.model.1.weight"] for i in range(5)]
    expected = torch.zeros(2)
    for x, y, head in zip(layers(weights, a), layers(weights, b), heads, strict=True):
        x, y = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
        expected += torch.nn.functional.conv2d((x - y) ** 2, torch.from_numpy(head)).mean((1, 2, 3))
    np.testing.assert_allclose(f.lpips(weights, heads, a, b), expected.numpy(), rtol=1e-4)
    np.testing.assert_allclose(f.lpips(weights, heads, a, a), 0, atol=1e-7)


def test_a_folder_of_weights_gives_features_and_with_heads_a_distance(weights, tmp_path):
    videos = np.random.default_rng(3).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    write_component(tmp_path / "lpips", {}, weights)
    trunk = {name: value for name, value in weights.items() if name.startswith("features")}
    write_component(tmp_path / "alexnet", {}, trunk)
    with_heads, without = (f.alexnet_features(tmp_path / name) for name in ("lpips", "alexnet"))
    assert without.distance is None and with_heads.distance is not None
    vectors = without.vectors(videos)
    assert vectors.shape == (2, 512)
    still = np.repeat(videos[:, :1], 3, 1)
    np.testing.assert_allclose(without.vectors(still)[:, 256:], 0, atol=1e-6)
    assert (vectors[:, 256:] > 0).any()
    assert with_heads.distance(videos, videos) == pytest.approx([0, 0], abs=1e-6)
    assert (with_heads.distance(videos, videos[::-1].copy()) > 0.01).all()
    trunk.pop("features.8.bias")
    write_component(tmp_path / "other", {}, trunk)
    with pytest.raises(ValueError, match="it lacks features.8.bias"):
        f.alexnet_features(tmp_path / "other")


def test_vae_features_are_moments_of_the_latents(toy_generator):
    videos = np.random.default_rng(4).integers(0, 256, (2, 5, 32, 32, 3), np.uint8)
    latent = toy_generator.encode(videos)
    found = f.vae_features(toy_generator).vectors(videos)
    assert found.shape == (2, 12)
    np.testing.assert_allclose(found[1, :4], latent[1].reshape(-1, 4).mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1, 4:8], latent[1].reshape(-1, 4).std(0), rtol=1e-4, atol=1e-5)
    change = np.abs(latent[1, 1:] - latent[1, :-1]).reshape(-1, 4).mean(0)
    np.testing.assert_allclose(found[1, 8:], change, rtol=1e-4, atol=1e-5)
