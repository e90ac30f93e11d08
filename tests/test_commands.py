"""Every command run to success as a user types it, on a run of three steps."""

import json
import re
import shutil

import numpy as np
import pytest

from dollar_jax.cli import main
from dollar_jax.data import shapes
from dollar_jax.evaluate import run as evaluation
from dollar_jax.evaluate.measure import SamplePlan
from dollar_jax.report.measures import of_samplers
from dollar_jax.video import read_video

TINY = {
    "steps": 3,
    "batch_size": 8,
    "checkpoint_every": 3,
    "log_every": 1,
    "data.train_videos": 16,
    "student.timesteps": (1000.0, 700.0, 400.0, 200.0),
    "student.layers": 1,
    "reward.samples": 2,
    "reward.replay": 16,
    "reward.batch_size": 8,
    "reward.updates": 1,
    "visibility.samples_every": 0,
    "sampling.num_steps": 2,
}
PROMPT = "a large red circle moving left slowly"


def dollar(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, own_config, wan_folder):
    """A run that `dollar train` has left, from a configuration in a file of the user's own."""
    folder = tmp_path_factory.mktemp("run")
    own = own_config(folder, TINY | {"teacher": str(wan_folder)})
    dollar("train", f"--config={own}", f"--workdir={folder / 'run'}")
    return folder / "run"


@pytest.fixture
def few_captions(monkeypatch):
    """Measures on two captions, of which one is drawn twice."""
    captions = shapes.covering_captions()[:2]
    monkeypatch.setattr(
        evaluation.measure, "default_plan", lambda seed, quick: SamplePlan(captions, captions[:1], 2, 4, seed)
    )


def test_train_leaves_a_run(workdir):
    history = [json.loads(line) for line in (workdir / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3]
    assert (workdir / "checkpoints" / "3" / "ema").is_dir()


def test_sample_writes_a_video_that_differs_by_its_seed(workdir, tmp_path):
    videos = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.gif"
        dollar("sample", f"--workdir={workdir}", f"--prompt={PROMPT}", f"--seed={seed}", "--num=1", f"--out={out}")
        videos.append(read_video(out).astype(float))
    assert videos[0].shape == videos[1].shape and np.abs(videos[0] - videos[1]).mean() > 1


def test_sample_into_a_folder_goes_on_and_warns_of_what_the_teacher_does_not_know(workdir, tmp_path, capsys):
    sample = ["sample", f"--workdir={workdir}", "--num=1", f"--out={tmp_path / 'v'}", "--steps=6"]
    dollar(*sample, "--prompt=a large purple/green circle")
    shown = capsys.readouterr()
    assert "warning: the teacher does not know the words purple/green" in shown.err
    assert "distilled to 4 steps, not 6" in shown.err
    dollar(*sample, "--prompt=a large purple/green circle", f"--prompt={PROMPT}")
    assert "1 videos drawn, 1 were there" in capsys.readouterr().out
    made = json.loads((tmp_path / "v.manifest.json").read_text())
    assert {path.name for path in (tmp_path / "v").iterdir()} == made["files"].keys()
    assert set(made["files"].values()) == {"a large purple/green circle", PROMPT}
    assert (made["fps"], made["scale"], made["steps"]) == (8, 8, 6)
    assert read_video(tmp_path / "v" / f"{PROMPT}-0.mp4").shape == (17, 256, 256, 3)
    assert main([*map(str, sample), f"--prompt={PROMPT}", "--seed=3"]) == 2
    assert "holds videos made with seeds = [0], not [3]" in capsys.readouterr().err


def test_sample_refuses_a_picture_that_no_player_shows(workdir, tmp_path, capsys):
    lines = [f"a large red circle moving left {'very ' * i}slowly" for i in range(40)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    flags = [f"--workdir={workdir}", f"--prompts_file={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'a.mp4'}"]
    assert main(["sample", *flags]) == 2
    assert "would be a picture of 1024 × 10240" in capsys.readouterr().err


def test_evaluate_takes_any_prompts_and_goes_on(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.measure, "TIMED", 1)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na small blue/green square\n")
    out = tmp_path / "own.json"
    flags = [f"--workdir={workdir}", f"--prompts_file={tmp_path / 'prompts.txt'}", f"--out={out}", "--num=2"]
    dollar("evaluate", *flags, "--reward=motion")
    metrics = json.loads(out.read_text())
    for name in ("teacher_2", "student_4", "student_2", "student_1"):
        row = metrics[name]
        assert {"reward", "motion", "vendi", "flicker", "net_change", "diffusion_seconds", "nfe"} <= row.keys()
        assert len(list((tmp_path / "own_videos" / name).glob("*.mp4"))) == 4
        made = json.loads((tmp_path / "own_videos" / f"{name}.manifest.json").read_text())
        assert set(made["files"].values()) == {PROMPT, "a small blue/green square"}
    assert metrics["student_1"]["nfe"] == 1 and metrics["speedup_1"] > 0 and metrics["manifest"]["num"] == 2
    assert out.with_suffix(".html").is_file() and "student_4" in capsys.readouterr().out
    # The measures of a folder are of its files, and a second start draws none of those anew.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "own_videos").rglob("*.mp4")}
    one = sorted(before)[0]
    one.unlink()
    dollar("evaluate", *flags, "--reward=motion")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "own_videos").rglob("*.mp4")}
    assert {path for path in before if before[path] != after[path]} == {one}


