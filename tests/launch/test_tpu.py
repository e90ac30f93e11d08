"""launch/tpu.py and the worker.sh it sends, against a fake gcloud whose workers are folders."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "launch" / "tpu.py"
PLACE = ["--name=wan", "--zone=us-east5-a"]
SLICE = [*PLACE, "--type=v5p-16", "--poll=0.01"]
UV = '#!/bin/bash\n[[ $1 == venv ]] && mkdir -p venv/bin\necho "$*" >>uv_calls\n'


class Cloud:
    """The fake cloud in a folder, and the tool run against it."""

    def __init__(self, folder: Path, **changes):
        self.folder = folder
        cloud = {"resources": {}, "states": ["ACTIVE"], "preempt": 0, **changes}
        (folder / "cloud.json").write_text(json.dumps(cloud))
        programs = folder / "bin"
        programs.mkdir()
        (programs / "gcloud").symlink_to(Path(__file__).with_name("gcloud"))
        (programs / "uv").write_text(UV)
        (programs / "uv").chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "FAKE_CLOUD": str(folder)}

    def __call__(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, TOOL, *arguments],
            env=self.env,
            text=True,
            capture_output=True,
            timeout=60,
            cwd=self.folder,
        )
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


@pytest.fixture
def cloud(tmp_path):
    clouds = []

    def make(**changes):
        clouds.append(Cloud(tmp_path, **changes))
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
    for _ in range(100):
        if happens():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_command_that_fails_fails_the_tool(cloud):
    c = cloud()
    done = c("run", *SLICE, "--watch", "--", "bash", "-c", "echo oh no; exit 7", code=1)
    assert "oh no" in done.stdout and "exit code 7" in done.stderr and c.verbs().count("create") == 1


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
    ],
)
def test_bad_requests_are_one_sentence(cloud, arguments, message):
    error = cloud()(*arguments, code=1).stderr
    assert message in error and len(error.splitlines()) == 1


def test_bad_login_is_one_sentence(cloud):
    c = cloud(broken=True)
    error = c("create", *SLICE, code=1).stderr
    assert "not logged in" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("script", ["worker.sh", "train.slurm"])
def test_shell_scripts_pass_shellcheck(script):
    subprocess.run(["shellcheck", "--shell=bash", ROOT / "launch" / script], check=True)


def test_the_job_set_asks_for_the_chips_of_its_topology():
    job = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = job["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    (container,) = pod["containers"]
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"][:2] == ["dollar", "train"]
