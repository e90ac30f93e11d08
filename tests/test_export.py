"""`dollar export`: a run's student as a user of diffusers gets it, from a folder on disk."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from diffusers.utils import torch_utils
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from dollar_jax import cli
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.data import shapes
from dollar_jax.experiment import load
from dollar_jax.generate import SHIPPED_TEACHERS, draw_videos, make_generator, student_network, video_keys
from dollar_jax.models import lora
from dollar_jax.models.layers import keep_blocks
from dollar_jax.run import CHECKPOINTS, read_config, record_config, restore_student
from dollar_jax.weights.pipeline import load_pipeline
from dollar_jax.weights.safetensors_io import list_tensors, read_tensors
from dollar_jax.weights.table import export_stream

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
METRICS = {
    "teacher_50": {"alignment": 0.75, "nfe": 100},
    "student_3": {"alignment": 0.5, "vendi": 4.25, "nfe": 3},
    "speedup_3": 33.3,
}


@pytest.fixture(scope="module")
def run(wan_folder, make_config, tmp_path_factory):
    """A run at step 7 whose raw student is the teacher itself, and the average half of it."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config({"teacher": str(wan_folder), "data.train_videos": 8})
    record_config(config, workdir)
    params = jax.tree.map(jnp.asarray, load_pipeline(wan_folder).transformer.params)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        half = jax.tree.map(lambda x: x / 2, params)
        checkpoints.save(7, {"student": {"student": params}, "ema": {"ema": half}})
    (workdir / "metrics.json").write_text(json.dumps(METRICS))
    return workdir


def export(workdir, folder, *flags):
    assert cli.main(["export", f"--workdir={workdir}", *flags, str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exported") / "student", "--shard_size=20KB")


@pytest.mark.parametrize("imported", [False, True])
def test_import_and_export_give_the_same_bits(wan_folder, run, tmp_path, imported):
    if imported:
        teacher = tmp_path / "teacher"
        assert cli.main(["import", str(wan_folder), str(teacher)]) == 0
        run = shutil.copytree(run, tmp_path / "run")
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace(str(wan_folder), str(teacher)))
    folder = export(run, tmp_path / "student", "--noema")
    for name in ("transformer", "vae", "text_encoder"):
        source, ours = dict(read_tensors(wan_folder / name)), dict(read_tensors(folder / name))
        # Tied to the other, and not in the files of older versions of transformers.
        source.pop("encoder.embed_tokens.weight", None), ours.pop("encoder.embed_tokens.weight", None)
        assert ours.keys() == source.keys()
        for key, value in ours.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, source[key], err_msg=key)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]


def test_the_average_is_exported_in_shards(wan_folder, exported):
    files = sorted(exported.glob("transformer/*.safetensors"))
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    sizes = [sum(x.nbytes for x in load_file(f).values()) for f in files]
    assert len(files) > 2 and max(sizes) <= 20_000
    index = json.loads((exported / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {k: t.path.name for k, t in list_tensors(exported / "transformer").items()}

    theirs = diffusers.WanTransformer3DModel.from_pretrained(exported / "transformer").state_dict()
    for key, value in read_tensors(wan_folder / "transformer"):
        np.testing.assert_array_equal(theirs[key].numpy(), value / 2, err_msg=key)


def test_half_precision(run, tmp_path):
    folder = export(run, tmp_path / "student", "--dtype=bfloat16")
    assert {x.dtype.name for _, x in read_tensors(folder / "transformer")} == {"bfloat16"}
    assert {x.dtype.name for _, x in read_tensors(folder / "vae")} == {"float32"}


@pytest.fixture(scope="module")
def adapted(wan_folder, make_config, tmp_path_factory):
    """A run that trained low-rank adapters."""
    workdir = tmp_path_factory.mktemp("adapted")
    config = make_config({"teacher": str(wan_folder), "data.train_videos": 8, "lora.rank": 2, "lora.alpha": 6.0})
    record_config(config, workdir)
    shapes = lora.adapters(student_network(load_pipeline(wan_folder).transformer.network, config.lora).shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), "float32"), shapes)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(7, {"ema": {"ema": params}})
    return workdir


