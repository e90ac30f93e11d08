"""The default experiment: the shipped moving-shapes teacher, distilled to 4 steps on two CPU cores.

    dollar demo                                                       # this, sampled, measured, reported
    dollar train --config=configs/demo.py --workdir=runs/demo         # the distillation alone
    dollar train --config=configs/demo.py:vsd --workdir=runs/vsd      # or vsd, cd, vsd+cd: an ablation
    dollar pretrain --config=configs/demo.py --workdir=runs/teacher   # how the teacher was made (hours)
        --config.pretrain.init=dollar_jax/assets/moving_shapes        # goes on from the shipped one

Guidance weights are the paper's w in v_c + w (v_c - v_∅); diffusers' guidance scale is w + 1.

What was learnt on the way to these values, on two CPU cores:

* Muon on the kernels instead of Adam is what made the teacher learn: after 1,000 steps an alignment of 0.57
  against 0.39 and a mean loss of 0.600 against 0.688 over steps 500-1,000, all else equal; for the VAE's
  convolutions a mean squared error of 0.0074 after 400 steps of single frames, where Adam needed about 1,900.
  With Adam 3,800 steps left shape, direction and speed near chance; with Muon 7,000 were enough for 0.99.
* VAE: single frames first, then clips of 9 and 17. Clips alone reached 17 dB in 400 steps of 4, single frames
  29 dB in the same time. A KL weight of 1e-5 leaves 4 nats per latent value, 5e-4 1.5 at the same quality.
  8 latent channels instead of 16 lose the shapes (accuracy 0.64).
* Random stripes on the background took most of the latent and of the teacher's effort. Hence the plain ones.
* Rotary embeddings are all that tells this network where a token is. 12 heads of 16 learn faster than 4 of 48
  at the same width (mean loss of steps 1,000-1,500: 0.582 against 0.622), random biases on queries and keys
  help at the start, and positions as extra input channels would help more (0.596 against 0.650 at 1,500 steps),
  but Wan has none. Fewer and larger tokens, patches of (1, 2, 4) or (1, 4, 4), are worse per step.
* VSD with the teacher's own guidance, w = 1, makes the colours 1.5 times as vivid as the teacher's (0.55 against
  0.37, Fréchet distance 2.1 against 0.8) without any reward; with w = 0.3 they are 0.32 (0.8): docs/recipe.md.
* Of the student 120 updates by Muon, its fake score learning from its own samples, are as good as 160 by Adam, and
  those as 200 with new samples for the fake score, by three seeds; and one update of the fake score does for two.
  The latent reward then needs a weight of 0.04 for 0.03: 4 steps have a reward of 0.695, 0.533 and 0.548 for Adam's
  0.635, 0.528 and 0.557 (0.642, 0.479 and 0.516 at 0.03 and two updates of the fake score; a sixth more updates do not
  change that), at the same alignment and variety."""

from ml_collections import ConfigDict

from dollar_jax.experiment import experiment

# The shipped teacher: `dollar pretrain --config=configs/demo.py`.
PRETRAIN = {
    "vae": {
        "base_dim": 16,
        "decoder_base_dim": 20,
        "z_dim": 16,
        "dim_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "temperal_downsample": (True, True),
        "latents_mean": (0.0,) * 16,
        "latents_std": (1.0,) * 16,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
    },
    "vae_phases": (
        {
            "frames": 1,
            "batch_size": 64,
            "steps": 2000,
            "learning_rate": 5e-3,
            "adam_learning_rate": 3e-3,
            "kl_weight": 1e-5,
        },
        {
            "frames": 9,
            "batch_size": 4,
            "steps": 3000,
            "learning_rate": 2.5e-3,
            "adam_learning_rate": 1.5e-3,
            "kl_weight": 2e-4,
        },
        {
            "frames": 17,
            "batch_size": 4,
            "steps": 2500,
            "learning_rate": 1.5e-3,
            "adam_learning_rate": 1e-3,
            "kl_weight": 4e-4,
        },
    ),
    "text_encoder": {"vocab_size": 24, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "transformer": {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 12,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 768,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    },
}


def get_config(losses: str = "vsd+cd+lrm") -> ConfigDict:
    adam = {
        "schedule": "cosine",
        "warmup_steps": 10,
        "final_ratio": 0.1,
        "b1": 0.5,
        "b2": 0.99,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    changes = {
        "teacher": "moving_shapes",
        "steps": 120,
        "batch_size": 32,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "log_every": 5,
        "mesh": {"data": -1, "fsdp": 1},
        "compute": {"dtype": "float32", "teacher_dtype": "float32", "remat": "dots", "vae_chunk": None},
        "data": {"name": "moving_shapes", "max_text_length": 12},
        "sampling.guidance_weight": 1.0,
        "student": {
            # A rectified flow with time shift 3 at u = 1, 3/4, 1/2, 1/4.
            "timesteps": (1000.0, 900.0, 750.0, 500.0),
            "input": "forward",
            "ema_decay": 0.95,
            "optimiser": {**adam, "name": "muon", "learning_rate": 7e-4},
        },
        # Less than the teacher's guidance: see above.
        "vsd": {"guidance_weight": 0.3, "score_range": (0.02, 0.98), "score_shift": 3.0},
        "consistency": {"times": "student", "skip": 3, "guidance_weight": 1.0, "distance": "mse", "boundary": "none"},
        "fake_score": {"updates": 1, "samples": "student", "optimiser": {**adam, "learning_rate": 6e-4}},
        "reward": {
            "rewards": ({"name": "vivid"},),
            "weight": 0.04,
            "start_step": 30,
            "samples": 4,
            "replay": 1024,
            "batch_size": 32,
            "updates": 2,
            # A group norm would hide the latent's overall scale.
            "head": {"width": 64, "stem_kernel": 3, "stem_stride": 1, "group_norm": False, "groups": 1},
            "optimiser": {**adam, "learning_rate": 2e-3, "b1": 0.9},
        },
        "visibility.prompts": (
            "a large red circle moving left slowly",
            "a small blue square moving up quickly",
            "a large yellow triangle moving right quickly",
        ),
        "decoder.width": 8,
        "pretrain": PRETRAIN,
    }
    return experiment(None, losses, changes)
