"""The files of launch/ that others read: GKE, Docker and SLURM."""

import os
import shutil
import signal
import subprocess
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that a training job may use, and their types, as the API
# server checks them; "*" stands for any key. https://github.com/kubernetes-sigs/jobset/tree/main/api
STRINGS = {"*": str}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "serviceAccountName": str,
    "nodeSelector": STRINGS,
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
            "ports": [{"containerPort": int}],
            "resources": {"requests": {"*": (int, str)}, "limits": {"*": (int, str)}},
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
        }
    ],
    "volumes": [{"name": str, "csi": {"driver": str, "readOnly": bool, "volumeAttributes": STRINGS}}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]
    },
    "template": {"metadata": {"labels": STRINGS, "annotations": STRINGS}, "spec": POD},
}
JOB_SET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
        "ttlSecondsAfterFinished": int,
    },
}


def misfits(value, schema, where=""):
    """The places of `value` that the schema does not know or that have another type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [where]
        fields = {key: schema.get(key, schema.get("*")) for key in value}
        bad = [f"{where}.{key}" for key, field in fields.items() if field is None]
        return bad + [m for k, f in fields.items() if f is not None for m in misfits(value[k], f, f"{where}.{k}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [where]
        return [m for i, item in enumerate(value) for m in misfits(item, schema[0], f"{where}[{i}]")]
    types = schema if isinstance(schema, tuple) else (schema,)
    return [] if type(value) in types else [where]


@pytest.fixture
def job_set():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


@pytest.fixture
def pod(job_set):
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_the_job_set_has_only_fields_that_kubernetes_knows(job_set):
    assert misfits(job_set, JOB_SET) == []
    # The check finds what it is there for: an unknown field, a number where a label must be a string.
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["backofLimit"] = 0
    spec["template"]["metadata"]["annotations"]["gke-gcsfuse/cpu-limit"] = 0
    assert len(misfits(job_set, JOB_SET)) == 2


def test_the_job_set_asks_for_the_chips_of_its_topology(job_set):
    job = job_set
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


def test_the_job_set_mounts_the_bucket_as_its_service_account(pod):
    (container,), (volume,) = pod["spec"]["containers"], pod["spec"]["volumes"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    # https://docs.cloud.google.com/kubernetes-engine/docs/reference/cloud-storage-fuse-csi-driver/volume-attr:
    # pods on the host network act as the node unless they ask for their own account.
    assert pod["spec"]["serviceAccountName"]
    assert not pod["spec"]["hostNetwork"] or volume["csi"]["volumeAttributes"]["hostNetworkPodKSA"] == "true"
    # The driver's webhook adds its sidecar where the first is set; the others are its limits, "0" for none.
    limits = [f"gke-gcsfuse/{what}-limit" for what in ("cpu", "memory", "ephemeral-storage")]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true", **dict.fromkeys(limits, "0")}
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 600


def test_the_job_set_restarts_but_where_the_same_would_come_again(job_set, pod):
    policy = job_set["spec"]["failurePolicy"]
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    # A job that a rule fails has the reason PodFailurePolicy, one out of retries BackoffLimitExceeded, and what no
    # rule of the set matches restarts it.
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0 == spec["backoffLimit"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 4, 6]
    assert rule["onExitCodes"]["containerName"] == pod["spec"]["containers"][0]["name"]
    assert pod["spec"]["restartPolicy"] == "Never", "pod failure policies want it so"


def in_image(path: str) -> bool:
    """Whether .dockerignore lets a file of the checkout into the image: the last pattern that matches decides, a
    pattern without ** matches from the root, and what matches a folder matches all that is in it."""
    kept, parts = True, path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            names = parts if pattern.startswith("**/") else parts[:1]
            if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
                kept = line.startswith("!")
    return kept


def test_the_image_has_the_package_and_nothing_that_lies_beside_it():
    for path in (
        "teachers/wan/model.safetensors",
        "data/a.array_record",
        "runs/x/events",
        ".git/config",
        ".venv/bin/x",
    ):
        assert not in_image(path), path
    assert not in_image("dollar_jax/__pycache__/train.cpython-311.pyc")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], text=True, capture_output=True, check=True).stdout
    needed = [p for p in listed.splitlines() if p.split("/")[0] in ("dollar_jax", "configs")]
    assert needed
    for path in (*needed, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        assert in_image(path), path


@pytest.mark.parametrize("script", ["worker.sh", "train.slurm"])
def test_shell_scripts_pass_shellcheck(script):
    subprocess.run(["shellcheck", "--shell=bash", ROOT / "launch" / script], check=True)


SRUN = """#!/bin/bash
echo "$*" >started
trap 'sleep 0.2; echo saved >>calls; exit 143' TERM
echo $$ >pid
if [[ $* == *--bad* ]]; then exit 2; fi
while :; do sleep 0.05; done
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >>calls
kill -TERM "$(<pid)"
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(ARGUMENTS...) starts train.slurm in a folder, among programs that note their calls."""
    programs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": '#!/bin/bash\necho "scontrol $*" >>calls\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    shutil.copy(ROOT / "launch" / "train.slurm", tmp_path)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    return lambda *arguments: subprocess.Popen(["bash", "train.slurm", *arguments], cwd=tmp_path, env=env)


def test_a_slurm_job_saves_before_its_time_is_up_and_is_queued_again(slurm, tmp_path):
    job = slurm("--workdir=x")
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(60) == 143
    assert (tmp_path / "calls").read_text().splitlines() == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    assert (tmp_path / "started").read_text() == "--kill-on-bad-exit=1 dollar train --workdir=x\n"


def test_a_slurm_job_that_fails_is_not_queued_again(slurm, tmp_path):
    assert slurm("--bad").wait(60) == 2
    assert not (tmp_path / "calls").exists()
