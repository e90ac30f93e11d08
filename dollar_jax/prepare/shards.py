"""Clips as the records of a data set: encoded by the teacher's networks, written to one shard for each size."""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageDraw
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, MeshConfig, SamplingConfig, changed
from dollar_jax.data.prepared import IMAGE, fingerprint_programs
from dollar_jax.files import sync, write_file
from dollar_jax.generate import Generator, make_generator, sampling_mesh, teacher_folder
from dollar_jax.prepare.clips import Clip, Rejected
from dollar_jax.prepare.settings import PARTS, PrepareSettings, bucket_name
from dollar_jax.prepare.sources import Item
from dollar_jax.program import Program
from dollar_jax.types import ImageCondition
from dollar_jax.video import to_uint8
from dollar_jax.weights.pipeline import EXPERTS, load_pipeline

PREVIEW = "preview.jpg"
_MOST_CHANGED = 0.5  # of a latent's norm, decoded and encoded again
_SHOWN, _MOMENTS, _THUMBNAIL = 8, 6, 96  # of a preview: clips, frames of each, their height in pixels


def load_generator(settings: PrepareSettings, config: DistillConfig | None = None) -> Generator:
    """The teacher that the settings name, of which only VAE and text encoder are used; or all of it, to draw samples as
    a configuration says. ValueError for one that continues images."""
    clip = settings.frames, *settings.buckets[0]
    if config is not None:
        own = {"teacher": settings.teacher, "expert": None, "data.max_text_length": settings.max_text_length}
        config = changed(config, own | {"compute.vae_chunk": settings.vae_chunk})
        generator = make_generator(config, clip, sampling_mesh(MeshConfig(1, -1, 1, 1)))
        if generator.pipeline.family.conditioned or generator.pipeline.schedule.given_frames:
            raise ValueError("--teacher_samples draws from text alone, and this teacher or configuration takes images")
        return generator
    pipeline = load_pipeline(teacher_folder(settings.teacher), settings.teacher_dtype, without_transformer=True)
    return Generator(pipeline, settings.max_text_length, SamplingConfig(), clip, settings.vae_chunk)


def prepare_programs(
    generator: Generator, clip: tuple[int, int, int], batch: int, sampling: SamplingConfig | None = None
) -> list[Program]:
    """What a job executes on its host's devices, a generator's, for `batch` clips, encoded or drawn by the teacher."""
    shape, mesh = (batch, *clip, 3), generator.mesh
    found = [generator.text_program(batch, mesh)]
    if sampling:
        found.append(generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight).program(batch))
        found.append(generator.decode_program((batch, *generator.latent_shape), mesh))
        return [*found, *fingerprint_programs(generator)]  # one of which encodes the negative prompt too
    found.append(generator.encode_program(shape, mesh))
    if generator.pipeline.family.conditioned:
        found.append(generator.image_program((batch, *shape[2:]), mesh))
    return [*found, *fingerprint_programs(generator)]


