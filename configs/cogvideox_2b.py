"""CogVideoX-2B distilled to 4 steps by VSD + CD: 49 frames of 480×720 at 8 frames per second.

    dollar import THUDM/CogVideoX-2b teachers/cogvideox_2b
    dollar prepare --source=videos --teacher=teachers/cogvideox_2b --frames=49 --height=480 --width=720
        --fps=8 --max_text_length=226 --out=data/cogvideox_2b
    dollar train --config=configs/cogvideox_2b.py --workdir=runs/cogvideox_2b
    dollar train --config=configs/cogvideox_2b.py:vsd+cd+lrm,hpsv2=rewards/hpsv2 --workdir=runs/hpsv2

This teacher is the nearest open one to the paper's: a DDPM that predicts v, sampled by 50 steps of DDIM. What
the paper gives is kept: the student's timesteps, 5 teacher steps to a consistency step, 5 fake-score updates,
w = 3.5 for VSD, the weights of the losses and the latent reward model of its tables. Guidance weights are its
w in v_c + w (v_c - v_∅), which is diffusers' guidance scale less 1; for the teacher's samples and the
consistency target w = 5 is what CogVideoX recommends (a scale of 6; the paper's own teacher had w = 7.5).
What the paper leaves unknown is as in systems that distil Wan: learning rates, betas, clipping, averages, and
the student trained on its own intermediate steps.

Every device of the mesh holds a share of all weights (FSDP); the batch of 64 videos is for up to 64 of them,
with fewer set config.accumulation. Steps and cost are those of configs/wan_1_3b.py, for its reasons."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    adam = {"learning_rate": 2e-6, "final_ratio": 0.1, "b1": 0.0, "clip_norm": 1.0}
    changes = {
        "teacher": "teachers/cogvideox_2b",
        "steps": 1200,
        "checkpoint_every": 200,
        "compute.vae_chunk": 2,
        "data": {"name": "data/cogvideox_2b", "max_text_length": 226},
        "sampling.guidance_weight": 5.0,
        "student": {"timesteps": (999.0, 749.0, 499.0, 249.0), "timestep_per": "micro_batch", "optimiser": adam},
        "vsd.score_range": (0.02, 0.98),
        "consistency": {"guidance_weight": 5.0, "every": 2, "distance": "mse"},
        "fake_score": {"samples": "rollout", "optimiser": adam},
        "reward": {
            "weight": 0.03,
            "start_step": 400,
            "updates": 5,
            "replay": 512,
            "optimiser": {"learning_rate": 1e-4, "final_ratio": 0.1, "b2": 0.99, "weight_decay": 0.0, "clip_norm": 1.0},
        },
    }
    return experiment(None, losses, changes)
