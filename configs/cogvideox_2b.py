"""CogVideoX-2B distilled to 4 steps by VSD + CD + LRM: 49 frames of 480×720 at 8 frames per second.

    dollar import THUDM/CogVideoX-2b teachers/cogvideox_2b
    dollar prepare --source=videos --teacher=teachers/cogvideox_2b --frames=49 --height=480 --width=720
        --fps=8 --max_text_length=226 --out=data/cogvideox_2b
    dollar train --config=configs/cogvideox_2b.py --workdir=runs/cogvideox_2b
    dollar train --config=configs/cogvideox_2b.py:vsd --workdir=runs/vsd      # or vsd, cd, vsd+cd: an ablation

This teacher is the nearest open one to the paper's: a DDPM that predicts v, sampled by 50 steps of DDIM. What
the paper gives is kept: the student's timesteps, 5 teacher steps to a consistency step, 5 fake-score updates,
w = 3.5 for VSD, the weights of the losses and the latent reward model of its tables. Guidance weights are its
w in v_c + w (v_c - v_∅), which is diffusers' guidance scale less 1; for the teacher's samples and the
consistency target w = 5 is what CogVideoX recommends (a scale of 6; the paper's own teacher had w = 7.5).
What the paper leaves unknown is as in systems that distil Wan: learning rates, betas, clipping, averages, and
the student trained on its own intermediate steps. Settings not named here are those of configs/demo.py.

Every device of the mesh holds a share of all weights (FSDP); the batch of 64 videos is for up to 64 of them,
with fewer set config.accumulation. The reward is the demo's, which needs no weights and only shows the way:
name one of your own.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# What the teacher's folder holds, to build and plan without it: fields of `CogVideoXConfig`, where they
# differ from its defaults, and of `Schedule`.
TRANSFORMER: dict = {}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_zero_snr": True,
    "snr_shift_scale": 3.0,
}


def get_config(losses: str = "vsd+cd+lrm") -> ConfigDict:
    """`losses` is one of configs/demo.py's."""
    config = runpy.run_path(str(Path(__file__).with_name("demo.py")))["get_config"](losses)
    adam = {"schedule": "constant", "warmup_steps": 100, "b1": 0.0, "b2": 0.999, "weight_decay": 0.01}
    config.update(
        {
            "teacher": "teachers/cogvideox_2b",
            "steps": 10_000,
            "batch_size": 64,
            "checkpoint_every": 500,
            "keep_checkpoints": 2,
            "log_every": 10,
            "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "compute": {"dtype": "bfloat16", "teacher_dtype": "bfloat16", "remat": "attention", "vae_chunk": 2},
            "data": {"name": "data/cogvideox_2b", "max_text_length": 226},
            "sampling": {"num_steps": 50, "guidance_weight": 5.0, "eta": 0.0},
            "student": {
                "timesteps": (999.0, 749.0, 499.0, 249.0),
                "input": "backward",
                "ema_decay": 0.99,
                "optimiser": {**adam, "learning_rate": 2e-6},
            },
            "vsd": {"guidance_weight": 3.5, "score_shift": 1.0},
            "consistency": {
                "times": "grid",
                "num_steps": 50,
                "skip": 5,
                "guidance_weight": 5.0,
                "distance": "pseudo_huber",
                "boundary": "lcm",
            },
            "fake_score": {"updates": 5, "optimiser": {**adam, "learning_rate": 2e-6}},
            "reward": {
                "start_step": 1000,
                "samples": 8,
                "replay": 256,
                "batch_size": 64,
                "updates": 1,
                "head": {
                    "width": 128,
                    "use_text": True,
                    "stem_kernel": 4,
                    "stem_stride": 4,
                    "stem_padding": 1,
                    "second_kernel": 3,
                    "second_stride": 2,
                    "second_padding": 1,
                    "group_norm": True,
                    "groups": 32,
                },
                "optimiser": {"schedule": "constant", "warmup_steps": 100, "learning_rate": 1e-4},
            },
        }
    )
    with config.ignore_type():
        config.pretrain = None
    return config
