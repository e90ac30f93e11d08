"""Every benchmark starts: what it imports is declared, and its arguments are those its first lines tell of."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FILES = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_benchmark_explains_itself(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    commands = [
        line for line in path.read_text().splitlines() if line.strip().startswith(f"python benchmarks/{path.name}")
    ]
    assert commands
    for flag in re.findall(r"--[\w-]+", " ".join(commands)):
        assert re.search(rf"(?<!\w){flag}\b", shown.partition("options:")[2]), flag


GPU = FILES[0].with_name("gpu.py")
IMPLEMENTATIONS = {"JAX", "PyTorch, eager"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs pip install -e '.[test]'")
def test_the_gpu_benchmark_runs_on_a_cpu_at_tiny_size(tmp_path):
    """Every row is timed, and both implementations count the same operations: those of the network's definition."""
    command = [sys.executable, str(GPU), "--size=tiny", "--rivals", "eager", f"--json={tmp_path / 'gpu.json'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GPU.parents[1])}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["by"], row["what"]): row for row in found["rows"]}
    assert not [row for row in rows.values() if "skipped" in row]
    assert all(row["seconds"] > 0 and row["mfu"] is None for row in rows.values())
    times = {"student, 4 steps": 4, "student, 2 steps": 2, "student, 1 step": 1, "teacher, 50 steps": 100}
    # 2 layers of 32 channels on 2 × 2 × 2 tokens, 8 tokens of text of 32 channels.
    embed = 8 * 64 * 32 + 256 * 32 + 32 * 32 + 6 * 32 * 32 + 8 * 32 * 32 + 8 * 32 * 32
    layer = 4 * 8 * 32 * 32 + 2 * 8 * 8 * 32 + 2 * (8 + 8) * 32 * 32 + 2 * 8 * 8 * 32 + 2 * 8 * 32 * 64
    forward = 2 * (embed + 2 * layer + 8 * 32 * 64) / 1e12
    for by in IMPLEMENTATIONS:
        assert rows[by, "forward"]["tflop"] == pytest.approx(forward)
        assert rows[by, "student's update"]["tflop"] == pytest.approx(3 * forward)
    assert {what: round(rows["JAX", what]["tflop"] / forward) for what in times} == times
    assert rows["JAX", "whole step"]["tflop"] > 10 * forward and rows["JAX", "decode"]["tflop"] > 0
    assert len(shown.splitlines()) == 2 + len(rows) and found["versions"].keys() >= {"jax", "torch", "diffusers"}


def test_a_gpu_benchmark_without_time_or_gpu_names_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    benchmark = runpy.run_path(str(GPU))
    rows = benchmark["Rows"]("JAX", 2.0, tmp_path / "rows.json", end=0.0)
    rows.add("forward", 1.0, lambda: pytest.fail("there is no time left"))
    rows.end = float("inf")
    rows.add("decode", 1.0, lambda: lambda: [][0])
    rows.add("update", 1.0, lambda: lambda: None)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written[2]["mfu"] == pytest.approx(written[2]["tflops_per_second"] / 2.0)
    *_, forward, decode = benchmark["table"](written).splitlines()
    assert forward == "JAX, forward: left out, no time left"
    assert decode == "JAX, decode: left out, IndexError: list index out of range"
    assert benchmark["why_not"]("eager", "wan_1_3b") in ("PyTorch sees no GPU", "torch is not installed")


SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_speed_times_what_agrees_with_pytorch(tmp_path):
    out = tmp_path / "speed.md"
    few = ["--sizes", "tiny", "--threads", "1", "--rivals", "diffusers", "pipeline", "--repeats", "1"]
    subprocess.run([sys.executable, SPEED, *few, f"--out={out}"], check=True)
    rows = [line.split("|")[1:-1] for line in out.read_text().splitlines() if ", tiny |" in line]
    assert len(rows) == 8
    for what, threads, ours, eager, pipeline in rows:
        assert int(threads) == 1 and float(ours) > 0
        ratio = float(ours) / float(eager.split("(")[0])
        assert ratio == pytest.approx(float(eager.split("(")[1].strip(" )")), abs=0.02)
        assert ("Teacher" in what) == ("(" in pipeline)


@pytest.mark.slow
def test_speed_refuses_to_time_a_step_that_is_another(monkeypatch):
    """An average that does not move changes no loss of the first step: those after it tell."""
    monkeypatch.syspath_prepend(SPEED.parent)
    speed = importlib.import_module("speed")
    monkeypatch.setattr("torch._foreach_lerp_", lambda *_: None)
    with (
        pytest.raises(AssertionError, match="diffusers"),
        jax.debug_key_reuse(False),
    ):  # the keys once more, for PyTorch
        list(speed.cases("tiny", 1, {"step"}, {"diffusers"}))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_is_timed_whole_and_in_parts(devices):
    command = [sys.executable, SPEED.with_name("cores.py"), f"--rows={4 * (os.cpu_count() or 1)}", "--seconds=0"]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    for line, name in zip(shown.splitlines(), ("forward", "gradient"), strict=True):
        assert line.startswith(name) and f"devices: {devices}: all " in line
        assert ("beside" in line) == (devices == 1 and " 1 cores" not in line)


FRONTIER = SPEED.with_name("frontier.py")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fewer_blocks_are_faster_in_one_step(tmp_path):
    command = [sys.executable, FRONTIER, f"--out={tmp_path / 'lines.jsonl'}", "--speed", "1"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(\d) blocks, one step: ×(\d+)", shown))
    assert list(found) == ["4", "3", "2", "1"] and int(found["1"]) > int(found["4"]) > 30


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_frontier_runs_what_has_no_line_yet(tmp_path):
    out = tmp_path / "lines.jsonl"

    def rows(*only: str) -> list[str]:
        command = [sys.executable, FRONTIER, f"--out={out}", "--quick", "--seeds", "0", "--only", *only]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [line for line in shown.splitlines() if line.startswith("| ")][1:]

    first = rows("cd")
    assert len(first) == 1 and first[0].startswith("| CD alone | 10 | 160 |")
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["student_4"].keys() >= {"alignment", "vendi", "frechet", "reward"} and line["student_1"]["nfe"] == 1
    both = rows("teacher", "cd")
    assert both[0].startswith("| the teacher") and both[1:] == first
    assert [json.loads(line)["setting"] for line in out.read_text().splitlines()] == ["cd", "teacher"]


def test_overhead_reads_records_of_a_real_teachers_size(tmp_path):
    seconds, size = runpy.run_path(str(SPEED.with_name("overhead.py")))["reading"](4, 1, tmp_path)
    assert size == pytest.approx(2 * (2 * 21 * 60 * 104 * 16 + 512 * 4096) / 2**20, rel=1e-3) and seconds > 0
