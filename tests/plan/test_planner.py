"""`dollar plan` on virtual devices in place of chips; with libtpu, on the TPU compiler."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import pytest

from dollar_jax import cli, sharding
from dollar_jax.config import MeshConfig, changed
from dollar_jax.plan import chips as chips_module
from dollar_jax.plan import planner
from dollar_jax.plan.chips import Chip, chips, parse_mesh
from dollar_jax.plan.teachers import architecture_of, clip_of
from dollar_jax.programs import shared_rewards
from dollar_jax.weights.pipeline import save_pipeline
from dollar_jax.weights.wan import WAN_TRANSFORMER

ROOT = Path(__file__).parents[2]
TINY = {"batch_size": 8, "mesh.data": 1, "mesh.fsdp": 4, "mesh.context": 2}


@pytest.fixture
def virtual(monkeypatch):
    """Eight CPU devices as chips of 1 GiB."""
    chip = Chip(1.0, 100.0, 1000.0, 100.0, False)
    monkeypatch.setattr(planner, "chips", lambda topology: (jax.devices(), chip))


def forward_flops(c, tokens, text):
    """Of one video through a Wan transformer, from its definition."""
    d, patch = c.dim, math.prod(c.patch_size) * c.in_channels
    embed = tokens * patch * d + c.freq_dim * d + d * d + 6 * d * d + text * c.text_dim * d + text * d * d
    attention = 4 * tokens * d * d + 2 * tokens * tokens * d
    attention += 2 * (tokens + text) * d * d + 2 * tokens * text * d
    return 2 * (embed + c.num_layers * (attention + 2 * tokens * d * c.ffn_dim) + tokens * d * patch)


def test_a_plan_counts_what_a_chip_holds_and_does(virtual, make_config):
    config = make_config(TINY)
    found = planner._jobs(config, "v5e:2x4", "sample")[0].plan()
    architecture = architecture_of(config)
    c, times = architecture.transformer, len(config.student.timesteps)
    t, h, w, _ = architecture.vae.latent_shape(*clip_of(config, None))
    tokens = math.prod(s // p for s, p in zip((t, h, w), c.patch_size, strict=True))
    expected = 8 * times * forward_flops(c, tokens, config.data.max_text_length) / 8 / 1e12
    assert found.model_tflops == pytest.approx(expected, rel=1e-6)
    weights = sum(math.prod(s.shape) for s in jax.tree.leaves(WAN_TRANSFORMER.network(c).shapes)) * 4 / 2**30
    assert weights / 8 < found.argument_gib < weights / 7
    assert found.fits and found.collectives_gib and found.collectives_gib["all-gather"] > 0
    assert found.mesh == {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}
    times = list(found.seconds.values())
    assert 0 < times[0] <= times[1] <= times[2] and tuple(found.seconds) == planner.TIMES
    assert list(found.mfu.values()) == pytest.approx([found.model_tflops / 100.0 / seconds for seconds in times])
    shown = planner.table([found])
    assert "fsdp=4,context=2" in shown and "all-gather, GiB" in shown and found.bound in shown


def test_a_plan_of_an_import_holds_the_teacher_and_leaves_the_state(virtual, make_config):
    found = planner._jobs(config := make_config(TINY), "v5e:2x4", "import")[0].plan()
    architecture = architecture_of(config)
    sizes = [s.size for s in jax.tree.leaves(WAN_TRANSFORMER.network(architecture.transformer).shapes)]
    weights = sum(sizes) * 4 / 2**30
    assert weights / 8 < found.argument_gib < weights / 7
    # Student, average, fake score and two moments each of two optimisers.
    assert 7 * weights / 8 < found.output_gib < 7 * weights / 7


def test_rewards_are_shared_by_the_hosts_of_a_slice(virtual, make_config, monkeypatch):
    """As in the run itself, where each host scores samples of its own: so many more that each has as many."""
    monkeypatch.setattr(sharding, "host_count", lambda mesh: 2)
    few = make_config({**TINY, "batch_size": 40, "reward.samples": 2, "reward.batch_size": 5})
    (job,) = planner._jobs(few, "v5e:2x4", "train")
    assert job.config.reward.samples == 4 and job.config.reward.batch_size == 8
    mesh = sharding.make_mesh(few.mesh, jax.devices()[:8])  # 4 shards of a batch of 40
    for asked, shared in {1: 4, 4: 4, 5: 8, 10: 20, 20: 20}.items():
        assert shared_rewards(changed(few, {"reward.samples": asked}), mesh).reward.samples == shared
    monkeypatch.setattr(sharding, "host_count", lambda mesh: 1)
    assert shared_rewards(few, mesh) is few


def test_what_prepare_sample_and_evaluate_execute_is_planned(virtual, make_config):
    """On the devices of one host, with batches that they share; each network's weights once beside the others'."""
    found = {}
    for what in ("prepare", "teacher-samples", "sample-command", "evaluate"):
        jobs = planner._jobs(make_config({**TINY, "lora.rank": 2}), "v5e:2x4", what)
        found[what] = collections.Counter(job.program.name for job in jobs)
        assert all(job.program.mesh.size == 8 for job in jobs)
        assert {job.common["videos"] for job in jobs} <= {8, 16, 1, None}
    assert found["prepare"] == {"vae_encode": 2, "text_encoder": 2}
    # The captions; the fingerprint's empty prompt, and the negative one by the same program.
    samples = {"text_encoder": 2, "teacher_sampler": 1, "vae_decode": 1, "vae_encode": 1}
    assert found["teacher-samples"] == samples
    drawn = {"text_encoder": 1, "student_sampler": 1, "teacher_sampler": 1, "vae_decode": 1, "merge_adapters": 1}
    assert found["sample-command"] == drawn
    # Of three timesteps in all, so one and two steps of the student.
    assert found["evaluate"] == {**drawn, "student_sampler": 2, "vae_encode": 1}


MESSAGE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm.

  Largest program allocations in hbm:

  1. Size: 12.50G
     Operator: op_name="jit(step)/while/body/ffn/dot_general" source_file="x.py"
     Shape: bf16[30,32760,8960]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 12.50G
     ==========================

  2. Size: 512.0M
     Shape: f32[1536,8960]{1,0:T(8,128)}
     ==========================
"""


