"""Wan 2.1 T2V 1.3B at 480 × 832 × 81, distilled to 4 steps by VSD + CD, and LRM once a reward is named.

    dollar import Wan-AI/Wan2.1-T2V-1.3B-Diffusers teachers/wan_1_3b --dtype=bfloat16
    dollar train --config=configs/wan_1_3b.py --workdir=runs/wan_1_3b --config.data.name=data/wan_480p
    dollar train --config=configs/wan_1_3b.py:vsd+cd+lrm,hpsv2=rewards/hpsv2 …   # or vsd, cd: an ablation
    dollar export --workdir=runs/wan_1_3b exported/wan_1_3b

The data is a folder with 81 frames of 480 × 832 to a video, encoded by this teacher. Memory: 30 bytes of state per
parameter over `mesh.fsdp` devices.

Guidance weights are the paper's w in v_c + w (v_c - v_∅); diffusers' guidance scale is w + 1, and Wan's 5.0 is 4.0
here. They lead away from Wan's own negative prompt, as in all systems that distil it. Student timesteps are a
rectified flow's with shift 5 at u = 1, 3/4, 1/2, 1/4, as FastGen's.

What the paper leaves unknown and is chosen here: learning rates, betas, decay and clipping (FastGen's for Wan),
the VSD normalisation (DMD's) and range of score timesteps (FastGen's, shift 5), the distance of CD (the mean square,
as FastVideo's: T2V-Turbo's pseudo-Huber with c = 0.001 is an L1 whose gradient does not fall with the error, and had
1.5 to 2.1 times the mean square's share of the gradient beside VSD, docs/recipe.md) and the student's input
("backward", its own way from noise, as users of rival systems advise).
β_FT counts standard deviations of the reward; the paper's 1.0 with HPSv2 is 0.01 of them. 1,200 updates of the
student are FastGen's, whose 6,000 iterations count those of the fake score; users of such systems report saturated
colours from about a thousand on. The latent reward model takes 5 updates a step, 2,000 before it counts. A row of
`reward.replay` is 17 MB of every host's memory and of a checkpoint, 8 where no reward reads prompts; 64 chips add 128 a
step. The more of them the latent reward model sees the better (docs/rewards.md): take what your hosts can spare."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment

# Wan's own, of wan/configs/shared_config.py: lurid colours, overexposed, still, blurred details, subtitles, …
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(losses: str = "vsd+cd") -> ConfigDict:
    changes = {
        "teacher": "teachers/wan_1_3b",
        "steps": 1200,
        "checkpoint_every": 200,
        "lora.alpha": 64.0,  # with --config.lora.rank=64: adapters only
        "data.name": "data/wan_480p",
        "sampling": {"guidance_weight": 4.0, "solver": "unipc", "negative_prompt": NEGATIVE_PROMPT},
        # 33.5 forwards a video and step in place of 58: docs/recipe.md.
        "student": {"timesteps": (1000.0, 937.5, 2500 / 3, 625.0), "timestep_per": "micro_batch"},
        "fake_score.samples": "rollout",
        "vsd": {"guidance_weight": 4.0, "score_shift": 5.0},
        "consistency": {"guidance_weight": 4.0, "every": 2, "distance": "mse"},
        "reward": {"start_step": 400, "updates": 5, "replay": 512, "optimiser.learning_rate": 1e-3},
    }
    return experiment(None, losses, changes)
