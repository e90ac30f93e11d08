"""Wan 2.2 TI2V 5B from text, 704 × 1280 × 121, 24 frames per second, distilled to 4 steps by VSD + CD.

    dollar import Wan-AI/Wan2.2-TI2V-5B-Diffusers teachers/wan22_5b --dtype=bfloat16
    dollar prepare --source=videos --teacher=teachers/wan22_5b --frames=121 --height=704 --width=1280 --fps=24
        --out=data/wan22_704p
    dollar train --config=configs/wan22_5b.py --workdir=runs/wan22_5b
    dollar export --workdir=runs/wan22_5b exported/wan22_5b

As configs/wan_14b.py: guidance scale 5 and shift 5 are this teacher's too. Its VAE makes 16 × 16 pixels of 4 frames
one latent position, so that a clip is 27,280 tokens; latents of Wan 2.1's VAE cannot be used again. A row of
`reward.replay` is 21 MB."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    return experiment("wan_14b", losses, {"teacher": "teachers/wan22_5b", "data.name": "data/wan22_704p"})
