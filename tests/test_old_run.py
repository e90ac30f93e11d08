"""A run that version 0.1.0 left: it reads, is sampled, measured and exported, and goes on.

The archive holds what `dollar train` of that version wrote with `SETTINGS` and the teacher of `wan_folder`."""

import json
import tarfile
from pathlib import Path

import pytest

from dollar_jax.cli import main
from dollar_jax.data import shapes
from dollar_jax.evaluate import run as evaluation
from dollar_jax.evaluate.measure import SamplePlan
from dollar_jax.run import read_config, read_history
from dollar_jax.video import read_video

ARCHIVE = Path(__file__).parent / "run_0.1.0.tar.xz"
SETTINGS = {
    "steps": 2,
    "batch_size": 8,
    "checkpoint_every": 1,
    "log_every": 1,
    "data.train_videos": 8,
    "visibility.samples_every": 0,
    "reward.samples": 2,
    "reward.replay": 4,
    "reward.weight": 0.03,
    "reward.batch_size": 8,
    "reward.updates": 1,
    "reward.start_step": 0,
    "reward.head.width": 4,
    "reward.rewards": ({"name": "compressibility", "weight": 1.0, "folder": None},),
    "consistency.skip": 1,
    "fake_score.updates": 1,
    "sampling.num_steps": 2,
}


def dollar(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def run(tmp_path, wan_folder):
    with tarfile.open(ARCHIVE) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        archive.extractall(tmp_path / "run", **safe)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("TEACHER", str(wan_folder)))
    return tmp_path / "run"


def test_its_settings_and_history_are_read(run, wan_folder, make_config):
    changes = {
        **SETTINGS,
        "teacher": str(wan_folder),
        "mesh.data": -1,
        "reward.head.use_text": False,
        "student.timesteps": (1000.0, 900.0, 750.0, 500.0),
    }
    expected = make_config(changes)
    found = read_config(run)
    assert found.pretrain is not None
    for name in ("student", "vsd", "consistency", "fake_score", "reward", "data", "sampling", "compute", "lora"):
        assert getattr(found, name) == getattr(expected, name)
    assert [line["step"] for line in read_history(run)] == [1, 2]


def test_it_is_sampled_and_exported(run, tmp_path):
    prompt = "a large red circle moving left slowly"
    dollar("sample", f"--workdir={run}", f"--prompt={prompt}", "--num=1", "--scale=1", f"--out={tmp_path / 'a.gif'}")
    assert len(read_video(tmp_path / "a.gif")) == shapes.FRAMES
    dollar("export", f"--workdir={run}", tmp_path / "student")
    assert (tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_it_is_measured(run, tmp_path, monkeypatch):
    captions = shapes.covering_captions()[:2]
    monkeypatch.setattr(
        evaluation.measure, "default_plan", lambda seed, quick: SamplePlan(captions, captions[:1], 2, 4, seed)
    )
    dollar("evaluate", f"--workdir={run}", f"--out={tmp_path / 'measured.json'}")
    assert "student_4" in json.loads((tmp_path / "measured.json").read_text())


@pytest.mark.slow
def test_it_goes_on(run, wan_folder):
    own = {"reward.head.use_text": False}  # what None, today's default, stands for where no reward reads prompts
    settings = {**SETTINGS, **own, "steps": 3, "teacher": wan_folder}
    dollar(
        "train", "--config=demo", f"--workdir={run}", *(f"--config.{name}={value}" for name, value in settings.items())
    )
    assert [line["step"] for line in read_history(run)] == [1, 2, 3]
    assert (run / "checkpoints" / "3").is_dir()
