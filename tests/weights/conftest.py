"""A tiny Wan pipeline with random weights, saved by diffusers itself, and a model card as its reader uses it."""

import re

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from dollar_jax.data import shapes
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.sampling import few_step_sample


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """As from the hub: the transformer in several shards, UniPC with Wan's flow shift."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
    )
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    with torch.no_grad():
        for module in (transformer, vae, text):
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    folder = tmp_path_factory.mktemp("wan")
    diffusers.WanPipeline(
        tokenizer=build_tokenizer(shapes.VOCABULARY),
        text_encoder=text,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    ).save_pretrained(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def assert_card_samples(monkeypatch):
    """The card's own snippet, executed in its folder, draws the video that we draw from the same noise.

    `axes` turns our latents' axes into diffusers'; `drawers` are the modules of diffusers that draw noise.
    Gives the snippet's variables, and how many of our draws of noise it did not make.
    """

    def check(exported, generator, params, times, axes, drawers):
        (snippet,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
        (prompt,) = re.findall(r'^    "(.*)",$', snippet, re.MULTILINE)
        pipeline = generator.pipeline
        noise = jax.random.normal(jax.random.key(2), (1, *generator.latent_shape))
        renoise = [jax.random.normal(k, noise.shape) for k in jax.random.split(jax.random.key(3), len(times))]
        apply, key = pipeline.transformer.network.apply, jax.random.key(3)
        latent = jax.jit(
            lambda params, noise, text: few_step_sample(apply, params, pipeline.schedule, times, noise, text, key)
        )(params, noise, generator.text([prompt]))
        ours = generator.decode(latent)[0]

        drawn = iter([noise, *renoise])

        def randn_tensor(shape, **_):
            value = torch.tensor(np.asarray(next(drawn))).permute(*axes)
            assert value.shape == shape
            return value

        for module in drawers:
            monkeypatch.setattr(module, "randn_tensor", randn_tensor)
        monkeypatch.chdir(exported)
        scope = {}
        exec(snippet, scope)
        assert ours.std() > 0.01 and np.mean((ours > 0) & (ours < 1)) > 0.5, "nothing to compare"
        np.testing.assert_allclose(scope["video"], ours, atol=1e-4)
        return scope, len(list(drawn))

    return check
