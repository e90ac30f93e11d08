"""Wan 2.1 T2V 14B at 480 × 832 × 81, distilled to 4 steps by VSD + CD, and LRM once a reward is named.

    dollar import Wan-AI/Wan2.1-T2V-14B-Diffusers teachers/wan_14b --dtype=bfloat16
    dollar train --config=configs/wan_14b.py --workdir=runs/wan_14b --config.data.name=data/wan_480p
    dollar export --workdir=runs/wan_14b exported/wan_14b

As configs/wan_1_3b.py, with lower learning rates and more of the forward pass recomputed. The import needs as
much host memory as its largest parameter, 5.7 GB in bf16."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    changes = {
        "teacher": "teachers/wan_14b",
        "compute.remat": "full",
        "student.optimiser.learning_rate": 2e-6,
        "fake_score.optimiser.learning_rate": 2e-6,
    }
    return experiment("wan_1_3b", losses, changes)