@pytest.fixture(scope="module")
def adapter(adapted, tmp_path_factory):
    return export(adapted, tmp_path_factory.mktemp("exported") / "adapter", "--adapter")


@pytest.fixture(scope="module")
def merged(adapted, tmp_path_factory):
    return export(adapted, tmp_path_factory.mktemp("exported") / "merged")


def test_an_adapter_is_what_diffusers_and_peft_take(wan_folder, adapter, merged):
    """The teacher with the adapter computes what the export with it merged does."""
    weights = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"}
    others = {"adapter_config.json", "scheduler", "README.md", "manifest.json", "SHA256SUMS"}
    assert {p.name for p in adapter.iterdir()} == weights | others
    whole = diffusers.WanTransformer3DModel.from_pretrained(merged / "transformer")
    pipe = diffusers.WanPipeline.from_pretrained(wan_folder)
    c = whole.config
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, c.in_channels, 2, 4, 4),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 3, c.text_dim),
        "return_dict": False,
    }
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(str(adapter))
        ours, theirs = whole(**inputs)[0], pipe.transformer(**inputs)[0]
        bare = diffusers.WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
        by_peft = peft.PeftModel.from_pretrained(bare, str(adapter))(**inputs)[0]
    assert (theirs - plain).abs().max() > 0.01
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_peft, ours, rtol=1e-4, atol=1e-4)


