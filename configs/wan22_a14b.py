"""Wan 2.2 T2V-A14B at 480 × 832 × 81, each of its two experts distilled to 2 of 4 steps by VSD + CD.

    dollar import Wan-AI/Wan2.2-T2V-A14B-Diffusers teachers/wan22_a14b --dtype=bfloat16
    dollar prepare --source=videos --teacher=teachers/wan22_a14b --out=data/wan_480p
    dollar train --config=configs/wan22_a14b.py:high --workdir=runs/a14b_high
    dollar train --config=configs/wan22_a14b.py:low --workdir=runs/a14b_low
    dollar train --config=configs/wan22_a14b.py:low,vsd+cd+lrm,hpsv2=rewards/hpsv2 …   # with a reward
    dollar sample --workdir=runs/a14b_high --low=runs/a14b_low --prompt='a fox in the snow' --scale=1
    dollar export --workdir=runs/a14b_high --low=runs/a14b_low exported/a14b

As configs/wan_14b.py, whose VAE it has: latents prepared for Wan 2.1 serve. The two runs need nothing of one another
and may run at once. The high-noise expert is for times from 875 on, the low-noise one for those below: score times and
CD's grid are cut there, and each student has its timesteps on its side. They are LightX2V's, of shift 7, but for the
third: 874 for 875, the first time below the boundary. At that noise level what the high student has learnt to match,
its prediction noised to 875 or more, is what the low one is trained on, real latents noised (docs/wan22.md).

Guidance is diffusers' scale 4 above the boundary and 3 below; w is one less. The official code samples with shift 12,
and the converted scheduler's file says 3: `sampling.shift` is used, with a warning."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(variant: str = "high") -> ConfigDict:
    expert, _, losses = variant.partition(",")
    if expert not in ("high", "low"):
        expert, losses = "high", variant
    low = expert == "low"
    weight = 2.0 if low else 3.0
    changes = {
        "teacher": "teachers/wan22_a14b",
        "expert": expert,
        "sampling": {"guidance_weight": 3.0, "low_guidance_weight": 2.0, "shift": 12.0},
        "student": {"timesteps": (874.0, 700.0) if low else (1000.0, 954.5), "input": "forward" if low else "backward"},
        "vsd.guidance_weight": weight,
        "consistency.guidance_weight": weight,
        "visibility.samples_every": 0,
    }
    if low:  # no rollout starts at its first timestep
        changes["fake_score.samples"] = "student"
    return experiment("wan_14b", losses or "vsd+cd", changes)
