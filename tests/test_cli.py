"""The command line: what is impossible gets one sentence and exit code 2, before any work."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dollar_jax import cli
from dollar_jax.checkpoint import NothingWhole, SaveFailed
from dollar_jax.cli import base
from dollar_jax.cli.base import report_error
from dollar_jax.cli.train import EndedEarly
from dollar_jax.distributed import Interrupted, Preempted, ProcessLost
from dollar_jax.lock import InUse

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.py")


def refused(capsys, *arguments):
    """What follows "dollar command: " in the one line on stderr."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert err.endswith("\n") and err.count("\n") == 1, err
    start = f"dollar {arguments[0]}: "
    assert err.startswith(start)
    return err.removeprefix(start).strip()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(capsys, arguments):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    for name, command in cli.COMMANDS.items():
        assert f"dollar {name} " in out
        assert command.summary in out


def test_nothing_asked_for_is_help_and_a_failure(capsys):
    assert cli.main([]) == 2
    assert "dollar demo" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(capsys, name):
    assert cli.main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith(f"dollar {name}")
    assert cli.COMMANDS[name].summary in out.splitlines()[0]
    flags = {
        "config": "--config",
        "import": "--dtype",
        "import-reward": "--clip",
        "prepare": "--out",
        "vbench-score": "--json",
        "plan": "--topology",
    }
    assert flags.get(name, "--workdir") in out


def test_an_unknown_command(capsys):
    assert cli.main(["dance"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "'dance'" in err and all(name in err for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train"], "--config and --workdir must be given"),
        (["train", f"--config={DEMO}"], "--workdir must be given"),
        (["pretrain", "--workdir=x"], "--config must be given"),
        (["sample", "--workdir=x"], "--prompt or --prompts_file must be given"),
        (["reproduce", "--quick"], "--workdir must be given"),
        (["evaluate"], "--workdir or --videos must be given"),
        (["prepare", "--source=x"], "--out must be given"),
    ],
)
def test_missing_flags(capsys, arguments, message):
    assert refused(capsys, *arguments) == message


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["demo", "--wrkdir=x"], ["wrkdir", "Did you mean: workdir"]),
        (["demo", "more"], ["unexpected argument 'more'", "dollar demo --help"]),
        (["demo", "--seed=one"], ["--seed=one", "a whole number"]),
        (["sample", "--workdir=x", "--prompt=a", "--steps=0"], ["--steps=0", "range [1, 1000]"]),
        (["evaluate", "--workdir"], ["Missing value", "--workdir"]),
        (["prepare", "--out=x"], ["give either --source", "or --prompts"]),
        (["prepare", "--out=x", "--source=y", "--prompts=z"], ["give either --source", "or --prompts"]),
        (["prepare", "--out=x", "--source=y", "--buckets=16*16"], ["480x832,832x480", "'16*16'"]),
        (["prepare", "--out=x", "--source=y", "--buckets=8x8", "--width=8"], ["--width or --buckets"]),
        (["prepare", "--out=x", "--source=y", "--crop=left"], ["--crop=left", "centre"]),
        (["prepare", "--out=x", "--source=y", "--teacher=z"], ["z is no diffusers pipeline"]),
        (["prepare", "--out=x", "--source=/no/such"], ["--source=/no/such does not exist"]),
    ],
)
def test_wrong_flags(capsys, arguments, parts):
    message = refused(capsys, *arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"--config={DEMO}", "--workdir=gs://bucket/run"],
        ["train", f"--config={DEMO}", "--workdir=x", "--config.data.name=gs://bucket/run"],
        ["train", f"--config={DEMO}", "--workdir", "s3://bucket/a=b"],
        ["prepare", "--source=x", "--out=gs://bucket/data"],
        ["import", "gs://bucket/wan", "x"],
        ["sample", "--workdir=x", "--prompt=a", "--out=gs://bucket/a.mp4"],
    ],
)
def test_a_path_in_a_bucket_is_refused_with_the_mend(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *arguments)
    assert "://bucket" in message and "only folders are read and written: mount it, as in gcsfuse bucket" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "pretrain"])
