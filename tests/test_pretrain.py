"""`dollar pretrain` from nothing to a teacher that `dollar import` takes, at a size that means nothing."""

import json

import numpy as np
import pytest

from dollar_jax import pretrain
from dollar_jax.cli import main
from dollar_jax.data import shapes
from dollar_jax.generate import make_generator
from dollar_jax.run import read_config
from dollar_jax.video import read_image, read_video, to_uint8, write_video
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
