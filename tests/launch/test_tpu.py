"""launch/tpu.py and the worker.sh it sends, against a fake gcloud whose workers are folders."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PLACE = ["--name=wan", "--zone=us-east5-a"]
SLICE = [*PLACE, "--type=v5p-16", "--poll=0.01"]
UV = '#!/bin/bash\n[[ $1 == venv ]] && mkdir -p venv/bin\necho "$*" >>uv_calls\n'


class Cloud:
    """The fake cloud in a folder, and the tool of a repository run against it."""

    def __init__(self, folder: Path, repository: Path, **changes):
        self.folder, self.repository = folder, repository
        cloud = {"resources": {}, "states": ["ACTIVE"], "preempt": 0, "outlived": 0, **changes}
        (folder / "cloud.json").write_text(json.dumps(cloud))
        programs = folder / "bin"
        programs.mkdir()
        (programs / "gcloud").symlink_to(Path(__file__).with_name("gcloud"))
        (programs / "uv").write_text(UV)
        (programs / "uv").chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "FAKE_CLOUD": str(folder)}

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, self.repository / "launch" / "tpu.py", *arguments],
            env=self.env,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        done = subprocess.CompletedProcess(arguments, 0, *process.communicate(timeout=120))
        done.returncode = process.returncode
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)[3:] for line in lines]

    def verbs(self) -> list[str]:
        """What was asked of gcloud, looks at the state left out: `ssh follow` and so on."""
        words = [[c[0], *(w.split()[2] for w in c if w.startswith("--command"))] for c in self.calls()]
        return [" ".join(w) for w in words if w != ["describe"]]


def git(folder: Path, *words: str):
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", folder, *words], check=True)


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A small one with launch/ in it."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "pyproject.toml").touch()
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def cloud(tmp_path, repository):
    clouds = []

    def make(**changes):
        clouds.append(Cloud(tmp_path, repository, **changes))
        return clouds[-1]

    yield make
    for made in clouds:
        if made.folder.joinpath("cloud.json").read_text().find('"wan"') >= 0:
            made("delete", *PLACE)


RUN = ["scp", "ssh install", "ssh running", "ssh stop", "ssh start", "ssh follow"]


def test_run_brings_a_slice_from_nothing_to_a_finished_command(cloud):
    c = cloud(states=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = c("run", *SLICE, "--spot", "--", "bash", "-c", "echo out of $PWD; ls pyproject.toml; sleep 0.3")
    assert c.verbs() == ["create", *RUN]
    create = next(call for call in c.calls() if call[0] == "create")
    assert create == [
        "create",
        "wan",
        "--node-id=wan",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
        "--zone=us-east5-a",
    ]
    assert "WAITING_FOR_RESOURCES" in done.stdout
    home = c.folder / "0-0" / "dollar"
    assert f"out of {home}/src\npyproject.toml" in done.stdout
    for worker in ("0-0", "0-1"):
        home = c.folder / worker / "dollar"
        assert (home / "exit_code").read_text() == "0\n"
        assert "pip install --quiet --python venv/bin/python -e src[tpu]" in (home / "uv_calls").read_text()
    # Again: the slice is there and the commit installed, only the command starts anew.
    c("run", *SLICE, "--", "true")
    assert c.verbs() == ["create", *RUN, *RUN]
    assert len((home / "uv_calls").read_text().splitlines()) == 2


def test_a_preempted_run_is_made_anew_and_goes_on(cloud):
    c = cloud(preempt=2)
    done = c("run", *SLICE, "--spot", "--watch", "--", "sleep", "0.2")
    assert c.verbs() == ["create", *RUN, *["delete", "create", *RUN] * 2]
    assert done.stdout.count("lost; looking again") == 2


def test_without_watch_a_preemption_ends_in_a_sentence_that_says_how_to_go_on(cloud):
    c = cloud(preempt=1)
    done = c("run", *SLICE, "--", "sleep", "0.2", code=1)
    assert "the same command again goes on" in done.stderr and len(done.stderr.splitlines()) < 4
    c("run", *SLICE, "--", "sleep", "0.2")
    assert c.verbs() == ["create", *RUN, "delete", "create", *RUN]


def test_a_running_command_is_joined_and_can_be_looked_at_and_stopped(cloud):
    c = cloud()
    command = ["--", "bash", "-c", "echo working; sleep 60"]
    c("run", *SLICE, "--detach", *command)
    c("run", *SLICE, "--detach", *command)
    assert c.verbs()[-1] == "ssh running", "it runs already and is not started again"
    assert "something else is running" in c("run", *SLICE, "--detach", "--", "true", code=1).stderr
    status = c("status", *PLACE).stdout
    assert "wan: ACTIVE" in status and status.count("running bash -c echo working") == 2
    c("logs", *PLACE, "--out=here")
    assert {p.name: p.read_text() for p in (c.folder / "here").iterdir()} == {
        "0-0.log": "working\n",
        "0-1.log": "working\n",
    }
    c("stop", *PLACE)
    assert c("status", *PLACE).stdout.count("nothing runs") == 2


def test_profiling_signals_the_training_process_alone(cloud):
    c = cloud()
    program = c.folder / "bin" / "dollar"
    program.write_text(
        "#!/usr/bin/env python3\nimport signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('tracing', flush=True))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    c("run", *SLICE, "--detach", "--", "dollar", "train")
    log = c.folder / "0-1" / "dollar" / "log"
    wait_for(lambda: "ready" in log.read_text())
    c("profile", *PLACE)
    wait_for(lambda: "tracing" in log.read_text())
    assert c("status", *PLACE).stdout.count("running dollar train") == 2


def wait_for(happens):
    for _ in range(600):
        if happens():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_command_that_fails_fails_the_tool(cloud):
    c = cloud()
    done = c("run", *SLICE, "--watch", "--", "bash", "-c", "echo oh no; exit 9", code=1)
    assert "oh no" in done.stdout and "exit code 9" in done.stderr and c.verbs().count("create") == 1


# Worker 0's command ends with the code it is given, once.
ONCE = "f=$FAKE_CLOUD/once; [[ $PWD == */0-0/* && ! -e $f ]] || exit 0; touch $f; exit $1"


@pytest.mark.parametrize(("code", "outlived", "outages"), [(143, 0, 2), (1, 1, 0)])
def test_a_command_that_ends_with_its_machines_is_started_again(cloud, code, outlived, outages):
    """143: SIGTERM came. 1: another worker went first; only the slice's state says so."""
    c = cloud(outlived=outlived, states=["ACTIVE", *["OUTAGE"] * outages, "ACTIVE"])
    done = c("run", *SLICE, "--watch", "--", "bash", "-c", ONCE, "command", str(code))
    assert c.verbs() == ["create", *RUN, *["delete", "create"] * outlived, *RUN]
    assert done.stdout.count("lost; looking again") == 1 + outages
    assert done.stderr.count("TransportError") == outages


