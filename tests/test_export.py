"""`dollar export`: a run's student as a user of diffusers gets it, from a folder on disk."""

import json
import os
import re
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow_match
from safetensors.numpy import load_file

from dollar_jax import cli
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.generate import make_generator, student_network
from dollar_jax.models import lora
from dollar_jax.run import CHECKPOINTS, read_config, record_config, restore_student
from dollar_jax.weights.pipeline import load_pipeline
from dollar_jax.weights.safetensors_io import list_tensors, read_tensors

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


def test_an_adapter_is_a_file_that_load_lora_weights_takes(wan_folder, adapted, adapter, tmp_path):
    """In diffusers the teacher with the adapter computes what the export with it merged does."""
    assert {p.name for p in adapter.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "scheduler",
        "README.md",
        "SHA256SUMS",
    }
    tensors = load_file(adapter / "pytorch_lora_weights.safetensors")
    assert tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 2
    merged = export(adapted, tmp_path / "merged")
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
    assert (theirs - plain).abs().max() > 0.01
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("trained", "folder"), [("run", "exported"), ("adapted", "adapter")])
def test_the_card_samples_the_same_video_as_we_do(trained, folder, request, assert_card_samples):
    run, exported = request.getfixturevalue(trained), request.getfixturevalue(folder)
    config = read_config(run)
    generator = make_generator(config)
    params, times = restore_student(run, generator), config.student.timesteps
    drawers = (pipeline_wan, flow_match)
    snippet, undrawn = assert_card_samples(exported, generator, params, times, (0, 4, 1, 2, 3), drawers)
    assert undrawn == 0
    np.testing.assert_allclose(snippet["scheduler"].timesteps, times, rtol=1e-6)


def test_the_card_tells_of_the_run(run, exported, tmp_path):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "7 steps" in card and "moving average" in card and "1000, 700, 400" in card
    assert "| consistency distillation (CD), β_CD | 0.5 |" in card
    assert "| student_3 | 0.5 | 3 | 4.25 |" in card and "| teacher_50 | 0.75 | 100 | – |" in card
    (config,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(config) == json.loads((run / "config.json").read_text())
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
