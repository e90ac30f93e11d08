"""`dollar pretrain` from nothing to a teacher that `dollar import` takes, at a size that means nothing."""

import json

import pytest

from dollar_jax import pretrain
from dollar_jax.cli import main
from dollar_jax.data import shapes
from dollar_jax.weights.pipeline import load_pipeline

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
