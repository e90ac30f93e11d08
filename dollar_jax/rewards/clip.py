"""Rewards on CLIP: HPSv2 (arXiv 2306.09341), PickScore (arXiv 2305.01569), LAION's aesthetic score, CLIP itself.

Each is read from a folder as `dollar import-reward` writes it, or transformers: config.json, safetensors, and for those
that read prompts CLIP's tokenizer. Every frame is scored, a clip's reward is their mean. Weights are held in half
precision, in which HPSv2's are published. Where one is differentiated, to compare with, layers are computed again."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dollar_jax.models.clip import Fit, preprocess
from dollar_jax.rewards.reward import JaxReward
from dollar_jax.types import Params
from dollar_jax.weights.clip import clip_tokenizer, load_clip
from dollar_jax.weights.pipeline import tokenize

_OURS: Any = {"param_dtype": "float16", "remat": "full"}
# The linear layers of the aesthetic head by their names in its file: no activations between them.
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)


def _agreement(fit: Fit, meaning: str, folder: Path) -> JaxReward:
    config, network, params, _ = load_clip(folder, **_OURS)
    tokenizer, length = clip_tokenizer(folder, config), config.max_position_embeddings

    def cosine(params: Params, frames: jax.Array, tokens: jax.Array | None) -> jax.Array:
        if (step := frames.shape[1] // config.frames) == 0:
            raise ValueError(f"this reward needs clips of at least {config.frames} frames, not {frames.shape[1]}")
        if together := config.frames > 1:
            frames = frames[:, ::step][:, : config.frames]
        pixels = preprocess(frames.reshape(-1, *frames.shape[2:]), config.image_size, "stretch" if together else fit)
        images = network.apply(params, pixels, method="embed_images").reshape(len(frames), -1, config.projection_dim)
        return jnp.einsum("btp,bp->b", images, network.apply(params, tokens, method="embed_text")) / images.shape[1]

    return JaxReward(cosine, meaning, params, lambda prompts: tokenize(tokenizer, prompts, length)[0])


# The cosine of picture and prompt, or of ViCLIP's 8 frames together and prompt, as the folder is: about 0.27 for HPSv2,
# v2.0 or v2.1; about 0.21 for PickScore, which as it is published is multiplied by its logit scale, 100.
hpsv2 = functools.partial(_agreement, "pad", "how people like the picture for its prompt (HPSv2)")
pickscore = functools.partial(_agreement, "crop", "how people would pick the picture for its prompt (PickScore)")
clip_score = functools.partial(_agreement, "crop", "how well the picture fits its prompt (CLIP)")


def aesthetic(folder: Path) -> JaxReward:
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): 1 to 10, on CLIP ViT-L/14, in one file."""
    config, network, tower, head = load_clip(folder, text=False, **_OURS)
    try:
        layers = [(head[f"layers.{i}.weight"].T, head[f"layers.{i}.bias"]) for i in AESTHETIC_LAYERS]
    except KeyError as error:
        why = "the aesthetic head belongs in the tower's file"
        raise ValueError(f"{folder} has no tensor {error.args[0]!r}: {why}") from error

    def score(params: Params, frames: jax.Array, tokens: jax.Array | None) -> jax.Array:
        pixels = preprocess(frames.reshape(-1, *frames.shape[2:]), config.image_size)
        x = network.apply(params["tower"], pixels, method="embed_images")
        for kernel, bias in params["head"]:
            x = x @ kernel + bias
        return x.reshape(frames.shape[:2]).mean(1)

    return JaxReward(score, "how beautiful the picture is (LAION)", {"tower": tower, "head": layers})
