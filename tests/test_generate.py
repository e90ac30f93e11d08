"""The shipped teacher through the generator, with the settings that change only how it is computed."""

import dataclasses

import numpy as np
import pytest

from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.generate import Generator, load_teacher


@pytest.fixture(scope="module")
def pipeline():
    return load_teacher("moving_shapes")


def test_the_vae_chunk_changes_no_video(pipeline):
    size = (shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    whole = Generator(pipeline, 12, SamplingConfig(50, 1.0, 0.0), size)
    chunked = dataclasses.replace(whole, vae_chunk=2)
    video = np.stack([shapes.example(0, "validation", 0)[0]])
    latent = whole.encode(video)
    np.testing.assert_allclose(chunked.encode(video), latent, atol=1e-5)
    np.testing.assert_allclose(chunked.decode(latent), whole.decode(latent), atol=1e-5)