@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--config=/no/such/file.py"], ["/no/such/file.py"]),
        ([f"--config={DEMO}:everything"], [":everything is unknown", "vsd+cd+lrm"]),
        ([f"--config={DEMO}", "--config.stepz=3"], ["config has no field 'stepz'; did you mean config.steps?"]),
        ([f"--config={DEMO}", "--config.student.stepz.x=3"], ["no field", "stepz"]),
        (["--config=demoo"], ["there is no configuration demoo", "cogvideox_2b", "demo", "wan_1_3b"]),
        ([f"--config={DEMO}", "--config.steps=0"], ["config.steps must be at least 1, not 0"]),
        (["--config=wan_1_3b", "--config.pretrain.num_steps=3"], ["config.pretrain is None in wan_1_3b"]),
        ([f"--config={DEMO}", "--config.reward.rewards[1].weight=3"], ["a --config. flag sets what is not there"]),
        ([f"--config={DEMO}", "--config.steps.x=3"], ["config.steps is a single setting"]),
        ([f"--config={DEMO}", "--config.steps=many"], ["--config.steps=many", "a whole number"]),
        ([f"--config={DEMO}", "--config.student.input=sideways"], ["config.student.input", "'forward', 'backward'"]),
        ([f"--config={DEMO}", "--config.accumulation=7"], ["config.batch_size", "7 micro-batches"]),
    ],
)
def test_wrong_configurations(capsys, tmp_path, command, flags, parts):
    workdir = tmp_path / "run"
    message = refused(capsys, command, *flags, f"--workdir={workdir}")
    for part in parts:
        assert part in message
    assert not workdir.exists()


