"""`dollar import`: what diffusers saved, restored from Orbax; and what is refused before any work."""

import functools
import json
import shutil
import weakref

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dollar_jax import cli, sharding
from dollar_jax.config import MeshConfig
from dollar_jax.weights import importer, safetensors_io
from dollar_jax.weights.pipeline import COMPONENTS, load_pipeline
from dollar_jax.weights.table import Row, stream_params

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")


@pytest.fixture(scope="module")
def imported(wan_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "teacher"
    assert cli.main(["import", str(wan_folder), str(folder)]) == 0
    return folder


@pytest.fixture
def copy(wan_folder, tmp_path):
    """The source, free to be broken."""
    return shutil.copytree(wan_folder, tmp_path / "source")


def test_the_imported_folder_holds_the_same_pipeline(wan_folder, imported):
    ours, theirs = load_pipeline(imported), load_pipeline(wan_folder)
    assert not list(imported.rglob("*.safetensors"))
    assert ours.schedule == theirs.schedule
    for name in COMPONENTS:
        one, two = getattr(ours, name), getattr(theirs, name)
        assert one.config == two.config
        jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
        assert {type(leaf) for leaf in jax.tree.leaves(one.params)} == {np.ndarray}
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_bf16_is_rounded_once_and_the_vae_stays_fp32(wan_folder, tmp_path):
    folder = tmp_path / "teacher"
    assert cli.main(["import", str(wan_folder), str(folder), "--dtype=bfloat16"]) == 0
    ours, exact = load_pipeline(folder, "bfloat16"), load_pipeline(wan_folder)

    kept = set()
    for part in ("transformer", "text_encoder"):
        values = flatten_dict(getattr(exact, part).params, sep="/")
        for path, x in flatten_dict(getattr(ours, part).params, sep="/").items():
            np.testing.assert_array_equal(x, values[path].astype(x.dtype))
            kept |= {path} if x.dtype == np.float32 else set()
    # What diffusers keeps in fp32 too: time_embedder, norm2 and scale_shift_table.
    embedder = {f"condition_embedder/time_embedder/linear_{i}/{p}" for i in (1, 2) for p in ("kernel", "bias")}
    tables = {"scale_shift_table", "blocks/scale_shift_table", "blocks/norm2/scale", "blocks/norm2/bias"}
    assert kept == embedder | tables
    jax.tree.map(np.testing.assert_array_equal, ours.vae.params, exact.vae.params)


def test_the_transformer_is_restored_into_the_shards_of_a_mesh(wan_folder, imported):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))
    place = functools.partial(sharding.shard, mesh)
    component = load_pipeline(imported, "bfloat16", place).transformer
    wanted = place(component.network.shapes)
    for leaf, where in zip(jax.tree.leaves(component.params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == where
    kernel = component.params["blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16
    assert kernel.addressable_shards[0].data.shape == (2, 12, 12)
    exact = load_pipeline(wan_folder, "bfloat16").transformer.params
    jax.tree.map(np.testing.assert_array_equal, component.params, exact)


def test_one_parameter_is_in_memory_at_a_time():
    held = []
    shapes = {name: {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)} for name in "abc"}
    table = [Row("{m}.{i}", "{m:a|b|c}/kernel")]
    sources = {f"{name}.{i}": (3,) for name in "abc" for i in range(2)}

    def read(key):
        assert all(reference() is None for reference in held), "an earlier parameter is still there"
        return np.full(3, ord(key[0]) + int(key[-1]), np.float32)

    for path, array in stream_params(table, sources, read, shapes):
        first = ord(path[0])
        np.testing.assert_array_equal(array, [[first] * 3, [first + 1] * 3])
        assert array.ctypes.data % 64 == 0
        held.append(weakref.ref(array))
        del array
    assert len(held) == 3


def test_an_interrupted_import_leaves_nothing_and_can_be_repeated(wan_folder, tmp_path, monkeypatch):
    target = tmp_path / "teacher"
    read = safetensors_io.Stored.read
    calls = []

    def interrupted(tensor):
        calls.append(tensor.name)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return read(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_io.Stored, "read", interrupted)
        assert cli.main(["import", str(wan_folder), str(target)]) == 130
    assert not target.exists()
    importer.import_pipeline(str(wan_folder), target)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    load_pipeline(target)


def test_a_name_on_the_hub_is_downloaded(wan_folder, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, [p for p in allow_patterns if "bin" in p or "pt" in p]))
        return str(wan_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    importer.import_pipeline("Wan-AI/Tiny", tmp_path / "teacher")
    assert asked == [("Wan-AI/Tiny", [])] * 2
    load_pipeline(tmp_path / "teacher")


def test_what_is_refused_on_the_hub_is_refused_before_its_weights_are_downloaded(copy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or copy
    )
    edit(copy / "transformer" / "config.json", num_layers=10**6)
    with pytest.raises(ValueError, match="transformer/config.json: num_layers is 1000000"):
        importer.import_pipeline("Wan-AI/Tiny", tmp_path / "teacher")
    assert asked and not any("safetensors" in pattern for pattern in asked)


def test_the_index_wins_over_a_stale_single_file(wan_folder, copy, tmp_path):
    """As in diffusers."""
    folder = copy / "transformer"
    stale = {name: np.zeros_like(x) for name, x in safetensors_io.read_tensors(folder)}
    save_file(stale, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder).state_dict()
    for name, value in safetensors_io.read_tensors(folder):
        np.testing.assert_array_equal(value, theirs[name].numpy(), err_msg=name)
        assert name not in stale or np.abs(value).max() > 0


def test_shards_of_a_variant_are_found(wan_folder, copy):
    folder = copy / "transformer"
    model = diffusers.WanTransformer3DModel.from_pretrained(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size="20KB", variant="fp16")
    assert list(folder.glob("*.index.fp16.json"))
    ours, exact = load_pipeline(copy), load_pipeline(wan_folder)
    jax.tree.map(np.testing.assert_array_equal, ours.transformer.params, exact.transformer.params)
    model.save_pretrained(folder, max_shard_size="20KB", variant="bf16")
    with pytest.raises(FileNotFoundError, match="several variants of its weights, .*bf16.json, .*fp16.json"):
        load_pipeline(copy)


# --- what is refused ------------------------------------------------------------------------------


def refused(capsys, source, target, *parts):
    """One line on stderr that has all the parts; nothing is written."""
    before = sorted(target.parent.iterdir())
    assert cli.main(["import", str(source), str(target)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dollar import: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err, err
    assert sorted(target.parent.iterdir()) == before


def test_what_is_no_pipeline(capsys, wan_folder, tmp_path, monkeypatch):
    target = tmp_path / "teacher"
    refused(capsys, tmp_path, target, tmp_path, "no model_index.json")
    refused(capsys, tmp_path / "nowhere", target, tmp_path / "nowhere", "neither a folder nor a name on the hub")
    refused(capsys, wan_folder / "model_index.json", target, "is a file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(capsys, "Wan-AI/Nothing", target, "Wan-AI/Nothing", "the hub did not give it", "give the folder")
    refused(capsys, wan_folder, tmp_path, tmp_path, "is there already")
    assert cli.main(["import", str(wan_folder)]) == 2
    assert "give two names" in capsys.readouterr().err


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "file, fields, parts",
    [
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ["transformer_2", "= None"]),
        ("model_index.json", {"boundary_ratio": 0.875}, ["boundary_ratio = 0.875"]),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, ["image_encoder", "an image"]),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, ["WanVACEPipeline", "known"]),
        ("model_index.json", {"transformer": 3}, ["transformer = 3", "the library and the class"]),
        ("transformer/config.json", {"in_channels": 36}, ["in_channels = 36 and out_channels = 4"]),
        ("transformer/config.json", {"in_channels": 8, "out_channels": 8}, ["in_channels = 8", "vae have 4"]),
        ("transformer/config.json", {"text_dim": 8}, ["8 channels", "text_encoder's 16"]),
        ("transformer/config.json", {"patch_size": 3}, ["patch_size must be a sequence, not 3"]),
        ("transformer/config.json", {"patch_size": [1, 2]}, ["patch_size needs 3 values, not 2"]),
        ("transformer/config.json", {"num_layers": 1e6}, ["num_layers is 1000000.0", "of type int"]),
        ("transformer/config.json", {"num_layers": 10**6}, ["num_layers is 1000000", "from 1 to 1000"]),
        ("transformer/config.json", {"eps": -1}, ["eps is -1.0", "positive"]),
        ("transformer/config.json", {"image_dim": 1280}, ["image_dim = 1280", "image_encoder have None"]),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, ["pos_embed_seq_len = 514", "FLF2V"]),
        ("transformer/config.json", {"_class_name": "WanAnimate"}, ["WanAnimate", "WanTransformer3DModel"]),
        ("vae/config.json", {"dropout": 0.5}, ["dropout = 0.5", "Wan 2.2"]),
        ("vae/config.json", {"z_dim": True}, ["z_dim is True", "of type int"]),
        ("text_encoder/config.json", {"d_model": None}, ["d_model is None"]),
        ("scheduler/scheduler_config.json", {"flow_shift": "3"}, ["flow_shift is '3'", "of type float"]),
    ],
)
def test_what_cannot_be_used_is_named_before_weights_are_read(capsys, copy, tmp_path, monkeypatch, file, fields, parts):
    monkeypatch.setattr(safetensors_io, "safe_open", None)
    edit(copy / file, **fields)
    refused(capsys, copy, tmp_path / "teacher", copy / file, *parts)


