"""Videos as feature vectors, for diversity and for the Fréchet distance. Two networks: the teacher's own VAE encoder,
which is always at hand, and AlexNet with given weights (torchvision's names), or LPIPS heads (arXiv 1801.03924)."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dollar_jax import sharding
from dollar_jax.generate import Generator, beside
from dollar_jax.program import Program
from dollar_jax.video import unit_range
from dollar_jax.weights.safetensors_io import read_tensors

Videos = np.ndarray  # uint8 [n t h w 3]


class Features(NamedTuple):
    """`vectors` maps uint8 videos [n t h w 3] to [n d]; `distance`, where there is one, two of them to [n]."""

    name: str
    vectors: Callable[[Videos], np.ndarray]
    distance: Callable[[Videos, Videos], np.ndarray] | None = None


def vae_features(generator: Generator) -> Features:
    """Mean, deviation and mean change in time of every channel of the teacher's VAE latents: d = 3 c."""

    def vectors(videos: Videos) -> np.ndarray:
        generator.pipeline.vae.config.latent_shape(*videos.shape[1:4])  # raises where they do not fit
        axes = (1, 2, 3)
        # One at a time is one compilation whatever the number of videos.
        run = map if sharding.cores(generator.own_mesh.devices.flat) == 1 else beside.map
        latents = run(generator.encode, videos[:, None])
        return np.concatenate([np.concatenate([x.mean(axes), x.std(axes), _change(x).mean(axes)], -1) for x in latents])

    return Features("the teacher's VAE encoder", vectors)


def _change(x: np.ndarray) -> np.ndarray:
    """How much neighbours along the second axis, time, differ; 0 for a single frame."""
    return np.abs(np.diff(x, axis=1)) if x.shape[1] > 1 else np.zeros_like(x)


# AlexNet's convolutions: their number in torchvision's `features`, stride and padding. The first two are
# followed by a pool.
_CONVOLUTIONS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224
_convolve = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "OIHW", "NHWC"), precision="highest")


def alexnet_features(folder: Path) -> Features:
    """AlexNet's last convolution, a mean over space: its mean over time and its mean change in time, d = 512. Frames
    are resized to 224 × 224. With LPIPS's heads `lin0` … `lin4` the LPIPS distance too, a mean over frames, which takes
    frames as they are. Raises FileNotFoundError or ValueError naming what the folder lacks."""
    weights = {name: np.asarray(value, np.float32) for name, value in read_tensors(folder)}
    wanted = [f"features.{i}.{part}" for i, _, _ in _CONVOLUTIONS for part in ("weight", "bias")]
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"{folder} is no AlexNet with torchvision's names: it lacks {missing[0]}")
    heads = [weights[f"lin{i}.model.1.weight"] for i in range(5) if f"lin{i}.model.1.weight" in weights]

    def pooled(frames: jax.Array) -> jax.Array:
        frames = jax.image.resize(frames, (len(frames), _SIDE, _SIDE, 3), "bilinear")
        return alexnet(weights, frames)[-1].mean((1, 2))

    program = Program("alexnet", pooled)

    def vectors(videos: Videos) -> np.ndarray:
        x = np.stack([program(unit_range(video)) for video in videos])
        return np.concatenate([x.mean(1), _change(x).mean(1)], -1)

    distance = Program("lpips", lambda a, b: lpips(weights, heads, a, b).mean())

    def lpips_distance(a: Videos, b: Videos) -> np.ndarray:
        return np.array([distance(unit_range(x), unit_range(y)) for x, y in zip(a, b, strict=True)])

    return Features("AlexNet", vectors, lpips_distance if len(heads) == 5 else None)


def alexnet(weights: Mapping[str, Any], frames: jax.Array) -> list[jax.Array]:
    """The five rectified convolutions of frames [n h w 3] in [0, 1], h and w at least 31."""
    x = (frames - jnp.array(_MEAN)) / jnp.array(_STD)
    found = []
    for place, (index, stride, padding) in enumerate(_CONVOLUTIONS):
        if place in (1, 2):
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        kernel, bias = (weights[f"features.{index}.{part}"] for part in ("weight", "bias"))
        x = jax.nn.relu(_convolve(x, kernel, (stride, stride), [(padding, padding)] * 2) + bias)
        found.append(x)
    return found


def lpips(weights: Mapping[str, Any], heads: list[np.ndarray], a: jax.Array, b: jax.Array) -> jax.Array:
    """LPIPS between frames a and b, both [n h w 3] in [0, 1]; [n]."""

    def unit(x: jax.Array) -> jax.Array:
        return x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)

    layers = zip(alexnet(weights, a), alexnet(weights, b), heads, strict=True)
    parts = [(((unit(x) - unit(y)) ** 2) @ head[0, :, 0]).mean((1, 2, 3)) for x, y, head in layers]
    return sum(parts, jnp.zeros(len(a)))
