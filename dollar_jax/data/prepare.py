"""`dollar prepare`: videos and captions, or prompts alone, as a TFDS data set of latents and text states.

The list of videos is cut into units of `shard_size`; a unit gives one ArrayRecord shard for each aspect bucket it
meets. What is done lies in OUT/parts until everything is:

    parts/index.jsonl                 the list, written once: a resumed job goes through the same one
    parts/00012-480x832.shard         the shards of unit 12, and parts/00012.jpg, its first clips
    parts/00012.json                  written last: unit 12 is whole, and what was rejected in it

Then the shards get their names in the data set and parts/ goes away. A unit depends on the list and the settings
alone, so a job that was killed and started again ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, Literal

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageDraw
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from dollar_jax.config import SamplingConfig
from dollar_jax.data import sources
from dollar_jax.data.clip import SETTINGS
from dollar_jax.data.sources import TFDS, Item
from dollar_jax.data.videos import ClipSettings, Unusable, array_frames, clips_of, read_clips
from dollar_jax.generate import Generator, load_teacher

NAME = "dollar_latents"
SPLIT = "train"
REJECTED = "rejected.jsonl"
PREVIEW = "preview.jpg"
PARTS = "parts"
_SHOWN, _MOMENTS, _THUMBNAIL = 8, 6, 96  # of a preview: clips, frames of each, their height in pixels


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """What a data set is made of. All of it decides the result; a resumed job must have the same.

    `source` and `prompts` are as in `sources.list_source` and `sources.list_manifest`, one of them None; `split`
    is for a source in TFDS. The clip settings are `videos.ClipSettings`'s. `sample` keeps one sample of the VAE's
    posterior rather than its mean and standard deviation.
    """

    source: str | None
    split: str
    prompts: str | None
    teacher: str
    frames: int
    buckets: tuple[tuple[int, int], ...]
    fps: float | None
    crop: Literal["centre", "random"]
    clips: int
    sample: bool
    dtype: Literal["float16", "float32"]
    max_text_length: int
    seed: int
    shard_size: int
    batch_size: int  # of the VAE, for each device

    def __post_init__(self) -> None:
        if (self.source is None) == (self.prompts is None):
            raise ValueError("give either --source, for videos, or --prompts, for a data set without videos")
        if self.source is not None and self.source.startswith(TFDS) and self.fps is not None:
            raise ValueError("videos of a TFDS data set carry no times: leave out --fps")
        if len(set(self.buckets)) != len(self.buckets) or not self.buckets:
            raise ValueError(f"the buckets must be different sizes, not {self.buckets}")
        if self.prompts is not None and len(self.buckets) > 1:
            raise ValueError("prompts alone have no shape of their own: give one size, not several buckets")

    @property
    def clip_settings(self) -> ClipSettings:
        return ClipSettings(self.frames, self.buckets, self.fps, self.crop, self.clips)


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a job ended; `waiting` is the number of units that other hosts have not finished."""

    clips: int
    videos: int
    rejected: int
    waiting: int


