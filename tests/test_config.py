import copy
import dataclasses
import json

import pytest

from dollar_jax import run
from dollar_jax.config import DROPPED, OptimiserConfig, PretrainConfig, changed, distill_config, unresumable

VIVID = {"name": "vivid", "weight": 1.0, "folder": None}
VARIANTS = {
    "vsd": (True, False, False),
    "cd": (False, True, False),
    "vsd+cd": (True, True, False),
    "vsd+cd+lrm": (True, True, True),
}


@pytest.mark.parametrize("losses", VARIANTS)
def test_each_variant_of_the_demo_turns_on_its_losses(get_config, losses):
    config = distill_config(get_config(losses))
    assert (config.vsd.weight > 0, config.consistency.weight > 0, config.reward.rewards != ()) == (VARIANTS[losses])
    assert isinstance(config.pretrain, PretrainConfig)


def test_the_default_variant_is_the_whole_method(get_config):
    assert get_config() == get_config("vsd+cd+lrm")
    with pytest.raises(ValueError, match=r":lrm is unknown.*vsd, cd, vsd\+cd"):
        get_config("lrm")


def test_values_arrive_with_their_declared_types(get_config):
    settings = get_config()
    settings.student.timesteps = [900, 500]  # a list of integers, as a command line may give it
    settings.pretrain.vae.z_dim = 8
    config = distill_config(settings)
    assert config.student.timesteps == (900.0, 500.0)
    assert all(isinstance(t, float) for t in config.student.timesteps)
    assert config.pretrain.vae["z_dim"] == 8 and config.pretrain.vae["dim_mult"] == (1, 2, 2)
    assert config.pretrain.vae_phases[0].frames == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vsd.weight", "1", r"config\.vsd\.weight is '1', but must be of type float"),
        ("vsd.nan_to_zero", 1, r"config\.vsd\.nan_to_zero is 1, but must be of type bool"),
        ("batch_size", 8.0, r"config\.batch_size is 8\.0, but must be of type int"),
        ("batch_size", True, r"config\.batch_size is True, but must be of type int"),
        ("vsd.weight", True, r"config\.vsd\.weight is True, but must be of type float"),
        ("reward.rewards", (3,), r"config\.reward\.rewards\[0\] must be a group of settings, not 3"),
        ("reward.rewards", ({"weight": 1.0},), r"config\.reward\.rewards\[0\] lacks name"),
        ("reward.rewards", ({**VIVID, "weight": 0.0}, VIVID), r"names 'vivid' twice"),
        ("reward.method", "rlhf", r"config\.reward\.method is 'rlhf', .*'lrm', 'direct', 'ddpo'"),
        ("reward.latent_frames", 0, r"config\.reward\.latent_frames must be at least 1, or None"),
        ("reward.timeout", 0.0, r"config\.reward\.timeout must be positive"),
        ("reward.guard.max_fall", 1.0, r"max_fall needs a held-out reward: add one with weight 0"),
        ("student.input", "both", r"config\.student\.input is 'both', .*'forward', 'backward'"),
        ("vsd.score_range", (0.1,), r"config\.vsd\.score_range needs 2 values, not 1"),
        ("vsd.score_range", (0.1, "a"), r"config\.vsd\.score_range\[1\] is 'a'"),
        ("vsd.score_range", 0.1, r"config\.vsd\.score_range must be a sequence"),
        ("mesh", 8, r"config\.mesh must be a group of settings, not 8"),
        ("student.timesteps", (500.0, 900.0), r"config\.student\.timesteps must descend"),
        ("accumulation", 5, r"config\.batch_size 32 does not divide into 5"),
        ("reward.samples", 5, r"config\.reward\.samples 5 does not divide a micro-batch of 32"),
    ],
)
def test_a_wrong_value_is_refused_by_name(get_config, path, value, message):
    settings = get_config().to_dict()
    *groups, last = path.split(".")
    group = settings
    for name in groups:
        group = group[name]
    group[last] = value
    with pytest.raises(ValueError, match=message):
        distill_config(settings)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("seed", -1, "from 0 to 4294967295"),
        ("batch_size", -1, "at least 1"),
        ("accumulation", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("keep_checkpoints", 0, "at least 1"),
        ("data.train_videos", 0, "at least 1"),
        ("data.prefetch", 0, "at least 1"),
        ("data.corrupt_records", -1, "at least 0"),
        ("sampling.num_steps", 0, "at least 1"),
        ("student.ema_decay", 2.0, "from 0 to 1"),
        ("student.ema_decay", float("nan"), "from 0 to 1"),
        ("student.optimiser.learning_rate", -1.0, "positive"),
        ("student.optimiser.learning_rate", float("inf"), "positive"),
        ("reward.optimiser.warmup_steps", -5, "at least 0"),
        ("consistency.skip", 0, "at least 1"),
        ("fake_score.updates", 0, "at least 1"),
        ("reward.replay", 0, "at least 1"),
        ("reward.batch_size", 0, "at least 1"),
        ("compute.vae_chunk", 0, "at least 1, or None"),
        ("lora.rank", -1, "at least 0"),
        ("pretrain.teacher.ema_decay", 1.5, "from 0 to 1"),
        ("vsd.guidance_weight", float("nan"), "finite"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(get_config, path, value, allowed):
    base = distill_config(get_config())
    with pytest.raises(ValueError, match=rf"^config\.{path} must be {allowed}, not {value!r}$"):
        changed(base, {path: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.timesteps": (1500.0, 750.0)}, r"config\.student\.timesteps\[0\] must be .* at most 1000, not 1500"),
        ({"student.timesteps": (750.0, 0.0)}, r"config\.student\.timesteps\[1\] must be positive.*, not 0"),
        ({"student.timesteps": ()}, r"config\.student\.timesteps must descend, not \(\)"),
        ({"student.timesteps": (500.0, 500.0)}, r"config\.student\.timesteps must descend"),
        ({"vsd.score_range": (0.9, 0.1)}, r"config\.vsd\.score_range must ascend, not \(0\.9, 0\.1\)"),
        ({"vsd.score_range": (0.1, 1.1)}, r"config\.vsd\.score_range\[1\] must be from 0 to 1, not 1\.1"),
        ({"consistency": {"times": "grid", "skip": 99}}, r"config\.consistency\.skip must be at most .*num_steps, 50"),
        ({"student.layers": 2, "lora.rank": 4}, r"config\.student\.layers leaves blocks out, and config\.lora\.rank"),
        ({"pretrain.dtype": "int3"}, r"config\.pretrain\.dtype is 'int3', but must be one of 'float32'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(get_config, changes, message):
    base = distill_config(get_config())
    with pytest.raises(ValueError, match=message):
        changed(base, changes)


def test_a_missing_setting_has_its_default_and_a_required_one_is_named(get_config):
    settings = get_config().to_dict()
    full = distill_config(settings)
    older = copy.deepcopy(settings)
    del older["fake_score"]["optimiser"]["b1"], older["sampling"]["solver"], older["lora"]
    read = distill_config(older)
    assert read.fake_score.optimiser.b1 == OptimiserConfig().b1 != full.fake_score.optimiser.b1
    assert (read.sampling, read.lora) == (full.sampling, full.lora)
    for name in ("teacher", "data"):
        with pytest.raises(ValueError, match=f"^config lacks {name}$"):
            distill_config({k: v for k, v in settings.items() if k != name})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "vsd.guidance_scale",
            r"^config\.vsd has no field 'guidance_scale'; did you mean config\.vsd\.guidance_weight\?$",
        ),
        ("studnt", r"^config has no field 'studnt'; did you mean config\.student\?$"),
        ("mesh.zzz", r"^config\.mesh has no field 'zzz'; its fields are context, data, fsdp, tensor$"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(get_config, path, message):
    with pytest.raises(ValueError, match=message):
        changed(distill_config(get_config()), {path: 4.5})


def test_a_dropped_setting_names_its_version_and_an_old_run_still_reads(get_config, monkeypatch):
    monkeypatch.setitem(DROPPED, "vsd.quantile", ("0.9.0", "set vsd.floor", 0.5))
    config = distill_config(get_config())
    for value, past in ((0.5, False), (0.6, False), (0.6, True)):
        old = {**dataclasses.asdict(config), "vsd": {**dataclasses.asdict(config.vsd), "quantile": value}}
        with pytest.raises(ValueError, match=r"^config\.vsd\.quantile was dropped in version 0\.9\.0: set vsd\.floor$"):
            distill_config(old, past)
    old["vsd"]["quantile"] = 0.5
    assert distill_config(old, past=True) == config
    assert old["vsd"]["quantile"] == 0.5


def test_what_may_change_on_resumption(get_config):
    base = distill_config(get_config())
    may = {
        "steps": 7,
        "log_every": 1,
        "checkpoint_every": 3,
        "mesh": {"fsdp": 2},
        "compute": {"dtype": "bfloat16", "vae_chunk": 2},
        "data": {"prefetch": 1, "corrupt_records": 4},
        "reward": {"timeout": 1.0, "retries": 0, "guard.window": 8},
        "student.optimiser": {"learning_rate": 1.0, "clip_norm": 2.0},
        "visibility.videos": 2,
        "pretrain": None,
    }
    assert unresumable(base, changed(base, may)) == []
    never = {"seed": 1, "student.timesteps": (900.0,), "reward.weight": 2.0, "student.optimiser.clip_norm": None}
    found = unresumable(base, changed(base, never))
    assert {path: now for path, _, now in found} == never
    assert ("seed", 0, 1) in found


@pytest.mark.parametrize("losses", VARIANTS)
def test_settings_survive_their_file(get_config, tmp_path, losses):
    config = distill_config(get_config(losses))
    run.record_config(config, tmp_path / "run")
    back = run.read_config(tmp_path / "run")
    assert dataclasses.replace(back, pretrain=None) == dataclasses.replace(config, pretrain=None)
    # The networks' own settings stay mappings, whose tuples JSON makes lists.
    assert json.dumps(dataclasses.asdict(back)) == json.dumps(dataclasses.asdict(config))


def test_other_settings_are_refused_by_name_and_the_file_stays(make_config, tmp_path):
    run.record_config(make_config(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    for name, value in {"vsd.weight": 2.0, "student.timesteps": (1000.0,), "seed": 1}.items():
        with pytest.raises(ValueError, match=rf"config\.{name} = "):
            run.record_config(make_config({name: value}), tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    longer = dataclasses.replace(make_config(), steps=99, checkpoint_every=7, pretrain=None)
    run.record_config(longer, tmp_path)
    assert run.read_config(tmp_path) == longer


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run.read_config(tmp_path)
