"""Every benchmark starts: what it imports is declared, and its arguments are those its first lines tell of."""

import re
import runpy
from pathlib import Path

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
