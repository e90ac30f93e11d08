"""A random teacher of toy size, as a pipeline folder, and real clips that it has encoded."""

import pytest

from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.generate import Generator
from dollar_jax.prepare.job import prepare
from dollar_jax.prepare.settings import PrepareSettings
from dollar_jax.video import encode_mp4
from dollar_jax.weights.pipeline import load_pipeline


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
