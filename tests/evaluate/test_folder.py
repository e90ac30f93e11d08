"""Folders of videos, as `dollar sample` and others leave them."""

import json

import numpy as np
import pytest

from dollar_jax import cli
from dollar_jax.data import shapes
from dollar_jax.evaluate.features import Features
from dollar_jax.evaluate.files import find_videos
from dollar_jax.evaluate.folder import measure_folder
from dollar_jax.evaluate.quality import frechet_distance, pixel_features, vendi_score
from dollar_jax.rewards import get_reward
from dollar_jax.video import write_video

CAPTIONS = [
    shapes.Caption("large", "red", "circle", "left", "quickly"),
    shapes.Caption("small", "blue", "square", "up", "slowly"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three real clips of each of two captions, enlarged four times."""
    path = tmp_path_factory.mktemp("videos")
    for caption in CAPTIONS:
        for i in range(3):
            clip = shapes.render(caption, np.random.default_rng(i))
            write_video(path / f"{caption}-{i}.mp4", clip, scale=4)
    return path


def means(videos):
    return videos.mean((1, 2, 3)) / 255  # [n, 3]


def test_videos_are_found_by_prompt_and_number(tmp_path):
    for name in ("a-b-10.mp4", "a-b-9.mp4", "plain.gif", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = find_videos(tmp_path)
    assert list(found) == ["a-b", "plain"]
    assert [path.name for path in found["a-b"]] == ["a-b-9.mp4", "a-b-10.mp4"]
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_videos(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .mp4 or .gif"):
        find_videos(tmp_path / "empty")


def test_real_clips_are_read_as_their_captions_say(folder):
    result = measure_folder(folder, rewards={"reward": get_reward("vivid")})
    assert (result["videos"], result["prompts"]) == (6, 2)
    assert result["alignment"] > 0.97
    assert 0.9 < result["flicker"] < 1 and 0 < result["net_change"] < 0.5
    assert 0 <= result["reward"] <= 1
    assert "frechet" not in result and "vendi_network" not in result


def test_enlarged_videos_are_measured_as_they_were(folder):
    seen = []
    measured = measure_folder(folder, Features("", lambda x: seen.append(x) or means(x)), enlarged=4)
    for videos, caption in zip(seen, sorted(CAPTIONS, key=str), strict=True):
        real = np.stack([shapes.render(caption, np.random.default_rng(i)) for i in range(3)])
        assert videos.shape == real.shape and np.abs(videos.astype(int) - real).mean() < 6
    assert measured["alignment"] > 0.97


def test_diversity_is_within_the_prompts(folder, tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
    for prompt, clip in zip(("one", "two"), clips, strict=True):
        for i in range(3):
            write_video(tmp_path / f"{prompt}-{i}.mp4", clip, scale=2)
    result = measure_folder(tmp_path)
    assert result["vendi"] == pytest.approx(1, abs=1e-6) and result["diversity"] == 0
    assert "alignment" not in result
    different = measure_folder(folder)
    assert 1.2 < different["vendi"] <= 3 and different["diversity"] > 0.01


def test_a_networks_features_give_distance_and_diversity(folder, tmp_path):
    calls = []

    def vectors(videos):
        calls.append(len(videos))
        return means(videos)

    for i in range(4):
        clip = shapes.example(9, "train", i)[0]
        write_video(tmp_path / f"real {i}.mp4", clip, scale=4)
    features = Features("mean colours", vectors, lambda a, b: np.abs(means(a) - means(b)).sum(-1))
    result = measure_folder(folder, features, reference=tmp_path)
    assert sorted(calls) == [1, 1, 1, 1, 3, 3]
    assert result["features"] == "mean colours" and result["frechet_reference_videos"] == 4
    assert result["frechet"] > 0 and result["lpips"] > 0 and 1 <= result["vendi_network"] < 3
    same = measure_folder(folder, features, reference=folder)
    assert same["frechet"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="give --features or --workdir"):
        measure_folder(folder, reference=tmp_path)


def test_the_command_leaves_its_json(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dollar_jax.cli.evaluate.prepare_jax", lambda: None)
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", f"--videos={folder}", f"--out={out}"]) == 0
    written = json.loads(out.read_text())
    assert written == measure_folder(folder)
    assert f"{written['alignment']:.6g}" in capsys.readouterr().out


def test_videos_that_do_not_go_together_are_named(tmp_path):
    write_video(tmp_path / "a-0.mp4", np.zeros((4, 16, 16, 3), np.uint8))
    write_video(tmp_path / "b-0.mp4", np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b-0\.mp4 has t, h, w = \(5, 16, 16\) and .*a-0\.mp4 \(4, 16, 16\)"):
        measure_folder(tmp_path)
    (tmp_path / "a-0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"a-0\.mp4 is no video that can be read"):
        measure_folder(tmp_path)


def test_vendi_of_a_folder_is_that_of_its_pixels(folder):
    from dollar_jax.video import read_video

    groups = [np.stack([read_video(p) for p in paths]) for paths in find_videos(folder).values()]
    expected = np.mean([vendi_score(pixel_features(group)) for group in groups])
    assert measure_folder(folder)["vendi"] == pytest.approx(expected)
    assert frechet_distance(means(groups[0]), means(groups[1])) > 0
