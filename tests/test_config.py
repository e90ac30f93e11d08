import copy
import dataclasses
import json

import pytest

from dollar_jax import run
from dollar_jax.config import DistillConfig, PretrainConfig, from_config

VIVID = {"name": "vivid", "weight": 1.0, "folder": None}
VARIANTS = {
    "vsd": (True, False, False),
    "cd": (False, True, False),
    "vsd+cd": (True, True, False),
    "vsd+cd+lrm": (True, True, True),
}


@pytest.mark.parametrize("losses", VARIANTS)
def test_each_variant_of_the_demo_turns_on_its_losses(get_config, losses):
    config = from_config(DistillConfig, get_config(losses))
    assert (config.vsd.weight > 0, config.consistency.weight > 0, config.reward.rewards != ()) == (VARIANTS[losses])
    assert isinstance(config.pretrain, PretrainConfig)


def test_the_default_variant_is_the_whole_method(get_config):
    assert get_config() == get_config("vsd+cd+lrm")
    with pytest.raises(ValueError, match=r"configs/demo.py:lrm.*vsd, cd, vsd\+cd"):
        get_config("lrm")


def test_values_arrive_with_their_declared_types(get_config):
    settings = get_config()
    settings.student.timesteps = [900, 500]  # a list of integers, as a command line may give it
    settings.pretrain.vae.z_dim = 8
    config = from_config(DistillConfig, settings)
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
        ("reward.rewards", ({"name": "vivid"},), r"config\.reward\.rewards\[0\] lacks folder, weight"),
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
        from_config(DistillConfig, settings)


def test_a_missing_and_an_unknown_key_are_refused_by_name(get_config):
    settings = get_config().to_dict()
    missing, unknown = copy.deepcopy(settings), copy.deepcopy(settings)
    del missing["fake_score"]["optimiser"]["b1"]
    with pytest.raises(ValueError, match=r"config\.fake_score\.optimiser lacks b1"):
        from_config(DistillConfig, missing)
    unknown["vsd"]["guidance_scale"] = 4.5
    with pytest.raises(ValueError, match=r"config\.vsd has no field 'guidance_scale'.*guidance_weight"):
        from_config(DistillConfig, unknown)


@pytest.mark.parametrize("losses", VARIANTS)
def test_settings_survive_their_file(get_config, tmp_path, losses):
    config = from_config(DistillConfig, get_config(losses))
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
