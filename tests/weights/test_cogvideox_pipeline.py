"""A tiny CogVideoX pipeline folder written by diffusers: read, sampled by both, distilled, and written again."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from diffusers.pipelines.cogvideo import pipeline_cogvideox
from diffusers.utils import torch_utils

from dollar_jax import cli
from dollar_jax import train as loop
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.data.latents import EncodedVideos
from dollar_jax.data.prepared import PreparedVideos
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.generate import Generator, video_keys
from dollar_jax.models.layers import keep_blocks
from dollar_jax.prepare.videos import ClipSettings, read_clips
from dollar_jax.run import CHECKPOINTS, read_history, record_config, restore_student
from dollar_jax.schedule import Schedule, coefficients, timestep_grid
from dollar_jax.video import encode_mp4
from dollar_jax.weights.importer import import_pipeline
from dollar_jax.weights.pipeline import load_pipeline, load_tokenizer, save_pipeline, tokenize
from dollar_jax.weights.scheduler import schedule_of, scheduler_json

torch.set_num_threads(1)

LENGTH = 12
CLIP = (9, 8, 16)
PROMPTS = ["a small red circle moving left slowly", "a large cyan triangle moving up"]
BETAS = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {
    "2b": diffusers.CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=3.0),
    "5b": diffusers.DDIMScheduler(
        **BETAS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ),
}


def randomise(model, scale):
    with torch.no_grad():
        for parameter in model.parameters():
            size = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * size * scale)
    return model.eval()


@pytest.fixture(scope="module", params=["2b", "5b"])
def folder(request, tmp_path_factory):
    """Positions as sinusoids and CogVideoX's scheduler, or rotary embeddings and the general one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        temporal_compression_ratio=2,
        max_text_seq_length=LENGTH,
        use_rotary_positional_embeddings=request.param == "5b",
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        scaling_factor=0.7,
    )
    text = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    diffusers.CogVideoXPipeline(
        build_tokenizer(shapes.VOCABULARY),
        randomise(text, 0.5),
        randomise(vae, 0.5),
        randomise(transformer, 0.7),
        SCHEDULERS[request.param],
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return Generator(load_pipeline(folder), LENGTH, SamplingConfig(50, 1.5, 0.0), CLIP)


@pytest.fixture(scope="module")
def theirs(generator, tmp_path_factory):
    """Diffusers' pipeline, from the folder that we wrote after reading theirs."""
    path = tmp_path_factory.mktemp("ours")
    save_pipeline(path, generator.pipeline)
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_prompts_are_read_as_diffusers_does(generator, theirs):
    states, null = theirs.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    assert relative(generator.text(PROMPTS), states.detach().numpy()) < 1e-4
    assert relative(np.repeat(generator.null_text, 2, 0), null.detach().numpy()) < 1e-4
    assert np.abs(generator.text(PROMPTS)[1, -1]).max() > 0.1, "padding is attended to, not zeroed"


def test_fifty_guided_steps_draw_the_same_latents(folder, generator, theirs):
    theirs.scheduler = SCHEDULERS["5b" if theirs.transformer.config.use_rotary_positional_embeddings else "2b"]
    noise = generator.noise(video_keys(0, 2))
    ours = generator.teacher_sampler(50, 1.5)(
        generator.pipeline.transformer.params, video_keys(0, 2), generator.text(PROMPTS)
    )
    frames, height, width = CLIP
    with torch.no_grad():
        drawn = theirs(
            PROMPTS,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=50,
            guidance_scale=2.5,
            latents=torch.tensor(np.asarray(noise)).permute(0, 1, 4, 2, 3),
            output_type="latent",
            max_sequence_length=LENGTH,
        ).frames
        decoded = (theirs.decode_latents(drawn) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    drawn = drawn.permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_array_equal(theirs.scheduler.timesteps, timestep_grid(generator.pipeline.schedule, 50)[:-1])
    assert np.abs(drawn - noise).max() > 0.5, "the network does nothing"
    assert relative(ours, drawn) < 1e-4

    video = generator.decode(jnp.asarray(drawn))
    assert video.shape == (2, *CLIP, 3) and video.std() > 0.02
    assert relative(video, decoded.numpy()) < 1e-4


def test_loading_undoes_saving(generator, theirs, tmp_path):
    save_pipeline(tmp_path, generator.pipeline)
    again = load_pipeline(tmp_path)
    assert again.schedule == generator.pipeline.schedule
    for name in ("transformer", "vae", "text_encoder"):
        one, two = getattr(generator.pipeline, name), getattr(again, name)
        assert two.config == one.config
        jax.tree.map(np.testing.assert_array_equal, two.params, one.params)


@pytest.mark.parametrize("folder", ["5b"], indirect=True)
def test_an_imported_folder_holds_the_same_pipeline(folder, generator, tmp_path):
    import_pipeline(str(folder), tmp_path / "imported")
    again = load_pipeline(tmp_path / "imported")
    assert again.schedule == generator.pipeline.schedule
    for name in ("transformer", "vae", "text_encoder"):
        one, two = getattr(generator.pipeline, name), getattr(again, name)
        assert two.config == one.config
        jax.tree.map(np.testing.assert_array_equal, two.params, one.params)


@pytest.mark.parametrize("folder", ["2b"], indirect=True)
def test_two_steps_of_distillation_then_a_sample(generator, make_config, tmp_path):
    config = make_config(
        {
            "steps": 2,
            "mesh.data": 2,
            "mesh.fsdp": 4,
            "checkpoint_every": 2,
            "student.timesteps": (999.0, 749.0, 499.0, 249.0),
            "consistency.times": "grid",
            "consistency.skip": 5,
            "consistency.boundary": "lcm",
            "vsd.score_shift": 1.0,
            "vsd.guidance_weight": 1.5,
            "fake_score.updates": 1,
            "student.optimiser.warmup_steps": 0,
        }
    )
    videos = np.random.default_rng(0).integers(0, 256, (8, *CLIP, 3)).astype(np.uint8)
    data = EncodedVideos(generator.encode(videos), generator.text(PROMPTS * 4), PROMPTS * 4)
    state = loop.train(config, tmp_path, generator, data)
    lines = read_history(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    teacher = generator.pipeline.transformer.params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.student, teacher)
    assert min(jax.tree.leaves(moved)) > 0, "every parameter is trained"

    draw = generator.student_sampler(config.student.timesteps)
    with jax.debug_key_reuse(False):  # the first video's key also seeds what is added between steps
        latent = draw(restore_student(tmp_path, generator), video_keys(0, 2), generator.text(PROMPTS))
    video = generator.decode(latent)
    assert video.shape == (2, *CLIP, 3)
    assert np.isfinite(video).all() and video.min() >= 0 and video.max() <= 1


def test_an_exported_student_samples_in_diffusers_as_here(folder, make_config, tmp_path, assert_card_samples):
    """By the card's own snippet: the betas, the times and the prediction of x0 are those of the path. With rotary
    embeddings of a student of one block."""
    times, pipeline = (999.0, 749.0, 499.0, 249.0), load_pipeline(folder)
    layers = 1 if pipeline.transformer.config.use_rotary_positional_embeddings else None
    config = make_config({"teacher": str(folder), "student.timesteps": times, "student.layers": layers})
    record_config(config, tmp_path / "run")
    params = jax.tree.map(lambda x: 0.9 * jnp.asarray(x), keep_blocks(pipeline.transformer.params, layers))
    with Checkpoints(tmp_path / "run" / CHECKPOINTS) as checkpoints:
        checkpoints.save(3, {"ema": {"ema": params}})
    exported = tmp_path / "student"
    assert cli.main(["export", f"--workdir={tmp_path / 'run'}", str(exported)]) == 0
    generator = Generator(pipeline, LENGTH, SamplingConfig(50, 1.5, 0.0), (17, 32, 32))
    drawers = (pipeline_cogvideox, torch_utils)
    assert_card_samples(exported, generator, params, times, (0, 1, 4, 2, 3), drawers)
    # And it is a teacher to go on from.
    assert cli.main(["import", str(exported), str(tmp_path / "again")]) == 0
    again = load_pipeline(tmp_path / "again")
    assert again.schedule == pipeline.schedule and again.transformer.config.num_layers == (layers or 2)
    jax.tree.map(np.testing.assert_array_equal, again.transformer.params, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize("folder", ["2b"], indirect=True)
def test_videos_are_prepared_with_an_imported_teacher(folder, generator, make_config, tmp_path):
    teacher, videos, out = tmp_path / "teacher", tmp_path / "videos", tmp_path / "data"
    assert cli.main(["import", str(folder), str(teacher)]) == 0
    videos.mkdir()
    for i in range(2):
        video, caption = shapes.example(3, "train", i)
        (videos / f"{i}.mp4").write_bytes(encode_mp4(video[:9, :16, :32], fps=8))
        (videos / f"{i}.txt").write_text(str(caption))
    sizes = ["--frames=9", "--height=8", "--width=16", "--clips=1", f"--max_text_length={LENGTH}", "--dtype=float32"]
    assert cli.main(["prepare", f"--source={videos}", f"--teacher={teacher}", f"--out={out}", *sizes]) == 0
    config = make_config({"teacher": str(teacher), "data.name": str(out), "data.max_text_length": LENGTH})
    data = PreparedVideos(config.data).check(config, generator)
    (records,) = data.buckets.values()
    clip = ClipSettings(9, ((8, 16),), None, "centre", 1)
    for i in range(2):
        record = records[i]
        (frames,) = read_clips(str(videos / record["name"].decode()), clip, np.random.default_rng(0))
        mean, std = generator.encode_posterior(frames[None])
        np.testing.assert_allclose(record["latent"], mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record["latent_std"], std[0], rtol=1e-4)
        text = generator.text([record["caption"].decode()])[0]
        np.testing.assert_allclose(record["text"], text, rtol=0.01, atol=0.003)  # of weights in bf16
        assert len(record["text"]) == LENGTH, "padding is part of the text"
    longer = make_config({"teacher": str(teacher), "data.name": str(out), "data.max_text_length": LENGTH + 1})
    with pytest.raises(ValueError, match="config.data.max_text_length to 12"):
        PreparedVideos(longer.data).check(longer, generator)


def test_a_tokenizer_published_as_a_sentencepiece_model_is_read(tmp_path):
    """As CogVideoX's: T5's ids 0, 1 and 2 are padding, end and unknown, and there is no tokenizer.json."""
    (tmp_path / "captions.txt").write_text("\n".join(map(str, shapes.all_captions())))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids, mask = tokenize(load_tokenizer(tmp_path), [*PROMPTS, "A blue Dog"], 40)
    for prompt, row, seen in zip([*PROMPTS, "A blue Dog"], ids, mask, strict=True):
        expected = [*reference.encode(prompt), 1]
        assert row.tolist() == expected + [0] * (40 - len(expected))
        assert seen.tolist() == [1] * len(expected) + [0] * (40 - len(expected))


# --- the files' fields ----------------------------------------------------------------------------


FILE = Path("scheduler_config.json")


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_schedules_survive_their_file(prediction):
    schedule = Schedule("ddpm", prediction, 500, 1.0, "linear", 0.001, 0.02, prediction != "eps", 2.0)
    assert schedule_of(scheduler_json(schedule, "ddpm"), "ddpm", FILE) == schedule


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler"])
def test_fields_left_out_mean_what_they_mean_to_diffusers(name):
    scheduler = getattr(diffusers, name)(clip_sample=False)
    schedule = schedule_of({"_class_name": name, "clip_sample": False}, "ddpm", FILE)
    assert schedule == schedule_of({"_class_name": name, **scheduler.config}, "ddpm", FILE)
    a, _ = coefficients(schedule, jnp.arange(1000.0))
    np.testing.assert_allclose(np.square(a), scheduler.alphas_cumprod.numpy(), atol=3e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "DDIMScheduler"}, "scheduler_config.json has clip_sample = True"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one = False"),
        ({"trained_betas": [0.1]}, r"trained_betas = \[0.1\]"),
        ({"prediction_type": "flow"}, "'flow'.*v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler; .* CogVideoXDDIMScheduler"),
    ],
)
def test_bad_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        schedule_of({"_class_name": "CogVideoXDDIMScheduler", **fields}, "ddpm", FILE)


def test_bad_path_cannot_be_written():
    for schedule in (Schedule("rf", "velocity"), Schedule("ddpm", "conjugate_velocity")):
        with pytest.raises(ValueError, match="cannot be written .* 'ddpm' with v, eps, x0"):
            scheduler_json(schedule, "ddpm")


@pytest.mark.parametrize(
    "name, class_name, message",
    [
        ("transformer", "FluxTransformer2DModel", "FluxTransformer2DModel; those known are .*Wan"),
        ("vae", "AutoencoderKLWan", "vae AutoencoderKLWan; a CogVideoXPipeline has a AutoencoderKLCogVideoX"),
        ("text_encoder", None, "text_encoder None; a CogVideoXPipeline has a T5EncoderModel"),
    ],
)
def test_bad_components_are_named(tmp_path, name, class_name, message):
    index = {
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        name: ["diffusers", class_name],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)
