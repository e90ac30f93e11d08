"""VBench's aggregates against published rows, and result files of every kind users have."""

import json

import jax
import numpy as np
import pytest

from dollar_jax import cli
from dollar_jax.evaluate.vbench import DIMENSIONS, QUALITY, aggregate, read_results, read_vbench_prompts, write_videos
from dollar_jax.video import read_video

# Percent, in DIMENSIONS' order, with the published quality, semantic and total: the teacher, DOLLAR with
# PickScore and DOLLAR with HPSv2, as DOLLAR's tables give them.
PUBLISHED = {
    "teacher": (
        "83.99 93.78 96.42 98.09 99.44 61.21 63.87 85.79 52.59 99.60 77.00 51.40 49.99 24.83 26.45 27.89",
        (81.89, 73.71, 80.25),
    ),
    "PickScore": (
        "93.77 96.80 96.30 97.76 75.83 63.80 69.40 91.63 69.71 99.00 77.95 68.56 55.06 24.45 24.64 26.93",
        (None, None, 82.37),
    ),
    "HPSv2": (
        "92.57 96.14 97.48 98.59 81.67 63.14 65.61 93.84 72.21 99.00 74.78 68.35 52.72 23.50 25.23 26.85",
        (83.83, 77.51, 82.57),
    ),
}


def row(name):
    return dict(zip(DIMENSIONS, map(float, PUBLISHED[name][0].split()), strict=True))


def shares(name):
    return {key: value / 100 for key, value in row(name).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_come_out_as_published(name):
    score = aggregate(shares(name))
    for ours, theirs in zip((score.quality, score.semantic, score.total), PUBLISHED[name][1], strict=True):
        if theirs is not None:
            assert ours == pytest.approx(theirs, abs=0.01)


def test_every_dimension_counts_by_its_weight():
    base = shares("teacher")
    total = aggregate(base).total
    assert total is not None
    moved = {name: aggregate(base | {name: base[name] + 0.01}).total - total for name in DIMENSIONS}  # type: ignore
    # The share of the total per unit of a dimension, by hand: 4/5 of 1/6.5, 1/5 of 1/9, over the range.
    assert moved["aesthetic_quality"] == pytest.approx(0.8 / 6.5)
    assert moved["dynamic_degree"] == pytest.approx(0.8 * 0.5 / 6.5)
    assert moved["motion_smoothness"] == pytest.approx(0.8 / 6.5 / 0.2915)
    assert moved["color"] == pytest.approx(0.2 / 9)
    assert moved["appearance_style"] == pytest.approx(0.2 / 9 / 0.2846)


def test_result_files_of_all_kinds_are_one(tmp_path, capsys):
    """VBench's own file per dimension, spelt its two ways, and plain percent, in files of several dimensions."""
    scores, files = row("HPSv2"), []
    for i, name in enumerate(DIMENSIONS[:8]):
        spelt = name.replace("_", " ").title() if i % 2 else name
        details = [{"video_path": f"{name}.mp4", "video_results": 0.5}]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({spelt: [scores[name] / 100, details]}))
    files.append(tmp_path / "rest.json")
    files[-1].write_text(json.dumps({name.replace("_", "-"): scores[name] for name in DIMENSIONS[8:]}))
    assert read_results(files) == pytest.approx(shares("HPSv2"))

    out = tmp_path / "new" / "score.json"
    assert cli.main(["vbench-score", *map(str, files), f"--json={out}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["total"] == pytest.approx(82.57, abs=0.01)
    assert printed["dimensions"] == pytest.approx(scores) and printed["missing"] == []


def test_missing_dimensions_are_an_error_unless_allowed(tmp_path, capsys):
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({name: shares("teacher")[name] for name in QUALITY}))
    assert cli.main(["vbench-score", str(path)]) == 2
    error = capsys.readouterr().err
    assert "9 of VBench's 16 dimensions are missing: object_class" in error and "--allow_missing" in error
    assert cli.main(["vbench-score", str(path), "--allow_missing"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["quality"] == pytest.approx(81.89, abs=0.01)
    assert printed["semantic"] is None and printed["total"] is None and len(printed["missing"]) == 9


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no VBench results"),
        ("{}", "holds no VBench results"),
        ('{"sharpness": 0.5}', "'sharpness' is no dimension of VBench's"),
        ('{"color": "red"}', 'score of color must be a number from 0 to 1, or in percent, not "red"'),
        ('{"color": []}', "score of color must be a number"),
        ('{"color": NaN}', "score of color must be a number"),
        ('{"color": true}', "score of color must be a number"),
        ('{"color": -0.1}', "score of color must be a number"),
        ('{"color": 101}', "score of color must be a number"),
        ('{"color": 0.5, "Color": 0.5}', "holds color twice"),
        ('{"color": 77, "scene": 0.5}', "mixes percent with shares"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="result.json") as error:
        read_results([path])
    assert message in str(error.value)


def test_files_that_disagree_are_named(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"color": value}))
    assert read_results([tmp_path / "a.json", tmp_path / "b.json"]) == {"color": 0.5}
    with pytest.raises(ValueError, match=r"a\.json and .*c\.json disagree on color"):
        read_results([tmp_path / "a.json", tmp_path / "c.json"])


def test_files_that_are_not_there(tmp_path, capsys):
    assert cli.main(["vbench-score", str(tmp_path / "no.json")]) == 2
    assert "no.json does not exist" in capsys.readouterr().err
    assert cli.main(["vbench-score"]) == 2
    assert "dollar vbench-score FILE" in capsys.readouterr().err


# The videos VBench asks for


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

    def run(folder, batch_size=8):
        with jax.debug_key_reuse(False):
            return write_videos(folder, counts, toy_generator, sampler, params, 0, batch_size)

    return run


def test_videos_are_named_as_vbench_wants_and_a_second_start_draws_what_is_missing(write, tmp_path):
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
        again, first = (read_video(tmp_path / run / name).astype(int) for run in ("killed", "whole"))
        assert np.abs(again - first).max() <= 6  # the codec makes more of a rounding


def test_hosts_share_the_videos_between_them(write, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert write(tmp_path) == 2
        assert len(list(tmp_path.iterdir())) == 2 * (index + 1)
