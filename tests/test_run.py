"""A run's folder: what is in it, and what a resumption may find there."""

import json
import os
import subprocess
import sys
import time

import pytest

from dollar_jax import lock
from dollar_jax.run import read_history, truncate_history


def test_history_is_json_and_drops_what_comes_after(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in (2, 4, 6)))
    truncate_history(tmp_path, 4)
    assert [line["step"] for line in read_history(tmp_path)] == [2, 4]
    assert read_history(tmp_path / "nowhere") == []


# --- one owner of a folder --------------------------------------------------------------------------

OWN = """
import sys, time
from pathlib import Path
from dollar_jax import lock
lock.DEAD_AFTER = 0.5
with lock.owned(Path(sys.argv[1])) as check:
    print("owned", flush=True)
    sys.stdin.readline()
    check()
"""


@pytest.fixture
def own(tmp_path):
    """Starts a process that owns tmp_path/run until it is told to end, and waits until it does."""
    started = []

    def start(**variables):
        process = subprocess.Popen(
            [sys.executable, "-c", OWN, str(tmp_path / "run")],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            text=True,
            env={**os.environ, **variables},
        )
        started.append(process)
        return process, process.stdout.readline()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_has_one_owner_and_a_dead_ones_is_taken_over(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "DEAD_AFTER", 0.5)
    workdir = tmp_path / "run"
    first, said = own()
    assert said == "owned\n"
    with pytest.raises(lock.InUse, match=rf"in use by process {first.pid}, begun .* on "), lock.owned(workdir):
        pass
    first.kill()
    first.wait()
    with lock.owned(workdir) as check:
        check()
        assert f"was left by process {first.pid}, " in capsys.readouterr().err
        (workdir / lock.LOCK).write_text("process 1, begun later on another host")  # after a long sleep of this one
        with pytest.raises(lock.InUse, match="taken over by process 1"):
            check()
    assert (workdir / lock.LOCK).exists()  # it is the other's


@pytest.mark.parametrize("lives", [True, False])
def test_another_hosts_owner_lives_as_long_as_it_gives_signs(tmp_path, monkeypatch, capsys, lives):
    """As on a file system whose locks do not reach other hosts; clocks, which may differ, are not compared."""
    monkeypatch.setattr(lock, "DEAD_AFTER", 0.6)
    path = tmp_path / lock.LOCK
    path.write_text("process 7, begun early on another host")
    os.utime(path, (1, 1))
    if lives:
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(path, (2, 2)))
        with pytest.raises(lock.InUse, match="in use by process 7"), lock.owned(tmp_path):
            pass
        assert path.exists()
    else:
        with lock.owned(tmp_path):
            assert "process 7, begun early on another host, which has ended" in capsys.readouterr().err
        assert os.listdir(tmp_path) == []


def test_the_owner_gives_signs_of_life_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.owned(tmp_path / "new"):
        path = tmp_path / "new" / lock.LOCK
        os.utime(path, (1, 1))
        end = time.monotonic() + 30
        while path.stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert os.listdir(tmp_path) == []
