"""Wrong inputs of every command: exit code 2, one sentence that names the thing, no traceback, nothing left behind.

A row is a command line and what the sentence must say. {run}, {bad} and {new} are folders: a run without a checkpoint,
the wrong files of FILES, and one that must not come to be. Rows of ranges are made of the settings themselves."""

import json
import os
import shutil
from pathlib import Path

import pytest

from dollar_jax import cli
from dollar_jax.cli import base
from dollar_jax.experiment import load
from dollar_jax.fields import plain, settings
from dollar_jax.generate import teacher_folder

SCORES = {"subject_consistency": 0.9}
ROWS = [{"prompt_en": "a cat", "dimension": ["color"]}]

# Wrong files by name; what is no text or bytes is written as JSON.
FILES = {
    "raises.py": "1 / 0",
    "none.py": "def get_config(*_): return None",
    "exits.py": "import sys\nsys.exit(0)",
    "list.py": "def get_config(*_): return [1, 2]",
    "nothing.py": "x = 1",
    "syntax.py": "def get_config(:",
    "unknown.py": "def get_config(*_): return {'teacher': 'x', 'data': {'name': 'y'}, 'stepz': 3}",
    "interrupted.py": "import os\nprint('junk')\nraise OSError('no disk')",
    "bytes.py": b"\xff\xfe\x00",
    "recursion.py": "def get_config(*_): return get_config()",
    "blank.txt": "\n \n",
    "latin.txt": "caf\xe9".encode("latin1"),
    "two.txt": "a\nb\n",
    "three.txt": "a\nb\nc\n",
    "empty.json": "",
    "cut.json": '{"color": ',
    "twice.json": '{"color": 0.5, "color": 0.6}',
    "deep.json": "[" * 50_000,
    "levels.json": '{"color":' * 90 + "1" + "}" * 90,
    "list.json": "[]",
    "object.json": "{}",
    "latin.json": '{"caf\xe9": 1}'.encode("latin1"),
    "dimension.json": {"beauty": 0.5},
    "text.json": {"color": "good"},
    "nan.json": '{"color": NaN}',
    "large.json": {"color": 101},
    "mixed.json": {"color": 0.5, "scene": 60},
    "negative.json": {"color": -0.1},
    "digits.json": '{"color": ' + "9" * 5000 + "}",
    "some.json": SCORES,
    "other.json": {"subject_consistency": 0.8},
    "dimensions.json": {"dimensions": {"color": "x"}},
    "info_key.json": [{"prompt": "a"}],
    "info_type.json": [3],
    "no_video.csv": "name,caption\na,b\n",
    "twice.csv": "video,caption,caption\na.mp4,b,c\n",
    "empty.csv": "",
    "no_caption.csv": "video\na.mp4\n",
    "some.xyz": "a",
    "vendi.json": {"vendi": [1]},
}
RUNS = {
    "empty": "",
    "cut": "{",
    "list": "[1]",
    "deep": '{"a":' * 50_000,
    "twice": '{"seed": 1, "seed": 2}',
    "latin": b'{"caf\xe9": 1}',
    "lacks": "{}",
    "unknown": {"teacher": "moving_shapes", "data": {"name": "moving_shapes"}, "wings": 2},
    "type": {"teacher": 3, "data": {"name": "moving_shapes"}},
    "range": {"teacher": "moving_shapes", "data": {"name": "moving_shapes"}, "steps": -5},
    "group": {"teacher": "moving_shapes", "data": []},
    "teacher": {"teacher": "/no/such/teacher", "data": {"name": "moving_shapes"}},
}
# Changes to one JSON file of the shipped teacher: its name, a field, the value, what is said.
TEACHERS = [
    ("model_index.json", None, "", "model_index.json is empty"),
    ("model_index.json", None, "[]", "must hold a JSON object"),
    ("model_index.json", "transformer", 3, "transformer = 3"),
    ("model_index.json", "_class_name", "FluxPipeline", "FluxPipeline"),
    ("transformer/config.json", None, '{"a":' * 50_000, "nested too deeply"),
    ("transformer/config.json", "num_layers", 1_000_000, "num_layers"),
    ("transformer/config.json", "num_layers", 0, "num_layers"),
    ("transformer/config.json", "num_layers", "two", "num_layers"),
    ("transformer/config.json", "num_layers", True, "num_layers"),
    ("transformer/config.json", "patch_size", 3, "patch_size"),
    ("transformer/config.json", "patch_size", [1, 2], "patch_size"),
    ("transformer/config.json", "num_attention_heads", -1, "num_attention_heads"),
    ("transformer/config.json", "ffn_dim", 2.5, "ffn_dim"),
    ("transformer/config.json", "eps", "small", "eps"),
    ("transformer/config.json", "text_dim", 10**9, "text_dim"),
    ("vae/config.json", "latents_std", [0.0, 1.0, 1.0, 1.0], "latents_std"),
    ("vae/config.json", "latents_mean", "zero", "latents_mean"),
    ("vae/config.json", "z_dim", None, "z_dim"),
    ("vae/config.json", "dim_mult", [], "dim_mult"),
    ("text_encoder/config.json", "d_model", {}, "d_model"),
    ("text_encoder/config.json", "model_type", "bert", "bert"),
    ("scheduler/scheduler_config.json", "shift", -1.0, "shift"),
    ("scheduler/scheduler_config.json", "_class_name", "EulerScheduler", "EulerScheduler"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", "use_dynamic_shifting", True, "use_dynamic_shifting"),
]

TRAIN = "train --config=demo --workdir={new} "
PRETRAIN = "pretrain --config=demo --workdir={new} --config.pretrain."
LINES = [
    *[(f"train --workdir={{new}} --config={{bad}}/{name}", name) for name in FILES if name.endswith(".py")],
    ("train --workdir={new} --config={bad}/pipe.py", "pipe.py"),
    ("train --workdir={new} --config={bad}", "there is no configuration"),
    ("train --workdir={new} --config=demo:vsd+dmd", ":vsd+dmd is unknown"),
    ("train --workdir={new} --config=", "there is no configuration"),
    ("train --config=demo --workdir=", "--workdir"),
    ("train --config=demo --workdir={bad}/two.txt", "two.txt"),
    (TRAIN + "--num_processes=0", "--num_processes"),
    (TRAIN + "--process_id=1", "--coordinator_address"),
    (TRAIN + "--coordinator_address=here --num_processes=2 --process_id=5", "--process_id=5"),
    (TRAIN + "--coordinator_address=here --num_processes=2 --process_id=0", "has no port"),
    (TRAIN + "--config.student.timesteps=(1500.0,750.0)", "config.student.timesteps[0]"),
    (TRAIN + "--config.student.timesteps=(250.0,750.0)", "must descend"),
    (TRAIN + "--config.student.timesteps=()", "config.student.timesteps"),
    (TRAIN + "--config.student.timesteps=(500.0,500.0)", "must descend"),
    (TRAIN + "--config.vsd.score_range=(0.9,0.1)", "score_range must ascend"),
    (TRAIN + "--config.vsd.score_range=(0.1,)", "score_range"),
    (TRAIN + "--config.consistency.skip=99", "config.consistency.skip"),
    (TRAIN + "--config.accumulation=7", "micro-batches"),
    (TRAIN + "--config.data.train_videos=14", "config.data.train_videos 14"),
    (TRAIN + "--config.reward.samples=7", "config.reward.samples 7"),
    (TRAIN + "--config.reward.guard.max_fall=1.0", "needs a held-out reward"),
    (TRAIN + "--config.sampling.solver=unipc --config.sampling.eta=0.5", "config.sampling.eta"),
    (TRAIN + "--config.visibility.videos=1", "config.visibility.samples_every"),
    (TRAIN + "--config.visibility.std_range=(2.0,1.0)", "std_range must ascend"),
    (TRAIN + "--config.pretrain.dtype=int3", "config.pretrain.dtype"),
    (TRAIN + "--config.mesh.data=-1 --config.mesh.fsdp=-1", "mesh"),
    (TRAIN + "--config.mesh.data=64", "mesh"),
    (TRAIN + "--config.teacher=/no/such", "/no/such is no diffusers pipeline"),
    (TRAIN + "--config.data.name=/no/such", "/no/such"),
    (TRAIN + "--config.data.name={bad}", "holds no prepared data set"),
    (TRAIN + "--config.seed=-1", "config.seed"),
    (TRAIN + "--config.seed=99999999999999", "config.seed"),
    (TRAIN + "--config.steps=1.5", "--config.steps"),
    (TRAIN + "--config.vsd.guidance_weight=nan", "config.vsd.guidance_weight"),
    (TRAIN + "--config.vsd.guidance_weight=inf", "config.vsd.guidance_weight"),
    (TRAIN + "--config.reward.weight=heavy", "config.reward.weight"),
    (TRAIN + "--config.student.input=sideways", "config.student.input"),
    (TRAIN + "--config.student.layers=0", "config.student.layers must be at least 1, or None, not 0"),
    (TRAIN + "--config.student.layers=5", "config.student.layers is 5, but the teacher has only 4 blocks"),
    (TRAIN + "--config.batch.size=3", "no field 'batch'"),
    (TRAIN + "--config.init=/no/such", "/no/such holds no run"),
    (TRAIN + "--config.lora.rank=4 --config.lora.targets=('nothing',)", "names no dense layer"),
    (TRAIN + "--config.lora.rank=4 --config.lora.targets=('[',)", "is no regular expression"),
    (TRAIN + "--config.lora.rank=999 --config.lora.targets=('.*to_q',)", "config.lora.rank 999 is more than"),
    (TRAIN + "--steps=3", "steps"),
    (TRAIN + "more", "unexpected argument 'more'"),
    *[
        (f"{command} --workdir={{bad}}/runs/{name}{rest}", "config.json")
        for name in RUNS
        if name != "teacher"
        for command, rest in (("sample", " --prompt=a"), ("evaluate", ""), ("export", " {new}"))
    ],
    *[
        (f"{command} --workdir={{bad}}/runs/teacher{rest}", "/no/such/teacher")
        for command, rest in (("sample", " --prompt=a"), ("evaluate", ""), ("export", " {new}"))
    ],
    ("sample --workdir={bad}/runs/pipe --prompt=a", "config.json"),
    ("sample --workdir={run} --prompt=a", "holds no checkpoint"),
    ("evaluate --workdir={run}", "holds no checkpoint"),
    ("export --workdir={run} {new}", "holds no checkpoint"),
    ("sample --workdir= --prompt=a", "--workdir"),
    ("sample --workdir={run} --prompt=a --num=0", "--num"),
    ("sample --workdir={run} --prompt=a --num=99999999999999999999", "--num"),
    ("sample --workdir={run} --prompt=a --scale=1000000000000", "--scale"),
    ("sample --workdir={run} --prompt=a --seed=-1", "--seed"),
    ("sample --workdir={run} --prompt=a --seed=18446744073709551616", "--seed"),
    ("sample --workdir={run} --prompt=a --fps=inf", "--fps"),
    ("sample --workdir={run} --prompt=a --fps=nan", "--fps"),
    ("sample --workdir={run} --prompt=a --fps=-1", "--fps"),
    ("sample --workdir={run} --prompt=a --steps=many", "--steps"),
    ("sample --workdir={run} --prompt=a --teacher --steps=1001", "--steps"),
    ("sample --workdir={run} --prompt=a --frames=2", "frames"),
    ("sample --workdir={run} --prompt=a --height=33", "33"),
    ("sample --workdir={run} --prompt=a --out={bad}/x.txt", "x.txt"),
    ("sample --workdir={run} --prompt=a --out=", "--out"),
    ("sample --workdir={run} --prompt=a --teacher --beside_teacher", "--beside_teacher"),
    ("sample --workdir={run} --prompts_file={bad}/blank.txt", "blank.txt"),
    ("sample --workdir={run} --prompts_file={bad}/latin.txt", "latin.txt"),
    ("sample --workdir={run} --prompts_file={bad}/gone.txt", "gone.txt"),
    ("sample --workdir={run} --prompts_file={bad}/pipe.txt", "pipe.txt"),
    ("sample --workdir={run} --prompts_file={bad}", "{bad}"),
    ("evaluate --workdir={run} --out={bad}/x.txt", "--out"),
    ("evaluate --videos={bad}/gone", "gone"),
    ("evaluate --videos={bad}", "holds no .mp4"),
    ("evaluate --videos={bad} --features={bad}/gone", "gone"),
    ("evaluate --workdir={run} --names={bad}/two.txt", "--names goes with --vbench"),
    ("evaluate --workdir={run} --reward=motion", "--reward goes with --prompts_file"),
    ("evaluate --workdir={run} --vbench={new}", "--prompts_file"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/gone.json", "gone.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/cut.json", "cut.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/object.json", "object.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/info_key.json", "info_key.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/info_type.json", "info_type.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/deep.json", "deep.json"),
    ("evaluate --workdir={run} --vbench={new} --prompts_file={bad}/two.txt --names={bad}/three.txt", "three.txt"),
    ("export --workdir={run}", "give the new folder"),
    ("export --workdir={run} {new} --shard_size=5", "--shard_size=5"),
    ("export --workdir={run} {new} --dtype=int8", "--dtype"),
    ("export --workdir={run} {new} --push_to_hub=name", "--push_to_hub=name must be OWNER/NAME"),
    ("export --workdir={run} {new} --push_to_hub=../..", "must be OWNER/NAME"),
    ("import {bad}/gone", "give two names"),
    ("import {teacher} {bad}/two.txt/new", "two.txt"),
    ("import {teacher} {new} --lora={bad}/gone", "gone"),
    ("import {teacher} {new} --lora={bad}/two.txt", "two.txt is damaged or no safetensors file"),
    ("import {teacher} {new} --lora={teacher}/transformer", "is no adapter's key"),
    ("import {bad}/gone {new}", "gone"),
    ("import {bad}/two.txt {new}", "two.txt is a file"),
    ("import {bad} {new}", "model_index.json"),
    ("import {run} {bad}", "is there already"),
    ("import {run} {new} --dtype=int8", "--dtype"),
    ("import-reward {bad}/gone", "give two names"),
    ("import-reward {bad}/gone {new}", "gone is not a folder"),
    ("import-reward {bad}/gone.pt {new}", "gone.pt"),
    ("import-reward {bad}/two.txt {new}", "two.txt is damaged or no safetensors file"),
    ("import-reward {run} {new}", "holds no safetensors file"),
    ("import-reward {run} {bad}", "is there already"),
    ("import-reward {run} {new} --clip=", "--clip is empty"),
    *[
        (f"vbench-score {{bad}}/{name}.json", f"{name}.json")
        for name in (
            "empty",
            "cut",
            "twice",
            "deep",
            "levels",
            "list",
            "object",
            "latin",
            "dimension",
            "text",
            "nan",
            "large",
            "mixed",
            "negative",
            "digits",
            "gone",
            "dimensions",
            "pipe",
            "zero",
        )
    ],
    ("vbench-score", "give VBench's result files"),
    ("vbench-score {bad}/some.json", "dimensions are missing"),
    ("vbench-score {bad}/some.json {bad}/other.json --allow_missing", "disagree"),
    ("vbench-score {bad}/runs", "holds no result file"),
    ("vbench-score {bad}/some.json --allow_missing --json={bad}", "{bad} is a folder"),
    ("vbench-score {bad}/some.json --allow_missing --json={bad}/two.txt/new.json", "two.txt is no folder"),
    ("vbench-score {bad}/some.json --allow_missing --metrics={bad}/vendi.json", "vendi.json"),
    ("vbench-score {bad}/some.json --allow_missing --metrics={bad}/cut.json", "cut.json"),
    ("vbench-score {bad}/some.json --allow_missing --manifest={bad}/list.json", "list.json"),
    ("vbench-score {bad}/some.json --compare", "give two results"),
    ("vbench-score {bad}/some.json {bad}/other.json --compare", "cannot be compared"),
    ("prepare --out={new} --source={bad}/gone", "gone"),
    ("prepare --out={new} --source={bad}/some.xyz", "some.xyz"),
    ("prepare --out={new} --source={bad}/no_video.csv", "no_video.csv has no column"),
    ("prepare --out={new} --source={bad}/no_caption.csv", "no_caption.csv has no column"),
    ("prepare --out={new} --source={bad}/twice.csv", "twice.csv has two columns"),
    ("prepare --out={new} --source={bad}/empty.csv", "empty.csv"),
    ("prepare --out={new} --source={bad}/pipe.csv", "pipe.csv"),
    ("prepare --out={new} --prompts={bad}/pipe.txt", "pipe.txt"),
    ("prepare --out={new} --prompts={bad}/zero.txt", "zero.txt"),
    ("prepare --out={new} --prompts={bad}/blank.txt", "blank.txt"),
    ("prepare --out={new} --prompts={bad}/gone.txt", "gone.txt"),
    ("prepare --out={new} --prompts={bad}/two.txt --frames=0", "--frames"),
    ("prepare --out={new} --prompts={bad}/two.txt --fps=inf", "--fps"),
    ("prepare --out={new} --prompts={bad}/two.txt --seed=-1", "--seed"),
    ("prepare --out={new} --prompts={bad}/two.txt --workers=0", "--workers"),
    ("prepare --out={new} --prompts={bad}/two.txt --process_index=1 --process_count=1", "--process_index"),
    ("prepare --out={new} --prompts={bad}/two.txt --buckets=0x16", "0x16"),
    ("prepare --out= --prompts={bad}/two.txt", "--out"),
    ("plan --config=demo --topology=v9:2x2", "--topology=v9:2x2"),
    ("plan --config=demo --topology=v5e", "--topology=v5e"),
    ("plan --config=demo --topology=v5e:4x4 --mesh=fsdp=x", "--mesh"),
    ("plan --config=demo --topology=v5e:4x4 --mesh=fsdp=8,fsdp=2", "says fsdp twice"),
    ("plan --config=demo --topology=v5e:4x4 --json={bad}", "{bad} is a folder"),
    ("plan --config=demo --topology=v5e:4x4 --video=big", "--video"),
    ("plan --config=demo --topology=v5e:4x4 --what=dance", "--what"),
    ("pretrain --config=wan_1_3b --workdir={new}", "no pretrain settings"),
    ("pretrain --config=demo --workdir={new} --config.pretrain.teacher.steps=0", "config.pretrain.teacher.steps"),
    (PRETRAIN + "vae_phases=()", "config.pretrain.vae_phases is empty"),
    (PRETRAIN + "vae_phases[0].frames=4", "frames must be 1 + a multiple of 4"),
    (PRETRAIN + "vae_phases[0].frames=401", "config.pretrain.vae_phases has 401 frames"),
    (PRETRAIN + "transformer.num_layers=0", "config.pretrain.transformer: num_layers is 0"),
    (PRETRAIN + "transformer.ffn_dim=-8", "config.pretrain.transformer: ffn_dim is -8"),
    (PRETRAIN + "transformer.text_dim=7", "config.pretrain.transformer.text_dim is 7"),
    (PRETRAIN + "vae.base_dim=0", "config.pretrain.vae: base_dim is 0"),
    (PRETRAIN + "text_encoder.d_model=100000000", "config.pretrain.text_encoder: d_model is 100000000"),
    ("train --config=demo --workdir=/proc/x", "/proc/x cannot be used"),
    ("serve --workdir={run}", "holds no checkpoint"),
    ("serve --workdir={run} --port=70000", "--port"),
    ("demo --seed=-1 --workdir={new}", "--seed"),
    ("demo --seed=4294967296 --workdir={new}", "--seed"),
    ("reproduce --workdir={new} --seeds=0", "--seeds"),
    ("config --config=nowhere", "nowhere"),
]


def out_of_range():
    """A row for every number of the demo's settings that has a bound: one value just outside of it."""
    for setting in settings(load("demo")):
        value = plain(setting.value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        words = setting.allowed.split()
        if setting.allowed.startswith(("at least", "from")):
            wrong = float(words[2] if words[0] == "at" else words[1]) - 1
        elif setting.allowed.startswith("positive"):
            wrong = 0.0
        else:
            continue
        wrong = int(wrong) if isinstance(value, int) else wrong
        yield f"{TRAIN}--config.{setting.path}={wrong}", f"config.{setting.path}"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    bad, run = root / "bad", root / "run"
    for folder in (bad, run, *(bad / "runs" / name for name in (*RUNS, "pipe"))):
        folder.mkdir(parents=True)
    files = {bad / name: content for name, content in FILES.items()}
    files |= {bad / "runs" / name / "config.json": content for name, content in RUNS.items()}
    for path, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    for name in ("pipe.py", "pipe.txt", "pipe.csv", "pipe.json", "runs/pipe/config.json"):
        os.mkfifo(bad / name)
    for name in ("zero.txt", "zero.json"):
        (bad / name).symlink_to("/dev/zero")
    (run / "config.json").write_text(json.dumps({"teacher": "moving_shapes", "data": {"name": "moving_shapes"}}))
    return {"bad": bad, "run": run, "new": root / "new", "teacher": teacher_folder("moving_shapes")}


def tree(places):
    return sorted(str(path) for path in places["bad"].parent.rglob("*"))


def check_refused(capsys, places, line, says):
    before = tree(places)
    code = cli.main([part.format(**places) for part in line.split()])
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1] if err.strip() else ""
    assert code == 2, (code, out, err)
    assert "Traceback" not in err and says.format(**places) in last, err
    assert last.startswith(f"dollar {line.split()[0]}: ") and len(last) < 1500
    assert tree(places) == before


@pytest.mark.parametrize("line, says", dict.fromkeys([*LINES, *out_of_range()]))
def test_a_wrong_command_line_is_one_sentence(capsys, places, line, says):
    check_refused(capsys, places, line, says)


@pytest.mark.parametrize("file, field, value, says", TEACHERS)
def test_a_wrong_teacher_is_one_sentence(capsys, places, tmp_path, file, field, value, says):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder("moving_shapes"), teacher, copy_function=os.symlink)
    path = teacher / file
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(value if field is None else json.dumps(content | {field: value}))
    check_refused(capsys, places, f"import {teacher} {{new}}", says)


def test_weights_that_are_not_finite_are_not_imported(capsys, places, tmp_path):
    from safetensors.numpy import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder("moving_shapes"), teacher, copy_function=os.symlink)
    (path,) = (teacher / "vae").glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = float("nan")
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    check_refused(capsys, places, f"import {teacher} {{new}}", f"tensor {name!r} holds what is not finite")


def test_there_are_enough_of_them():
    rows = {*LINES, *out_of_range()}
    assert len(rows) + len(TEACHERS) >= 250
    assert {line.split()[0] for line, _ in rows} == {*cli.COMMANDS}


def test_a_reader_that_goes_away_does_not_end_a_command():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        gone = base.Unbreakable(stream)
        for _ in range(3):
            print("x" * 100_000, file=gone, flush=True)
        assert Path(f"/proc/self/fd/{gone.fileno()}").resolve() == Path("/dev/null")
    base.Unbreakable(None).write("nobody listens")


def test_a_disk_without_room_for_what_is_said_does_not_end_a_command():
    with open("/dev/full", "w") as stream:
        full = base.Unbreakable(stream)
        print("x" * 100_000, file=full, flush=True)
        assert Path(f"/proc/self/fd/{full.fileno()}").resolve() == Path("/dev/full")  # there may be room later
        full.flush(last=True)
        assert Path(f"/proc/self/fd/{full.fileno()}").resolve() == Path("/dev/null")