def test_videos_for_vbench_are_drawn_named_and_told_how_they_were_made(workdir, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(f"\ufeff{PROMPT}, {'seen from very far away, ' * 40}\r\n{PROMPT}")
    (tmp_path / "short.txt").write_text("a/b\na circle\n")
    flags = [f"--workdir={workdir}", f"--vbench={tmp_path / 'v'}", f"--prompts_file={tmp_path / 'long.txt'}", "--num=1"]
    assert main(["evaluate", *flags]) == 2 and "give --names" in capsys.readouterr().err
    flags.append(f"--names={tmp_path / 'short.txt'}")
    assert main(["evaluate", *flags]) == 2 and "no file can be named by the prompt 'a/b'" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("a disc\na circle\n")
    dollar("evaluate", *flags)
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"a disc-0.mp4", "a circle-0.mp4"}
    made = json.loads((tmp_path / "v.manifest.json").read_text())
    assert (made["prompts"], made["names_file"], made["fps"], made["steps"]) == ("rewritten", "short.txt", 16, 4)
    assert made.keys() >= {
        "prompts_sha256",
        "seeds",
        "num",
        "frames",
        "width",
        "timesteps",
        "weights_sha256",
        "versions",
    }
    assert main(["evaluate", *flags, "--fps=8"]) == 2
    assert "videos made with fps = 16, not 8.0" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_measures_a_run(workdir, few_captions, capsys):
    out = workdir.parent / "measured.json"
    dollar("evaluate", f"--workdir={workdir}", f"--out={out}")
    metrics = json.loads(out.read_text())
    assert {"student_4", "student_1", "teacher_2"} <= metrics.keys() and metrics["student_1"]["nfe"] == 1
    made = json.loads(out.with_name("measured_videos.manifest.json").read_text())
    assert made == metrics["manifest"] | {"shown": made["shown"]}
    assert all("diffusion_seconds" in row for row in of_samplers(metrics).values())
    assert of_samplers(metrics).keys() == {k for k in metrics if re.match(r"(teacher|student|undistilled)_\d", k)}
    assert {"prompts_sha256", "seeds", "num", "frames", "fps", "width", "weights_sha256", "versions"} <= made.keys()
    assert (made["sampler"], made["nfe"], made["beside"]) == ("student_4", 4, [{"sampler": "teacher_2", "nfe": 4}])
    assert out.with_suffix(".html").is_file() and "student_4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_folder_makes_evaluate_execute_nothing_unless_allowed(workdir, few_captions, tmp_path, capsys):
    code, proof = tmp_path / "reward.py", tmp_path / "executed"
    code.write_text(
        f"open({str(proof)!r}, 'w').close()\ndef reward(frames, prompts):\n    return frames.mean((1, 2, 3, 4))\n"
    )
    run = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["reward"]["rewards"].append({**config["reward"]["rewards"][0], "name": f"{code}:reward"})
    (run / "config.json").write_text(json.dumps(config))
    dollar("sample", f"--workdir={run}", f"--prompt={PROMPT}", "--num=1", f"--out={tmp_path / 'a.gif'}")
    dollar("export", f"--workdir={run}", tmp_path / "exported")
    dollar("evaluate", f"--workdir={run}")
    assert f"is not run without --allow_code: {code}:reward" in capsys.readouterr().err and not proof.exists()
    assert "reward" in json.loads((run / "metrics.json").read_text())["student_4"]
    dollar("evaluate", f"--workdir={run}", "--allow_code")
    assert proof.exists()


