"""The families of teachers: a diffusers pipeline's networks, schedule and habits, one record for each.

Another family is one more record in FAMILIES, beside its networks in `models` and their tables."""

import contextlib
import dataclasses
import html
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dollar_jax.files import read_json
from dollar_jax.models.clip import CLIPVisionConfig
from dollar_jax.models.umt5 import UMT5Config
from dollar_jax.schedule import Path as DiffusionPath
from dollar_jax.schedule import Schedule
from dollar_jax.weights.clip import CLIP_VISION
from dollar_jax.weights.cogvideox import COGVIDEOX_TRANSFORMER
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.umt5 import T5, UMT5
from dollar_jax.weights.vae import COGVIDEOX_VAE, WAN_VAE
from dollar_jax.weights.wan import WAN_NATIVE, WAN_TRANSFORMER

COMPONENTS = ("transformer", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of diffusers pipelines.

    `masks_padding`: the text encoder does not see the rows of padding, and the transformer gets zeros there; without
    it padding is part of the text. `guidance_scale` is diffusers' default, w + 1 of ours, `clip` the frames,
    height and width and `fps` the frames per second of its videos, and `vae_chunk` the latent frames that its VAE takes
    at a time where memory counts. `entries` of model_index.json tell it from other families of its class; `unsupported`
    ones must be absent, null or false, each with what asks for it. `cleans_prompts`: prompts go through `clean_prompt`.
    `image_pipeline` is the class that gives the same networks a clip's first frame, by a time for every token. A
    `conditioned` transformer is told of it by further channels, and by the tokens of an `image_encoder` if any.
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
    conditioned: bool = False
    image_encoder: Kind | None = None
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    native: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Kind]:
        """The networks of such a pipeline, by the names of their folders."""
        found = {name: getattr(self, name) for name in (*COMPONENTS, "image_encoder")}
        return {name: kind for name, kind in found.items() if kind is not None}


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
    image_encoder: CLIPVisionConfig | None = None


_IMAGE = "an image as condition, which only image-to-video pipelines do"
_NO_IMAGE = {"image_encoder": _IMAGE, "image_processor": _IMAGE}
_OWN: dict[str, Any] = {"masks_padding": True, "guidance_scale": 5.0, "clip": (81, 480, 832), "fps": 16}
_OWN |= {"vae_chunk": 1, "unsupported": _NO_IMAGE, "native": WAN_NATIVE}
WAN = Family("WanPipeline", WAN_TRANSFORMER, WAN_VAE, UMT5, "rf", **_OWN)
# Wan 2.2's 5B. Given an image, every token has a time of its own; from text alone all have the same.
WAN_TI2V = dataclasses.replace(
    WAN, clip=(121, 704, 1280), fps=24, entries={"expand_timesteps": True}, image_pipeline="WanImageToVideoPipeline"
)
# Told of an image by further channels; Wan 2.1's attends to its tokens too.
_ENCODER = {"image_encoder": "another image encoder than transformers' CLIPVisionModel"}
WAN_I2V = dataclasses.replace(WAN, pipeline="WanImageToVideoPipeline", conditioned=True, unsupported=_ENCODER)
WAN_I2V_CLIP = dataclasses.replace(
    WAN_I2V, image_encoder=CLIP_VISION, entries={"image_encoder": ["transformers", "CLIPVisionModel"]}, unsupported={}
)
_OWN = {"masks_padding": False, "guidance_scale": 6.0, "clip": (49, 480, 720), "fps": 8, "vae_chunk": 2}
_OWN |= {"cleans_prompts": False}
COGVIDEOX = Family("CogVideoXPipeline", COGVIDEOX_TRANSFORMER, COGVIDEOX_VAE, T5, "ddpm", **_OWN)
FAMILIES = (WAN_TI2V, WAN, WAN_I2V_CLIP, WAN_I2V, COGVIDEOX)  # the first whose entries match


def _architecture(family: str, schedule: Mapping[str, Any], **parts: Mapping[str, Any]) -> Architecture:
    fields = {n: {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()} for n, part in parts.items()}
    configs = {name: _NAMED[family].kinds[name].config(**own) for name, own in fields.items()}
    return Architecture(_NAMED[family], **configs, schedule=Schedule(**schedule))


# Published teachers, by the names their folders have in configs/: what is not as by default in each.
_NAMED = {"wan": WAN, "wan_ti2v": WAN_TI2V, "wan_i2v": WAN_I2V, "wan_i2v_clip": WAN_I2V_CLIP, "cogvideox": COGVIDEOX}
_FILE = Path(__file__).parents[1] / "assets" / "published.json"
PUBLISHED = {name: _architecture(**fields) for name, fields in read_json(_FILE).items()}