def test_refused_input_is_not_tried_again_whatever_becomes_of_the_slice(cloud):
    c = cloud(outlived=1)
    error = c("run", *SLICE, "--watch", "--", "bash", "-c", ONCE, "command", "2", code=1).stderr
    assert "the command refused its input" in error and c.verbs() == ["create", *RUN]


def test_a_slice_that_cannot_be_set_up_is_given_up(cloud):
    c = cloud(unreachable=True)
    error = c("run", *SLICE, "--watch", "--", "true", code=1).stderr
    assert "could not be set up or reached 10 times in a row" in error and c.verbs() == ["create", *["scp"] * 10]


def test_stop_waits_until_the_command_has_saved_and_ends_the_watch(cloud):
    c = cloud()
    save = 'trap "sleep 0.5; echo saved; exit 143" TERM; echo ready; while :; do sleep 0.05; done'
    watch = c.start("run", *SLICE, "--watch", "--", "bash", "-c", save)
    log = c.folder / "0-1" / "dollar" / "log"
    wait_for(lambda: log.exists() and "ready" in log.read_text() and "ssh follow" in c.verbs())
    c("stop", *PLACE)
    assert "saved" in log.read_text(), "stop came back before the command was done"
    assert log.with_name("exit_code").read_text() == "143\n", "the shell around the command ended before it"
    assert "was told to stop" in watch.communicate(timeout=60)[1] and watch.returncode == 1
    assert c.verbs().count("ssh start") == 1


def test_environment_variables_reach_the_command_and_nothing_else(cloud):
    c = cloud()
    c.env["HF_TOKEN"] = "hf'xyzzy $x"
    arguments = ["run", *SLICE, "--env=HF_TOKEN", "--env=MODE=a=b", "--", "bash", "-c", "echo [$HF_TOKEN] [$MODE]"]
    assert "[hf'xyzzy $x] [a=b]\n" in c(*arguments).stdout
    assert "xyzzy" not in json.dumps(c.calls()), "a command line has it"
    left = [p for w in ("0-0", "0-1") for p in (c.folder / w).rglob("*") if p.is_file() and b"xyzzy" in p.read_bytes()]
    assert {p.name for p in left} == {"log"}, "the command wrote it there"
    dry = c(*arguments[:-4], "--dry-run", *arguments[-4:])
    assert "xyzzy" not in dry.stdout + dry.stderr and "dollar.env wan:" in dry.stdout