def test_an_export_is_imported_and_trained_on(workdir, tmp_path):
    dollar("export", f"--workdir={workdir}", tmp_path / "exported")
    dollar("import", tmp_path / "exported", tmp_path / "imported")
    assert (tmp_path / "exported" / "README.md").is_file()
    assert (tmp_path / "imported" / "transformer" / "params").is_dir()


def test_prompts_are_prepared_and_drawn(tmp_path, own_config, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na small blue square moving up quickly\n")
    dollar("prepare", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'data'}")
    assert (tmp_path / "data" / "rejected.jsonl").read_text() == ""
    assert list((tmp_path / "data").glob("**/*array_record*"))
    samples = own_config(tmp_path, {"sampling.num_steps": 2})
    command = ["prepare", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'drawn'}", "--clips=2"]
    dollar(*command, f"--teacher_samples={samples}")
    assert (tmp_path / "drawn" / "preview.jpg").is_file()
    assert "4 samples of 2" in capsys.readouterr().out
    command[2] = f"--out={tmp_path / 'refused'}"
    assert main([*command, "--teacher_samples=demo_i2v"]) == 2
    assert "takes no image" in capsys.readouterr().err and not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_demo_leaves_metrics_a_page_and_videos(tmp_path, few_captions, monkeypatch, image):
    from dollar_jax import config, experiment

    load = experiment.load
    few = {"pretrain.num_steps": 2, "pretrain.teacher.steps": 2, "pretrain.teacher.videos": 64}
    monkeypatch.setattr(experiment, "load", lambda name, *losses: config.changed(load(name, *losses), TINY | few))
    monkeypatch.setattr(evaluation, "SHOWN", 2)
    dollar("demo", f"--workdir={tmp_path}", "--seed=1", *["--image"] * image)
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["seed"] == 1
    assert (tmp_path / "report.html").is_file() and list((tmp_path / "videos").glob("*.mp4"))


def test_config_lists_every_setting_with_its_meaning(capsys):
    dollar("config", "--config=wan_1_3b:vsd+cd")
    text = capsys.readouterr().out
    assert "learning_rate = 1e-05" in text and "Highest learning rate" in text


def test_vbench_score_prints_and_writes_the_three_scores(tmp_path, capsys):
    from dollar_jax.evaluate.vbench import DIMENSIONS

    (tmp_path / "results.json").write_text(json.dumps(dict.fromkeys(DIMENSIONS, 0.5)))
    dollar("vbench-score", tmp_path / "results.json", f"--json={tmp_path / 'scores.json'}")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["total"] == pytest.approx((4 * scores["quality"] + scores["semantic"]) / 5, abs=1e-6)
    assert json.loads(capsys.readouterr().out)["total"] == scores["total"]