COMMON = {
    "what": "train",
    "program": "step",
    "videos": None,
    "kept_gib": 0.0,
    "topology": "v5p:2x2x2",
    "chips": 8,
    "remat": "attention",
    "hbm_gib": 95.74,
    "mesh": {"data": 1, "fsdp": 8, "context": 1, "tensor": 1},
}


@pytest.fixture
def make_plan():
    return lambda **given: planner.Plan(**COMMON, argument_gib=1.0, temp_gib=1.0, peak_gib=1.0, **given)


def test_what_does_not_fit_is_named_with_a_mend(make_config):
    job = planner._Job(None, make_config({"compute.remat": "attention"}), None, COMMON | {"argument_gib": 5.2}, None)
    found = job.failed(MESSAGE)
    assert not found.fits and found.peak_gib == 120.5 and found.temp_gib == pytest.approx(115.3)
    first, second = (line.split() for line in found.largest_buffers)
    assert first == ["12.50G", "bf16[30,32760,8960]", "jit(step)/while/body/ffn/dot_general"]
    assert second == ["512.0M", "f32[1536,8960]"]
    assert found.advice and "remat=full" in found.advice and found.advice in planner.table([found])
    short = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (61.08G) exceeds available HBM."
    assert job.failed(short).temp_gib == pytest.approx(61.08)
    full = dataclasses.replace(job, common=COMMON | {"argument_gib": 60.0})
    assert "larger fsdp" in str(full.failed(MESSAGE).advice)
    fits = dataclasses.replace(found, fits=True, seconds={"all hidden": 1.0, "as scheduled": 3.0})
    faster = dataclasses.replace(fits, seconds={"all hidden": 2.0, "as scheduled": 2.0})
    assert planner.rank([found, fits, faster]) == [faster, fits, found]


class Worker(contextlib.AbstractContextManager):
    """In place of a process with three programs, of which the second aborts at low effort and the third always."""

    def __init__(self, *_):
        self.broken = False

    def __exit__(self, *_):
        pass

    def submit(self, call, *arguments):
        future = concurrent.futures.Future()
        self.broken |= arguments in {(1, planner.LOW), (2, planner.LOW), (2, 0.0)}
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(["failed"] * 3 if call is planner._load else arguments)
        return future


def test_where_the_compiler_aborts_it_is_asked_again_at_its_own_effort(monkeypatch):
    monkeypatch.setattr(planner, "ProcessPoolExecutor", Worker)
    assert list(planner.plans("config", "v5e:2x2", "run")) == [(0, planner.LOW), (1, 0.0), "failed"]
    asked = planner.plans("config", "v5e:2x2", "run", first=planner.OWN)
    assert list(asked) == [(0, 0.0), (1, 0.0), "failed"]


