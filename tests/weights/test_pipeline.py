"""A whole pipeline folder: written by us, read by diffusers, sampled by both; and what is refused."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax.config import SamplingConfig
from dollar_jax.generate import Generator, video_keys
from dollar_jax.models.umt5 import zero_padding
from dollar_jax.models.wan import WanConfig
from dollar_jax.sampling import Denoiser, ode_sample
from dollar_jax.schedule import Schedule, timestep_grid
from dollar_jax.weights import families
from dollar_jax.weights.pipeline import load_pipeline, save_pipeline, tokenize

LENGTH = 12
PROMPTS = ["a small red circle moving left slowly", "a large cyan triangle moving up"]


@pytest.fixture(scope="module")
def pipeline(make_pipeline):
    return make_pipeline(layers=2)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    save_pipeline(path, pipeline)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """The folder's files, free to be broken."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def encode(pipeline, prompts):
    ids, mask = tokenize(pipeline.tokenizer, prompts, LENGTH)
    encoder = pipeline.text_encoder
    return zero_padding(jax.jit(encoder.network.apply)(encoder.params, ids, mask), jnp.asarray(mask))


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_diffusers_pipeline_draws_the_same_latents(folder, weight):
    ours = load_pipeline(folder)
    noise = jax.random.normal(jax.random.key(0), (2, *ours.vae.config.latent_shape(5, 32, 16)))
    steps = 4
    latent = jax.jit(
        lambda params, noise, text, null: ode_sample(
            Denoiser(ours.transformer.network.apply, params, ours.schedule, text, null, weight), noise, steps
        )
    )(ours.transformer.params, noise, encode(ours, PROMPTS), encode(ours, [""]))

    theirs = diffusers.WanPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    # By itself the scheduler shifts the smallest sigma twice; on our grid of unshifted times it does not.
    set_timesteps = theirs.scheduler.set_timesteps
    sigmas = np.linspace(1, 0, steps + 1)[:-1]
    theirs.scheduler.set_timesteps = lambda n, device: set_timesteps(sigmas=sigmas, device=device)
    drawn = (
        theirs(
            PROMPTS,
            height=32,
            width=16,
            num_frames=5,
            num_inference_steps=steps,
            guidance_scale=weight + 1,
            latents=torch.tensor(np.asarray(noise)).permute(0, 4, 1, 2, 3),
            output_type="latent",
            max_sequence_length=LENGTH,
        )
        .frames.permute(0, 2, 3, 4, 1)
        .numpy()
    )
    np.testing.assert_allclose(theirs.scheduler.timesteps, timestep_grid(ours.schedule, steps)[:-1], rtol=1e-6)
    assert np.abs(drawn - noise).max() > 0.5, "the network does nothing"
    assert np.abs(latent - drawn).max() / np.abs(drawn).max() < 1e-4


@pytest.mark.parametrize("solver", ["unipc", "ddim"])
def test_fifty_guided_steps_of_the_whole_pipeline_agree(wan_folder, solver):
    ours, weight, steps = load_pipeline(wan_folder), 5.0, 50
    generator = Generator(ours, LENGTH, SamplingConfig(steps, weight, 0.0, solver), (5, 32, 16))
    draw = generator.teacher_sampler(steps, weight)
    latent = draw(ours.transformer.params, video_keys(0, 2), generator.text(PROMPTS))

    theirs = diffusers.WanPipeline.from_pretrained(wan_folder)
    theirs.set_progress_bar_config(disable=True)
    if solver == "ddim":
        theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        set_timesteps = theirs.scheduler.set_timesteps
        sigmas = np.linspace(1, 0, steps + 1)[:-1]
        theirs.scheduler.set_timesteps = lambda n, device: set_timesteps(sigmas=sigmas, device=device)
    noise = torch.tensor(np.asarray(generator.noise(video_keys(0, 2)))).permute(0, 4, 1, 2, 3)
    drawn = theirs(
        PROMPTS,
        height=32,
        width=16,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=weight + 1,
        latents=noise,
        output_type="latent",
        max_sequence_length=LENGTH,
    ).frames
    assert (drawn - noise).abs().max() > 0.5, "the network does nothing"
    drawn = drawn.permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(latent - drawn).max() / np.abs(drawn).max() < 1e-4


def test_diffusers_reads_prompts_as_we_do(folder):
    ours, theirs = load_pipeline(folder), diffusers.WanPipeline.from_pretrained(folder)
    states, null = theirs.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    np.testing.assert_allclose(encode(ours, PROMPTS), states.detach(), atol=1e-5)
    np.testing.assert_allclose(encode(ours, ["", ""]), null.detach(), atol=1e-5)


