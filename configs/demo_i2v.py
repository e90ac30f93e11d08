"""The default experiment from an image: the shipped teacher learns to continue a first frame, and is distilled.

    dollar demo --image                                               # all of this, sampled, measured, reported
    dollar pretrain --config=configs/demo_i2v.py --workdir=runs/i2v_teacher
    dollar train --config=configs/demo_i2v.py --workdir=runs/demo_i2v
    dollar sample --workdir=runs/demo_i2v --image=circle.png --prompt='a large red circle moving left slowly'

As configs/demo.py, with Wan 2.2's TI2V for an example: `config.data.given_frames` is 1."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd+lrm") -> ConfigDict:
    return experiment(
        "demo",
        losses,
        {
            "teacher": "runs/i2v_teacher/teacher",
            "data.given_frames": 1,
            "visibility.prompts": (),
            "pretrain.init": "moving_shapes",
            "pretrain.vae_phases": (),
            "pretrain.teacher.given_frames": 1,
            "pretrain.teacher.videos": 1024,
            "pretrain.teacher.batch_size": 32,
            "pretrain.teacher.steps": 300,
            "pretrain.teacher.learning_rate": 1e-3,
            "pretrain.teacher.adam_learning_rate": 3e-4,
            "pretrain.teacher.ema_decay": 0.95,
            "pretrain.vae_videos": 1,
        },
    )
