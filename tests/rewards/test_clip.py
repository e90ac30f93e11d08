"""Rewards on CLIP, read from folders as they are published, against the same sums done with transformers."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil

from dollar_jax import cli
from dollar_jax.evaluate.dimensions import load_dimensions
from dollar_jax.rewards import get_reward
from dollar_jax.run import read_config as read_run
from dollar_jax.weights.clip import import_reward, load_clip
from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
PROMPTS = ["a red cat", "a dog"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny CLIPModel in half precision, with CLIP's byte-pair tokenizer of a few words."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("c", "a"), ("ca", "t</w>")], model_max_length=16
    )
    tokenizer.save_pretrained(folder)
    end = len(words) - 1
    config = transformers.CLIPConfig(
        text_config={
            **TOWER,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "eos_token_id": end,
            "bos_token_id": end - 1,
            "pad_token_id": end,
        },
        vision_config={**TOWER, "image_size": 28, "patch_size": 7},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    model.save_pretrained(folder)
    return folder, model, tokenizer


def clips():
    """Smooth ones: PIL rounds to bytes, which is most of what remains between the two."""
    y, x = np.mgrid[:40, :60] / 20
    base = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return np.stack([[0.5 + 0.4 * base * np.cos(k + t) for t in range(2)] for k in range(2)]).astype(np.float32)


def torch_images(model, pixels):
    with torch.no_grad():
        out = model.visual_projection(model.vision_model(torch.tensor(pixels)).pooler_output)
    return (out / out.norm(dim=-1, keepdim=True)).numpy()


def torch_text(model, tokenizer):
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model.text_projection(model.text_model(input_ids=tokens["input_ids"]).pooler_output)
    return (out / out.norm(dim=-1, keepdim=True)).numpy()


def cropped():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pictures = [Image.fromarray(np.uint8(np.rint(255 * f))) for f in clips().reshape(-1, 40, 60, 3)]
    return processor(pictures, return_tensors="np")["pixel_values"]


def padded():
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    pictures = []
    for frame in clips().reshape(-1, 40, 60, 3):
        sized = Image.fromarray(np.uint8(np.rint(255 * frame))).resize((28, 19), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (28, 28))
        square.paste(sized, (0, 4))
        pictures.append(square)
    return processor(pictures, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(("name", "pixels"), [("pickscore", cropped), ("hpsv2", padded), ("clip", cropped)])
def test_agreement_is_the_mean_cosine_of_frames_and_prompt(published, name, pixels):
    folder, model, tokenizer = published
    images = torch_images(model, pixels()).reshape(2, 2, -1)
    expected = np.einsum("btp,bp->b", images, torch_text(model, tokenizer)) / 2
    reward = get_reward(name, str(folder))
    found = reward(clips(), PROMPTS)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    swapped = reward(clips(), PROMPTS[::-1])
    assert np.abs(found - swapped).min() > 0.01
    assert np.abs(expected[0] - expected[1]) > 0.01


def test_aesthetic_score_is_its_linear_layers_on_the_image(published, tmp_path):
    folder, model, _ = published
    rng, sizes = np.random.default_rng(0), {0: (16, 8), 2: (8, 6), 4: (6, 5), 6: (5, 4), 7: (4, 1)}
    head = {f"layers.{i}.weight": rng.normal(size=s[::-1]).astype(np.float32) for i, s in sizes.items()}
    head |= {f"layers.{i}.bias": rng.normal(size=s[1]).astype(np.float32) for i, s in sizes.items()}
    tower = {k: v for k, v in read_tensors(folder) if k.startswith("vis")}
    write_component(tmp_path, read_config(folder), tower | head, file_name="model.safetensors")
    x = torch_images(model, cropped())
    for i in sizes:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    expected = x.reshape(2, 2).mean(1)
    found = get_reward("aesthetic", str(tmp_path))(clips(), PROMPTS)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    del head["layers.4.weight"]
    write_component(tmp_path, read_config(folder), tower | head, file_name="model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'layers\.4\.weight': the aesthetic head belongs in"):
        get_reward("aesthetic", str(tmp_path))


def test_a_gradient_reaches_the_frames(published):
    reward = get_reward("pickscore", str(published[0]))
    tokens = jnp.asarray(reward.tokenize(PROMPTS))
    total = jax.jit(jax.grad(lambda x, params, tokens: reward.function(params, x, tokens).sum()))
    gradient = total(clips(), reward.params, tokens)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6


def test_a_folder_that_makes_all_prompts_alike_is_refused(published, tmp_path):
    """transformers makes a tokenizer of a model's config.json alone, to which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(published[0] / name, tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        get_reward("hpsv2", str(tmp_path))