def test_loading_undoes_saving(pipeline, folder):
    again = load_pipeline(folder)
    assert again.schedule == pipeline.schedule
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name), getattr(again, name)
        assert theirs.config == ours.config
        jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
    for one, two in zip(*(tokenize(p.tokenizer, PROMPTS, LENGTH) for p in (pipeline, again)), strict=True):
        np.testing.assert_array_equal(one, two)


@dataclasses.dataclass(frozen=True)
class ThirdConfig(WanConfig):
    """Of a family of its own, although it is a WanConfig."""


def test_another_family_is_one_record(pipeline, tmp_path, monkeypatch):
    kind = dataclasses.replace(families.WAN.transformer, class_name="ThirdTransformer3DModel", config=ThirdConfig)
    third = dataclasses.replace(families.WAN, pipeline="ThirdPipeline", transformer=kind, masks_padding=False)
    monkeypatch.setattr("dollar_jax.weights.pipeline.FAMILIES", (*families.FAMILIES, third))
    config = ThirdConfig(**dataclasses.asdict(pipeline.transformer.config))
    transformer = dataclasses.replace(pipeline.transformer, config=config)
    save_pipeline(tmp_path, dataclasses.replace(pipeline, family=third, transformer=transformer))
    again = load_pipeline(tmp_path)
    assert again.family is third and type(again.transformer.config) is ThirdConfig
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ThirdPipeline"
    jax.tree.map(np.testing.assert_array_equal, again.transformer.params, pipeline.transformer.params)


def test_half_precision_files_are_read_as_fp32(pipeline, folder, tmp_path):
    save_pipeline(tmp_path, pipeline, dtype="float16")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).stat().st_size < 0.7 * (folder / name).stat().st_size
    again = load_pipeline(tmp_path)

    def rounded(x, y):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.float16(y).astype(np.float32))

    jax.tree.map(rounded, again.vae.params, pipeline.vae.params)
    jax.tree.map(rounded, again.transformer.params, pipeline.transformer.params)


def test_options_of_ours_reach_the_transformer(folder):
    config = load_pipeline(folder, dtype="bfloat16", remat="full").transformer.config
    assert (config.dtype, config.remat) == ("bfloat16", "full")


def test_a_unipc_scheduler_gives_its_flow_shift(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ).save_pretrained(path.parent)
    assert load_pipeline(copy).schedule == Schedule("rf", "velocity", shift=5.0)


# --- what is refused ------------------------------------------------------------------------------


def refuse(folder, error, *parts):
    """One line that has all the parts."""
    with pytest.raises(error) as caught:
        load_pipeline(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_a_folder_that_is_no_pipeline(tmp_path):
    refuse(tmp_path, FileNotFoundError, tmp_path, "model_index.json")
    refuse(tmp_path / "nowhere", FileNotFoundError, tmp_path / "nowhere")


def test_a_missing_tokenizer(copy):
    for path in (copy / "tokenizer").iterdir():
        path.unlink()
    refuse(copy, (ValueError, OSError), copy / "tokenizer")
    (copy / "tokenizer").rmdir()
    refuse(copy, FileNotFoundError, copy / "tokenizer", "no tokenizer")


def test_a_missing_component(copy):
    (copy / "vae" / "config.json").unlink()
    refuse(copy, FileNotFoundError, copy / "vae" / "config.json")


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("UniPCMultistepScheduler", {}, "prediction_type = 'epsilon'"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas = False"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas = True"),
    ],
)
def test_a_scheduler_that_samples_in_another_way(copy, name, fields, message):
    path = copy / "scheduler" / "scheduler_config.json"
    getattr(diffusers, name)(**fields).save_pretrained(path.parent)
    refuse(copy, ValueError, path, message, "must have")


def test_a_missing_unknown_or_broken_scheduler(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    refuse(copy, ValueError, path, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
    path.write_text("{")
    refuse(copy, ValueError, path, "not valid JSON")
    path.unlink()
    refuse(copy, FileNotFoundError, path)


def test_a_pickle_is_never_opened(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({"a": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    refuse(copy, FileNotFoundError, copy / "transformer", "diffusion_pytorch_model.bin", "pickle")


def test_damaged_weights(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(copy, ValueError, weights)


def test_only_rectified_flows_are_written(pipeline, tmp_path):
    target = tmp_path / "ddpm"
    with pytest.raises(ValueError, match="'ddpm' and prediction 'v' cannot be written"):
        save_pipeline(target, dataclasses.replace(pipeline, schedule=Schedule("ddpm", "v")))
    assert not target.exists(), "refused after writing"