def bucket_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def latents_features(settings: PrepareSettings, channels: int, text_dim: int, time: int, space: int) -> Any:
    """A record's features. `time` latent frames, `space` pixels to a latent pixel; text without its padding."""
    dtype = np.dtype(settings.dtype)
    heights, widths = ({size[i] // space for size in settings.buckets} for i in range(2))
    latent = tfds.features.Tensor(
        shape=(time, *(next(iter(s)) if len(s) == 1 else None for s in (heights, widths)), channels),
        dtype=dtype,
        encoding="bytes",
    )
    features: dict[str, Any] = {
        "name": tfds.features.Text(),
        "caption": tfds.features.Text(),
        "text": tfds.features.Tensor(shape=(None, text_dim), dtype=dtype, encoding="bytes"),
    }
    if settings.prompts is None:
        features["latent"] = latent
        if not settings.sample:
            features["latent_std"] = latent
    return tfds.features.FeaturesDict(features)


def load_generator(settings: PrepareSettings) -> Generator:
    """The teacher of the settings, for its VAE and text encoder."""
    clip = settings.frames, *settings.buckets[0]
    sampling = SamplingConfig(50, 1.0, 0.0)  # not used here
    return Generator(load_teacher(settings.teacher), settings.max_text_length, sampling, clip)


class Encoder:
    """A teacher's VAE and text encoder on all of this host's devices: clips in, records out."""

    def __init__(self, settings: PrepareSettings, generator: Generator):
        self.settings = settings
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        everywhere, self._rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.batch = settings.batch_size * len(devices)
        pipeline = generator.pipeline
        placed = {
            name: dataclasses.replace(part, params=jax.device_put(part.params, everywhere))
            for name, part in (("vae", pipeline.vae), ("text_encoder", pipeline.text_encoder))
        }
        self.generator = dataclasses.replace(generator, pipeline=dataclasses.replace(pipeline, **placed))
        vae, patch = pipeline.vae.config, pipeline.transformer.config.patch_size
        for height, width in settings.buckets:
            latent = vae.latent_shape(settings.frames, height, width)
            if any(a % p for a, p in zip(latent, patch, strict=False)):
                raise ValueError(
                    f"a clip of {settings.frames}×{height}×{width} has latents of {latent[:3]}, which the "
                    f"teacher's patches of {tuple(patch)} do not divide: choose another height and width"
                )
        self.latent = vae.latent_shape(settings.frames, *settings.buckets[0])
        self.features = latents_features(
            settings, self.latent[-1], generator.null_text.shape[-1], self.latent[0], vae.scale_factor_spatial
        )
        self._serializer = ExampleSerializer(self.features.get_serialized_info())

    def records(self, clips: list[Clip]) -> Iterator[tuple[Clip, bytes | str]]:
        """At most `batch` clips of one size with each one's record, or the reason why it has none."""
        spare = self.batch - len(clips)
        texts = self.generator.text([clip.caption for clip in clips] + [""] * spare)
        mean = std = None
        if self.settings.prompts is None:
            frames = np.stack([clip.frames for clip in clips])  # type: ignore[arg-type]
            frames = np.concatenate([frames, np.zeros((spare, *frames.shape[1:]), np.uint8)])
            mean, std = self.generator.encode_posterior(jax.device_put(frames, self._rows))
        for i, clip in enumerate(clips):
            arrays = {"text": texts[i, : 1 + max(np.flatnonzero(np.any(texts[i], -1)), default=0)]}
            if mean is not None and std is not None:
                if self.settings.sample:
                    noise = np.random.default_rng([self.settings.seed, clip.index, clip.number])
                    arrays["latent"] = mean[i] + std[i] * noise.standard_normal(std[i].shape, np.float32)
                else:
                    arrays |= {"latent": mean[i], "latent_std": std[i]}
            with np.errstate(over="ignore"):
                arrays = {name: x.astype(self.settings.dtype) for name, x in arrays.items()}
            if not all(np.isfinite(x).all() for x in arrays.values()):
                yield clip, f"its latents or text states are not finite in {self.settings.dtype}"
                continue
            example = {"name": clip.name, "caption": clip.caption, **arrays}
            # A record's features are a map, whose order is the process's own unless asked for.
            message: Any = self._serializer.get_tf_example(self.features.encode_example(example))
            yield clip, message.SerializeToString(deterministic=True)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip to encode: the `number`-th of the `index`-th video of the list; no frames for a prompt."""

    index: int
    number: int
    name: str
    caption: str
    frames: np.ndarray | None

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.frames is None else (self.frames.shape[1], self.frames.shape[2])


class Loader:
    """An item of the list as clips."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        self.dataset = None
        if settings.source is not None and settings.source.startswith(TFDS):
            self.dataset = sources.Dataset(settings.source.removeprefix(TFDS), settings.split)

    def items(self) -> Iterator[Item]:
        """The list; raises OSError or ValueError for a source that cannot be read."""
        if self.dataset is not None:
            return self.dataset.items()
        if self.settings.source is not None:
            return sources.list_source(self.settings.source)
        assert self.settings.prompts is not None
        return sources.list_manifest(Path(self.settings.prompts), prompts=True)

    def __call__(self, index: int, item: Item) -> list[Clip] | str:
        """Its clips, or the reason why there are none."""
        settings = self.settings.clip_settings
        rng = np.random.default_rng([self.settings.seed, index])
        try:
            if self.dataset is not None:
                video, caption = self.dataset.read(item["video"]["record"])
                clips = clips_of(array_frames(video), settings, rng)
            else:
                caption = sources.read_caption(item)
                if self.settings.prompts is not None:
                    return [Clip(index, 0, item["name"], caption, None)]
                clips = read_clips(sources.open_video(item), settings, rng)
        except Unusable as reason:
            return str(reason)
        except Exception as error:  # whatever is wrong with one video, the job goes on
            return f"cannot be read: {type(error).__name__}: {error}"
        names = [item["name"]] if settings.clips == 1 else [f"{item['name']}#{i}" for i in range(len(clips))]
        return [Clip(index, i, names[i], caption, frames) for i, frames in enumerate(clips)]


def prepare(
    settings: PrepareSettings,
    generator: Generator,
    out: Path,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 4,
    hand_out: Callable[[list[int]], None] | None = None,
) -> Summary:
    """Makes the data set in `out`, or goes on making it; the last to be run again says that it is there.

    Each of `process_count` hosts, all writing to the same `out`, takes every `process_count`-th unit; host 0 waits
    for the others and finishes. `hand_out` gets the units that are missing to others' workers, where
    `encode_units` makes them; it returns when they are there. Raises ValueError before any work for settings,
    sizes or a source that cannot be, or when `out` holds something else; and in the end when no video at all
    could be used.
    """
    loader = Loader(settings)
    first = next(loader.items(), None)
    if first is None:
        raise ValueError(f"there is nothing to prepare in {settings.source or settings.prompts}")
    encoder = Encoder(settings, generator)
    remember_settings(settings, out)
    parts = out / PARTS
    if not parts.exists():
        return _finished(out)
    total = _write_index(parts / "index.jsonl", loader.items())
    units = -(-total // settings.shard_size)
    mine = range(process_index, units, process_count)
    todo = [unit for unit in mine if not _report(parts, unit).exists()]
    sizes = [min(settings.shard_size, total - unit * settings.shard_size) for unit in range(units)]
    expected = sum(sizes[unit] for unit in mine)
    done = expected - sum(sizes[unit] for unit in todo)
    with tqdm(total=expected, initial=done, desc="preparing", unit="video", smoothing=0.05) as bar:
        if hand_out is None:
            encode_units(todo, encoder, out, workers, bar)
        elif todo:
            with ThreadPoolExecutor(1) as pool:
                handed, missing = pool.submit(hand_out, todo), todo
                while not handed.done():
                    wait([handed], timeout=1)
                    missing = [unit for unit in missing if not _report(parts, unit).exists()]
                    bar.update(expected - sum(sizes[unit] for unit in missing) - bar.n)
                handed.result()
    if process_index:
        try:
            waiting = sum(not _report(parts, unit).exists() for unit in range(units))
            summary = dataclasses.replace(_tally(parts, units), waiting=waiting)
        except FileNotFoundError:  # host 0 finishes as soon as it sees the last unit
            return _finished(out)
        return summary if parts.exists() else _finished(out)
    _wait(parts, units)
    return _finish(settings, encoder, out, units)


def encode_units(units: Collection[int], encoder: Encoder, out: Path, workers: int = 1, bar: Any = None) -> None:
    """Makes these units of the list in `out`, decoding with `workers` threads."""
    size, rejected = encoder.settings.shard_size, 0
    items = _read_index(out / PARTS / "index.jsonl", set(units), size)
    loaded = _ahead(Loader(encoder.settings), items, workers)
    for unit, members in itertools.groupby(loaded, lambda loaded: loaded[0] // size):
        job = _Unit(out, unit, encoder)
        for index, item, clips in members:
            job.add(index, item, clips)
            rejected += isinstance(clips, str)
            if bar is not None:
                bar.update()
                bar.set_postfix({"rejected": rejected} if rejected else None, refresh=False)
        job.close()


def _ahead(
    load: Callable[[int, Item], Any], items: Iterable[tuple[int, Item]], workers: int
) -> Iterator[tuple[int, Item, Any]]:
    """Items with what `load` makes of them, in order; a bounded number is loaded ahead, in threads."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[int, Item, Future[Any]]] = deque()
        for index, item in items:
            ahead.append((index, item, pool.submit(load, index, item)))
            if len(ahead) > 2 * workers:
                index, item, future = ahead.popleft()
                yield index, item, future.result()
        for index, item, future in ahead:
            yield index, item, future.result()


class _Unit:
    """The shards of one unit, under their names in parts/ only when all of them are whole."""

    def __init__(self, out: Path, unit: int, encoder: Encoder):
        self.out, self.parts, self.unit, self.encoder = out, out / PARTS, unit, encoder
        for left in self.parts.glob(f"{unit:05d}[-.]*"):  # of a killed job
            left.unlink()
        self.waiting: dict[tuple[int, int] | None, list[Clip]] = {}
        self.writers: dict[str, Any] = {}
        self.shards: dict[str, dict[str, Any]] = {}
        self.rejected: list[tuple[int, str, str]] = []
        self.shown: list[Clip] = []
        self.videos = 0

    def add(self, index: int, item: Item, clips: list[Clip] | str) -> None:
        self.videos += 1
        if isinstance(clips, str):
            self.rejected.append((index, item["name"], clips))
            return
        for clip in clips:
            waiting = self.waiting.setdefault(clip.size, [])
            waiting.append(clip)
            if len(waiting) == self.encoder.batch:
                self._encode(self.waiting.pop(clip.size))

    def _encode(self, clips: list[Clip]) -> None:
        bucket = bucket_name(clips[0].size or self.encoder.settings.buckets[0])
        for clip, record in self.encoder.records(clips):
            if isinstance(record, str):
                self.rejected.append((clip.index, clip.name, record))
                continue
            if bucket not in self.writers:
                # One record to a group: training reads them in random order.
                self.writers[bucket] = ArrayRecordWriter(str(self._shard(bucket)), "group_size:1")
                self.shards[bucket] = {"bucket": bucket, "clips": 0, "bytes": 0}
            self.writers[bucket].write(record)
            self.shards[bucket]["clips"] += 1
            self.shards[bucket]["bytes"] += len(record)
            if len(self.shown) < _SHOWN and clip.frames is not None:
                self.shown.append(clip)

    def close(self) -> None:
        for clips in self.waiting.values():
            self._encode(clips)
        for writer in self.writers.values():
            writer.close()
        if self.shown:
            sheet = contact_sheet(self.shown)
            _replace(self.parts / f"{self.unit:05d}.jpg", sheet)
            if not (self.out / PREVIEW).exists():
                _replace(self.out / PREVIEW, sheet)
        report = {
            "videos": self.videos,
            "shards": [self.shards[bucket] for bucket in sorted(self.shards)],
            "rejected": [{"name": name, "reason": reason} for _, name, reason in sorted(self.rejected)],
        }
        _replace(_report(self.parts, self.unit), json.dumps(report).encode())

    def _shard(self, bucket: str) -> Path:
        return self.parts / f"{self.unit:05d}-{bucket}.shard"


def _report(parts: Path, unit: int) -> Path:
    return parts / f"{unit:05d}.json"


def _reports(parts: Path, units: int) -> Iterator[dict[str, Any]]:
    for unit in range(units):
        if _report(parts, unit).exists():
            yield json.loads(_report(parts, unit).read_text())


def _tally(parts: Path, units: int) -> Summary:
    clips = videos = rejected = 0
    for report in _reports(parts, units):
        clips += sum(shard["clips"] for shard in report["shards"])
        videos += report["videos"]
        rejected += len(report["rejected"])
    return Summary(clips, videos, rejected, 0)


def _wait(parts: Path, units: int) -> None:
    """Until the other hosts' units are whole."""
    missing = [unit for unit in range(units) if not _report(parts, unit).exists()]
    if not missing:
        return
    with tqdm(total=len(missing), desc="waiting for the other hosts", unit="shard") as bar:
        while missing:
            time.sleep(1)
            missing = [unit for unit in missing if not _report(parts, unit).exists()]
            bar.update(bar.total - len(missing) - bar.n)


def _finish(settings: PrepareSettings, encoder: Encoder, out: Path, units: int) -> Summary:
    """Names the shards and writes what makes them a data set; may be killed and run again at any point."""
    parts = out / PARTS
    summary = _tally(parts, units)
    shards: list[tuple[int, dict[str, Any]]] = []
    with _Draft(out / REJECTED) as rejected:
        for unit, report in enumerate(_reports(parts, units)):
            shards += [(unit, shard) for shard in report["shards"]]
            rejected.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in report["rejected"])
    if not shards:
        raise ValueError(
            f"none of the {summary.videos} videos could be used: {out / REJECTED} says why. "
            f"Mend them and start again with another --out, or remove {out}"
        )
    for number, (unit, shard) in enumerate(shards):
        part = parts / f"{unit:05d}-{shard['bucket']}.shard"
        name = f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}"
        if part.exists() or not (out / name).exists():
            part.replace(out / name)
    for sheet in sorted(parts.glob("[0-9]*.jpg"))[:1]:
        _replace(out / PREVIEW, sheet.read_bytes())
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=encoder.features,
        split_infos=[
            tfds.core.SplitInfo(
                name=SPLIT,
                shard_lengths=[shard["clips"] for _, shard in shards],
                num_bytes=sum(shard["bytes"] for _, shard in shards),
            )
        ],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
        description="Latents and text states of captioned videos, made by dollar prepare.",
        metadata=tfds.core.MetadataDict(
            settings=dataclasses.asdict(settings),
            shards=[shard["bucket"] for _, shard in shards],
            latent_shapes={
                bucket_name(size): encoder.generator.pipeline.vae.config.latent_shape(settings.frames, *size)
                for size in settings.buckets
            },
            fingerprint=fingerprint(encoder.generator),
            videos=summary.videos,
            rejected=summary.rejected,
        ),
    )
    # Gone at once, so that half of it never looks like a job to go on with.
    gone = out / f".{PARTS}"
    parts.rename(gone)
    shutil.rmtree(gone)
    return summary


def _finished(out: Path) -> Summary:
    shutil.rmtree(out / f".{PARTS}", ignore_errors=True)
    info = tfds.builder_from_directory(out).info
    about: Any = info.metadata
    return Summary(info.splits[SPLIT].num_examples, about["videos"], about["rejected"], 0)


def fingerprint(generator: Generator) -> dict[str, list[float]]:
    """A few numbers by which VAE and text encoder can be told from others: a fixed picture, the empty prompt."""
    space = generator.pipeline.vae.config.scale_factor_spatial
    ramp = np.indices((2 * space, 2 * space, 3)).sum(0)[None, None] * 7 % 256
    latent = generator.encode(ramp.astype(np.uint8))
    return {
        name: [round(float(x), 5) for x in values.ravel()[:16]]
        for name, values in (("vae", latent), ("text_encoder", generator.null_text))
    }


# --- files ----------------------------------------------------------------------------------------


def remember_settings(settings: PrepareSettings, out: Path) -> None:
    """Writes the settings into `out`, or compares them with those it was begun with."""
    path = out / SETTINGS
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in now.items():
            if before[name] != value:
                raise ValueError(
                    f"{out} was begun with {name} = {before[name]!r}, not {value!r}: choose another --out, or "
                    "the same settings to go on"
                )
        return
    if out.exists() and any(path.name != PARTS for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no data set of ours: choose another --out")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    _replace(path, (json.dumps(now, indent=2) + "\n").encode())


def _write_index(path: Path, items: Iterator[Item]) -> int:
    """Writes the list if it is not there; returns its length."""
    if not path.exists():
        with _Draft(path) as file:
            for item in tqdm(items, "listing", unit="video", mininterval=1):
                file.write(json.dumps(item) + "\n")
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _read_index(path: Path, units: set[int], size: int) -> Iterator[tuple[int, Item]]:
    """The items, with their places, that belong to these units of `size`."""
    with path.open() as file:
        for index, line in enumerate(file):
            if index // size in units:
                yield index, json.loads(line)


class _Draft:
    """A text file that appears under its name when the block ends well; until then it lies in parts/."""

    def __init__(self, path: Path):
        self.path, self.draft = path, _draft(path)

    def __enter__(self) -> IO[str]:
        self.file = self.draft.open("w", encoding="utf-8")
        return self.file

    def __exit__(self, kind: Any, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.draft.replace(self.path)
        else:
            self.draft.unlink()


def _replace(path: Path, data: bytes) -> None:
    draft = _draft(path)
    draft.write_bytes(data)
    draft.replace(path)


def _draft(path: Path) -> Path:
    folder = path.parent if path.parent.name == PARTS else path.parent / PARTS
    return folder / f".{path.name}.{platform.node()}.{os.getpid()}"


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