def latents_features(
    settings: PrepareSettings, channels: int, text_dim: int, time: int, space: int, image: ImageCondition | None = None
) -> Any:
    """The TFDS features of a record: latents [t, h, w, channels] of `time` frames, with one latent pixel for `space` ×
    `space` pixels, and text states [tokens, text_dim] without padding; `image` are the shapes of its condition."""
    tensor = functools.partial(tfds.features.Tensor, dtype=np.dtype(settings.dtype), encoding="bytes")
    sides = [{side // space for side in sides} for sides in zip(*settings.buckets, strict=True)]
    latent = tensor(shape=(time, *(next(iter(s)) if len(s) == 1 else None for s in sides), channels))
    features: dict[str, Any] = {"name": tfds.features.Text(), "caption": tfds.features.Text()}
    features["text"] = tensor(shape=(None, text_dim))
    if settings.has_latents:
        features["latent"] = latent
        if not settings.sample:
            features["latent_std"] = latent
        if image is not None:
            features[IMAGE[0]] = latent
            features |= {} if image.tokens is None else {IMAGE[1]: tensor(shape=image.tokens.shape[1:])}
    return tfds.features.FeaturesDict(features)


class Encoder:
    """Encodes clips by a teacher's VAE and text encoder, with the batch shared by all devices of this host."""

    def __init__(self, settings: PrepareSettings, generator: Generator):
        self.settings = settings
        mesh = sharding.make_mesh(MeshConfig(1, -1, 1, 1), jax.local_devices())
        self.batch = settings.batch_size * mesh.size
        pipeline = generator.pipeline
        places: dict[str, Any] = dict.fromkeys(("vae", "image_encoder"), sharding.replicated(mesh))
        places["text_encoder"] = sharding.shard(mesh, pipeline.text_encoder.network.shapes, strict=False)
        if settings.sampling:
            places |= dict.fromkeys(EXPERTS.values(), sharding.shard(mesh, pipeline.transformer.network.shapes))
        self.generator = dataclasses.replace(generator.holding(places), mesh=mesh)
        vae, patch = pipeline.vae.config, pipeline.transformer.config.patch
        for height, width in settings.buckets:
            latent = vae.latent_shape(settings.frames, height, width)
            if any(a % p for a, p in zip(latent, patch, strict=False)):
                why = f"which the teacher's patches of {tuple(patch)} do not divide: choose another height and width"
                raise ValueError(f"a clip of {settings.frames}×{height}×{width} has latents of {latent[:3]}, {why}")
        self.latent = vae.latent_shape(settings.frames, *settings.buckets[0])
        sizes = self.latent[-1], generator.text_shape[-1], self.latent[0], vae.scale_factor_spatial
        self.features = latents_features(settings, *sizes, None if settings.latents else generator.image_shapes(1))
        self._serializer = ExampleSerializer(self.features.get_serialized_info())

    def check(self, latent: np.ndarray | None) -> None:
        """Raises ValueError for a latent that the teacher's decoder and encoder do not give back, or for none."""
        source, shape = self.settings.source, None if latent is None else latent.shape
        if latent is None or shape != self.latent:
            found = "there is none" if latent is None else f"the first is of shape {shape}"
            wanted = f"{source} must hold latents of shape {self.latent}, as clips of these settings have"
            raise ValueError(f"{wanted}: {found}")
        frames = self.generator.decode(np.repeat(latent[None], self.batch, 0))
        back = self.generator.encode(np.round(255 * frames).astype(np.uint8))[0]
        change = np.linalg.norm(back - latent) / np.linalg.norm(latent)
        if not change < _MOST_CHANGED:
            found = f"differs by {change:.0%} from what this teacher's VAE makes of its video"
            why = "it is of another VAE, or not scaled as the teacher takes it"
            raise ValueError(f"the first latent of {source} {found}: {why}")

    def drawn(self, clips: list[Clip], texts: np.ndarray, show: bool) -> list[Clip]:
        """The clips with the teacher's samples as latents, each from the noise of its own place in the list, and with
        their frames if they are to be shown."""
        c, fold, key = self.settings.sampling, jax.random.fold_in, jax.random.key(self.settings.seed)
        assert c is not None
        padded = [*clips, *[clips[-1]] * (self.batch - len(clips))]
        keys = jnp.stack([fold(fold(key, clip.index), clip.number) for clip in padded])
        draw = self.generator.teacher_sampler(c.num_steps, c.guidance_weight)
        latents = draw(self.generator.pipeline.params, keys, texts)
        frames = to_uint8(self.generator.decode(latents)) if show else [None] * len(clips)
        made = zip(clips, np.asarray(latents), frames, strict=False)
        return [clip._replace(latent=latent, frames=shown) for clip, latent, shown in made]

    def records(self, clips: list[Clip], show: bool = False) -> Iterator[tuple[Clip, bytes | str]]:
        """Each of at most `batch` clips of one size with its serialised record, or with the reason why it has none. If
        they are to be shown, those that are drawn here get frames."""
        spare = self.batch - len(clips)
        texts = self.generator.text([clip.caption for clip in clips] + [""] * spare)
        if self.settings.sampling:
            clips = self.drawn(clips, texts, show)
        mean = std = image = None
        if self.settings.prompts is None and not self.settings.latents:
            frames = np.stack([clip.frames for clip in clips])  # type: ignore[arg-type]
            frames = np.concatenate([frames, np.zeros((spare, *frames.shape[1:]), np.uint8)])
            mean, std = self.generator.encode_posterior(frames)
            if self.generator.pipeline.family.conditioned:
                image = self.generator.first_frames(frames[:, 0])
        for i, clip in enumerate(clips):
            arrays = {"text": texts[i, : 1 + max(np.flatnonzero(np.any(texts[i], -1)), default=0)]}
            if clip.latent is not None:
                arrays["latent"] = clip.latent
                if clip.latent.shape != self.latent:
                    yield clip, f"its latent is of shape {clip.latent.shape}, and not {self.latent} as of the clips"
                    continue
            if mean is not None and std is not None:
                if self.settings.sample:
                    noise = np.random.default_rng([self.settings.seed, clip.index, clip.number])
                    arrays["latent"] = mean[i] + std[i] * noise.standard_normal(std[i].shape, np.float32)
                else:
                    arrays |= {"latent": mean[i], "latent_std": std[i]}
            arrays |= {name: x[i] for name, x in zip(IMAGE, image or (), strict=False) if x is not None}
            with np.errstate(over="ignore"):
                arrays = {name: x.astype(self.settings.dtype) for name, x in arrays.items()}
            if not all(np.isfinite(x).all() for x in arrays.values()):
                yield clip, f"its latents or text states are not finite in {self.settings.dtype}"
                continue
            example = {"name": clip.name, "caption": clip.caption, **arrays}
            # The features are a protobuf map, whose order differs between processes unless it is asked for.
            message: Any = self._serializer.get_tf_example(self.features.encode_example(example))
            yield clip, message.SerializeToString(deterministic=True)


class Unit:
    """Writes the shards of one unit of the list, which counts as finished once its report exists, which `close` writes
    last. What a killed job left of an unfinished unit is deleted and made again."""

    def __init__(self, out: Path, unit: int, encoder: Encoder):
        self.out, self.parts, self.unit, self.encoder = out, out / PARTS, unit, encoder
        for left in self.parts.glob(f"{unit:05d}[-.]*"):
            left.unlink()
        self.waiting: dict[tuple[int, int] | None, list[Clip]] = {}
        self.writers: dict[str, Any] = {}
        self.shards: dict[str, dict[str, Any]] = {}
        self.rejected: list[Rejected] = []
        self.shown: list[Clip] = []
        self.videos = 0

    def add(self, index: int, item: Item, clips: list[Clip | Rejected] | str) -> None:
        self.videos += 1
        for clip in [Rejected(index, item["name"], clips)] if isinstance(clips, str) else clips:
            if isinstance(clip, Rejected):
                self.rejected.append(clip)
                continue
            waiting = self.waiting.setdefault(clip.size, [])
            waiting.append(clip)
            if len(waiting) == self.encoder.batch:
                self._encode(self.waiting.pop(clip.size))

    def _encode(self, clips: list[Clip]) -> None:
        bucket = bucket_name(clips[0].size or self.encoder.settings.buckets[0])
        for clip, record in self.encoder.records(clips, len(self.shown) < _SHOWN):
            if isinstance(record, str):
                self.rejected.append(Rejected(clip.index, clip.name, record))
                continue
            if bucket not in self.writers:
                # One record to a group: training reads them in random order.
                self.writers[bucket] = ArrayRecordWriter(str(self._path(bucket)), "group_size:1")
                self.shards[bucket] = {"bucket": bucket, "clips": 0, "bytes": 0}
            with _disk():
                self.writers[bucket].write(record)
            self.shards[bucket]["clips"] += 1
            self.shards[bucket]["bytes"] += len(record)
            if len(self.shown) < _SHOWN and clip.frames is not None:
                self.shown.append(clip)

    def close(self) -> None:
        for clips in self.waiting.values():
            self._encode(clips)
        for bucket, writer in self.writers.items():
            with _disk():
                writer.close()
            sync(self._path(bucket))
        if self.shown:
            sheet = contact_sheet(self.shown)
            write_file(self.parts / f"{self.unit:05d}.jpg", sheet)
            if not (self.out / PREVIEW).exists():
                write_file(self.out / PREVIEW, sheet, drafts=self.parts)
        report = {"videos": self.videos, "shards": [self.shards[bucket] for bucket in sorted(self.shards)]}
        rejected = [{"name": name, "reason": reason} for _, name, reason in sorted(self.rejected)]
        write_file(report_path(self.parts, self.unit), json.dumps({**report, "rejected": rejected}))

    def _path(self, bucket: str) -> Path:
        return self.parts / f"{self.unit:05d}-{bucket}.shard"


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # as ArrayRecord says that there is no room
        raise OSError(str(error)) from error


def report_path(parts: Path, unit: int) -> Path:
    return parts / f"{unit:05d}.json"


def contact_sheet(clips: list[Clip]) -> bytes:
    """A JPEG with a row of frames and the caption for each clip."""
    rows = []
    for clip in clips:
        assert clip.frames is not None
        height, width = clip.frames.shape[1:3]
        size = max(1, round(_THUMBNAIL * width / height)), _THUMBNAIL
        moments = np.linspace(0, len(clip.frames) - 1, _MOMENTS).round().astype(int)
        rows.append([Image.fromarray(clip.frames[i]).resize(size) for i in moments])
    wide = max(_MOMENTS * (row[0].width + 4) for row in rows)
    sheet = Image.new("RGB", (wide, len(rows) * (_THUMBNAIL + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (clip, row) in enumerate(zip(clips, rows, strict=True)):
        top = i * (_THUMBNAIL + 20)
        for j, image in enumerate(row):
            sheet.paste(image, (j * (image.width + 4), top))
        draw.text((2, top + _THUMBNAIL + 3), f"{clip.name}: {clip.caption}"[: wide // 6], fill="black")
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90)
    return data.getvalue()
