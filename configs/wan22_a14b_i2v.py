"""Wan 2.2 I2V-A14B from an image and text, 480 × 832 × 81, each of its two experts distilled to 2 of 4 steps.

    dollar import Wan-AI/Wan2.2-I2V-A14B-Diffusers teachers/wan22_a14b_i2v --dtype=bfloat16
    dollar prepare --source=videos --teacher=teachers/wan22_a14b_i2v --out=data/wan22_i2v_480p
    dollar train --config=configs/wan22_a14b_i2v.py:high --workdir=runs/i2v_high
    dollar train --config=configs/wan22_a14b_i2v.py:low --workdir=runs/i2v_low
    dollar train --config=configs/wan22_a14b_i2v.py:low,vsd+cd+lrm,hpsv2=rewards/hpsv2 …   # with a reward
    dollar sample --workdir=runs/i2v_high --low=runs/i2v_low --image=fox.jpg --prompt='a fox in the snow' --scale=1
    dollar export --workdir=runs/i2v_high --low=runs/i2v_low exported/a14b_i2v

As configs/wan22_a14b.py, with the boundary at 900. The data must be prepared with this teacher, or with Wan 2.1's I2V:
it is told of each clip's first frame by latents, which `dollar prepare` keeps. The timesteps are those of 4 steps at
shift 5, but for the third: 899 for 833, the first time below the boundary. The fourth is 625.

Guidance is diffusers' scale 3.5 for both experts; w is one less. The official code samples with shift 5, and the
converted scheduler's file says 3: `sampling.shift` is used, with a warning."""

from ml_collections import ConfigDict

from dollar_jax.config import changed
from dollar_jax.experiment import as_config_dict, load


def get_config(variant: str = "high") -> ConfigDict:
    config = load("wan22_a14b", variant)
    own = changed(
        config,
        {
            "teacher": "teachers/wan22_a14b_i2v",
            "data.name": "data/wan22_i2v_480p",
            "sampling.guidance_weight": 2.5,
            "sampling.low_guidance_weight": 2.5,
            "sampling.shift": 5.0,
            "student.timesteps": (899.0, 625.0) if config.expert == "low" else (1000.0, 937.5),
            "vsd.guidance_weight": 2.5,
            "consistency.guidance_weight": 2.5,
        },
    )
    return as_config_dict(own)
