"""Every experiment in configs/: it converts, and what it trains builds at its real size without any memory."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dollar_jax.config import distill_config
from dollar_jax.distillation import Frozen
from dollar_jax.experiment import load
from dollar_jax.fields import plain, settings
from dollar_jax.generate import transformer_options
from dollar_jax.weights.cogvideox import COGVIDEOX_TRANSFORMER
from dollar_jax.weights.families import PUBLISHED
from dollar_jax.weights.umt5 import T5
from dollar_jax.weights.vae import COGVIDEOX_VAE

REWARD = {"vsd+cd+lrm": "vsd+cd+lrm,vivid"}  # of a real teacher has to be named
FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("losses", ["vsd", "cd", "vsd+cd", "vsd+cd+lrm"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_converts(path, losses):
    module = runpy.run_path(str(path))
    config = distill_config(module["get_config"](losses if path.stem == "demo" else REWARD.get(losses, losses)))
    weights = config.vsd.weight, config.consistency.weight
    assert [weight > 0 for weight in weights] == ["vsd" in losses, "cd" in losses.replace("vsd", "")]
    assert re.search(rf"dollar (train|demo)\b.*{path.name}", module["__doc__"]), "the docstring says how to run it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_resolves_to_the_values_of_version_0_1(path):
    """But for the steps, and what else of the real teachers' was made affordable."""
    before = json.loads((Path(__file__).parent / "resolved_configs.json").read_text())
    now = {setting.path: plain(setting.value) for setting in settings(load(path.stem, REWARD["vsd+cd+lrm"]))}
    for name, values in before.items():
        places = path.stem, "all", path.stem.removesuffix("_i2v")
        assert now.get(name) == next((values[place] for place in places if place in values), None), name


def test_the_papers_batch_goes_by_the_losses():
    config = load("paper", "vsd+cd")
    assert (config.batch_size, config.accumulation) == (8, 1)


def test_rewards_by_argument():
    config = load("wan_1_3b", "vsd+cd+lrm,hpsv2=some/folder,vivid")
    assert [(term.name, term.folder) for term in config.reward.rewards] == [("hpsv2", "some/folder"), ("vivid", None)]
    assert config.reward.use_text and not load("wan_1_3b", "vsd+cd+lrm,aesthetic=a").reward.use_text
    assert load("demo", "vsd+cd+lrm,my.py:score").reward.use_text and not load("demo").reward.use_text
    assert load("wan_1_3b") == load("wan_1_3b", "vsd+cd") and not load("wan_1_3b").reward.rewards
    for variant, said in {"vsd+cd+lrm": "lacks a reward: name one", "vsd+cd,vivid": "only lrm learns"}.items():
        with pytest.raises(ValueError, match=said):
            load("wan_1_3b", variant)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b"])
def test_the_whole_step_builds_at_real_size(name, network_programs):
    config, teacher = load(name, "vsd+cd+lrm,vivid"), PUBLISHED[name]
    vae = teacher.vae
    clip = (49, 480, 720)
    shape = vae.latent_shape(*clip)
    assert shape == (13, 60, 90, 16)
    compute = config.compute
    transformer = COGVIDEOX_TRANSFORMER.network(
        dataclasses.replace(teacher.transformer, param_dtype=compute.teacher_dtype, **transformer_options(compute))
    )
    text_shape = (config.data.max_text_length, teacher.text_encoder.d_model)
    program = network_programs(config, transformer, teacher.schedule, shape, text_shape)
    frozen = Frozen(transformer.shapes, jax.ShapeDtypeStruct((1, *text_shape), jnp.float32))
    state, metrics, samples = jax.eval_shape(program.step, program.state_shapes, frozen, program.batch_shapes)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, program.state_shapes)
    assert samples.latent.shape == (config.reward.samples, 2, *shape)
    assert {"student_loss", "vsd", "consistency"} <= metrics.keys()

    ids = jax.ShapeDtypeStruct((1, config.data.max_text_length), jnp.int32)
    encoder = T5.network(teacher.text_encoder)
    assert jax.eval_shape(encoder.apply, encoder.shapes, ids, ids).shape == (1, *text_shape)
    network = COGVIDEOX_VAE.network(vae)
    latent = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def decode(params, latent):
        return network.apply(params, latent, method="decode", chunk=compute.vae_chunk)

    assert jax.eval_shape(decode, network.shapes, latent).shape == (1, *clip, 3)