SHARED = (2, "gather"), (2, "ulysses")


class Made:
    """In place of a plan: fits with so many micro-batches, by remat."""

    def __init__(self, config, least):
        self.setting = (config.mesh.context, config.compute.context_parallel, config.compute.remat, config.accumulation)
        self.mesh, self.whole = dataclasses.asdict(config.mesh), config.compute.whole_teacher
        self.fits = config.accumulation >= least[config.compute.remat]
        self.fits &= not self.whole or config.mesh.data <= least.get("room", 4)
        self.seconds = {"as scheduled": 1 + abs(config.mesh.context - 4)}  # four chips a video are the fastest


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        # Of 8 videos: as many micro-batches as leave one for each of fsdp.
        ({"qkv": 1, "attention": 1, "full": 1}, {(1, "gather"): [1], (2, "gather"): [1], (2, "ulysses"): [1]}),
        ({"qkv": 9, "attention": 1, "full": 1}, {(1, "gather"): [1], **dict.fromkeys(SHARED, [1, 2, 1])}),
        (
            {"qkv": 9, "attention": 2, "full": 1},
            {(1, "gather"): [1, "full", 1], **dict.fromkeys(SHARED, [1, 2, 1, 2, "full", 1])},
        ),
        (
            {"qkv": 9, "attention": 9, "full": 9},
            {(1, "gather"): [1, "full", 1], **dict.fromkeys(SHARED, [1, 2, 1, 2, "full", 1, 2])},
        ),
    ],
    ids=["all fit", "all but qkv", "two micro-batches", "none"],
)
def test_a_search_tries_what_can_win(virtual, make_config, monkeypatch, least, expected):
    monkeypatch.setattr(planner, "plans", lambda config, *_: [Made(config, least)])
    found = {}
    for plan in planner.search(make_config({"batch_size": 8, "reward.samples": 2}), "v5e:2x4"):
        context, way, remat, parts = plan.setting
        tried = found.setdefault((context, way), [])
        tried += [remat] * (remat == "full" and "full" not in tried) + [parts]
    assert {key: tried for key, tried in found.items() if key[0] <= 2} == expected
    # The toy's four heads do not divide by 8.
    assert {key for key in found if key[0] > 2} == {(4, "gather"), (4, "ulysses"), (8, "gather")}


