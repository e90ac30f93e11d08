"""What `dollar prepare` makes its data set of, and the names of the files it leaves while it works."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from dollar_jax.config import SamplingConfig
from dollar_jax.data.clip import SETTINGS
from dollar_jax.files import read_json, write_json
from dollar_jax.prepare.sources import TFDS
from dollar_jax.prepare.videos import ClipSettings

PARTS = "parts"  # the folder of unfinished work inside the data set's folder


@dataclasses.dataclass(frozen=True)
class PrepareSettings(ClipSettings):
    """Everything that decides the bytes of the data set; a resumed job must have the same settings. Either `source`
    (see `sources.list_source`) or `prompts` (see `sources.list_manifest`) is None. `split` is that of a TFDS source.
    With `sample` a record holds one sample of the VAE's posterior, otherwise its mean and standard deviation. With
    `sampling` it holds what the teacher draws so of a prompt, `clips` of each."""

    source: str | None
    split: str
    prompts: str | None
    teacher: str
    sample: bool
    dtype: Literal["float16", "float32"]
    max_text_length: int
    seed: int
    shard_size: int
    batch_size: int  # of the VAE, for each device
    caption: Literal["first", "random"] = "first"  # of a list of captions
    language: str | None = None  # of an object of captions by language
    keep_cuts: bool = False  # clips that cross a hard cut
    vae_chunk: int | None = None  # latent frames that the VAE makes at a time; None is the whole batch
    latents: bool = False  # the source's own, of this teacher's VAE and as the teacher takes them
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"  # of the text encoder's weights
    sampling: SamplingConfig | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.prompts is None):
            raise ValueError("give either --source, for videos, or --prompts, for a data set without videos")
        if self.source is not None and self.source.startswith(TFDS) and self.fps:
            raise ValueError("videos of a TFDS data set carry no times: leave out --fps")
        if len(set(self.buckets)) != len(self.buckets) or not self.buckets:
            raise ValueError(f"the buckets must be different sizes, not {self.buckets}")
        if (self.latents or self.sampling) and not self.sample:
            raise ValueError("latents of others are one sample each, without its deviation: add --sample")
        if self.latents and (self.prompts or (self.source or "").startswith(TFDS) or len(self.buckets) > 1):
            raise ValueError("--latents are those of a --source of tar files, of one size")
        if self.sampling and self.prompts is None:
            raise ValueError("--teacher_samples draws what --prompts lists: give those in place of --source")
        if self.prompts is not None and len(self.buckets) > 1:
            raise ValueError("prompts alone have no shape of their own: give one size, not several buckets")

    @property
    def has_latents(self) -> bool:
        """Whether a record holds more than text."""
        return self.prompts is None or self.sampling is not None


DEFAULTS = {field.name: field.default for field in dataclasses.fields(PrepareSettings)}


def _place(name: str, value: Any) -> Any:
    """A setting to be compared: a path, relative or not, is where it leads to."""
    if name not in ("source", "prompts", "teacher") or value is None or not Path(value).exists():
        return value
    return str(Path(value).resolve())


def bucket_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def remember_settings(settings: PrepareSettings, out: Path) -> None:
    """Writes the settings into `out`, or compares them with those of the job there; ValueError if they differ."""
    path = out / SETTINGS
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.exists():
        before = read_json(path)
        for name, value in now.items():
            if _place(name, then := before.get(name, DEFAULTS.get(name))) != _place(name, value):
                mend = "choose another --out, or the same settings to go on"
                raise ValueError(f"{out} was begun with {name} = {then!r}, not {value!r}: {mend}")
        return
    if out.exists() and any(path.name != PARTS for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no data set of ours: choose another --out")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    write_json(path, now, drafts=out / PARTS)
