"""CLIP against transformers' in PyTorch on random weights, under both naming schemes; PIL's preprocessing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil

from dollar_jax.models.clip import MEAN, STD, VIT_H_14, CLIPConfig, TowerConfig, preprocess
from dollar_jax.weights.clip import CLIP_TABLE, clip_config, clip_fields, clip_network, load_clip
from dollar_jax.weights.safetensors_io import write_component
from dollar_jax.weights.table import export_stream

VIT_L_14 = CLIPConfig(TowerConfig(1024, 4096, 24, 16, "quick_gelu"), TowerConfig(768, 3072, 12, 12, "quick_gelu"), 768)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def config(act):
    return transformers.CLIPConfig(
        text_config={
            **TOWER,
            "hidden_size": 24,
            "vocab_size": 60,
            "max_position_embeddings": 12,
            "eos_token_id": 59,
            "bos_token_id": 58,
            "pad_token_id": 0,
            "hidden_act": act,
        },
        vision_config={**TOWER, "image_size": 28, "patch_size": 7, "hidden_act": act},
        projection_dim=16,
    )


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def saved(request, tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config(request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 28, 28, 3)).astype(np.float32)
    ids = rng.integers(1, 58, (2, 12))
    ids[0, 5:], ids[1, 11:] = 0, 0
    ids[0, 5] = ids[1, 11] = 59  # the ends of text; what follows the first is padding
    return pixels, ids.astype(np.int32)


def close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def towers(network, params, pixels, ids):
    @jax.jit
    def all_three(params, pixels, ids):
        images = network.apply(params, pixels, method="embed_images")
        return images, network.apply(params, ids, method="embed_text"), network.apply(params, pixels, ids)

    return map(np.asarray, all_three(params, pixels, ids))


def test_both_towers_and_logits_match_transformers(saved):
    folder, model = saved
    ours, network, params, _ = load_clip(folder)
    assert ours.vision.num_hidden_layers == 3 and ours.eos_token_id == 59
    pixels, ids = inputs()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids).long(), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    images, text, logits = towers(network, params, pixels, ids)
    close(images, theirs.image_embeds.numpy())
    close(text, theirs.text_embeds.numpy())
    close(logits, theirs.logits_per_image.numpy())
    again = dict(export_stream(CLIP_TABLE, params))
    for name, value in model.state_dict().items():
        if "position_ids" not in name:
            np.testing.assert_array_equal(again.pop(name), value.numpy(), err_msg=name)
    assert not again


def openclip_names(model):
    """The same weights as OpenCLIP lays them out: one matrix for q, k, v, projections on the right."""
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if "position_ids" not in k}
    out = {
        "logit_scale": theirs["logit_scale"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "text_projection": theirs["text_projection.weight"].T,
    }
    for ours, prefix in (("vision_model", "visual."), ("text_model", "")):

        def take(name, ours=ours):
            return theirs[f"{ours}.{name}"]

        for i in range(3):
            block, old = f"{prefix}transformer.resblocks.{i}", f"encoder.layers.{i}"
            for leaf in ("weight", "bias"):
                qkv = [take(f"{old}.self_attn.{p}_proj.{leaf}") for p in "qkv"]
                out[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(qkv)
                out[f"{block}.attn.out_proj.{leaf}"] = take(f"{old}.self_attn.out_proj.{leaf}")
                for new, name in (
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    out[f"{block}.{new}.{leaf}"] = take(f"{old}.{name}.{leaf}")
        out[f"{prefix}positional_embedding"] = take("embeddings.position_embedding.weight")
    for leaf in ("weight", "bias"):
        out[f"visual.ln_pre.{leaf}"] = theirs[f"vision_model.pre_layrnorm.{leaf}"]
        out[f"visual.ln_post.{leaf}"] = theirs[f"vision_model.post_layernorm.{leaf}"]
        out[f"ln_final.{leaf}"] = theirs[f"text_model.final_layer_norm.{leaf}"]
    out["visual.class_embedding"] = theirs["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = theirs["vision_model.embeddings.patch_embedding.weight"]
    out["token_embedding.weight"] = theirs["text_model.embeddings.token_embedding.weight"]
    out["attn_mask"] = np.zeros((12, 12), np.float32)
    return out


def test_openclip_names_give_the_same_numbers(saved, tmp_path):
    folder, model = saved
    fields = json.loads((folder / "config.json").read_text())
    tensors = openclip_names(model)
    write_component(tmp_path, fields, tensors, file_name="open_clip_model.safetensors")
    _, network, params, _ = load_clip(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, load_clip(folder)[2])
    del tensors["visual.ln_pre.bias"]
    write_component(tmp_path, fields, tensors, file_name="open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"lack 'vision_model.pre_layrnorm.bias'"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("preset", "image", "text", "published"),
    # Numbers of parameters that OpenCLIP's table of models prints, in millions.
    [(VIT_H_14, 632.08, 354.03, 986.11), (VIT_L_14, 303.97, 123.65, 427.62)],
)
def test_presets_have_the_published_sizes(preset, image, text, published):
    sizes = {"visual": 0, "text": 0, "all": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(clip_network(preset).shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sizes["all"] += leaf.size
        sizes["visual" if name.startswith("vis") else "text"] += leaf.size
    np.testing.assert_allclose(
        [sizes["visual"] / 1e6, sizes["text"] / 1e6, sizes["all"] / 1e6], [image, text, published], atol=0.01
    )


def test_configs_come_back_and_bad_ones_are_refused():
    for preset in (VIT_H_14, VIT_L_14):
        assert clip_config(clip_fields(preset)) == preset
    with pytest.raises(ValueError, match="of a 'siglip' model, not of a CLIPModel"):
        clip_config({"model_type": "siglip"})
    old = clip_config({**config("gelu").to_dict(), "text_config": {"vocab_size": 60, "eos_token_id": 2}})
    assert old.eos_token_id == 59


# Preprocessing


@pytest.mark.parametrize("shape", [(40, 60), (96, 54), (20, 28), (28, 28)])
def test_preprocessing_is_pils_in_floats(shape):
    """Against PIL's own bicubic filter, one axis at a time on floating-point channels, which rounds nothing."""
    frames = np.random.default_rng(0).uniform(size=(2, *shape, 3)).astype(np.float32)
    h, w = shape
    scale = 28 / min(h, w)
    height, width = (28 if h <= w else int(h * scale)), (28 if w <= h else int(w * scale))
    expected = []
    for frame in frames:
        sized = []
        for channel in np.moveaxis(frame, -1, 0):
            for size in ((width, h), (width, height)):
                image = Image.fromarray(np.ascontiguousarray(channel)).resize(size, Image.Resampling.BICUBIC)
                channel = np.clip(np.asarray(image), 0, 1)
            sized.append(channel)
        top, left = (height - 28) // 2, (width - 28) // 2
        expected.append(np.stack(sized, -1)[top : top + 28, left : left + 28])
    expected = (np.array(expected) - MEAN) / STD
    np.testing.assert_allclose(jax.jit(preprocess, static_argnums=1)(frames, 28), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 60), (97, 53)])
def test_preprocessing_is_transformers_up_to_pils_rounding(shape):
    """PIL rounds to bytes after each of two passes: at most 0.5 / 255 each, which contrast overshoots amplify.

    So this cannot be 1e-4; it is less than 1.5 grey levels at the worst pixel and a third of one on average."""
    pictures = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor([Image.fromarray(p) for p in pictures], return_tensors="np")["pixel_values"]
    ours = np.asarray(preprocess(jnp.asarray(pictures) / 255, 28))
    levels = 255 * np.abs(ours - theirs.transpose(0, 2, 3, 1)) * STD
    assert levels.max() < 1.5 and levels.mean() < 0.35


def test_padding_keeps_the_whole_picture_in_the_middle():
    frames = np.ones((1, 14, 56, 3), np.float32)
    x = np.asarray(preprocess(jnp.asarray(frames), 28, "pad")) * STD + MEAN
    inside = np.zeros((28, 28))
    inside[10:17] = 1  # 7 rows, 21 // 2 above
    np.testing.assert_allclose(x[0], np.repeat(inside[..., None], 3, -1), atol=1e-5)
