"""The paper's own setting as far as open weights allow: 4 steps at 192 × 320, 12 fps, by VSD + CD + LRM.

    dollar import Wan-AI/Wan2.1-T2V-1.3B-Diffusers teachers/wan_1_3b --dtype=bfloat16
    dollar train --config=configs/paper.py --workdir=runs/paper --config.data.name=data/paper

From DOLLAR (arXiv 2412.15689): 40,000 iterations, one video per device on 8 devices, 7 accumulated when the
latent reward counts; m = 5 teacher steps of 50 with w = 7.5 for CD and w = 3.5 for VSD; 5 fake-score updates per
student update; β_CD = 0.5 and β_FT = 1 (0.01 here, where rewards are counted in standard deviations); student
timesteps at equal distances; the latent reward model of its tables.

What differs: its teacher, on a DDPM path with a VAE of 12 channels, is not published; Wan 2.1 1.3B is here.
Wan's VAE takes 1 + 4n frames: the data has 129 where the paper has 128, which are 33 × 24 × 40 latents.
What the paper leaves unknown is as in configs/wan_1_3b.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(losses: str = "vsd+cd+lrm") -> ConfigDict:
    """`losses` as in configs/demo.py."""
    wan = Path(__file__).with_name("wan_1_3b.py")
    config = runpy.run_path(str(wan))["get_config"](losses)
    config.steps = 40_000
    config.accumulation = 7 if "lrm" in losses else 1
    config.batch_size = 8 * config.accumulation
    config.data.name = "data/paper"
    config.student.timesteps = (1000.0, 750.0, 500.0, 250.0)
    config.student.input = "forward"
    config.vsd.guidance_weight = 3.5
    config.consistency.guidance_weight = 7.5
    config.reward.samples = 8  # one per device
    config.reward.batch_size = 8
    return config
