"""Checkpoints that can be trusted: what is not as it was saved is named, kept, and never restored."""

import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash

from dollar_jax import checkpoint
from dollar_jax.checkpoint import Checkpoints, NothingWhole, SaveFailed
from dollar_jax.cli import main
from dollar_jax.files import SHA256, XXH128, find_damage, write_checksums

ITEMS = ("student", "ema", "optimisers")


def items(step):
    """Different in every step and item, and too random to be compressed."""
    rng = np.random.default_rng(step)
    return {name: {"w": jnp.asarray(rng.normal(size=(8, 32)), "float32"), "step": jnp.int32(step)} for name in ITEMS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 20 and 30, in a folder whose name would be a pattern to a shell."""
    folder = tmp_path_factory.mktemp("saved") / "lr[1e-4]*?" / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, items(step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restored(folder, names=ITEMS, keep=2):
    """The step that is restored, once it is seen to be all that was saved."""
    with Checkpoints(folder, keep) as checkpoints:
        found = checkpoints.restore({name: items(0)[name] for name in names})
        for name in names:
            for leaf, value in items(checkpoints.restored)[name].items():
                np.testing.assert_array_equal(found[name][leaf], value)
        return checkpoints.restored


def test_the_newest_are_kept_with_checksums_that_anybody_can_check(saved, folder):
    assert {p.name for p in saved.iterdir()} == {"20", "30"}
    assert restored(saved) == 30
    lines = (saved / "30" / XXH128).read_text().splitlines()[1:-1]
    for value, _, name in (line.partition("  ") for line in lines):
        assert value == xxhash.xxh128_hexdigest((saved / "30" / name).read_bytes())
    assert {line.partition("  ")[2].partition("/")[0] for line in lines} >= set(ITEMS)
    write_checksums(folder / "30")
    assert os.system(f"cd '{folder}/30' && sha256sum --check --strict --quiet {SHA256}") == 0


def files(folder, pattern):
    return sorted(p for p in folder.glob(pattern) if p.is_file())


def largest(folder):
    """The file of an item that holds its arrays."""
    return max(files(folder, "**/*"), key=lambda p: p.stat().st_size)


def flip(path, bit=None):
    data = bytearray(path.read_bytes())
    bit = 8 * len(data) // 2 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path, keep=0.5, more=b""):
    data = path.read_bytes()
    path.write_bytes(data + more if more else data[: int(keep * len(data))])


def replace(path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def older(step):
    return min((p for p in step.parent.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


# What happens to the newer of two steps, and how the sentence about it begins.
DAMAGE = {
    "array truncated": (lambda s: cut(largest(s / "ema")), "has another ema/"),
    "array emptied": (lambda s: cut(largest(s / "ema"), 0), "has another ema/"),
    "array grown": (lambda s: cut(largest(s / "ema"), more=b"\0"), "has another ema/"),
    "array zeroed": (lambda s: (f := largest(s / "ema")).write_bytes(bytes(f.stat().st_size)), "has another ema/"),
    "array deleted": (lambda s: largest(s / "ema").unlink(), "lacks ema/"),
    "array a folder": (lambda s: ((f := largest(s / "ema")).unlink(), f.mkdir()), "lacks ema/"),
    "array a pipe": (lambda s: fifo(largest(s / "ema")), "lacks ema/"),
    "array a dangling link": (lambda s: ((f := largest(s / "ema")).unlink(), f.symlink_to("no")), "lacks ema/"),
    "array with a bit flipped": (lambda s: flip(largest(s / "ema")), "has another ema/"),
    "array of another item": (lambda s: shutil.copy(largest(s / "student"), largest(s / "ema")), "has another ema/"),
    "tree truncated": (lambda s: cut(s / "ema/_METADATA"), "has another ema/_METADATA"),
    "tree garbage": (lambda s: (s / "ema/_METADATA").write_bytes(b"\xff" * 99), "has another ema/_METADATA"),
    "tree deep": (lambda s: (s / "ema/_METADATA").write_text("[" * 10**5), "has another ema/_METADATA"),
    "tree deleted": (lambda s: (s / "ema/_METADATA").unlink(), "lacks ema/_METADATA"),
    "shardings garbage": (lambda s: (s / "ema/_sharding").write_text("{"), "has another ema/_sharding"),
    "index emptied": (lambda s: cut(s / "ema/manifest.ocdbt", 0), "has another ema/manifest.ocdbt"),
    "index deleted": (lambda s: (s / "ema/manifest.ocdbt").unlink(), "lacks ema/manifest.ocdbt"),
    "process's part deleted": (lambda s: shutil.rmtree(s / "ema/ocdbt.process_0"), "lacks ema/ocdbt.process_0"),
    "file added": (lambda s: (s / "ema/d/0").write_text("x"), "holds ema/d/0"),
    "item deleted": (lambda s: shutil.rmtree(s / "ema"), "has no ema"),
    "item emptied": (lambda s: (shutil.rmtree(s / "ema"), (s / "ema").mkdir()), "lacks ema/"),
    "item a file": (lambda s: (shutil.rmtree(s / "ema"), (s / "ema").write_text("x")), "has no ema"),
    "item of another step": (lambda s: replace(s / "ema", older(s) / "ema"), "lacks ema/"),
    "item of another name": (lambda s: replace(s / "ema", s / "student"), "lacks ema/"),
    "step's metadata garbage": (lambda s: (s / "_CHECKPOINT_METADATA").write_text("{}"), "has another _CHECK"),
    "step's metadata deleted": (lambda s: (s / "_CHECKPOINT_METADATA").unlink(), "lacks _CHECKPOINT_METADATA"),
    "checksums deleted": (lambda s: (s / XXH128).unlink(), f"has no {XXH128}"),
    "checksums emptied": (lambda s: cut(s / XXH128, 0), f"has a {XXH128} that is damaged"),
    "checksums truncated": (lambda s: cut(s / XXH128, 0.7), f"has a {XXH128} that is damaged"),
    "checksums not text": (lambda s: (s / XXH128).write_bytes(b"\xff\xfe"), f"has no {XXH128}"),
    "checksums a folder": (lambda s: ((s / XXH128).unlink(), (s / XXH128).mkdir()), f"has no {XXH128}"),
    "checksums of another step": (lambda s: shutil.copy(older(s) / XXH128, s), "is checkpoint of step "),
    "another step under its name": (lambda s: replace(s, older(s)), "is checkpoint of step "),
    "all deleted": (lambda s: (shutil.rmtree(s), s.mkdir()), f"has no {XXH128}"),
    "a file in its place": (lambda s: (shutil.rmtree(s), s.write_text("x")), f"has no {XXH128}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_kept_and_not_used(folder, damage, capsys):
    act, begins = DAMAGE[damage]
    act(folder / "30")
    assert restored(folder, ("student",), keep=None) in (20, 30)  # sampling asks for one item, and moves nothing
    assert {p.name for p in folder.iterdir()} == {"20", "30"}
    capsys.readouterr()
    assert restored(folder, keep=None) == restored(folder, ("ema",), keep=None) == 20
    assert restored(folder) == 20
    told = capsys.readouterr().err
    assert told.count(f"{folder}/30 {begins}") == 3
    assert told.endswith(f" and was moved to 30.damaged: {folder}/20 is used instead\n")
    assert {p.name for p in folder.iterdir()} == {"20", "30.damaged"}
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(30, items(30))
    assert restored(folder) == 30
    assert {p.name for p in folder.iterdir()} == {"20", "30", "30.damaged"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, own_config):
    """What `dollar train` leaves after two steps, a checkpoint of each, and beside it what it is without the newer."""
    folder = tmp_path_factory.mktemp("run")
    changes = {
        "steps": 2,
        "batch_size": 8,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "data.train_videos": 16,
        "mesh.fsdp": 8,
        "student.ema_decay": 0.5,  # so that the two differ to the eye
        "student.optimiser.learning_rate": 0.01,
        "student.optimiser.warmup_steps": 0,
        "reward.samples": 2,
        "reward.replay": 16,
        "reward.batch_size": 8,
        "reward.updates": 1,
        "visibility.samples_every": 0,
        "sampling.num_steps": 2,
    }
    config = own_config(folder, changes)
    assert main(["train", f"--config={config}", f"--workdir={folder / 'run'}"]) == 0
    shutil.copytree(folder / "run", folder / "before", ignore=shutil.ignore_patterns("2", "metrics*"))
    return config, folder / "run", folder / "before"


def used(command, config, workdir, out):
    """The exit code of a command on a run, and what it made, but for how long it took."""
    if command == "train":
        code = main(["train", f"--config={config}", f"--workdir={workdir}"])
        return code, used("export", config, workdir, out)[1] if code == 0 else None
    if command == "export":
        code, made = main(["export", f"--workdir={workdir}", str(out)]), out / SHA256
        return code, made.read_text() if made.exists() else None
    if command == "sample":
        made = out.with_suffix(".gif")
        code = main(["sample", f"--workdir={workdir}", "--prompt=a small blue circle", "--num=1", f"--out={made}"])
        return code, made.read_bytes() if made.exists() else None
    (prompts := out.with_suffix(".txt")).write_text("a small blue circle\n")
    made = out.with_suffix(".json")
    code = main(
        ["evaluate", f"--workdir={workdir}", f"--prompts_file={prompts}", f"--out={made}", "--num=1", "--reward=motion"]
    )
    rows = json.loads(made.read_text()) if made.exists() else {}
    return code, {name: rows[name]["motion"] for name in ("student_4", "student_1")} if rows else None


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "export"])
def test_no_command_takes_what_is_damaged(run, command, tmp_path, capsys):
    """Each makes of the step before what it makes when there is no other, and training what it had made."""
    config, before = run[0], run[2]
    whole = Path(shutil.copytree(run[1], tmp_path / "whole"))
    code, expected = used(command, config, whole if command == "train" else before, tmp_path / "expected")
    assert code == 0 and expected
    if command != "train":
        assert used(command, config, whole, tmp_path / "newest")[1] != expected
    for number, (name, (act, begins)) in enumerate(DAMAGE.items()):
        workdir = Path(shutil.copytree(whole, tmp_path / "run"))
        act(workdir / "checkpoints" / "2")
        capsys.readouterr()
        assert used(command, config, workdir, tmp_path / str(number)) == (0, expected), name
        told = capsys.readouterr().err
        assert f"{workdir}/checkpoints/2 {begins}" in told and f"{workdir}/checkpoints/1 is used instead" in told, name
        left = {p.name for p in (workdir / "checkpoints").iterdir()}
        assert left == ({"1", "2", "2.damaged"} if command == "train" else {"1", "2"}), name
        shutil.rmtree(workdir)
    shutil.rmtree(whole / "checkpoints" / "1" / "ema")
    flip(largest(whole / "checkpoints" / "2" / "ema"))
    assert used(command, config, whole, tmp_path / "none") == (4, None)
    (last,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(f"dollar {command}: "))
    assert "no checkpoint is whole" in last and f"{whole}/checkpoints/1 has no ema" in last


def test_what_all_devices_have_is_cut_among_them_only_where_it_is_large(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = {"bias": jnp.ones((16, 16)), "kernel": jnp.ones((8, 2**18))}
    with Checkpoints(tmp_path) as checkpoints:
        whole = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        checkpoints.save(1, {"student": whole})
    with ocp.StandardCheckpointer() as checkpointer:
        about = checkpointer.metadata(tmp_path / "1" / "student").item_metadata
    assert {name: x.storage.chunk_shape for name, x in about.items()} == {"bias": (16, 16), "kernel": (1, 2**18)}


def test_when_none_is_whole_all_are_named_and_none_is_moved(folder):
    for step in ("20", "30"):
        flip(largest(folder / step / "ema"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(NothingWhole, match=rf"no checkpoint is whole: {folder}/30 has another.*; {folder}/20 has"):
        restored(folder)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        restored(folder / "nowhere")
    assert not (folder / "nowhere").exists()


def test_a_thousand_flipped_bits_are_noticed(folder):
    """In any file of a step, XXH128SUMS too."""
    step, rng = folder / "30", random.Random(0)
    paths = [p for p in step.rglob("*") if p.is_file()]
    weights = [p.stat().st_size for p in paths]
    whole = {path: path.read_bytes() for path in paths}
    assert not find_damage(step, ITEMS, "checkpoint of step 30", sums=XXH128)
    for i in range(1000):
        # Half of them as an accident would have it, half in the many small files.
        path = rng.choices(paths, weights)[0] if i % 2 else rng.choice([p for p in paths if whole[p]])
        flip(path, rng.randrange(8 * len(whole[path])))
        assert find_damage(step, ITEMS, "checkpoint of step 30", sums=XXH128), path
        path.write_bytes(whole[path])


def test_processes_check_a_share_each(folder):
    flip(largest(folder / "30" / "ema"))
    found = [find_damage(folder / "30", ["ema"], share=(i, 3), sums=XXH128) for i in range(3)]
    assert sum(map(bool, found)) == 1


def test_a_step_of_version_0_1_0_is_read_and_said_to_be_unchecked(folder, capsys):
    metadata = folder / "30" / "_CHECKPOINT_METADATA"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "custom_metadata": {}}))
    (folder / "30" / XXH128).unlink()
    assert restored(folder) == 30
    assert "30 was saved by version 0.1.0, without checksums" in capsys.readouterr().err
    cut(folder / "30" / "ema" / "_METADATA", 0)
    assert restored(folder) == 20
    assert "30 cannot be read" in capsys.readouterr().err


def test_other_networks_are_no_damage(folder):
    like = {"ema": {"w": jnp.zeros((8, 32)), "another": jnp.zeros(3)}}
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(ValueError, match="cannot be restored into these"):
        checkpoints.restore(like)
    assert {p.name for p in folder.iterdir()} == {"20", "30"}


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_in_the_background_is_noticed_and_tried_again(folder, monkeypatch, capsys):
    with Checkpoints(folder, keep=2) as checkpoints, monkeypatch.context() as full:
        full.setattr(checkpoint, "write_checksums", refuse)
        checkpoints.save(40, items(40))
        checkpoints._checkpointer._async_manager._thread.join()
        assert checkpoints.failed()
        full.undo()
        checkpoints.save(41, items(41))
        assert not checkpoints.failed() and checkpoints.latest() == 41
    assert restored(folder) == 41
    assert {p.name for p in folder.iterdir()} == {"30", "41"}  # what the failed one left is gone


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_that_fails_for_good_names_the_last_good_one(folder, monkeypatch, capsys, wait):
    monkeypatch.setattr(checkpoint, "write_checksums", refuse)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    message = rf"could not be saved \(.*No space left on device\); the last good checkpoint is {folder}/30:"
    with pytest.raises(SaveFailed, match=message), Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(40, items(40), wait)
    assert capsys.readouterr().err.count("saving step 40 failed") == (checkpoint.TRIES if wait else 0)
    monkeypatch.undo()
    assert restored(folder) == 30


def test_a_folder_that_cannot_be_made_is_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(SaveFailed, match="there is no checkpoint yet"), Checkpoints(tmp_path / "checkpoints") as new:
        new.save(1, items(1))
