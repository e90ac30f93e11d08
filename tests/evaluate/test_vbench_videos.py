"""The videos VBench asks for: their names, prompts, numbers and frame rate."""

import functools
import json

import av
import jax
import numpy as np
import pytest

from dollar_jax.evaluate import files
from dollar_jax.evaluate.files import draw_missing
from dollar_jax.evaluate.manifest import hash_params, manifest_path, write_manifest
from dollar_jax.evaluate.vbench_videos import pair_names, read_vbench_prompts, video_rows
from dollar_jax.generate import video_keys
from dollar_jax.video import write_video


def test_the_list_of_prompts_says_how_many_videos_each_needs(tmp_path):
    text = tmp_path / "all_dimension.txt"
    text.write_text("a cat\na dog\n\na cat\n")
    assert read_vbench_prompts(text, 5) == {"a cat": 5, "a dog": 5}
    rows = [
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"]},
        {"prompt_en": "a still cup", "dimension": ["temporal_flickering"], "auxiliary_info": {}},
        {"prompt_en": "a cat", "dimension": ["temporal_flickering"]},
    ]
    full = tmp_path / "VBench_full_info.json"
    full.write_text(json.dumps(rows))
    assert read_vbench_prompts(full, 5) == {"a cat": 25, "a still cup": 25}
    assert read_vbench_prompts(full, 1) == {"a cat": 5, "a still cup": 5}
    full.write_text('[{"prompt": "a cat"}]')
    with pytest.raises(ValueError, match="is not like VBench_full_info.json"):
        read_vbench_prompts(full, 5)


@pytest.fixture
def write(toy_generator):
    """Writes a folder of videos: two prompts, three and one."""
    sampler = toy_generator.student_sampler((1000.0, 500.0))
    params = toy_generator.pipeline.transformer.params
    counts = {"a bb": 3, "ccc a": 1}

    def run(folder, prompts=None, fps=8):
        rows, keys = video_rows(counts, prompts), functools.partial(video_keys, 0, 3)
        with jax.debug_key_reuse(False):
            return draw_missing(folder, rows, keys, toy_generator, [(sampler, params)], 8, fps)

    return run


def test_videos_are_named_as_vbench_wants_and_a_second_start_draws_what_is_missing(write, tmp_path, monkeypatch):
    drawn = {}

    def remembered(path, clip, *rest):
        drawn[path.parent.name, path.name] = clip.astype(int)
        write_video(path, clip, *rest)

    monkeypatch.setattr(files, "write_video", remembered)
    names = {"a bb-0.mp4", "a bb-1.mp4", "a bb-2.mp4", "ccc a-0.mp4"}
    assert write(tmp_path / "whole") == 4
    assert {path.name for path in (tmp_path / "whole").iterdir()} == names
    assert write(tmp_path / "whole") == 0

    (tmp_path / "killed").mkdir()
    kept = tmp_path / "killed" / "a bb-1.mp4"
    kept.write_bytes(b"kept")
    assert write(tmp_path / "killed") == 3
    assert kept.read_bytes() == b"kept"
    for name in names - {kept.name}:
        assert np.abs(drawn["killed", name] - drawn["whole", name]).max() <= 1  # before the codec makes more of it
        assert (tmp_path / "killed" / name).stat().st_size
    assert np.abs(drawn["whole", name] - drawn["whole", kept.name]).max() > 20


def test_hosts_share_the_videos_between_them(write, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert write(tmp_path) == 2
        assert len(list(tmp_path.iterdir())) == 2 * (index + 1)


# Rewritten prompts

LONG = ["A cat, seen from afar, " + "very " * 280 + "slowly walks", "Ein großer Hund", "A cat again"]


def test_rewritten_prompts_are_named_by_the_short_ones(tmp_path):
    long, short = tmp_path / "aug.txt", tmp_path / "all_dimension.txt"
    long.write_text("\ufeff" + "\r\n".join(LONG) + "\r\n")
    short.write_text("\ufeffa cat\r\na dog\r\na cat\r\n")
    with pytest.raises(ValueError, match="no file can be named by the prompt .* give --names"):
        video_rows(dict.fromkeys(LONG, 1))
    expected = {"a cat": LONG[0], "a dog": LONG[1]}
    assert pair_names(long, short) == expected
    full = tmp_path / "VBench_full_info.json"
    full.write_text(json.dumps([{"prompt_en": p, "dimension": ["color"]} for p in ("a cat", "a dog", "a cat")]))
    assert pair_names(long, full) == expected
    # A list of which the doubles were left out pairs too; one with a line missing does not.
    long.write_text("\n".join(LONG[:2]))
    assert pair_names(long, full) == expected
    long.write_text("one\n")
    with pytest.raises(ValueError, match=r"aug.txt holds 1 prompts and .*all_dimension.txt 2 names"):
        pair_names(long, short)
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        pair_names(tmp_path / "no.txt", short)


def test_what_is_drawn_is_the_long_prompt(write, toy_generator, tmp_path, monkeypatch):
    shown, text = [], type(toy_generator).text
    monkeypatch.setattr(type(toy_generator), "text", lambda self, prompts: shown.extend(prompts) or text(self, prompts))
    write(tmp_path, fps=24, prompts={"a bb": "a bb ccc", "ccc a": "ccc"})
    assert set(shown) - {""} == {"a bb ccc", "ccc"}
    assert {path.name for path in tmp_path.iterdir()} == {"a bb-0.mp4", "a bb-1.mp4", "a bb-2.mp4", "ccc a-0.mp4"}
    with av.open(str(tmp_path / "ccc a-0.mp4")) as container:
        assert container.streams.video[0].average_rate == 24


# How they were made


def test_a_folder_of_other_videos_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "videos"
    write_manifest(folder, {"num": 5, "fps": 16.0, "timesteps": (999.0, 499.0), "versions": {"jax": "1"}})
    folder.mkdir()
    assert manifest_path(folder) == tmp_path / "videos.manifest.json"
    write_manifest(folder, {"num": 5, "fps": 16.0, "timesteps": (999.0, 499.0), "versions": {"jax": "2"}})
    with pytest.raises(ValueError, match=r"videos made with fps = 16.0, not 8.0"):
        write_manifest(folder, {"num": 5, "fps": 8.0, "versions": {}})


def test_weights_are_told_apart_by_any_of_their_numbers_names_and_types():
    a = {"x": np.zeros(3, np.float32), "y": np.ones(2, np.float32)}
    same = {"y": a["y"].copy(), "x": jax.numpy.zeros(3)}
    others = [
        {**a, "x": np.array([0, 0, 1e-30], np.float32)},
        {"x": a["x"], "z": a["y"]},
        {**a, "x": np.zeros(3, np.int32)},
        {**a, "x": np.zeros((3, 1), np.float32)},
    ]
    assert hash_params(a) == hash_params(same)
    assert len({hash_params(x) for x in (a, *others)}) == 5
