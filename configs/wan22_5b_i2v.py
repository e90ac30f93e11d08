"""Wan 2.2 TI2V 5B from an image and text, 704 × 1280 × 121, 24 frames per second, distilled to 4 steps by VSD + CD.

    dollar import Wan-AI/Wan2.2-TI2V-5B-Diffusers teachers/wan22_5b --dtype=bfloat16
    dollar prepare --source=videos --teacher=teachers/wan22_5b --frames=121 --height=704 --width=1280 --fps=24
        --out=data/wan22_704p
    dollar train --config=configs/wan22_5b_i2v.py --workdir=runs/wan22_5b_i2v
    dollar sample --workdir=runs/wan22_5b_i2v --image=fox.jpg --prompt='a fox in the snow' --scale=1
    dollar export --workdir=runs/wan22_5b_i2v exported/wan22_5b_i2v

As configs/wan22_5b.py, whose data it trains on: of each clip the first latent frame is given. What was trained on text
may go on from there: --config.init=runs/wan22_5b."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    return experiment("wan22_5b", losses, {"data.given_frames": 1})
