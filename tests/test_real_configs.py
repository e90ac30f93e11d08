"""The configurations of real teachers: settings, published sizes, and a step that fits together; no weights."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import diffusers
import jax
import pytest
import torch

from dollar_jax.distillation import Frozen
from dollar_jax.experiment import load
from dollar_jax.generate import transformer_options
from dollar_jax.models.wan_vae import WanVAEConfig
from dollar_jax.schedule import Schedule
from dollar_jax.weights.families import FAMILIES, PUBLISHED
from dollar_jax.weights.vae import WAN_VAE
from dollar_jax.weights.wan import WAN_TRANSFORMER

CONFIGS = Path(__file__).parents[1] / "configs"
# Parameters as published for Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers, and Wan2.2-TI2V-5B-Diffusers.
SIZES = {"wan_1_3b": 1_418_996_800, "wan_14b": 14_288_491_584, "wan22_5b": 4_999_787_712}


def count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "wan22_5b", "wan22_5b_i2v", "paper"])
def test_the_whole_method_is_on_and_can_be_taken_apart(name):
    config = load(name, "vsd+cd+lrm,vivid")
    assert config.vsd.weight == 1 and config.consistency.weight == 0.5 and config.reward.trained
    assert config.compute.dtype == config.compute.teacher_dtype == "bfloat16"
    assert config.fake_score.updates == config.consistency.skip == 5
    assert config.pretrain is None
    assert load(name, "vsd").consistency.weight == 0 and load(name, "cd").vsd.weight == 0
    assert load(name, "vsd+cd").reward.rewards == ()
    docstring = (CONFIGS / f"{name}.py").read_text()
    assert re.search(rf"dollar train --config=configs/{name}.py\S* --workdir=", docstring)
    assert f"teachers/{config.teacher.split('/')[1]} --dtype=bfloat16" in docstring


def test_the_papers_numbers():
    config = load("paper", "vsd+cd+lrm,hpsv2=folder")
    assert (config.batch_size, config.accumulation, config.steps) == (56, 7, 40_000)
    assert (config.vsd.guidance_weight, config.consistency.guidance_weight) == (3.5, 7.5)
    assert WanVAEConfig().latent_shape(129, 192, 320) == (33, 24, 40, 16)


@pytest.mark.parametrize("name, published", SIZES.items())
def test_transformers_have_the_published_number_of_parameters(name, published):
    config = PUBLISHED[name].transformer
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel.from_config(WAN_TRANSFORMER.write(config))
    assert sum(p.numel() for p in theirs.parameters()) == published
    assert count(WAN_TRANSFORMER.network(config).shapes) == published


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_a_familys_guidance_is_its_pipelines_default(family):
    parameters = inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters
    assert parameters["guidance_scale"].default == family.guidance_scale


@pytest.mark.parametrize("config", [WanVAEConfig(), PUBLISHED["wan22_5b"].vae], ids=["wan2.1", "wan2.2"])
def test_the_vae_has_as_many_parameters_as_diffusers(config):
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan.from_config(json.loads(json.dumps(WAN_VAE.write(config))))
    assert count(WAN_VAE.network(config).shapes) == sum(p.numel() for p in theirs.parameters())


def test_a_clip_of_wan_2_2_is_27280_tokens():
    frames, height, width, channels = PUBLISHED["wan22_5b"].vae.latent_shape(121, 704, 1280)
    assert (frames * height * width // 4, channels) == (27_280, 48)


@pytest.mark.parametrize(
    "name, teacher, clip",
    [
        pytest.param("wan_1_3b", "wan_1_3b", (81, 480, 832), marks=pytest.mark.slow),
        pytest.param("wan_14b", "wan_14b", (81, 480, 832), marks=pytest.mark.slow),
        ("paper", "wan_1_3b", (129, 192, 320)),
    ],
)
def test_the_step_fits_together_on_eight_devices(name, teacher, clip, network_programs):
    config = load(name, "vsd+cd+lrm,vivid")
    options = {"param_dtype": config.compute.teacher_dtype, **transformer_options(config.compute)}
    wan = dataclasses.replace(PUBLISHED[teacher].transformer, **options)
    latent, text = WanVAEConfig().latent_shape(*clip), (config.data.max_text_length, wan.text_dim)
    transformer = WAN_TRANSFORMER.network(wan)
    program = network_programs(config, transformer, Schedule("rf", "velocity", shift=3.0), latent, text)
    null_text = jax.ShapeDtypeStruct((1, *text), "float32")
    frozen = Frozen(transformer.shapes, null_text)
    state, metrics, samples = jax.eval_shape(program.step, program.state_shapes, frozen, program.batch_shapes)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, program.state_shapes)
    assert all(jax.tree.leaves(same))
    assert samples.latent.shape == (config.reward.samples, 2, *latent)
    assert {"vsd", "consistency", "latent_reward", "fake_score", "reward_regression"} <= metrics.keys()
    for params in (state.student, state.fake_score, state.ema):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