def test_what_is_not_committed_is_named_and_refused_where_the_command_needs_it(cloud, tmp_path):
    c = cloud()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(c.repository), str(clone))
    c.repository = clone
    (clone / "pyproject.toml").write_text("changed")
    (clone / "mine.py").touch()
    command = ["run", *SLICE, "--dry-run", "--", "dollar", "train"]
    assert "not committed, so not installed: pyproject.toml, mine.py\n" in c(*command).stderr
    refused = c(*command, "--config=mine.py:vsd", code=1)
    assert refused.stderr.startswith("tpu.py run: mine.py is not committed") and not refused.stdout
    assert len(refused.stderr.splitlines()) == 1


def test_a_bucket_is_mounted_by_its_name(cloud):
    c = cloud()
    for given in ("clips", "gs://clips", "gs://clips/"):
        *_, last = c("install", *PLACE, f"--bucket={given}", "--dry-run").stdout.splitlines()
        (command,) = [word for word in shlex.split(last) if word.startswith("--command=bash worker.sh install ")]
        assert command.endswith(" clips")


def test_several_slices_are_one_request(cloud):
    c = cloud()
    c("create", *SLICE, "--slices=2", "--reserved", "--valid-until-duration=6h")
    create = next(call for call in c.calls() if call[0] == "create")
    assert {"--node-count=2", "--node-prefix=wan", "--reserved", "--valid-until-duration=6h"} < set(create)
    assert not any(word.startswith("--node-id") for word in create)
    c("create", *SLICE, "--slices=2")
    assert c.verbs() == ["create"]


def test_delete_may_be_given_twice(cloud):
    c = cloud()
    c("create", *SLICE)
    c("delete", *PLACE)
    assert "nothing to delete" in c("delete", *PLACE).stdout
    assert c.verbs() == ["create", "delete"]


def test_dry_run_prints_the_commands_and_runs_none(cloud):
    c = cloud()
    options = ["--project=mine", "--bucket=clips", "--dry-run"]
    arguments = ["run", *SLICE, *options, "--", "dollar", "train", "--workdir=a b"]
    lines = c(*arguments).stdout.splitlines()
    assert c.calls() == []
    assert [line.split()[4] for line in lines if line.startswith("gcloud")] == [
        "describe",
        "create",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "ssh",
        "ssh",
    ]
    assert all("--project=mine" in line for line in lines if line.startswith("gcloud"))
    assert any(" clips'" in line for line in lines) and any("a b" in line for line in lines)


def test_arguments_may_stand_in_a_file(cloud):
    c = cloud()
    (c.folder / "wan.flags").write_text("\n".join(SLICE))
    c("create", "@wan.flags")
    assert c.verbs() == ["create"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", *PLACE], "--type is missing"),
        (["create", *PLACE, "--type=v9-8"], "--type=v9-8 is of no known generation"),
        (["run", *SLICE], "what shall run"),
        (["run", *SLICE, "--watch", "--detach", "--", "true"], "--watch follows the run and --detach leaves it"),
    ],
)
def test_bad_requests_are_one_sentence(cloud, arguments, message):
    error = cloud()(*arguments, code=1).stderr
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", *SLICE, "--spot", "--reserved"], "--reserved: not allowed with argument --spot"),
        (["run", *SLICE, "--bucket=gs://clips/wan"], "'clips/wan' is no bucket's name"),
        (["run", *SLICE, "--env=NOT_SET_HERE"], "NOT_SET_HERE is not set here"),
        (["run", *SLICE, "--env=a b=c"], "'a b' is no variable's name"),
        (["create", "--name=wan"], "--zone"),
        (["status", *PLACE, "--", "true"], "status takes no command"),
    ],
)
def test_bad_arguments_are_one_sentence(cloud, arguments, message):
    error = cloud()(*arguments, code=2).stderr
    assert message in error and len(error.splitlines()) == 1


def test_every_generation_has_its_image(cloud):
    c = cloud()
    for kind, image in {"tpu7x-8": "v2-alpha-tpu7-ubuntu2404", "v6e-8": "v2-alpha-tpuv6e"}.items():
        out = c("create", *PLACE, f"--type={kind}", "--dry-run").stdout
        assert f"--accelerator-type={kind} --runtime-version={image} " in out


def test_bad_login_is_one_sentence(cloud):
    c = cloud(broken=True)
    error = c("create", *SLICE, code=1).stderr
    assert "not logged in" in error and len(error.splitlines()) == 1