def test_a_configuration_with_a_syntax_error(capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(:\n")
    assert "broken.py, line 1" in refused(capsys, "train", f"--config={path}", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    "body, message",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def get_config(): return None", "get_config must return settings, not None"),
        ("steps = 3", "there is no function get_config in it"),
        ("def get_config(): return {'steps': 3}", "config lacks data, teacher"),
    ],
)
def test_a_configuration_that_fails_names_its_file(capsys, tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(body + "\n")
    assert refused(capsys, "train", f"--config={path}", f"--workdir={tmp_path}") == f"{path}: {message}"


def test_a_teacher_that_is_not_there(capsys, tmp_path):
    teacher = tmp_path / "teacher"
    flags = [f"--config={DEMO}", f"--config.teacher={teacher}", f"--workdir={tmp_path / 'run'}"]
    assert f"{teacher} is no diffusers pipeline" in refused(capsys, "train", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command, more", [("sample", ["--prompt=a small red circle"]), ("evaluate", [])])
def test_a_workdir_without_a_run(capsys, tmp_path, command, more):
    for workdir in (tmp_path, tmp_path / "nowhere"):
        message = refused(capsys, command, f"--workdir={workdir}", *more)
        assert message.startswith(f"{workdir} holds no run")
    assert not list(tmp_path.iterdir())


def test_a_run_with_a_damaged_configuration(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "config lacks" in refused(capsys, "evaluate", f"--workdir={tmp_path}")


def test_a_traceback_can_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("DOLLAR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        cli.main(["evaluate", f"--workdir={tmp_path}"])


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("dollar_jax.cli.demo.run", interrupted)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_settings_on_the_command_line_reach_the_run(monkeypatch):
    seen = {}

    def look():
        seen.update(steps=base.FLAGS.config.steps, rate=base.FLAGS.config.student.optimiser.learning_rate)

    monkeypatch.setattr("dollar_jax.cli.train.run", look)
    flags = ["--config.steps=7", "--config.student.optimiser.learning_rate=0.5", "--workdir=x"]
    assert cli.main(["train", f"--config={DEMO}:vsd", *flags]) == 0
    assert seen == {"steps": 7, "rate": 0.5}


def loaded(code):
    """What code prints, and the modules that a process which runs it has loaded in the end."""
    code = f"import sys\ntry:\n  {code}\nfinally: sys.stdout.write(' '.join(['loaded', *sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    said, _, modules = out.rpartition("loaded ")
    return said, set(modules.split())


@pytest.mark.multiprocess
def test_what_is_quick_imports_nothing_slow(tmp_path):
    (tmp_path / "results.json").write_text('{"subject_consistency": 0.9}')
    for arguments, says, slow in (
        (["--help"], "dollar demo", {"absl", "numpy", "jax", "torch"}),
        (["vbench-score", str(tmp_path / "results.json"), "--allow_missing"], "quality", {"jax", "torch", "orbax"}),
    ):
        said, modules = loaded(f"from dollar_jax.cli import main; main({arguments})")
        assert says in said and not slow & modules


@pytest.mark.multiprocess
def test_the_demo_speaks_before_it_loads_what_takes_time(tmp_path):
    stop = "import builtins; builtins.print = lambda *said, **_: sys.exit(sys.stdout.write(said[0]) and 0)"
    said, modules = loaded(f"{stop}; from dollar_jax.cli import main; main(['demo', '--workdir={tmp_path}'])")
    assert "Distilling" in said and not {"jax", "numpy", "orbax", "transformers"} & modules


@pytest.mark.multiprocess
def test_the_shipped_tokenizer_is_read_without_pytorch():
    read = "from dollar_jax.generate import teacher_folder; from dollar_jax.weights.pipeline import load_tokenizer; "
    said, modules = loaded(read + "print(load_tokenizer(teacher_folder('moving_shapes') / 'tokenizer')('red'))")
    assert "input_ids" in said and "transformers" in modules and "torch" not in modules


@pytest.mark.multiprocess
def test_the_module_is_the_command():
    run = [sys.executable, "-m", "dollar_jax"]
    helped = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "dollar demo" in helped.stdout
    failed = subprocess.run([*run, "evaluate", "--workdir=/no/such/run"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == "dollar evaluate: /no/such/run holds no run: there is no config.json in it\n"


def test_every_way_to_end_has_its_exit_code():
    codes = {SaveFailed: 3, NothingWhole: 4, InUse: 5, EndedEarly: 6, FloatingPointError: 6, ValueError: 2, OSError: 2}
    codes |= {KeyboardInterrupt: 130, Interrupted: 130, Preempted: 143, ProcessLost: 7, ZeroDivisionError: 1}
    assert {kind: report_error("train", kind("why")) for kind in codes} == codes
    assert set(codes.values()) | {0} == cli.EXIT_CODES.keys()


@pytest.mark.multiprocess
def test_virtual_devices_share_a_cpu_without_waiting_for_each_other():
    """A user's flags stay, and win."""
    code = "from dollar_jax.cli.base import prepare_jax; prepare_jax(); import jax, os; jax.devices()"
    code += "; print(jax.device_count(), os.environ.get('PJRT_NPROC'), os.environ.get('XLA_FLAGS'))"

    def said(devices):
        env = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"} | {"JAX_NUM_CPU_DEVICES": devices}
        env["XLA_FLAGS"] = own = "--xla_cpu_collective_call_terminate_timeout_seconds=50"
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return run.stdout.replace(own, "OWN").strip()

    assert said("1") == "1 None OWN"
    assert re.fullmatch(r"2 8 --xla_cpu_enable_concurrency_optimized_scheduler=false .*=600 OWN", said("2"))


@pytest.mark.multiprocess
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_memory_that_was_freed_is_there_for_the_next_buffer():
    """64 MiB twice: the second buffer costs no page fault, where by default it costs one a page. Threads have heaps of
    their own, unless they are to share one: then theirs costs none either."""
    code = """
import ctypes, resource, sys, threading
import numpy as np
from dollar_jax.cli.base import prepare_jax
if sys.argv[1] != "default":
    prepare_jax(one_heap=sys.argv[1] == "one")
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**26, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def show():
    faults(), print(faults(), int(libc.malloc(1000) > libc.sbrk(0)))
thread = threading.Thread(target=show)
thread.start(), thread.join(), show()
"""
    found = {}
    for way in ("kept", "one", "default"):
        done = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True)
        found[way] = [int(line) for line in done.stdout.split()]
    threads, main = ([found[way][i] for way in found] for i in (0, 2))
    assert max(main[:2]) < 100 and threads[1] < 100
    assert min(main[2], threads[2]) > 25
    assert [numbers[1::2] for numbers in found.values()] == [[1, 0], [0, 0], [1, 0]]