@pytest.mark.parametrize(("room", "data"), [(4, [1, 2]), (1, [1, 2]), (0, [1])])
def test_a_search_ends_with_a_whole_teacher_while_it_fits(virtual, make_config, monkeypatch, room, data):
    """`room` is over how many `data` parts the state may be shared with the teacher whole."""
    least = {"qkv": 1, "attention": 1, "full": 1, "room": room}
    monkeypatch.setattr(planner, "plans", lambda config, *_: [Made(config, least)])
    found = list(planner.search(make_config({"batch_size": 4, "reward.samples": 2}), "v5e:2x4"))
    whole = [plan for plan in found if plan.whole]
    assert [plan.mesh for plan in whole] == [{"data": n, "fsdp": 2 // n, "context": 4, "tensor": 1} for n in data]
    assert {plan.setting for plan in whole} == {(4, "gather", "qkv", 1)}
    assert found[-len(whole) :] == whole


def test_a_search_says_why_the_best_is_best(make_plan):
    parts = {"matrix products": 2.0, "memory": 1.0, "asynchronous collectives": 0.5, "other collectives": 0.5}
    best = make_plan(fits=True, seconds={"as scheduled": 2.5}, parts_seconds=parts)
    slower = {**parts, "other collectives": 4.0}
    other = dataclasses.replace(best, accumulation=4, seconds={"as scheduled": 6.0}, parts_seconds=slower)
    too_large = dataclasses.replace(best, fits=False)
    first = "mesh fsdp=8, micro-batches 1, keys by gather, remat attention, teacher shared: 2.5 s"
    second = "mesh fsdp=8, micro-batches 4, keys by gather, remat attention, teacher shared: 6 s"
    expected = f"best is {first}; next {second}, its other collectives 4 s in place of 0.5"
    assert planner.why(planner.rank([too_large, other, best])) == expected
    assert planner.why([best, too_large]) == f"only one fits, {first}"
    assert "more chips" in planner.why([too_large])


def test_teachers_can_be_planned_before_they_are_there(make_config):
    config = make_config({"teacher": "teachers/wan_1_3b"})
    found = architecture_of(config)
    assert (found.transformer.dim, found.transformer.num_layers, found.schedule.shift) == (1536, 30, 3.0)
    # As published for the forward of one video of 480 × 832 × 81: 283 TFLOP.
    latent = found.vae.latent_shape(*clip_of(config, (480, 832, 81)))
    assert latent == (21, 60, 104, 16)
    assert forward_flops(found.transformer, 32_760, 512) / 1e12 == pytest.approx(283, abs=1)


def test_meshes_and_videos_are_read():
    assert parse_mesh("fsdp=16,context=4") == MeshConfig(-1, 16, 4, 1)
    assert planner.parse_video("480x832x81") == (480, 832, 81)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_mesh("fsdp=16,model=4"), "'model=4' is not one of data, fsdp"),
        (lambda: planner.parse_video("480p"), "--video=480p is not HEIGHTxWIDTHxFRAMES"),
        (lambda: chips("v9:2x2"), "--topology=v9:2x2 is none that is known"),
        (lambda: chips("v5p"), "--topology=v5p is none that is known"),
    ],
)
def test_bad_requests_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_teacher_is_one_sentence(make_config):
    with pytest.raises(ValueError, match="teachers/nothing is not there; without it only .* wan_1_3b, wan_14b"):
        architecture_of(make_config({"teacher": "teachers/nothing"}))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_without_the_tpu_compiler_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(chips_module.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--config=configs/demo.py", "--topology=v5e:2x2", "--search"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("\ndollar plan: the TPU compiler is not installed: pip install -e '.[plan]'\n")
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[plan]'")
@pytest.mark.parametrize(
    ("topology", "devices"), [("v6e:2x2", 4), ("v6e:2x4", 8), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8)]
)
def test_the_tpu_compiler_makes_every_program_of_a_run(make_pipeline, tmp_path, topology, devices):
    """Of a teacher of toy size: the attention kernel cannot be shared out by the compiler, so the mesh must be said."""
    save_pipeline(tmp_path / "toy", make_pipeline())
    command = [sys.executable, "-m", "dollar_jax", "plan", "--what=run", "--config=configs/demo.py"]
    command += [f"--topology={topology}", f"--json={tmp_path / 'plan.json'}", f"--config.teacher={tmp_path / 'toy'}"]
    command += [f"--mesh=fsdp={devices}", "--config.data.train_videos=8", "--config.compute.vae_chunk=1"]
    command += ["--config.batch_size=8", "--config.reward.batch_size=8", "--config.reward.samples=8"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {"init", "step", "student_sampler", "teacher_sampler"} <= {row["program"] for row in found}
    for row in found:
        assert row["fits"] and row["error"] is None and row["compile_seconds"] > 0, row["program"]
        assert row["argument_gib"] > 0 and row["temp_gib"] >= 0 and row["chips"] == devices


DOCUMENTED = re.findall(
    r"^dollar (plan --what=\w+ .*(?:\n    .*)*)", (ROOT / "docs" / "plans.md").read_text(), re.MULTILINE
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[plan]'")
@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda command: " ".join(command.split()[1:4]))
def test_every_program_of_the_documented_runs_compiles_and_fits(command, tmp_path):
    """At real size; minutes each."""
    command = [sys.executable, "-m", "dollar_jax", *command.split(), f"--json={tmp_path / 'plan.json'}"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    found = json.loads((tmp_path / "plan.json").read_text())
    assert all(row["fits"] and row["error"] is None for row in found) and len(found) > 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[plan]'")
def test_the_tpu_compiler_plans_the_demo(tmp_path):
    """The whole train step, in a process of its own: libtpu changes how one ends."""
    command = [
        sys.executable,
        "-m",
        "dollar_jax",
        "plan",
        "--config=configs/demo.py",
        "--topology=v5e:2x2",
        "--mesh=fsdp=2,context=2",
        f"--json={tmp_path / 'plan.json'}",
        # The TPU kernel would compute 128 tokens where this domain has 20.
        "--config.compute.attention=xla",
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["hbm_gib"] == 15.75
    assert 0.7 * found["model_tflops"] < found["compiled_tflops"] < 2 * found["model_tflops"]
    times = list(found["seconds"].values())
    assert 0 < times[0] <= times[1] < times[2]
    assert sum(found["collectives_gib"].values()) > 0 and all(0 < mfu <= 1 for mfu in found["mfu"].values())