@pytest.fixture(scope="module")
def layouts(published, tmp_path_factory):
    """Published layouts of random weights: HPSv2's torch file of OpenCLIP's names, an aesthetic head, towers alone."""
    folder, model, _ = published
    place = tmp_path_factory.mktemp("layouts")
    state = {f"module.{name}": tensor.half() for name, tensor in openclip(model).items()}
    state["module.attn_mask"] = torch.full((16, 16), -torch.inf).triu(1)
    torch.save({"epoch": 3, "optimizer": {"groups": [1, 2], 5: None}, "state_dict": state}, place / "HPS_v2.1.pt")
    sizes = (16, 8, 6, 5, 4, 1)
    linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    drop = torch.nn.Dropout(0.1)
    with torch.no_grad():
        for layer in linear:
            layer.weight.mul_(3)
    layers = torch.nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, *linear[3:])
    torch.save(torch.nn.ModuleDict({"layers": layers}).state_dict(), place / "sac+logos+ava1-l14-linearMSE.pth")
    tensors = {name: tensor.numpy() for name, tensor in openclip(model).items()}
    (place / "open_clip").mkdir()
    write_component(place / "open_clip", {}, tensors, file_name="open_clip_model.safetensors")
    (place / "open_clip" / "config.json").unlink()
    return place, layers


@pytest.mark.parametrize("source", ["HPS_v2.1.pt", "open_clip", "open_clip/open_clip_model.safetensors", None])
def test_published_layouts_are_imported(published, layouts, tmp_path, source, capsys):
    """PickScore's is transformers' own, with all that it needs."""
    folder, flags = published[0], [] if source is None else [f"--clip={published[0]}"]
    source, new = folder if source is None else layouts[0] / source, tmp_path / "new"
    assert cli.main(["import-reward", str(source), str(new), *flags]) == 0
    assert f"vsd+cd+lrm,REWARD={new}" in capsys.readouterr().out
    config, _, params, _ = load_clip(new)
    assert config == load_clip(folder)[0] and get_reward("hpsv2", str(new)).tokenize(PROMPTS).shape == (2, 16)
    jax.tree.map(np.testing.assert_array_equal, params, load_clip(folder)[2])
    theirs = transformers.CLIPModel.from_pretrained(new).state_dict()
    for key, value in published[1].state_dict().items():
        torch.testing.assert_close(theirs[key].float(), value)


def test_an_imported_aesthetic_head_is_torchs_on_transformers_images(published, layouts, tmp_path):
    place, layers = layouts
    import_reward(place / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "new", published[0])
    with torch.no_grad():
        expected = layers.eval()(torch.tensor(torch_images(published[1], cropped()))).numpy().reshape(2, 2).mean(1)
    found = get_reward("aesthetic", str(tmp_path / "new"))(clips(), PROMPTS)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.abs(expected[0] - expected[1]) > 0.5


class Block(torch.nn.Module):
    """A block under the names of OpenAI's, OpenCLIP's and ViCLIP's files."""

    def __init__(self, width, heads, mask=None):
        super().__init__()
        self.attn, self.mask = torch.nn.MultiheadAttention(width, heads, batch_first=True), mask
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(width, 64), "c_proj": torch.nn.Linear(64, width)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


def random_parameter(*shape):
    return torch.nn.Parameter(0.3 * torch.randn(shape))


class ViCLIPVision(torch.nn.Module):
    """Its image tower (arXiv 2307.06942): the patches of all frames and one class token attend to one another."""

    def __init__(self, frames):
        super().__init__()
        self.conv1 = torch.nn.Conv3d(3, 32, (1, 7, 7), (1, 7, 7), bias=False)
        self.class_embedding, self.positional_embedding = random_parameter(32), random_parameter(17, 32)
        self.temporal_positional_embedding, self.proj = random_parameter(1, frames, 32), random_parameter(32, 16)
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
        self.transformer = torch.nn.ModuleDict({"resblocks": torch.nn.Sequential(Block(32, 4), Block(32, 4))})

    def forward(self, video):  # [b 3 t h w]
        x = self.conv1(video).flatten(3).permute(0, 3, 2, 1) + self.positional_embedding[1:, None]  # [b n t d]
        x = (x + self.temporal_positional_embedding).flatten(1, 2)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.transformer["resblocks"](self.ln_pre(torch.cat([first, x], 1)))
        return self.ln_post(x[:, 0]) @ self.proj


