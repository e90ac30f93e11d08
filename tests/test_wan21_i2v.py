"""Transformers that are told of an image by channels and, as Wan 2.1's, by CLIP's tokens, tiny: imported, data
prepared, sampled, distilled and exported by the commands, against diffusers' pipelines."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import torch_utils
from PIL import Image

from dollar_jax import cli, objectives
from dollar_jax.config import SamplingConfig
from dollar_jax.data.prepared import PreparedVideos
from dollar_jax.distillation import Batch, Frozen, References
from dollar_jax.generate import Generator, make_generator, video_keys
from dollar_jax.prepare.clips import Loader
from dollar_jax.prepare.settings import PrepareSettings
from dollar_jax.programs import teacher_programs
from dollar_jax.run import read_config, restore_student
from dollar_jax.types import ImageCondition
from dollar_jax.video import read_image, read_video
from dollar_jax.weights.families import WAN, WAN_I2V, WAN_I2V_CLIP
from dollar_jax.weights.pipeline import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
LENGTH, WEIGHT, SIDE = 512, 1.5, 32  # diffusers takes 512 tokens of text beside an image's for granted
PROMPTS = ["a small red circle moving left slowly", "a large cyan triangle moving up"]
RUN = {"checkpoint_every": 1, "data.max_text_length": LENGTH, "visibility.prompts": ()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, save_wan):
    """As from the hub, with and without CLIP."""
    found = {}
    for clip in (True, False):
        channels = {"in_channels": 12} | ({"image_dim": 16, "added_kv_proj_dim": 24} if clip else {})
        found[clip] = tmp_path_factory.mktemp("i2v")
        save_wan(found[clip], pipeline="WanImageToVideoPipeline", transformer=channels, clip=clip)
    return found


@pytest.fixture(scope="module")
def teachers(folders, tmp_path_factory):
    target = tmp_path_factory.mktemp("imported")
    for clip, folder in folders.items():
        assert cli.main(["import", str(folder), str(target / str(clip))]) == 0
    return {clip: target / str(clip) for clip in folders}


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "channels"])
def test_the_pipeline_draws_what_diffusers_draws(folders, teachers, picture, assert_diffusers_draws, clip):
    ours = load_pipeline(teachers[clip])
    assert ours.family is (WAN_I2V_CLIP if clip else WAN_I2V)
    generator = Generator(ours, LENGTH, SamplingConfig(4, WEIGHT, 0.0, "unipc"), (9, SIDE, SIDE))
    with pytest.raises(ValueError, match="an image to continue, and 'a large cyan triangle moving up' has none"):
        generator.condition(PROMPTS)
    latent, theirs = assert_diffusers_draws(folders[clip], generator, WEIGHT, image=picture)
    condition = generator.condition(PROMPTS)
    assert isinstance(condition.given, ImageCondition) and (condition.given.tokens is not None) == clip
    if clip:
        tokens = theirs.encode_image(Image.fromarray(read_image(picture, SIDE, SIDE))).detach().numpy()
        np.testing.assert_allclose(condition.given.tokens[:1], tokens, atol=1e-5 * np.abs(tokens).max())
        without = condition.given._replace(tokens=np.zeros_like(condition.given.tokens))
        draw = generator.teacher_sampler(4, WEIGHT)
        other = draw(ours.transformer.params, video_keys(0, 2), condition.text, without)
        assert np.abs(np.asarray(other) - np.asarray(latent)).max() > 1e-2, "the tokens make no difference"


@pytest.fixture(scope="module")
def prepared(teachers, make_data):
    return {clip: make_data(teacher, 16, f"--max_text_length={LENGTH}") for clip, teacher in teachers.items()}


@pytest.fixture
def config(make_config, teachers, prepared, two_steps):
    def make(clip=True, **changes):
        return make_config(
            two_steps | RUN | {"teacher": str(teachers[clip]), "data.name": str(prepared[clip])} | changes
        )

    return make


def test_prepared_data_keeps_what_diffusers_would_make_of_the_first_frame(config, folders):
    """The mode of the VAE's posterior of the frame and grey ones, normalised, and the tokens before the last block."""
    made = config()
    generator = make_generator(made)
    data = PreparedVideos(made.data).check(made, generator)
    batch = next(data.batches(made))
    clips = {name: data.info.features[name].shape for name in ("image", "image_tokens")}
    assert clips == {"image": (2, 4, 4, 4), "image_tokens": (17, 16)}
    for family, told in ((WAN_I2V, (True, False)), (WAN, None)):  # teachers with the same VAE and text encoder
        pipeline = dataclasses.replace(generator.pipeline, family=family, image_encoder=None)
        other = PreparedVideos(made.data).check(made, dataclasses.replace(generator, pipeline=pipeline))
        image = next(other.batches(made))["image"]
        assert told == (image and tuple(part is not None for part in image))
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(folders[True])
    mean, std = (
        torch.tensor(x)[:, None, None, None] for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    source = prepared_frames(data)
    for name, latent, tokens in zip(batch["name"], *batch["image"], strict=True):
        first = source[str(name)]
        video = torch.zeros(1, 3, 5, SIDE, SIDE)
        video[0, :, 0] = torch.tensor(first).permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            expected = ((pipe.vae.encode(video).latent_dist.mode()[0] - mean) / std).permute(1, 2, 3, 0).numpy()
            theirs = pipe.encode_image(Image.fromarray(first))[0].numpy()
        assert np.abs(latent - expected).max() < 2e-3 * np.abs(expected).max()
        assert np.abs(tokens - theirs).max() < 2e-3 * np.abs(theirs).max()


def prepared_frames(data):
    """The first frame of each clip as it was read, by the clip's name."""
    settings = PrepareSettings(**{**data.about["settings"], "buckets": ((SIDE, SIDE),)})
    loader, found = Loader(settings), {}
    for index, item in enumerate(loader.items()):
        for clip in loader(index, item):
            found[clip.name] = clip.frames[0]
    assert len(found) == 8 and Path(settings.source).is_dir()
    return found


def test_the_students_loss_sees_the_image(config):
    """Channels and tokens both; and the teacher's half of guidance without a prompt is told of them too."""
    made = config(**{"consistency.times": "student"})
    generator = make_generator(made)
    programs = teacher_programs(made, generator, None)
    data = PreparedVideos(made.data).check(made, generator)
    row = next(data.batches(made))
    params = jax.tree.map(jnp.asarray, generator.pipeline.transformer.params)
    frozen = Frozen(params, jnp.asarray(generator.null_text))
    references = References(params, params, (), None, frozen, jnp.zeros((), jnp.int32))
    bare = dataclasses.replace(
        programs.distillation, config=dataclasses.replace(made, reward=dataclasses.replace(made.reward, rewards=()))
    )

    @jax.jit
    def loss(image):
        batch = Batch(jnp.asarray(row["latent"]), jnp.asarray(row["text"]), image=image)
        return objectives.student(bare, params, references, batch, jax.random.key(0))[0]

    image = jax.tree.map(jnp.asarray, row["image"])
    whole, others = loss(image), [loss(image._replace(**{name: x[::-1]})) for name, x in image._asdict().items()]
    assert np.isfinite([whole, *others]).all()
    assert min(abs(float(other) - float(whole)) for other in others) > 1e-4 * abs(float(whole))


def test_what_lacks_an_image_is_refused_in_a_sentence(config, teachers, prepared, wan_folder, tmp_path, capsys):
    from dollar_jax.data.latents import load_data

    made = config()
    generator = make_generator(made)
    with pytest.raises(ValueError, match=r"'ddpo' does not keep images"):
        ddpo = config(**{"reward.method": "ddpo"})
        teacher_programs(ddpo, generator, None)
    with pytest.raises(ValueError, match="config.reward.head.depth reads the features of latents alone"):
        teacher_programs(config(**{"reward.head.depth": 0.5}), generator, None)
    assert "gan_head" in teacher_programs(config(**{"gan.weight": 0.1}), generator, None).state_shapes.fake_score
    shapes_alone = dataclasses.replace(made, data=dataclasses.replace(made.data, name="moving_shapes"))
    with pytest.raises(ValueError, match="moving_shapes keeps no images"):
        load_data(shapes_alone, generator, tmp_path)
    told = dataclasses.replace(made, data=dataclasses.replace(made.data, given_frames=1))
    with pytest.raises(ValueError, match="takes no image as config.data.given_frames asks"):
        make_generator(told)
    data = PreparedVideos(made.data)
    data.info = types.SimpleNamespace(features={})
    with pytest.raises(ValueError, match="lacks the images this teacher is told of: prepare it with this teacher"):
        data.check(made, generator)


@pytest.mark.parametrize(
    "file, fields, parts",
    [
        ("transformer/config.json", {"pos_embed_seq_len": 514}, ["pos_embed_seq_len = 514", "FLF2V"]),
        ("transformer/config.json", {"in_channels": 16}, ["in_channels = 16", "has 12, its latents with a mask"]),
        ("transformer/config.json", {"image_dim": None, "added_kv_proj_dim": None}, ["image_dim = None", "have 16"]),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ["transformer_2"]),
        ("model_index.json", {"image_encoder": ["transformers", "SiglipVisionModel"]}, ["another image encoder"]),
        ("image_processor/preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, ["image_mean [0.5, 0.5, 0.5]"]),
        ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 8}}, ["size {'shortest_edge': 8}"]),
    ],
)
def test_what_cannot_be_used_is_named_at_import(folders, tmp_path, capsys, file, fields, parts):
    copy = shutil.copytree(folders[True], tmp_path / "copy")
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert cli.main(["import", str(copy), str(tmp_path / "teacher")]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in (str(path), *parts)), said


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("clip, changes", [(True, {}), (False, {"lora.rank": 2})], ids=["clip", "channels-lora"])
def test_from_videos_to_diffusers(
    teachers, prepared, picture, tmp_path, own_config, two_steps, assert_card_samples, capsys, clip, changes
):
    shown = {"visibility.samples_every": 2, "visibility.videos": 2}
    own = two_steps | RUN | {"teacher": str(teachers[clip]), "data.name": str(prepared[clip])} | shown | changes
    path = own_config(tmp_path, own)

    def train(name, *more):
        assert cli.main(["train", f"--config={path}", f"--workdir={tmp_path / name}", *more]) == 0
        return tmp_path / name

    run, parted = train("run"), train("parted", "--config.steps=1")
    train("parted")
    whole, resumed = history(run), history(parted)
    assert [row["step"] for row in whole] == [1, 2]
    assert all(np.isfinite(value) for row in whole for value in row.values())
    timed = ("second", "wait", "videos")
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if not any(t in k for t in timed)} == {
            k: v for k, v in b.items() if not any(t in k for t in timed)
        }
    assert (run / "samples" / "step_000002.mp4").stat().st_size > 0

    out, asked = tmp_path / "video.gif", [f"--workdir={run}", f"--prompt={PROMPTS[0]}", "--steps=2", "--num=1"]
    for whose in ([], ["--teacher"]):
        assert cli.main(["sample", *asked, f"--out={out}", *whose]) == 2 and "give --image" in capsys.readouterr().err
        assert cli.main(["sample", *asked, f"--out={out}", f"--image={picture}", *whose]) == 0
        assert read_video(out).std() > 1
        out = tmp_path / "teacher.gif"
    assert cli.main(["evaluate", f"--workdir={run}", "--quick"]) == 0
    assert {"teacher_2", "student_2"} <= json.loads((run / "metrics.json").read_text()).keys()

    student = tmp_path / "student"
    assert cli.main(["export", f"--workdir={run}", str(student)]) == 0
    index = json.loads((student / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["image_encoder"] == (["transformers", "CLIPVisionModel"] if clip else [None, None])
    config = read_config(run)
    generator = make_generator(config)
    params = restore_student(run, generator)
    drawers = (pipeline_wan_i2v, torch_utils)
    times = config.student.timesteps
    _, undrawn = assert_card_samples(student, generator, params, times, (0, 4, 1, 2, 3), drawers, picture)
    assert undrawn == 1
    shutil.rmtree(student / "__pycache__", ignore_errors=True)
    assert cli.main(["import", str(student), str(tmp_path / "again")]) == 0
