"""`dollar pretrain` from nothing to a teacher that `dollar import` takes, at a size that means nothing, and a smaller
decoder for one."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dollar_jax import pretrain
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.cli import main
from dollar_jax.config import Fit, changed
from dollar_jax.data import shapes
from dollar_jax.evaluate.manifest import hash_params
from dollar_jax.generate import make_generator
from dollar_jax.models.cogvideox_vae import CogVideoXVAEConfig
from dollar_jax.models.wan_vae import denormalise
from dollar_jax.run import CHECKPOINTS, drawing_config, read_config, record_config
from dollar_jax.video import read_image, read_video, to_uint8, write_video
from dollar_jax.weights.pipeline import Component, load_pipeline, save_component
from dollar_jax.weights.safetensors_io import read_tensors
from dollar_jax.weights.vae import WAN_VAE

SETTINGS = {
    "vae.base_dim": 4,
    "vae.decoder_base_dim": 4,
    "vae.dim_mult": (1, 1, 1),
    "vae_phases": tuple({"frames": frames, "batch_size": 2, "steps": 2} for frames in (1, 5)),
    "vae_videos": 4,
    "text_encoder": {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "transformer.num_attention_heads": 2,
    "transformer.num_layers": 1,
    "transformer.text_dim": 16,
    "transformer.freq_dim": 16,
    "transformer.ffn_dim": 32,
    "teacher.videos": 4,
    "teacher.batch_size": 2,
    "teacher.steps": 3,
    "num_steps": 2,
    "checkpoint_every": 1,
}


def test_a_training_comes_to_its_end_and_goes_on(tmp_path, make_config):
    """A matrix is fitted by Muon and a bias by Adam; what is done is not done again."""
    config = make_config().pretrain
    target = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def loss(params, batch, key):
        error = jnp.square(params["kernel"] + params["bias"] - batch[0]).sum()
        return error, {"error": error}

    def fitted():
        start = {"kernel": jnp.zeros((2, 3, 4)), "bias": jnp.zeros((2, 1, 4))}
        training = Fit(batch_size=1, steps=150, learning_rate=0.3, adam_learning_rate=0.1)
        return pretrain.fit("toy", tmp_path, loss, start, pretrain.endless([target] * 2, 1, 0), training, config)

    whole = fitted()
    assert np.abs(whole["kernel"] + whole["bias"] - target).max() < 0.05 and np.abs(whole["bias"]).max() > 0.05
    jax.tree.map(np.testing.assert_array_equal, fitted(), whole)  # from its last checkpoint


@pytest.mark.slow
def test_pretrain_leaves_a_teacher_and_goes_on_after_a_kill(tmp_path, monkeypatch, own_config):
    own = own_config(tmp_path, {f"pretrain.{name}": value for name, value in SETTINGS.items()}, "vsd+cd")
    captions = shapes.all_captions()[:4]
    monkeypatch.setattr(shapes, "all_captions", lambda: captions)
    rendered = pretrain.rendered
    monkeypatch.setattr(pretrain, "rendered", lambda seed, split, count: rendered(seed, split, min(count, 4)))
    arguments = ["pretrain", f"--config={own}", f"--workdir={tmp_path / 'run'}"]

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_teacher", killed)
        assert main(arguments) == 130
    assert sorted(path.name for path in (tmp_path / "run" / "vae").iterdir()) == ["phase_0", "phase_1"]
    assert main(arguments) == 0

    folder = tmp_path / "run" / "teacher"
    stored = json.loads((folder / "provenance.json").read_text())
    assert set(stored["metrics"]) == {"vae", "all_captions", "trained", "held_out"}
    assert stored["config"]["teacher"]["steps"] == 3
    assert load_pipeline(folder).transformer.config.num_layers == 1


@pytest.mark.slow
def test_the_shipped_teacher_learns_to_continue_an_image_and_is_distilled(tmp_path, picture, whole_compilation):
    """`dollar demo --image`, with less of everything."""
    config = ["--config=demo_i2v", "--config.data.train_videos=256", "--config.steps=40", "--config.log_every=1"]
    config += [
        "--config.pretrain.teacher.steps=60",
        "--config.visibility.samples_every=0",
        "--config.pretrain.num_steps=20",
    ]
    assert main(["pretrain", *config, f"--workdir={tmp_path / 'teacher'}"]) == 0
    teacher, run = tmp_path / "teacher" / "teacher", tmp_path / "run"
    measured = json.loads((teacher / "provenance.json").read_text())["metrics"]
    assert measured["all_captions"]["alignment_strict"] > 0.9  # 0.86 before
    assert main(["train", *config, f"--config.teacher={teacher}", f"--workdir={run}"]) == 0
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    early, late = (np.mean([row["student_loss"] for row in part]) for part in (history[:10], history[-10:]))
    assert late < 0.97 * early
    assert main(["evaluate", f"--workdir={run}", "--quick"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["student_4"]["alignment"] > 0.95

    out, caption = tmp_path / "video.gif", "a large red circle moving left slowly"
    given = [f"--image={picture}", f"--prompt={caption}", "--num=1", "--scale=1", f"--out={out}"]
    assert main(["sample", f"--workdir={run}", *given]) == 0
    generator = make_generator(read_config(run))
    first = to_uint8(generator.decode(generator.encode(read_image(picture, 32, 32)[None, None])))[0]
    write_video(tmp_path / "first.gif", first)  # its colours are as few
    video, (expected,) = np.float32(read_video(out)), np.float32(read_video(tmp_path / "first.gif"))
    assert np.abs(video[0] - expected).mean() < 1 < np.abs(video[-1] - expected).mean()


DECODER = {"width": 2, "batch_size": 2, "steps": 60, "latent_frames": 2, "latent_size": 3}


@pytest.fixture(scope="module")
def settings(teacher, make_config):
    changes: dict = {f"decoder.{name}": value for name, value in DECODER.items()}
    return make_config(changes | {"teacher": str(teacher), "data.train_videos": 8, "checkpoint_every": 25})


def narrow(component):
    """The VAE with a decoder of half the width, as it is before training."""
    config = dataclasses.replace(component.config, decoder_base_dim=2)
    network = WAN_VAE.network(config)
    fresh = network.init(jax.random.key(0))
    return Component(config, network, {**component.params, "decoder": fresh["decoder"]})


@pytest.fixture(scope="module")
def vae(make_pipeline, tmp_path_factory):
    """The folder of such a one."""
    folder = tmp_path_factory.mktemp("vae")
    save_component(folder, WAN_VAE, narrow(make_pipeline().vae), "float32")
    return folder


@pytest.fixture(scope="module")
def distilled(settings, tmp_path_factory):
    return pretrain.train_decoder(settings, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def run(teacher, settings, tmp_path_factory):
    """A run whose student is the teacher."""
    workdir = tmp_path_factory.mktemp("run")
    record_config(settings, workdir)
    params = jax.tree.map(jax.numpy.asarray, load_pipeline(teacher).transformer.params)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.save(7, {"ema": {"ema": params}})
    return workdir


@pytest.mark.slow
def test_a_narrow_decoder_comes_near_the_teachers(settings, distilled):
    wide = make_generator(settings)
    ours = make_generator(changed(settings, {"sampling.vae": str(distilled)}))
    with np.load(next(distilled.parent.glob("data/*.npz"))) as stored:
        latent = stored["latent"][:, :2]
    program, before, after = (
        ours.decode_program(latent.shape, ours.own_mesh),
        narrow(wide.pipeline.vae),
        ours.pipeline.vae,
    )
    far, near = (((program(x.params, latent) - wide.decode(latent)) ** 2).mean() for x in (before, after))
    assert near < 0.7 * far
    for name, value in wide.pipeline.vae.params.items():
        if name != "decoder":
            jax.tree.map(np.testing.assert_array_equal, value, after.params[name])
    assert read_video(distilled.parent / "decoder.mp4").shape[2] == 8 * (4 * 24 + 6)


@pytest.mark.slow
def test_a_killed_decoder_goes_on_to_the_same_bits(settings, distilled, tmp_path, monkeypatch):
    def killed(self, step, items, **how):
        save(self, step, items, wait=True)
        raise KeyboardInterrupt

    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        pretrain.train_decoder(settings, tmp_path)
    again, once = (dict(read_tensors(folder)) for folder in (pretrain.train_decoder(settings, tmp_path), distilled))
    for name, value in once.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_narrow_decoder_draws_and_is_exported_as_diffusers_has_it(teacher, run, vae, tmp_path):
    config = drawing_config(run, vae=str(vae))
    generator = make_generator(config)
    latent = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 4)).astype(np.float32)
    raw = denormalise(jax.numpy.asarray(latent), generator.pipeline.vae.config)
    raw = torch.tensor(np.asarray(raw)).permute(0, 4, 1, 2, 3)
    exported = tmp_path / "student"
    assert main(["export", f"--workdir={run}", f"--vae={vae}", str(exported)]) == 0
    theirs = diffusers.AutoencoderKLWan.from_pretrained(exported / "vae")
    assert theirs.config["decoder_base_dim"] == 2
    frames = theirs.decode(raw).sample.permute(0, 2, 3, 4, 1).detach().numpy()
    np.testing.assert_allclose(2 * generator.decode(latent) - 1, frames, atol=1e-4)
    assert load_pipeline(exported).vae.config.decoder_base_dim == 2


@pytest.mark.slow
def test_a_student_is_sampled_with_a_narrow_decoder(run, vae, tmp_path):
    out = tmp_path / "video.gif"
    given = ["--prompt=a red circle", "--num=1", "--steps=1", f"--out={out}"]
    assert main(["sample", f"--workdir={run}", f"--vae={vae}", *given]) == 0
    manifest = json.loads((tmp_path / "video.gif.manifest.json").read_text())
    assert manifest["vae_sha256"] == hash_params(make_generator(drawing_config(run, vae=str(vae))).pipeline.vae.params)


def test_bad_decoders_are_refused(settings, vae, teacher, run, tmp_path, capsys):
    fields = json.loads((vae / "config.json").read_text())
    other = shutil.copytree(vae, tmp_path / "vae")
    (other / "config.json").write_text(json.dumps(fields | {"latents_std": [1.0, 2.0, 3.0, 5.0]}))
    for command in ["sample", "--prompt=a"], ["export", str(tmp_path / "student")]:
        assert main([*command, f"--workdir={run}", f"--vae={other}"]) == 2
        wrong = "config.json has another latents_std than the teacher's VAE: only decoder_base_dim may differ"
        assert wrong in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
    lora = shutil.copytree(run, tmp_path / "run")
    fields = json.loads((lora / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps(fields | {"lora": {"rank": 2}}))
    assert main(["export", f"--workdir={lora}", "--adapter", f"--vae={vae}", str(tmp_path / "student")]) == 2
    assert "holds no VAE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="width is 4, and that of the teacher's decoder 4: give less"):
        pretrain.train_decoder(changed(settings, {"decoder.width": 4}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_decoder_of_cogvideox_is_refused(settings, make_pipeline, monkeypatch, tmp_path):
    pipeline = make_pipeline()
    vae = dataclasses.replace(pipeline.vae, config=CogVideoXVAEConfig())
    monkeypatch.setattr(pretrain.pipelines, "load_pipeline", lambda *_, **__: dataclasses.replace(pipeline, vae=vae))
    with pytest.raises(ValueError, match="one width for both ways"):
        pretrain.train_decoder(settings, tmp_path)