class ViCLIPText(torch.nn.Module):
    def __init__(self, words, length):
        super().__init__()
        mask = torch.full((length, length), -torch.inf).triu(1)
        self.token_embedding, self.positional_embedding = torch.nn.Embedding(words, 32), random_parameter(length, 32)
        blocks = torch.nn.Sequential(Block(32, 4, mask), Block(32, 4, mask))
        self.transformer = torch.nn.ModuleDict({"resblocks": blocks})
        self.ln_final, self.text_projection = torch.nn.LayerNorm(32), random_parameter(32, 16)

    def forward(self, ids, ends):
        x = self.transformer["resblocks"](self.token_embedding(ids) + self.positional_embedding)
        return self.ln_final(x)[torch.arange(len(ids)), ends] @ self.text_projection


def test_viclip_is_its_restatement_on_eight_frames(published, tmp_path):
    folder, _, tokenizer = published
    clip = tmp_path / "openai"
    shutil.copytree(folder, clip)
    (clip / "config.json").write_text((clip / "config.json").read_text().replace('"gelu"', '"quick_gelu"'))
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"vision_encoder": ViCLIPVision(8), "text_encoder": ViCLIPText(len(tokenizer), 9)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    torch.save({"model": model.eval().state_dict() | {"temp": torch.tensor(0.02)}}, tmp_path / "ViClip.pth")
    import_reward(tmp_path / "ViClip.pth", tmp_path / "new", clip)
    videos = np.random.default_rng(5).uniform(size=(2, 17, 30, 40, 3)).astype(np.float32)
    taken = torch.tensor(videos[:, ::2][:, :8].reshape(16, 30, 40, 3)).permute(0, 3, 1, 2)
    sized = torch.nn.functional.interpolate(taken, (28, 28), mode="bilinear", align_corners=False)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = ((sized - mean) / deviation).reshape(2, 8, 3, 28, 28).transpose(1, 2)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=9, truncation=True, return_tensors="pt")
    ends = (tokens["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
    with torch.no_grad():
        video = torch.nn.functional.normalize(model["vision_encoder"](pixels), dim=-1)
        text = torch.nn.functional.normalize(model["text_encoder"](tokens["input_ids"], ends), dim=-1)
    reward = get_reward("viclip", str(tmp_path / "new"))
    np.testing.assert_allclose(reward(videos, PROMPTS), (video * text).sum(-1), atol=1e-4)
    assert np.abs(reward(videos[:, ::-1], PROMPTS) - reward(videos, PROMPTS)).min() > 1e-3  # it sees time
    assert load_clip(tmp_path / "new")[2]["logit_scale"] == pytest.approx(np.log(50), rel=1e-3)
    with pytest.raises(ValueError, match="needs clips of at least 8 frames, not 7"):
        reward(videos[:, :7], PROMPTS)


def test_what_a_source_lacks_is_said_and_nothing_left(published, layouts, tmp_path, capsys):
    folder, place = published[0], layouts[0]
    towers, new = tmp_path / "towers", tmp_path / "new"
    towers.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, towers)
    wide = tmp_path / "wide.pt"
    torch.save({"visual.class_embedding": torch.zeros(1280)}, wide)
    broken = openclip(published[1]) | {"visual.conv1.weight": torch.zeros(32, 3, 14, 14)}
    torch.save(broken, tmp_path / "shape.pt")
    torch.save(openclip(published[1]) | {"logit_scale": torch.tensor(1e5)}, tmp_path / "large.pt")
    shutil.copytree(folder, tmp_path / "other")
    shutil.copytree(folder, tmp_path / "ends")
    fields = read_config(folder)
    fields["text_config"]["eos_token_id"] = 5  # nothing ends with it: the first token would be taken of every prompt
    (tmp_path / "ends" / "config.json").write_text(json.dumps(fields))
    (tmp_path / "other" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    for source, clip, says in (
        (place / "HPS_v2.1.pt", None, "is of no CLIP that a config.json describes: give --clip=FOLDER of"),
        (place / "sac+logos+ava1-l14-linearMSE.pth", None, "is a head without its CLIP: give --clip=FOLDER of"),
        (towers, None, "lacks tokenizer.json, or vocab.json and merges.txt: give --clip=FOLDER of"),
        (place / "HPS_v2.1.pt", towers, "lacks tokenizer.json"),
        (wide, folder, "the weights lack 'logit_scale'"),
        (tmp_path / "shape.pt", folder, "has shape (32, 3, 14, 14)"),
        (tmp_path / "large.pt", folder, "large.pt: tensor 'logit_scale' holds what is not finite"),
        (tmp_path / "ends", None, "ends lacks tokenizer.json"),
        (towers, tmp_path / "gone", "gone is not a folder"),
        (tmp_path / "other", None, "has image_mean [0.5, 0.5, 0.5], and only CLIP's"),
        (folder, towers, None),
        (folder, None, "is there already"),
    ):
        flags = [] if clip is None else [f"--clip={clip}"]
        assert cli.main(["import-reward", str(source), str(new), *flags]) == (2 if says else 0)
        shown = capsys.readouterr().err
        assert (says or "") in shown, shown
        assert new.exists() == (says in (None, "is there already")) and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_published_reward_is_imported_trained_on_and_guarded(published, layouts, tmp_path, capsys):
    """HPSv2's layout from the file to a run of the demo that ends, and to one that its guard ends."""
    new = tmp_path / "hpsv2"
    hps = layouts[0] / "HPS_v2.1.pt"
    assert cli.main(["import-reward", str(hps), str(new), f"--clip={published[0]}"]) == 0
    settings = {"steps": 6, "batch_size": 8, "log_every": 1, "data.train_videos": 16, "mesh.fsdp": 8}
    settings |= {f"reward.{k}": v for k, v in {"samples": 2, "replay": 16, "batch_size": 8, "start_step": 1}.items()}
    settings |= {"visibility.samples_every": 0}
    train = ["train", f"--config=demo:vsd+cd+lrm,hpsv2={new}", *(f"--config.{k}={v}" for k, v in settings.items())]
    assert cli.main([*train, f"--workdir={tmp_path / 'run'}"]) == 0
    config = read_run(tmp_path / "run")
    assert config.reward.use_text and [term.label for term in config.reward.rewards] == ["hpsv2"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    cosines = [row[f"reward_{which}"] for row in rows[1:] for which in ("generated", "real")]
    assert -1 < min(cosines) < max(cosines) < 1 and rows[-1]["reward_std"] > 0
    guard = ["--config.reward.guard.window=4", "--config.reward.guard.min_correlation=1.0"]
    capsys.readouterr()
    assert cli.main([*train, *guard, f"--workdir={tmp_path / 'guarded'}"]) == 6
    assert "latent and true reward correlate by" in "".join(capsys.readouterr())
    for path in new.glob("*token*"):
        path.unlink()
    assert cli.main([*train, f"--workdir={tmp_path / 'blind'}"]) == 2
    assert "lacks CLIP's tokenizer" in capsys.readouterr().err and not (tmp_path / "blind").exists()


def openclip(model):
    """A CLIPModel's tensors under OpenCLIP's names, joined and transposed as it has them."""
    state, found = model.state_dict(), {}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        for i in range(TOWER["num_hidden_layers"]):
            theirs, ours = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for leaf in ("weight", "bias"):
                joined = [state[f"{theirs}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
                found[f"{ours}attn.in_proj_{leaf}"] = torch.cat(joined)
                found[f"{ours}attn.out_proj.{leaf}"] = state[f"{theirs}self_attn.out_proj.{leaf}"]
                found |= {f"{ours}{b}.{leaf}": state[f"{theirs}{a}.{leaf}"] for a, b in names.items()}
    for leaf in ("weight", "bias"):
        found[f"visual.ln_pre.{leaf}"] = state[f"vision_model.pre_layrnorm.{leaf}"]
        found[f"visual.ln_post.{leaf}"] = state[f"vision_model.post_layernorm.{leaf}"]
        found[f"ln_final.{leaf}"] = state[f"text_model.final_layer_norm.{leaf}"]
    found["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    found["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    found["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    found["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    found["visual.proj"] = state["visual_projection.weight"].T
    found["text_projection"] = state["text_projection.weight"].T
    found["logit_scale"] = state["logit_scale"]
    return found


def test_missing_weights_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="the reward 'hpsv2' needs its weights: give their folder"):
        get_reward("hpsv2")
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        get_reward("hpsv2", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        get_reward("hpsv2", str(tmp_path))


def test_vbenchs_consistencies_through_published_towers(published):
    """VBench's sums on transformers' features of the same frames."""
    folder, model, tokenizer = published
    images, text = torch_images(model, cropped()), torch_text(model, tokenizer)[0]
    frames = np.rint(255 * clips().reshape(-1, 40, 60, 3)).astype(np.uint8)
    found = load_dimensions(folder)(frames, PROMPTS[0], 8)
    first = [max(0, float(images[0] @ image)) for image in images[1:]]
    before = [max(0, float(a @ b)) for a, b in zip(images[:-1], images[1:], strict=True)]
    assert found["background_consistency"] == pytest.approx((np.mean(first) + np.mean(before)) / 2, abs=2e-3)
    assert found["overall_consistency_ours"] == pytest.approx(float((images @ text).mean()), abs=2e-3)