# The layers that ComfyUI, LightX2V and MaxDiffusion apply an adapter to, by Wan's own names, and diffusers'.
WAN_LAYERS = {
    "blocks.{}.self_attn.q": "blocks.{}.attn1.to_q",
    "blocks.{}.self_attn.k": "blocks.{}.attn1.to_k",
    "blocks.{}.self_attn.v": "blocks.{}.attn1.to_v",
    "blocks.{}.self_attn.o": "blocks.{}.attn1.to_out.0",
    "blocks.{}.cross_attn.q": "blocks.{}.attn2.to_q",
    "blocks.{}.cross_attn.k": "blocks.{}.attn2.to_k",
    "blocks.{}.cross_attn.v": "blocks.{}.attn2.to_v",
    "blocks.{}.cross_attn.o": "blocks.{}.attn2.to_out.0",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def test_an_adapter_is_what_wans_own_code_takes(wan_folder, adapter, merged):
    """Every key has a layer there, and W + B A, as these readers compute it without an alpha, is the merged layer."""
    layers = {name.format(i): theirs.format(i) for name, theirs in WAN_LAYERS.items() for i in range(2)}
    teacher, student = (dict(read_tensors(folder / "transformer")) for folder in (wan_folder, merged))
    tensors, used = load_file(adapter / "pytorch_lora_weights.safetensors"), set()
    for name, theirs in layers.items():
        keys = [f"diffusion_model.{name}.{half}.weight" for half in ("lora_A", "lora_B")]
        if keys[0] in tensors:
            low, high = (tensors[key] for key in keys)
            assert low.shape[0] == high.shape[1] == 2
            changed = teacher[f"{theirs}.weight"] + high @ low
            np.testing.assert_allclose(changed, student[f"{theirs}.weight"], atol=1e-5)
            used |= set(keys)
    assert used == tensors.keys() and len(used) == 2 * 20


def distilled_lora(path, teacher, adapter):
    """The adapter as Wan's few-step adapters are published: lora_up, lora_down, alpha, and differences."""
    tensors, added = {}, {}
    for key, value in load_file(adapter / "pytorch_lora_weights.safetensors").items():
        key = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        tensors[key] = value / 4 if "lora_up" in key else value
        tensors[key.rsplit(".", 2)[0] + ".alpha"] = np.array(8, np.float32)  # 4 times a rank of 2
    for key, name in {
        "patch_embedding.diff": "patch_embedding.weight",
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "text_embedding.2.diff": "condition_embedder.text_embedder.linear_2.weight",
    }.items():
        added[name] = tensors[f"diffusion_model.{key}"] = np.full(teacher[name].shape, 0.25, np.float32)
    save_file(tensors, path)
    return added


@pytest.mark.parametrize("published", [False, True])
def test_an_adapter_is_merged_on_import(wan_folder, adapter, merged, tmp_path, published):
    lora, added = adapter, {}
    if published:
        lora = tmp_path / "lora.safetensors"
        added = distilled_lora(lora, dict(read_tensors(wan_folder / "transformer")), adapter)
    folder = tmp_path / "imported"
    assert cli.main(["import", str(wan_folder), str(folder), f"--lora={lora}"]) == 0
    loaded = load_pipeline(folder)
    wanted = {k: v + added.get(k, 0) for k, v in read_tensors(merged / "transformer")}
    kind = loaded.family.transformer
    table = kind.table(loaded.transformer.config, loaded.transformer.network.shapes)
    for key, value in export_stream(table, loaded.transformer.params):
        np.testing.assert_allclose(value, wanted[key], atol=1e-5, err_msg=key)
    assert loaded.schedule == load_pipeline(wan_folder).schedule


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.blocks.7.ffn.0.lora_A.weight": (2, 24)}, "has no place in the transformer"),
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": (2, 24)}, "only one half of the adapter of 'blocks.0.ffn"),
        ({"diffusion_model.blocks.0.ffn.0.hada_w1_a": (2, 24)}, "is no adapter's key"),
        (
            {f"diffusion_model.blocks.0.ffn.0.lora_{k}.weight": (2, 2) for k in "AB"},
            "the adapter of 'blocks.0.ffn.net.0.proj.weight' is (2, 2) times (2, 2), but the tensor is (32, 24)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(capsys, wan_folder, tmp_path, tensors, message):
    save_file({key: np.zeros(shape, np.float32) for key, shape in tensors.items()}, tmp_path / "lora.safetensors")
    flags = [str(tmp_path / "new"), f"--lora={tmp_path / 'lora.safetensors'}"]
    assert cli.main(["import", str(wan_folder), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def of_imported(wan_folder, adapted, tmp_path_factory):
    """The run of adapters, but its teacher was read by `dollar import`."""
    folder = tmp_path_factory.mktemp("imported")
    assert cli.main(["import", str(wan_folder), str(folder / "teacher")]) == 0
    run = shutil.copytree(adapted, folder / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace(str(wan_folder), str(folder / "teacher")))
    return run


@pytest.fixture(scope="module")
def of_ode(run, tmp_path_factory):
    """The run, but its student takes DDIM steps."""
    workdir = shutil.copytree(run, tmp_path_factory.mktemp("ode") / "run")
    text = (workdir / "config.json").read_text()
    assert '"renoise"' in text
    (workdir / "config.json").write_text(text.replace('"renoise"', '"ode"'))
    return workdir


@pytest.fixture(scope="module")
def of_fewer(wan_folder, make_config, tmp_path_factory):
    """A run of a student of one of two blocks."""
    workdir = tmp_path_factory.mktemp("fewer")
    record_config(make_config({"teacher": str(wan_folder), "data.train_videos": 8, "student.layers": 1}), workdir)
    params = keep_blocks(jax.tree.map(jnp.asarray, load_pipeline(wan_folder).transformer.params), 1)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(7, {"ema": {"ema": params}})
    return workdir


@pytest.mark.parametrize(
    ("trained", "flags"),
    [
        ("run", []),
        ("adapted", ["--adapter"]),
        ("of_imported", []),
        ("of_imported", ["--adapter"]),
        ("of_ode", []),
        ("of_fewer", []),
    ],
)
def test_the_card_samples_the_same_video_as_we_do(wan_folder, trained, flags, request, tmp_path, assert_card_samples):
    run = request.getfixturevalue(trained)
    exported, config = export(run, tmp_path / "student", *flags), read_config(run)
    generator = make_generator(config)
    params, times = restore_student(run, generator), config.student.timesteps
    drawers = (pipeline_wan, torch_utils)
    if flags:  # the card names a teacher that is not on the hub as it was called here
        (exported / wan_folder.name).symlink_to(wan_folder)
    snippet, undrawn = assert_card_samples(exported, generator, params, times, (0, 4, 1, 2, 3), drawers)
    assert undrawn == (3 if trained == "of_ode" else 1)  # we draw noise for the clean end too
    np.testing.assert_allclose(snippet["pipe"].scheduler.timesteps, times, rtol=1e-6)
    assert len(snippet["pipe"].transformer.blocks) == (1 if trained == "of_fewer" else 2)
    assert ("1 of its teacher's blocks" in (exported / "README.md").read_text()) == (trained == "of_fewer")


@pytest.mark.slow
def test_the_plain_call_of_diffusers_is_as_aligned_as_our_own_sample(tmp_path, monkeypatch):
    """The default domain, the shipped teacher in the student's place: what a video shows is read from its frames.

    Give STUDENT_RUN, the folder of a run of `dollar demo`, to compare the student of that."""
    workdir = Path(os.environ.get("STUDENT_RUN", tmp_path / "run"))
    if not workdir.exists():
        params = load_pipeline(SHIPPED_TEACHERS["moving_shapes"]).transformer.params
        record_config(load("demo"), workdir)
        with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
            checkpoints.save(1, {"ema": {"ema": jax.tree.map(jnp.asarray, params)}})
    folder, config = export(workdir, tmp_path / "student"), read_config(workdir)
    generator = make_generator(config)
    times, captions = config.student.timesteps, shapes.covering_captions()[::2]
    prompts = list(map(str, captions))
    keys, sampler = video_keys(5, len(prompts)), generator.student_sampler(times)
    ours = np.concatenate(list(draw_videos(generator, sampler, restore_student(workdir, generator), prompts, keys, 12)))

    pipe = diffusers.WanPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    steps = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    noise = [generator.noise(keys)]
    for i in range(len(times)):
        step = jax.vmap(jax.random.fold_in, (0, None))(steps, i)
        noise.append(jax.vmap(lambda key: jax.random.normal(key, generator.latent_shape))(step))
    drawn = iter(noise)
    for module in (pipeline_wan, torch_utils):
        monkeypatch.setattr(
            module, "randn_tensor", lambda *_, **__: torch.tensor(np.asarray(next(drawn))).permute(0, 4, 1, 2, 3)
        )
    frames, height, width = generator.clip
    size = {"num_frames": frames, "height": height, "width": width, "max_sequence_length": config.data.max_text_length}
    theirs = pipe(prompts, num_inference_steps=len(times), guidance_scale=1.0, output_type="np", **size).frames
    measured = [shapes.alignment(videos, captions)["alignment"] for videos in (ours, np.uint8(np.round(theirs * 255)))]
    print("alignment by dollar sample and by diffusers:", *measured)
    assert abs(measured[0] - measured[1]) <= 0.005 and measured[0] > 0.8


def test_a_call_that_is_not_the_students_is_refused(exported):
    """diffusers' own defaults are 50 steps and a guidance scale of 5."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.WanPipeline.from_pretrained(exported)
    pipe = diffusers.WanPipeline.from_pretrained(exported, trust_remote_code=True)
    for given, message in (
        ({}, "num_inference_steps=3"),
        ({"num_inference_steps": 3}, "guidance_scale=1.0"),
        ({"num_inference_steps": 4, "guidance_scale": 1.0}, "num_inference_steps=3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a red circle", height=16, width=16, num_frames=5, max_sequence_length=12, **given)


def test_vllm_omni_finds_the_times_in_the_index(exported):
    block = json.loads((exported / "model_index.json").read_text())["dmd2_config"]
    assert block == {
        "num_inference_steps": 3,
        "denoising_timesteps": [1000, 700, 400],
        "solver": "sde",
        "guidance_scale": 1.0,
    }


@pytest.mark.parametrize("folder", ["exported", "adapter"])
def test_the_manifest_says_what_the_folder_is(wan_folder, folder, request):
    folder = request.getfixturevalue(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["timesteps"] == [1000.0, 700.0, 400.0] and manifest["shift"] == 3.0
    assert manifest["teacher"]["name"] == wan_folder.name and manifest["step"] == 7

    own = ("manifest.json", "SHA256SUMS")

    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    files = {name: path for name, path in files.items() if wan_folder.name not in name and "__pycache__" not in name}
    assert {name: sha256(path) for name, path in files.items() if name not in own} == manifest["files"]
    teacher = {p.name: sha256(p) for p in (wan_folder / "transformer").iterdir()}
    assert manifest["teacher"]["sha256"] == teacher
    for path in files.values():
        assert path.stat().st_mode & 0o777 == 0o644
        if path.suffix in (".json", ".md"):
            assert str(wan_folder.parent) not in path.read_text(), "a path of this machine"


def test_the_card_tells_of_the_run(wan_folder, run, exported, tmp_path):
    card = (exported / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.to_dict()["library_name"], data.license, data.base_model) == ("diffusers", "other", wan_folder.name)
    assert {r.metric_type: r.metric_value for r in data.eval_results} == METRICS["student_3"]
    assert "7 steps" in card and "moving average" in card and "1000, 700, 400" in card
    assert "| consistency distillation (CD), β_CD | 0.5 |" in card
    assert "| student_3 | 0.5 | 3 | 4.25 |" in card and "| teacher_50 | 0.75 | 100 | – |" in card
    (config,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(config) == json.loads((run / "config.json").read_text()) | {"teacher": wan_folder.name}
    bare = shutil.copytree(run, tmp_path / "bare")
    os.remove(bare / "metrics.json")
    assert "Evaluation" not in (export(bare, tmp_path / "student") / "README.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shard_size=much"], "--shard_size=much must be a size such as 500MB"),
        (["--workdir=nowhere"], "nowhere holds no run"),
        (["another"], "give the new folder"),
        (["--adapter"], "trained the student whole (config.lora.rank is 0)"),
    ],
)
def test_what_is_refused(capsys, run, tmp_path, flags, message):
    assert cli.main(["export", f"--workdir={run}", str(tmp_path / "student"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_and_a_run_without_a_checkpoint(capsys, run, exported, tmp_path):
    assert cli.main(["export", f"--workdir={run}", str(exported)]) == 2
    assert "is there already" in capsys.readouterr().err
    shutil.copy(run / "config.json", tmp_path)
    assert cli.main(["export", f"--workdir={tmp_path}", str(tmp_path / "student")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks when it uploads a folder; everything is taken as a regular file."""

    got: dict = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer, url = {}, f"http://{self.headers['Host']}/someone/student"
        if self.path == "/api/repos/create":
            self.got["created"] = json.loads(body)["name"]
            answer = {"url": url}
        elif self.path.endswith("/preupload/main"):
            files = [f["path"] for f in json.loads(body)["files"]]
            answer = {
                "files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in files]
            }
        elif self.path == "/api/models/someone/student/commit/main":
            entries = [json.loads(line) for line in body.splitlines()]
            files = [e["value"] for e in entries if e["key"] == "file"]
            self.got["files"] = {f["path"]: base64.b64decode(f["content"]) for f in files}
            answer = {"commitUrl": f"{url}/commit/0", "commitOid": "0", "success": True}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "someone/student", "sha": "0", "siblings": []})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_folder_goes_to_the_hub(capsys, adapted, tmp_path, monkeypatch):
    flags = [f"--workdir={adapted}", "--adapter", "--push_to_hub=someone/student"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
        folder = tmp_path / "student"
        assert cli.main(["export", *flags, str(folder)]) == 0
        server.shutdown()
    assert "someone/student" in capsys.readouterr().out
    assert Hub.got["created"] == "student"
    assert Hub.got["files"] == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert cli.main(["export", *flags, str(tmp_path / "again")]) == 2
    err = capsys.readouterr().err
    assert "again is written, but not taken: " in err and (tmp_path / "again").is_dir()
    assert f"hf upload someone/student '{tmp_path / 'again'}' retries" in err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name, message in (("student", "must be OWNER/NAME"), ("someone/student", "needs a token of yours")):
        assert cli.main(["export", f"--workdir={adapted}", f"--push_to_hub={name}", str(tmp_path / "third")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_a_disk_without_room_is_one_sentence(capsys, run, tmp_path, full_disk):
    with full_disk(5000):
        code = cli.main(["export", f"--workdir={run}", str(tmp_path / "new")])
    assert code == 2 and re.search("dollar export: .* cannot be written: .*File too large", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
