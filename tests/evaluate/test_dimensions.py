"""VBench's dimensions against its own formulas, written out frame by frame, on the same features."""

import json

import numpy as np
import pytest

from dollar_jax import cli
from dollar_jax.evaluate.dimensions import Dimensions, background_consistency, dynamic_degree, motion_smoothness
from dollar_jax.evaluate.vbench import read_intervals, read_results
from dollar_jax.video import write_video


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (7, 12, 16, 3), np.uint8)


def moving(speed, frames=9, height=128, width=160):
    """A smooth texture that goes right by so many pixels per frame."""
    y, x = np.mgrid[:height, :width]
    shown = [np.sin((x - speed * t) / 9) * np.cos(y / 11) for t in range(frames)]
    return np.repeat(np.round(127 + 100 * np.stack(shown))[..., None], 3, -1).astype(np.uint8)


def test_background_consistency_is_vbenchs(noise):
    features = np.random.default_rng(1).normal(size=(6, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    total = 0.0
    for i in range(1, 6):
        with_first = max(0.0, features[i] @ features[0])
        with_former = max(0.0, features[i] @ features[i - 1])
        total += (with_first + with_former) / 2
    assert background_consistency(features) == pytest.approx(total / 5)
    assert (features @ features.T).min() < 0  # some cosines count as 0


@pytest.mark.parametrize("frames", [3, 6, 7])
def test_motion_smoothness_is_vbenchs_with_the_mean_of_two_frames(noise, frames):
    video = noise[:frames].astype(int)
    errors = [np.abs(video[i] - (video[i - 1] + video[i + 1]) // 2).mean() for i in range(1, frames - 1, 2)]
    assert motion_smoothness(noise[:frames]) == pytest.approx((255 - np.mean(errors)) / 255)
    assert motion_smoothness(np.repeat(noise[:1], 5, 0)) == 1


def test_dynamic_degree_is_motion_over_six_pixels_in_256_at_8_fps():
    """Frames are 128 high, so that the limit is 3 pixels per frame at 8 fps."""
    assert dynamic_degree(moving(4.0), fps=8) and not dynamic_degree(moving(2.0), fps=8)
    # At 16 fps every other frame counts, between which the same video has moved twice as far.
    assert dynamic_degree(moving(2.0), fps=16)
    still = np.repeat(moving(0.0, 1), 9, 0)
    grain = np.random.default_rng(0).integers(-2, 3, still.shape)
    assert not dynamic_degree((still + grain).astype(np.uint8), fps=8)
    # A quarter of the pairs must move: 2 of 8.
    for pairs in (1, 2):
        assert dynamic_degree(np.concatenate([still[: 8 - pairs], moving(4.0, pairs + 1)]), fps=8) == (pairs == 2)


def test_features_and_prompt_make_the_dimensions(noise):
    features = np.eye(7)
    dimensions = Dimensions(lambda frames, prompt: (features, 0.7 * features[0]), lambda frames: 5.5)
    found = dimensions(noise, "a", 8)
    assert found["aesthetic_quality"] == pytest.approx(0.55)
    assert found["overall_consistency_ours"] == pytest.approx(0.1) and found["background_consistency"] == 0
    change = np.abs(np.diff(noise.astype(int), axis=0)).mean()
    assert found["temporal_flickering"] == pytest.approx((255 - change) / 255, abs=1e-5)


def test_the_command_writes_what_vbench_score_reads(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for prompt, speed in (("a", 0.5), ("b", 4.0)):
        write_video(folder / f"{prompt}-0.mp4", moving(speed), fps=8)
    (folder / "._a-0.mp4").write_bytes(b"Mac OS X")
    (folder / "notes.txt").write_text("notes")
    (tmp_path / "videos.manifest.json").write_text(json.dumps({"num": 1}))
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", f"--videos={folder}", f"--out={out}", "--dimensions"]) == 0
    assert "notes.txt" in (printed := capsys.readouterr().out) and "._a-0.mp4" not in printed
    written = json.loads(out.read_text())
    assert written["videos"] == 2 and written["dynamic_degree_ours"] == 0.5 and written["manifest"] == {"num": 1}
    assert "aesthetic_quality" in written["dimensions_left_out"] and "dynamic_degree" in written["dimensions_left_out"]
    results = tmp_path / "out_vbench.json"
    assert list(read_results([results])) == ["temporal_flickering"]
    assert read_results([results])["temporal_flickering"] == pytest.approx(written["temporal_flickering"])
    assert len(read_intervals([results])["temporal_flickering"]) == 2
