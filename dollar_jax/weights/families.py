"""The families of teachers: a diffusers pipeline's networks, schedule and habits, one record for each.

Another family is one more record in FAMILIES, beside its networks in `models` and their tables."""

import contextlib
import dataclasses
import html
import importlib
from collections.abc import Mapping
from typing import Any

from dollar_jax.models.cogvideox import CogVideoXConfig
from dollar_jax.models.cogvideox_vae import CogVideoXVAEConfig
from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.models.wan import WanConfig
from dollar_jax.models.wan_vae import WanVAEConfig
from dollar_jax.schedule import Path as DiffusionPath
from dollar_jax.schedule import Schedule
from dollar_jax.weights.cogvideox import COGVIDEOX_TRANSFORMER
from dollar_jax.weights.cogvideox_vae import COGVIDEOX_VAE
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.scheduler import COGVIDEOX_NOISE
from dollar_jax.weights.umt5 import T5, UMT5
from dollar_jax.weights.wan import WAN_NATIVE, WAN_TRANSFORMER
from dollar_jax.weights.wan_vae import WAN_VAE

COMPONENTS = ("transformer", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of diffusers pipelines.

    `masks_padding`: the text encoder does not see the rows of padding, and the transformer gets zeros there; without
    it padding is part of the text. `guidance_scale` is diffusers' default, w + 1 of ours, `clip` the frames,
    height and width and `fps` the frames per second of its videos, and `vae_chunk` the latent frames that its VAE takes
    at a time where memory counts. `entries` of model_index.json tell it from other families of its class; `unsupported`
    ones must be absent, null or false, each with what asks for it. `cleans_prompts`: prompts go through `clean_prompt`.
    `image_pipeline` is the class that gives the same networks a clip's first frame, by a time for every token.
    `native` are the names of the transformer's modules in the code it was published with, by those in diffusers."""

    pipeline: str
    transformer: Kind
    vae: Kind
    text_encoder: Kind
    path: DiffusionPath
    masks_padding: bool
    guidance_scale: float
    clip: tuple[int, int, int]
    fps: int
    vae_chunk: int
    cleans_prompts: bool = True
    image_pipeline: str | None = None
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    native: Mapping[str, str] = dataclasses.field(default_factory=dict)


def clean_prompt(text: str) -> str:
    """A prompt as diffusers' WanPipeline cleans it: HTML entities resolved twice, white space to single spaces. As
    there, ftfy mends broken encodings where it is installed."""
    with contextlib.suppress(ImportError):
        text = importlib.import_module("ftfy").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a pipeline folder says of its networks, without their weights."""

    family: Family
    transformer: Any
    vae: Any
    text_encoder: UMT5Config
    schedule: Schedule


_IMAGE = "an image as condition, and only text-to-video pipelines are supported"
_EXPERTS = ", as in Wan 2.2's A14B, and only models of one transformer are supported"
WAN = Family(
    "WanPipeline",
    WAN_TRANSFORMER,
    WAN_VAE,
    UMT5,
    path="rf",
    masks_padding=True,
    guidance_scale=5.0,
    clip=(81, 480, 832),
    fps=16,
    vae_chunk=1,
    unsupported={
        "transformer_2": f"a second transformer for low noise levels{_EXPERTS}",
        "boundary_ratio": f"two transformers that share the noise levels{_EXPERTS}",
        "image_encoder": _IMAGE,
        "image_processor": _IMAGE,
    },
    native=WAN_NATIVE,
)
# Wan 2.2's 5B. Given an image, every token has a time of its own; from text alone all have the same.
WAN_TI2V = dataclasses.replace(
    WAN, clip=(121, 704, 1280), fps=24, entries={"expand_timesteps": True}, image_pipeline="WanImageToVideoPipeline"
)
COGVIDEOX = Family(
    "CogVideoXPipeline",
    COGVIDEOX_TRANSFORMER,
    COGVIDEOX_VAE,
    T5,
    path="ddpm",
    masks_padding=False,
    guidance_scale=6.0,
    clip=(49, 480, 720),
    fps=8,
    vae_chunk=2,
    cleans_prompts=False,
)
FAMILIES = (WAN_TI2V, WAN, COGVIDEOX)  # the first whose entries match

_UMT5_XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
_T5_XXL = dataclasses.replace(_UMT5_XXL, vocab_size=32128, shared_position_bias=True)
_COGVIDEOX_SCHEDULE = Schedule("ddpm", "v", rescale_zero_snr=True, **COGVIDEOX_NOISE)
# Published teachers, by the names their folders have in configs/.
PUBLISHED = {
    "wan_1_3b": Architecture(
        WAN,
        WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        WanVAEConfig(),
        _UMT5_XXL,
        Schedule("rf", "velocity", shift=3.0),
    ),
    "wan_14b": Architecture(WAN, WanConfig(), WanVAEConfig(), _UMT5_XXL, Schedule("rf", "velocity", shift=5.0)),
    "wan22_5b": Architecture(
        WAN_TI2V,
        WanConfig(num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30),
        WanVAEConfig(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            latents_mean=(0.0,) * 48,
            latents_std=(1.0,) * 48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        _UMT5_XXL,
        Schedule("rf", "velocity", shift=5.0),
    ),
    "cogvideox_2b": Architecture(COGVIDEOX, CogVideoXConfig(), CogVideoXVAEConfig(), _T5_XXL, _COGVIDEOX_SCHEDULE),
    "cogvideox_5b": Architecture(
        COGVIDEOX,
        CogVideoXConfig(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
        CogVideoXVAEConfig(scaling_factor=0.7),
        _T5_XXL,
        dataclasses.replace(_COGVIDEOX_SCHEDULE, snr_shift_scale=1.0),
    ),
}
