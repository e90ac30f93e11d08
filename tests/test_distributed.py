"""Several processes on this machine, through the command line: the run of one process, and left together."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dollar_jax import distributed
from dollar_jax.checkpoint import SaveFailed
from dollar_jax.run import read_history
from dollar_jax.weights.pipeline import save_pipeline

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "batch_size": 8,
    "steps": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "data.train_videos": 16,
    "consistency.skip": 1,
    "reward.samples": 8,
    "reward.batch_size": 8,
    "reward.replay": 64,
    "reward.start_step": 0,
    "reward.head.width": 8,
    "student.optimiser.warmup_steps": 1,
    "fake_score.updates": 1,
    "reward.updates": 1,
    "visibility.samples_every": 2,
    "visibility.videos": 2,
    "sampling.num_steps": 2,
    # As in test_step: an eps that keeps rounding noise from being blown up.
    **{f"{part}.optimiser.eps": 1e-3 for part in ("student", "fake_score", "reward")},
}


@pytest.fixture(scope="module")
def launch(make_pipeline, tmp_path_factory, pytestconfig):
    """launch(workdir, processes, devices, settings) starts `dollar train` and returns the processes."""
    folder = tmp_path_factory.mktemp("distributed")
    save_pipeline(folder / "teacher", make_pipeline(scale=0.2))
    started = []

    def start(workdir, processes, devices, **settings):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        flags = {**SETTINGS, "teacher": folder / "teacher", **settings}
        command = [sys.executable, "-m", "dollar_jax", "train", "--config=configs/demo.py", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in flags.items()]
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONUNBUFFERED": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("jax")),
        }
        group = []
        for i in range(processes):
            place = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"]
            with (Path(workdir).parent / f"{Path(workdir).name}.{i}.log").open("a") as log:
                group.append(
                    subprocess.Popen(
                        command + (place if processes > 1 else []), cwd=ROOT, env=env, stdout=log, stderr=log
                    )
                )
        started.extend(group)
        return group

    yield start
    for process in started:
        process.kill()
        process.wait()


def finish(group, workdir, seconds=900):
    for i, process in enumerate(group):
        code = process.wait(timeout=seconds)
        assert code == 0, Path(f"{workdir}.{i}.log").read_text()[-3000:]


def train(launch, workdir, *args, **settings):
    finish(launch(workdir, *args, **settings), workdir)
    return read_history(workdir)


def assert_same(history, expected):
    assert [line["step"] for line in history] == [line["step"] for line in expected]
    for line, other in zip(history, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"seconds_per_step", "data_wait", "videos_per_second"}:
            # Samples are looked at as whole numbers from 0 to 255.
            loose = {"rtol": 1e-2, "atol": 1e-3} if name.startswith("sample_") else {"rtol": 1e-5, "atol": 1e-6}
            np.testing.assert_allclose(line[name], other[name], **loose, err_msg=name)


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """Four steps of one process with four devices, and its folder."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, train(launch, workdir, 1, 4, **{"mesh.data": 2, "mesh.fsdp": 2})


