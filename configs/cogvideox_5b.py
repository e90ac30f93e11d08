"""CogVideoX-5B distilled to 4 steps by VSD + CD: 49 frames of 480×720 at 8 frames per second.

    dollar import THUDM/CogVideoX-5b teachers/cogvideox_5b
    dollar prepare --source=videos --teacher=teachers/cogvideox_5b --frames=49 --height=480 --width=720
        --fps=8 --max_text_length=226 --out=data/cogvideox_5b
    dollar train --config=configs/cogvideox_5b.py --workdir=runs/cogvideox_5b

configs/cogvideox_2b.py says how and why. The larger model has rotary embeddings, its noise schedule is not
shifted, and its latents are scaled otherwise: those of the 2B model cannot be used again."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    changes = {"teacher": "teachers/cogvideox_5b", "data.name": "data/cogvideox_5b", "compute.remat": "full"}
    return experiment("cogvideox_2b", losses, changes)
