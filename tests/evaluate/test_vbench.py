"""VBench's aggregates against published rows, and result files of every kind users have."""

import json
import subprocess
import sys

import pytest

from dollar_jax import cli
from dollar_jax.evaluate.vbench import DIMENSIONS, QUALITY, SEMANTIC, aggregate, read_intervals, read_results

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


@pytest.mark.parametrize(
    "quality, semantic, total",
    [(83.44, 80.13, 82.78), (85.86, 80.15, 84.72), (85.54, 81.01, 84.63), (83.97, 80.88, 83.35), (85.69, 79.92, 84.53)],
    ids=["Wan 1.3B", "FastGen DMD2, 4 steps", "Causal-rCM", "Wan 14B", "FastGen DMD2, 2 steps"],
)
def test_published_triples_come_out_as_published(quality, semantic, total):
    """Dimensions that all lie at their group's published share of their range give the published total."""
    groups = ((QUALITY, quality), (SEMANTIC, semantic))
    row = {name: low + share / 100 * (high - low) for g, share in groups for name, (low, high) in g.items()}
    score = aggregate(row)
    assert (score.quality, score.semantic) == (pytest.approx(quality), pytest.approx(semantic))
    assert score.total == pytest.approx(total, abs=0.01)  # all three are rounded


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


# Intervals, and two results side by side


def result_file(path, dimension, values):
    """VBench's result file of {prompt: its videos' scores}."""
    rows = [
        {"video_path": f"videos/{prompt}-{i}.mp4", "video_results": value}
        for prompt, videos in values.items()
        for i, value in enumerate(videos)
    ]
    scores = [float(row["video_results"]) for row in rows]
    mean = sum(scores) / len(scores) / (100 if max(scores) > 1 else 1)
    path.write_text(json.dumps({dimension: [mean, rows]}))
    return mean


def test_an_interval_draws_prompts_with_all_their_videos(tmp_path):
    """Half of 200 prompts move in all five videos: the interval is the binomial's of 200, not of 1,000."""
    path = tmp_path / "dynamic_degree.json"
    mean = result_file(path, "dynamic_degree", {f"a-{p}": [p % 2 == 0] * 5 for p in range(200)})
    low, high = read_intervals([path])["dynamic_degree"]
    assert mean == 0.5
    assert (low, high) == (pytest.approx(50 - 196 * (0.25 / 200) ** 0.5, abs=1), pytest.approx(56.93, abs=1))
    # Unequal numbers of videos count by video, and percent are percent.
    values = {"still": [40.0] * 5, "moving": [80.0]}
    mean = result_file(path, "imaging_quality", values)
    assert mean == pytest.approx((5 * 40 + 80) / 600)
    low, high = read_intervals([path])["imaging_quality"]
    assert (low, high) == (pytest.approx(40), pytest.approx(80))


@pytest.mark.parametrize("rows", [[], [{"video_path": "a-0.mp4", "video_results": 0.5}], [{"video_path": "a"}], 3])
def test_without_scores_of_several_prompts_there_is_no_interval(tmp_path, rows):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"color": [0.5, rows]}))
    assert read_intervals([path]) == {}


MADE = {"prompts_sha256": "1", "prompts": "raw", "num": 5, "fps": 16, "weights_sha256": "a", "steps": 50}


@pytest.fixture
def results(tmp_path):
    """Two folders with results and the manifest of their videos: a teacher's and a student's."""
    for name, row_name, other in (("a", "teacher", {}), ("b", "HPSv2", {"weights_sha256": "b", "steps": 4})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval_results.json").write_text(json.dumps(shares(row_name)))
        (tmp_path / name / "manifest.json").write_text(json.dumps(MADE | other))
    return tmp_path


def test_results_of_like_videos_stand_side_by_side(results, capsys):
    a, b = str(results / "a"), str(results / "b" / "eval_results.json")
    assert cli.main(["vbench-score", "--compare", a, b]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["b_minus_a"]["total"] == pytest.approx(82.57 - 80.25, abs=0.02)
    assert printed["made_with"] == {"weights_sha256": ["a", "b"], "steps": [50, 4]}
    assert printed["b"]["dynamic_degree"] == pytest.approx(81.67)


@pytest.mark.parametrize("field, value", [("prompts", "rewritten"), ("fps", 8), ("num", 1), ("prompts_sha256", "2")])
def test_results_of_unlike_videos_are_refused_by_what_differs(results, capsys, field, value):
    (results / "b" / "manifest.json").write_text(json.dumps(MADE | {field: value, "steps": 4}))
    assert cli.main(["vbench-score", "--compare", str(results / "a"), str(results / "b")]) == 2
    error = capsys.readouterr().err
    assert f"{field} is {MADE[field]!r} in" in error and f"and {value!r} in" in error and "steps" not in error


def test_results_without_a_manifest_are_refused(results, capsys):
    (results / "b" / "manifest.json").unlink()
    assert cli.main(["vbench-score", "--compare", str(results / "a"), str(results / "b")]) == 2
    assert f"{results / 'b'} cannot be compared: there is no manifest.json" in capsys.readouterr().err
    assert cli.main(["vbench-score", "--compare", str(results / "a")]) == 2
    assert "give two results" in capsys.readouterr().err


def test_scores_keep_their_manifest_and_stand_beside_vendi(results, capsys):
    metrics, out = results / "metrics.json", results / "scores.json"
    metrics.write_text(json.dumps({"vendi": 1.98}))
    file = str(results / "a" / "eval_results.json")
    assert cli.main(["vbench-score", file, f"--metrics={metrics}", f"--json={out}"]) == 0
    assert json.loads(capsys.readouterr().out) | {"vendi": 1.98, "manifest": MADE} == json.loads(out.read_text())
    assert cli.main(["vbench-score", "--compare", str(out), str(results / "b")]) == 0
    capsys.readouterr()
    metrics.write_text("{}")
    assert cli.main(["vbench-score", file, f"--metrics={metrics}"]) == 2
    assert "holds no Vendi score" in capsys.readouterr().err


def test_scoring_needs_no_jax(results):
    """jax alone takes longer to import than a second."""
    code = "import sys; from dollar_jax import cli; cli.main(sys.argv[1:]); assert 'jax' not in sys.modules"
    file = str(results / "a" / "eval_results.json")
    subprocess.run([sys.executable, "-c", code, "vbench-score", file], check=True, stdout=subprocess.DEVNULL)
