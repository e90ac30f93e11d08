"""Wan 2.2's TI2V, tiny: imported, sampled, distilled and exported by the commands, against diffusers' pipelines."""

import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from diffusers.utils import torch_utils
from PIL import Image

from dollar_jax import cli
from dollar_jax.config import SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.generate import Generator, make_generator
from dollar_jax.run import read_config, restore_student
from dollar_jax.serve import Studio
from dollar_jax.video import read_image, read_video, to_uint8, write_video
from dollar_jax.weights.families import WAN_TI2V
from dollar_jax.weights.pipeline import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
LENGTH, WEIGHT = 12, 1.5
PROMPT = "a small red circle moving left slowly"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_wan):
    """As from the hub: one time per token, the residual VAE, UniPC with flow shift 5."""
    vae = {"decoder_base_dim": 6, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "is_residual": True}
    vae |= {"in_channels": 12, "out_channels": 12, "patch_size": 2}
    path = tmp_path_factory.mktemp("ti2v")
    save_wan(path, 5.0, vae=vae, expand_timesteps=True)
    return path


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported") / "teacher"
    assert cli.main(["import", str(folder), str(target)]) == 0
    return target


@pytest.mark.parametrize("given", [0, 1], ids=["text", "image"])
def test_the_pipeline_draws_what_diffusers_draws(folder, teacher, picture, assert_diffusers_draws, given):
    ours = load_pipeline(teacher)
    assert ours.family is WAN_TI2V and ours.schedule.shift == 5
    ours = dataclasses.replace(ours, schedule=dataclasses.replace(ours.schedule, given_frames=given))
    generator = Generator(ours, LENGTH, SamplingConfig(4, WEIGHT, 0.0, "unipc"), (5, 32, 16))
    latent, theirs = assert_diffusers_draws(folder, generator, WEIGHT, image=picture if given else None)
    assert theirs.config.expand_timesteps
    if given:
        alone = generator.encode(read_image(picture, 32, 16)[None, None])
        np.testing.assert_array_equal(latent[:, :1], alone.repeat(2, 0))
        np.testing.assert_allclose(generator.decode(latent)[:, :1], generator.decode(alone).repeat(2, 0), atol=1e-5)


def test_a_clips_first_latent_frame_is_its_first_frames(teacher):
    """So that prepared latents hold what image-to-video is given."""
    generator = Generator(load_pipeline(teacher), LENGTH, SamplingConfig(), (9, 32, 32))
    video = shapes.example(3, "train", 1)[0][None, :9]
    first = generator.encode(video[:, :1])
    for chunk in (None, 1):
        whole = dataclasses.replace(generator, vae_chunk=chunk).encode(video)
        assert whole.shape[1] == 3 and np.abs(whole[:, 1:2] - first).max() > 0.1
        np.testing.assert_allclose(whole[:, :1], first, atol=1e-5)


@pytest.fixture(scope="module")
def train(teacher, tmp_path_factory, own_config, two_steps):
    """Two steps of `dollar train` with settings of its own."""

    def run(changes):
        folder = tmp_path_factory.mktemp("run")
        own = own_config(folder, two_steps | {"teacher": str(teacher), "checkpoint_every": 2} | changes)
        assert cli.main(["train", f"--config={own}", f"--workdir={folder / 'run'}"]) == 0
        history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history] == [1, 2]
        assert all(np.isfinite(value) for row in history for value in row.values())
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def run(train):
    return train({})


def sample(run, out, *more):
    return cli.main(["sample", f"--workdir={run}", f"--prompt={PROMPT}", "--steps=2", "--num=1", f"--out={out}", *more])


def test_sample_and_export_of_a_distilled_student(run, picture, tmp_path, assert_card_samples, capsys):
    out = tmp_path / "video.gif"
    assert sample(run, out) == 0
    assert read_video(out).std() > 1
    assert sample(run, out, f"--image={picture}") == 2
    assert "leave out --image" in capsys.readouterr().err
    assert sample(run, tmp_path / "teacher.gif", f"--image={picture}", "--teacher") == 0
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


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2}], ids=["whole", "lora"])
def test_image_to_video_from_videos_to_diffusers(
    teacher, train, make_data, picture, tmp_path, assert_card_samples, capsys, changes
):
    data = make_data(teacher, 24, f"--max_text_length={LENGTH}")
    shown = {"visibility.samples_every": 2, "visibility.videos": 2, "visibility.prompts": ()}
    run = train({"data.name": str(data), "data.given_frames": 1, **shown, **changes})
    assert (run / "samples" / "step_000002.mp4").stat().st_size > 0

    out = tmp_path / "video.gif"
    assert sample(run, out) == 2 and "give --image" in capsys.readouterr().err
    assert sample(run, out, f"--image={picture}", "--scale=1") == 0
    (served := tmp_path / "served").mkdir()
    studio = Studio(run, served, 1, 100)
    drawn = studio.sample({"prompt": PROMPT, "image": base64.b64encode(picture.read_bytes()).decode()})
    config = read_config(run)
    generator = make_generator(config)
    first = generator.decode(generator.encode(read_image(picture, 32, 32)[None, None]))[0, 0]
    write_video(tmp_path / "first.gif", to_uint8(first)[None])  # its colours are as few
    shown, expected = (np.float32(read_video(path)[0]) for path in (out, tmp_path / "first.gif"))
    assert np.abs(shown - expected).mean() < 1 < expected.std()
    shown = read_video(served / drawn["student"]["video"][1:])[0, 4::8, 4::8]  # enlarged, with fewer colours
    assert np.abs(shown - expected).mean() < 0.5 * np.abs(expected[::-1] - expected).mean()
    assert cli.main(["evaluate", f"--workdir={run}", "--quick"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"teacher_2", "student_2"} <= metrics.keys()
    suite = tmp_path / "vbench2_i2v_full_info.json"
    prompts = [PROMPT, f"{PROMPT}, camera pans left"]
    suite.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["i2v_subject"]} for prompt in prompts]))
    Image.open(picture).save(tmp_path / f"{PROMPT}.jpg")
    more = [f"--images={tmp_path}", f"--prompts_file={suite}", "--steps=2", "--num=1"]
    assert cli.main(["evaluate", f"--workdir={run}", f"--vbench={tmp_path / 'vbench'}", *more]) == 0
    assert {path.name for path in (tmp_path / "vbench").iterdir()} == {f"{prompt}-0.mp4" for prompt in prompts}

    student = tmp_path / "student"
    assert cli.main(["export", f"--workdir={run}", str(student)]) == 0
    index = json.loads((student / "model_index.json").read_text())
    assert (index["_class_name"], index["expand_timesteps"]) == ("WanImageToVideoPipeline", True)
    drawers = (pipeline_wan_i2v, torch_utils)
    params = restore_student(run, generator)
    times = config.student.timesteps
    _, undrawn = assert_card_samples(student, generator, params, times, (0, 4, 1, 2, 3), drawers, picture)
    assert undrawn == 1
    shutil.rmtree(student / "__pycache__", ignore_errors=True)
    assert cli.main(["import", str(student), str(tmp_path / "again")]) == 0


def test_an_image_is_refused_where_the_teacher_takes_none(make_config):
    with pytest.raises(ValueError, match="moving_shapes takes no image"):
        make_generator(make_config({"data.given_frames": 1, "visibility.prompts": ()}))
    with pytest.raises(ValueError, match="visibility.prompts have no first frames"):
        make_config({"data.given_frames": 1})
