"""Wan 2.2's TI2V, tiny: imported, sampled, distilled and exported by the commands, against diffusers' pipelines."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from diffusers.utils import torch_utils

from dollar_jax import cli
from dollar_jax.config import SamplingConfig
from dollar_jax.generate import Generator, make_generator, video_keys
from dollar_jax.run import read_config, restore_student
from dollar_jax.video import read_video
from dollar_jax.weights.families import WAN_TI2V
from dollar_jax.weights.pipeline import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
LENGTH, WEIGHT, STEPS = 12, 1.5, 4
PROMPTS = ["a small red circle moving left slowly", "a large cyan triangle moving up"]
RUN = {
    "steps": 2,
    "batch_size": 8,
    "checkpoint_every": 2,
    "log_every": 1,
    "data.train_videos": 8,
    "mesh.fsdp": 8,
    "student.timesteps": (1000.0, 700.0),
    "consistency.skip": 1,
    "fake_score.updates": 1,
    "reward.samples": 2,
    "reward.replay": 8,
    "reward.batch_size": 8,
    "reward.updates": 1,
    "reward.start_step": 0,
    "reward.head.width": 8,
    "visibility.samples_every": 0,
    "sampling.num_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_wan):
    """As from the hub: one time per token, the residual VAE, UniPC with flow shift 5."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    transformer = diffusers.WanTransformer3DModel(num_attention_heads=2, in_channels=4, out_channels=4, **sizes)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )
    path = tmp_path_factory.mktemp("ti2v")
    save_wan(path, transformer, vae, flow_shift=5.0, expand_timesteps=True)
    return path


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "teacher"
    assert cli.main(["import", str(folder), str(target)]) == 0
    return target


def test_the_pipeline_draws_what_diffusers_draws(folder, teacher):
    ours = load_pipeline(teacher)
    assert ours.family is WAN_TI2V and ours.schedule.shift == 5
    generator = Generator(ours, LENGTH, SamplingConfig(STEPS, WEIGHT, 0.0, "unipc"), (5, 32, 16))
    keys = video_keys(0, 2)
    latent = generator.teacher_sampler(STEPS, WEIGHT)(ours.transformer.params, keys, generator.text(PROMPTS))
    theirs = diffusers.WanPipeline.from_pretrained(folder)
    assert theirs.config.expand_timesteps
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        PROMPTS,
        height=32,
        width=16,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=WEIGHT + 1,
        latents=torch.tensor(np.asarray(generator.noise(keys))).permute(0, 4, 1, 2, 3),
        output_type="np",
        max_sequence_length=LENGTH,
    ).frames
    assert drawn.std() > 0.01 and np.mean((drawn > 0) & (drawn < 1)) > 0.5, "nothing to compare"
    np.testing.assert_allclose(generator.decode(latent), drawn, atol=1e-4)


@pytest.fixture(scope="module")
def train(teacher, tmp_path_factory, own_config):
    """Two steps of `dollar train` with settings of its own."""

    def run(changes):
        folder = tmp_path_factory.mktemp("run")
        own = own_config(folder, RUN | {"teacher": str(teacher)} | changes)
        assert cli.main(["train", f"--config={own}", f"--workdir={folder / 'run'}"]) == 0
        history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history] == [1, 2]
        assert all(np.isfinite(value) for row in history for value in row.values())
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def run(train):
    return train({})


def test_sample_and_export_of_a_distilled_student(run, tmp_path, assert_card_samples):
    out = tmp_path / "video.gif"
    assert (
        cli.main(["sample", f"--workdir={run}", f"--prompt={PROMPTS[0]}", "--steps=2", "--num=1", f"--out={out}"]) == 0
    )
    assert read_video(out).std() > 1
    assert cli.main(["export", f"--workdir={run}", str(tmp_path / "student")]) == 0
    config = read_config(run)
    generator = make_generator(config)
    drawers = (pipeline_wan, torch_utils)
    params = restore_student(run, generator)
    snippet, undrawn = assert_card_samples(
        tmp_path / "student", generator, params, config.student.timesteps, (0, 4, 1, 2, 3), drawers
    )
    assert undrawn == 1 and snippet["pipe"].config.expand_timesteps
    assert cli.main(["import", str(tmp_path / "student"), str(tmp_path / "again")]) == 0
