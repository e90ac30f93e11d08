"""The teacher in the package: small, documented, as good as it says, and the same in diffusers."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.generate import SHIPPED_TEACHERS, Generator, load_teacher, video_keys
from dollar_jax.weights.pipeline import tokenize

FOLDER = SHIPPED_TEACHERS["moving_shapes"]
SEED = 2024  # of videos and noise that the teacher was not measured on
TOLERANCE = 1e-3
FLOORS = {"vae": 0.99, "all_captions": 0.95, "held_out": 0.95}


@pytest.fixture(scope="module")
def provenance():
    path = FOLDER / "provenance.json"
    assert path.is_file(), f"{path} is missing: the package ships no teacher"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def generator(provenance):
    c = provenance["config"]
    sampling = SamplingConfig(num_steps=50, guidance_weight=c["guidance_weight"], eta=0.0)
    size = (shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    return Generator(load_teacher("moving_shapes"), c["max_text_length"], sampling, size)


@pytest.fixture(scope="module")
def validation():
    pairs = [shapes.example(SEED, "validation", i) for i in range(16)]
    return np.stack([video for video, _ in pairs]), [caption for _, caption in pairs]


def agree(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() < TOLERANCE * np.abs(theirs).max()


def to_torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)


def test_it_is_small_and_holds_no_code():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert files, f"{FOLDER} is empty: the package ships no teacher"
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_it_says_how_it_was_made(provenance):
    assert provenance["command"].startswith("dollar pretrain --config=")
    assert re.fullmatch("[0-9a-f]{40}", provenance["commit"])
    assert provenance["config"].keys() >= {"seed", "vae", "text_encoder", "transformer", "teacher"}
    metrics = provenance["metrics"]
    assert metrics["vae"]["psnr"] >= 30
    for part, floor in FLOORS.items():
        assert metrics[part]["alignment"] >= floor


def test_it_is_built_as_it_says(provenance, generator):
    for name in ("transformer", "text_encoder"):
        config = getattr(generator.pipeline, name).config
        for field, value in provenance["config"][name].items():
            ours = getattr(config, field)
            assert (list(ours) if isinstance(ours, tuple) else ours) == value, (name, field)
    assert generator.pipeline.schedule.shift == provenance["config"]["teacher"]["shift"]


def test_videos_survive_the_vae(generator, validation):
    videos, captions = validation
    rebuilt = generator.decode(generator.encode(videos))
    error = np.mean((rebuilt - videos / 255) ** 2)
    assert 10 * np.log10(1 / error) >= 30
    assert shapes.alignment(rebuilt, captions)["alignment"] >= FLOORS["vae"]


def test_latents_are_normalised(generator, validation):
    latent = generator.encode(validation[0])
    np.testing.assert_allclose(latent.mean((0, 1, 2, 3)), 0, atol=0.5)
    # The posterior's own noise counts as well, and is most of the deviation of a channel that is
    # hardly used: means alone spread less.
    spread = latent.std((0, 1, 2, 3))
    assert spread.max() < 1.3 and np.median(spread) > 0.7


def test_samples_show_their_captions(generator):
    covering = shapes.covering_captions()
    captions = [covering[7 * i % len(covering)] for i in range(12)]
    for name in ("colour", "shape", "direction"):
        assert {getattr(c, name) for c in captions} == set(shapes.ATTRIBUTES[name])
    draw = generator.teacher_sampler(50, generator.sampling.guidance_weight)
    text = generator.text([str(caption) for caption in captions])
    latent = draw(generator.pipeline.transformer.params, video_keys(SEED, 12), text)
    reached = shapes.alignment(generator.decode(latent), captions)
    assert reached["alignment"] >= FLOORS["all_captions"]
    assert min(reached.values()) >= 0.9, reached  # of every attribute, in 12 videos


def test_transformer_agrees_with_diffusers(generator):
    model = diffusers.WanTransformer3DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32)
    text = generator.text([str(caption) for caption in shapes.covering_captions()[:2]])
    x = generator.noise(video_keys(SEED, 2))
    t = jnp.array([1000.0, 333.25])
    part = generator.pipeline.transformer
    ours = jax.jit(part.network.apply)(part.params, x, t, text)
    with torch.no_grad():
        theirs = model(to_torch(x), torch.tensor(np.asarray(t)), torch.tensor(text)).sample
    agree(ours, theirs.permute(0, 2, 3, 4, 1))


def test_vae_agrees_with_diffusers(generator, validation):
    model = diffusers.AutoencoderKLWan.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    latent = generator.encode(validation[0])
    decoded = generator.decode(latent)
    mean, std = (torch.tensor(model.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        posterior = model.encode(to_torch(validation[0][:2]) / 127.5 - 1).latent_dist
        frames = model.decode(to_torch(latent[:2]) * std + mean).sample
    agree(latent[:2], ((posterior.mean - mean) / std).permute(0, 2, 3, 4, 1))
    agree(decoded[:2], ((frames + 1) / 2).permute(0, 2, 3, 4, 1))


def test_text_encoder_agrees_with_transformers(generator):
    model = transformers.UMT5EncoderModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    prompts = ["", *map(str, shapes.covering_captions()[:3])]
    ids, mask = tokenize(generator.pipeline.tokenizer, prompts, generator.max_text_length)
    with torch.no_grad():
        states = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    agree(generator.text(prompts), states * torch.tensor(mask)[..., None])
