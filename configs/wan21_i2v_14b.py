"""Wan 2.1 I2V 14B from an image and text, 480 × 832 × 81, 16 frames per second, distilled to 4 steps by VSD + CD.

    dollar import Wan-AI/Wan2.1-I2V-14B-480P-Diffusers teachers/wan21_i2v_14b --dtype=bfloat16
    dollar prepare --source=videos --teacher=teachers/wan21_i2v_14b --out=data/wan_i2v_480p
    dollar train --config=configs/wan21_i2v_14b.py --workdir=runs/wan21_i2v_14b
    dollar sample --workdir=runs/wan21_i2v_14b --image=fox.jpg --prompt='a fox in the snow' --scale=1
    dollar export --workdir=runs/wan21_i2v_14b exported/wan21_i2v_14b

As configs/wan_14b.py. The data must be prepared with this teacher: it is told of each clip's first frame by latents and
by CLIP's tokens, which `dollar prepare` keeps, 4.9 MB a clip beside the 8.4 of its latents. The 720p model, with data
prepared with --height=720 --width=1280, is configured alike. A row of `reward.replay` is 17 MB."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    return experiment("wan_14b", losses, {"teacher": "teachers/wan21_i2v_14b", "data.name": "data/wan_i2v_480p"})
