"""Wan 2.1 T2V 1.3B at 480 × 832 × 81, distilled to 4 steps by VSD + CD + LRM.

    dollar import Wan-AI/Wan2.1-T2V-1.3B-Diffusers teachers/wan_1_3b --dtype=bfloat16
    dollar train --config=configs/wan_1_3b.py --workdir=runs/wan_1_3b --config.data.name=data/wan_480p
    dollar train --config=configs/wan_1_3b.py:vsd+cd …                   # or vsd, cd: an ablation
    dollar export --workdir=runs/wan_1_3b exported/wan_1_3b

The data is a folder with 81 frames of 480 × 832 to a video, encoded by this teacher. Memory: 30 bytes of state per
parameter over `mesh.fsdp` devices.

Guidance weights are the paper's w in v_c + w (v_c - v_∅); diffusers' guidance scale is w + 1, and Wan's 5.0 is 4.0
here. Student timesteps are a rectified flow's with shift 5 at u = 1, 3/4, 1/2, 1/4, as FastGen's.

What the paper leaves unknown and is chosen here: learning rates, betas, decay and clipping (FastGen's for Wan),
the VSD normalisation (DMD's) and range of score timesteps (FastGen's, shift 5), the distance of CD (T2V-Turbo's
pseudo-Huber) and the student's input ("backward", its own way from noise, as users of rival systems advise).
β_FT counts standard deviations of the reward; the paper's 1.0 with HPSv2 is 0.01 of them. The reward is the
demo's, which needs no weights. A row of `reward.replay` is 17 MB of every host's memory and of a checkpoint; the
more of them the latent reward model sees the better (docs/rewards.md), so take what your hosts can spare.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(losses: str = "vsd+cd+lrm") -> ConfigDict:
    """`losses` as in configs/demo.py, from which comes what is not said here."""
    demo = runpy.run_path(str(Path(__file__).with_name("demo.py")))["get_config"](losses).to_dict()
    adam = {
        "learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_steps": 100,
        "final_ratio": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip_norm": 10.0,
    }
    head = {
        "width": 128,
        "stem_kernel": 4,
        "stem_stride": 4,
        "stem_padding": 1,
        "second_kernel": 3,
        "second_stride": 2,
        "second_padding": 1,
        "group_norm": True,
        "groups": 32,
    }
    return ConfigDict(
        {
            **demo,
            "teacher": "teachers/wan_1_3b",
            "steps": 6000,
            "batch_size": 64,
            "checkpoint_every": 500,
            "keep_checkpoints": 2,
            "log_every": 10,
            "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "compute": {
                "dtype": "bfloat16",
                "teacher_dtype": "bfloat16",
                "remat": "attention",
                "scan_layers": True,
                "vae_chunk": 1,
                "attention": "auto",
                "context_parallel": "gather",
                "offload": (),
            },
            "lora": {**demo["lora"], "alpha": 64.0},  # with --config.lora.rank=64: adapters only
            "data": {**demo["data"], "name": "data/wan_480p", "max_text_length": 512},
            "sampling": {"num_steps": 50, "guidance_weight": 4.0, "eta": 0.0, "solver": "unipc"},
            "student": {
                "timesteps": (1000.0, 937.5, 2500 / 3, 625.0),
                "input": "backward",
                "ema_decay": 0.99,
                "optimiser": adam,
            },
            "vsd": {
                **demo["vsd"],
                "guidance_weight": 4.0,
                "normalisation": "dmd",
                "floor": 1e-6,
                "score_range": (0.001, 0.999),
                "score_shift": 5.0,
            },
            "consistency": {
                **demo["consistency"],
                "times": "grid",
                "num_steps": 50,
                "skip": 5,
                "guidance_weight": 4.0,
                "distance": "pseudo_huber",
                "huber_c": 1e-3,
                "boundary": "lcm",
            },
            "fake_score": {"updates": 5, "loss": "prediction", "optimiser": adam},
            "reward": {
                **demo["reward"],
                "weight": 0.01,
                "start_step": 1000,
                "samples": 8,
                "replay": 128,
                "batch_size": 64,
                "updates": 1,
                "head": {**demo["reward"]["head"], **head},
                "optimiser": {**adam, "learning_rate": 1e-3},
            },
            "pretrain": None,
        }
    )
