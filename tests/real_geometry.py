"""Makes what tests/real_geometry.sh starts from: a tiny teacher as from the hub, a tiny CLIP, clips with captions.

python tests/real_geometry.py FOLDER {wan_1_3b|cogvideox_2b|cogvideox_5b} HEIGHT WIDTH FRAMES"""

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from dollar_jax.data import shapes
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.video import write_video

TEXT = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BETAS = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def wan(folder: Path) -> None:
    """The published VAE's strides, so that latents have their real shape; everything else is tiny."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT, feed_forward_proj="gated-gelu"))
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    tokenizer = build_tokenizer(shapes.VOCABULARY)
    diffusers.WanPipeline(tokenizer, text, vae, scheduler, transformer).save_pretrained(folder)


def cogvideox(folder: Path, large: bool, height: int, width: int, frames: int) -> None:
    """As `wan`; 5B has rotary embeddings, and positions for every size."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_width=width // 8,
        sample_height=height // 8,
        sample_frames=frames,
        max_text_seq_length=12,
        use_rotary_positional_embeddings=large,
    )
    vae = diffusers.AutoencoderKLCogVideoX(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    text = transformers.T5EncoderModel(transformers.T5Config(**TEXT, feed_forward_proj="gated-gelu"))
    scheduler = diffusers.CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=1.0 if large else 3.0)
    diffusers.CogVideoXPipeline(build_tokenizer(shapes.VOCABULARY), text, vae, transformer, scheduler).save_pretrained(
        folder
    )


def clip(folder: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder)
    end = len(words) - 1
    ends = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    text = {**TOWER, **ends, "vocab_size": len(words), "max_position_embeddings": 16}
    vision = {**TOWER, "image_size": 28, "patch_size": 7}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)


def videos(folder: Path, height: int, width: int, frames: int) -> None:
    rng = np.random.default_rng(0)
    for i, caption in enumerate(shapes.covering_captions()[:8]):
        start, step = rng.integers(60, 160, 3), rng.integers(-4, 5, 3)
        grey = start + step * np.arange(2 * frames)[:, None]  # CogVideoX takes every other one
        clip = np.broadcast_to(grey[:, None, None], (len(grey), height, width, 3)).astype(np.uint8)
        write_video(folder / f"{i}.mp4", clip, 16)
        (folder / f"{i}.txt").write_text(f"{caption}\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    root, name, size = Path(sys.argv[1]), sys.argv[2], [int(word) for word in sys.argv[3:6]]
    wan(root / "hub") if name.startswith("wan") else cogvideox(root / "hub", name == "cogvideox_5b", *size)
    clip(root / "clip")
    videos(root / "clips", *size)
