"""A random teacher of toy size, as a pipeline folder, and real clips that it has encoded."""

import jax
import numpy as np
import pytest

from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.generate import Generator
from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.models.wan import WanConfig
from dollar_jax.models.wan_vae import WanVAEConfig
from dollar_jax.prepare.job import prepare
from dollar_jax.prepare.settings import PrepareSettings
from dollar_jax.schedule import Schedule
from dollar_jax.video import encode_mp4
from dollar_jax.weights import families
from dollar_jax.weights.pipeline import Component, Pipeline, load_pipeline, save_pipeline
from dollar_jax.weights.umt5 import UMT5
from dollar_jax.weights.wan import WAN_TRANSFORMER
from dollar_jax.weights.wan_vae import WAN_VAE

WAN = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=32,
)
VAE = WanVAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1, 1),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.1, 0.2, 0.3, 0.4),
    latents_std=(1.0, 2.0, 3.0, 4.0),
    in_channels=12,
    out_channels=12,
    patch_size=2,
)
TEXT = UMT5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)


def component(config, network):
    leaves, tree = jax.tree.flatten(network.shapes)
    rng = np.random.default_rng(0)
    values = [np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return Component(config, network, jax.tree.unflatten(tree, values))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    networks = (WAN, WAN_TRANSFORMER.network(WAN)), (VAE, WAN_VAE.network(VAE)), (TEXT, UMT5.network(TEXT))
    parts = [component(*network) for network in networks]
    tokenizer = build_tokenizer(shapes.VOCABULARY)
    save_pipeline(folder, Pipeline(families.WAN, *parts, tokenizer, Schedule("rf", "velocity", shift=3.0)))
    return folder


@pytest.fixture(scope="session")
def generator(teacher):
    return Generator(load_pipeline(teacher), 12, SamplingConfig(50, 1.0, 0.0), (5, 16, 16))


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Eighteen good clips of 9 frames, every other one upright; and four that are of no use."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(18):
        video, caption = shapes.example(3, "train", i)
        video = video[:9, :, 8:24] if i % 2 == 0 else video[:9, 8:24]
        (folder / f"{i:02d}.mp4").write_bytes(encode_mp4(video, fps=8))
        (folder / f"{i:02d}.txt").write_text(f"{caption} {i}\n")
    whole = (folder / "01.mp4").read_bytes()
    (folder / "04cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "05none.mp4").write_bytes(whole)
    (folder / "06zero.mp4").write_bytes(b"")
    (folder / "20short.mp4").write_bytes(encode_mp4(shapes.example(3, "train", 0)[0][:3], fps=8))
    for name in ("04cut", "06zero", "20short"):
        (folder / f"{name}.txt").write_text("a caption")
    return folder


@pytest.fixture(scope="session")
def settings(videos, teacher):
    return PrepareSettings(
        source=str(videos),
        split="train",
        prompts=None,
        teacher=str(teacher),
        frames=5,
        buckets=((16, 32), (32, 16)),
        fps=None,
        crop="random",
        clips=1,
        sample=False,
        dtype="float32",
        max_text_length=12,
        seed=0,
        shard_size=4,
        batch_size=1,
    )


@pytest.fixture(scope="session")
def whole(settings, generator, tmp_path_factory):
    """The prepared data set and the job's summary."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, prepare(settings, generator, out)