@pytest.mark.multiprocess
def test_two_processes_take_a_step_and_show_samples(launch, tmp_path):
    (line,) = train(launch, tmp_path / "run", 2, 1, steps=1, **{"mesh.data": 2, "visibility.samples_every": 1})
    assert line["step"] == 1 and "reward_generated" in line and "sample_vendi" in line


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_as_one_and_their_checkpoint_serves_another_number(launch, alone, tmp_path):
    """Two processes for two steps, then one process on another mesh: the losses of one process throughout."""
    workdir = tmp_path / "run"
    shutil.copytree(alone[0] / "data", workdir / "data")
    first = train(launch, workdir, 2, 2, steps=2, **{"mesh.data": 2, "mesh.fsdp": 2})
    assert len(first) == 2 and "reward_generated" in first[-1] and "sample_vendi" in first[-1]
    assert {path.name for path in (workdir / "samples").iterdir()} == {"teacher.npz", "step_000002.mp4"}
    assert "distilling" not in Path(f"{workdir}.1.log").read_text(), "only process 0 shows progress"
    assert len(list((workdir / "events").iterdir())) == 1
    assert_same(train(launch, workdir, 1, 2, **{"mesh.data": 1, "mesh.fsdp": 2}), alone[1])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_processes_resume_the_run_of_one(launch, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    history = train(launch, workdir, 4, 1, **{"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert_same(history, alone[1])


@pytest.fixture
def under_way(launch, alone, tmp_path):
    """The folder of a run that would not end by itself, and its two processes, a few steps in."""
    workdir = tmp_path / "run"
    shutil.copytree(alone[0] / "data", workdir / "data")
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "visibility.samples_every": 0}
    group = launch(workdir, 2, 2, steps=100_000, checkpoint_every=100_000, **mesh)
    end = time.monotonic() + 900
    while len(read_history(workdir)) < 2:
        assert time.monotonic() < end and all(p.poll() is None for p in group)
        time.sleep(0.1)
    return workdir, group


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_lost_process_ends_the_others(under_way):
    """Killed outright, as by the machine; the other must not wait for it for ever."""
    workdir, group = under_way
    group[1].send_signal(signal.SIGKILL)
    assert group[0].wait(timeout=120) == 7
    shown = Path(f"{workdir}.0.log").read_text()
    assert "another process of this run died" in shown and "Traceback" not in shown


WAITING = """
import sys, time
from dollar_jax import distributed
distributed.HEARTBEAT_SECONDS = 10
with distributed.joined(sys.argv[1], 2, int(sys.argv[2]), lambda error: print(error) or error.exit_code):
    print("joined", flush=True)
    time.sleep(300)
"""


@pytest.mark.multiprocess
def test_a_process_that_waits_ends_when_another_misses_its_heartbeats():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WAITING, address]
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    with subprocess.Popen([*command, "0"], **pipes) as first, subprocess.Popen([*command, "1"], **pipes) as second:
        for process in (first, second):
            while process.stdout.readline() != "joined\n":
                assert process.poll() is None
        second.kill()
        assert "another process of this run died" in first.communicate(timeout=120)[0]
        assert first.returncode == 7


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_error_in_one_process_ends_all_with_its_message(under_way):
    workdir, group = under_way
    group[1].send_signal(signal.SIGINT)
    assert group[1].wait(timeout=120) == 130
    assert "interrupted" in Path(f"{workdir}.1.log").read_text()
    assert group[0].wait(timeout=120) not in (None, 0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_when_one_process_is_terminated_all_save_and_end(under_way):
    workdir, group = under_way
    group[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=300) for process in group] == [143, 143]
    (saved,) = (workdir / "checkpoints").iterdir()
    assert int(saved.name) == read_history(workdir)[-1]["step"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_scores_are_taken_in_while_the_next_step_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    measure = runpy.run_path(str(ROOT / "benchmarks" / "scorer_overlap.py"))["measure"]
    assert measure(reward_seconds=0.05, host_seconds=0.3, work=60)["running"] > 0.5


@pytest.mark.parametrize(
    "signs", ["Gloo all-reduce failed: Connection closed by peer [127.0.0.1]", "heartbeat timeout"]
)
def test_what_is_left_of_a_run_says_that_a_process_died(signs, monkeypatch):
    def ended(code):
        raise SystemExit(code)

    def report(error):
        seen.append(error)
        return getattr(error, "exit_code", 1)

    seen = []
    monkeypatch.setattr(distributed, "_start", lambda *_: True)
    monkeypatch.setattr(distributed, "_watch", lambda *_: None)  # there is nobody
    monkeypatch.setattr(distributed.os, "_exit", ended)
    for message, code in ((signs, 7), ("RESOURCE_EXHAUSTED: out of memory", 1)):
        with pytest.raises(SystemExit) as end, distributed.joined(None, None, None, report):
            raise jax.errors.JaxRuntimeError(message)
        assert end.value.code == code
        with pytest.raises(SystemExit) as end, distributed.joined(None, None, None, report):
            raise SaveFailed("step 9 could not be saved") from jax.errors.JaxRuntimeError(message)
        assert end.value.code == (7 if code == 7 else 3)
    assert "another process of this run died" in str(seen[0]) and "goes on from its last checkpoint" in str(seen[1])
    assert isinstance(seen[2], jax.errors.JaxRuntimeError) and isinstance(seen[3], SaveFailed)


def test_the_environment_says_whether_there_are_others(monkeypatch):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert distributed.in_cluster(slurm)
    assert not distributed.in_cluster({**slurm, "SLURM_NTASKS": "1"})
    assert not distributed.in_cluster({})
    chips = {"/dev/vfio/[0-9]*": ["/dev/vfio/0"]}
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: chips.get(pattern, []))
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert distributed.in_cluster({})
    assert distributed.in_cluster({"JAX_PLATFORMS": "tpu,cpu"})
    assert not distributed.in_cluster({"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "go together"),
        (("host:1", 2, 2), "--process_id=2 is not among 0 to 1"),
        (("host", 2, 0), "--coordinator_address=host has no port"),
    ],
)
def test_bad_flags_are_one_sentence(given, message):
    with pytest.raises(ValueError, match=message), distributed.joined(*given, report=print):
        pass


def test_an_error_of_a_single_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(distributed, "in_cluster", lambda environ: False)
    with pytest.raises(KeyError), distributed.joined(None, None, None, report=json.dumps):
        raise KeyError


@pytest.mark.parametrize(("number", "kind"), [("SIGINT", distributed.Interrupted), ("SIGTERM", distributed.Preempted)])
def test_a_signal_is_told_at_the_next_step_and_a_second_ctrl_c_ends_at_once(number, kind, capsys):
    number = signal.Signals[number]
    before = signal.getsignal(number)
    with distributed.preemption() as noticed:
        assert noticed(0) is None
        signal.raise_signal(number)
        assert noticed(1) is kind and noticed(2) is None
        assert (signal.getsignal(number) is signal.SIG_DFL) == (number == signal.SIGINT)
    assert signal.getsignal(number) is before