def test_wans_own_layout_gets_a_pointer(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"}))
    refused(capsys, tmp_path, tmp_path / "teacher", "no model_index.json", "ends in -Diffusers")


def test_pickles(capsys, copy, tmp_path):
    folder = copy / "vae"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    refused(capsys, copy, tmp_path / "teacher", folder, "a pickle", "can run any code")


@pytest.mark.parametrize(
    "change, parts",
    [
        ("missing", ["the weights lack 'decoder.conv_out.bias'"]),
        ("shape", ["'decoder.conv_out.bias' has shape (2,)", "'decoder/conv_out/bias' needs (3,)"]),
        ("extra", ["'decoder.conv_out.more' of shape (3,) has no place"]),
    ],
)
def test_tensors_that_do_not_fit(capsys, copy, tmp_path, change, parts):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    bias = tensors["decoder.conv_out.bias"]
    if change == "missing":
        del tensors["decoder.conv_out.bias"]
    elif change == "shape":
        tensors["decoder.conv_out.bias"] = bias[:2]
    else:
        tensors["decoder.conv_out.more"] = bias
    save_file(tensors, path, metadata={"format": "pt"})
    refused(capsys, copy, tmp_path / "teacher", path.parent, *parts)


def test_a_tensor_in_two_shards(capsys, copy, tmp_path):
    shards = sorted((copy / "transformer").glob("*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name]}, shards[1])
    refused(capsys, copy, tmp_path / "teacher", f"'{name}' comes twice", shards[0], shards[1])


def test_damaged_weights(capsys, copy, imported, tmp_path):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(capsys, copy, tmp_path / "teacher", path, "damaged")
    broken = shutil.copytree(imported, tmp_path / "broken")
    shutil.rmtree(broken / "vae" / "params" / "state")
    with pytest.raises(ValueError, match="broken lacks vae/params/state"):
        load_pipeline(broken)
    (broken / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="vae/params is damaged"):
        load_pipeline(broken)


def test_an_imported_folder_is_as_it_was_written(imported, tmp_path):
    """A single bit of a weight, or a setting changed by accident."""
    broken = shutil.copytree(imported, tmp_path / "broken")
    (broken / "README.md").write_text("my own note")
    load_pipeline(broken)
    weights = max((p for p in (broken / "transformer" / "params").rglob("*")), key=lambda p: p.stat().st_size)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ValueError, match="broken has another transformer/params/.* than was written: copy it anew"):
        load_pipeline(broken)
