"""What `dollar prepare` left, as endless shuffled batches: a batch holds one aspect bucket."""

import functools
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from dollar_jax.config import DataConfig, DistillConfig
from dollar_jax.data.clip import read_about
from dollar_jax.files import first_line
from dollar_jax.generate import Generator
from dollar_jax.program import Program
from dollar_jax.sharding import make_global_rows
from dollar_jax.types import ImageCondition

NAME, SPLIT = "dollar_latents", "train"
IMAGE = "image", "image_tokens"  # the features that hold a clip's `ImageCondition`


class Damaged:
    """Damaged records met so far: each is named once, and one more than `allowed` is an error."""

    def __init__(self, allowed: int):
        self.allowed, self.found = allowed, set[str]()
        self._lock = threading.Lock()

    def note(self, record: str, error: Exception) -> None:
        """Raises ValueError when there are too many."""
        reason = f"{record} is damaged ({first_line(error)})"
        with self._lock:
            if record in self.found:
                return
            self.found.add(record)
            if len(self.found) > self.allowed:
                mend = f"or let more be skipped with config.data.corrupt_records, now {self.allowed}"
                raise ValueError(f"{reason}, the {len(self.found)}. of this run: prepare the data set anew, {mend}")
        tqdm.write(f"skipped: {reason}")


class Records:
    """Random access to the records of one bucket; one that is damaged is None."""

    def __init__(self, info: Any, shards: Sequence[Any], damaged: Damaged):
        self._features, self._shards, self._damaged = info.features, shards, damaged
        self._source = grain.sources.ArrayRecordDataSource(list(shards))
        self._ends = list(itertools.accumulate(shard.take for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            record = self._features.deserialize_example_np(self._source[index])
            for name in {"latent", "latent_std", "text", *IMAGE} & record.keys():
                if not np.isfinite(record[name]).all():
                    raise ValueError(f"its {name} is not finite")
            return record
        except (RuntimeError, ValueError, OSError) as error:
            shard = next(i for i, end in enumerate(self._ends) if index < end)
            first = self._ends[shard] - self._shards[shard].take
            self._damaged.note(f"record {index - first} of {self._shards[shard].filename}", error)
            return None

    def readable(self, index: int) -> dict[str, Any]:
        """The record of that index, or the next one that is not damaged in its place. So a damaged record moves none of
        the others, and processes need not tell each other of it."""
        for i in range(len(self)):
            if (record := self[(index + i) % len(self)]) is not None:
                return record
        raise ValueError(f"every record of {self._shards[0].filename} and its fellows is damaged")


class PreparedVideos:
    """A data set of `dollar prepare`: latents (or their posterior), text states and captions, or prompts alone. Raises
    FileNotFoundError or ValueError for a folder that holds none, or one for other captions' length."""

    def __init__(self, config: DataConfig):
        self.folder, self.config = Path(config.name), config
        self.about = read_about(self.folder)
        if (length := self.about["settings"]["max_text_length"]) > config.max_text_length:
            most = f"config.data.max_text_length {config.max_text_length}"
            raise ValueError(f"{self.folder} holds captions of up to {length} tokens, more than {most}")
        self.info: Any = tfds.builder_from_directory(self.folder).info
        self.has_latents, self._told = "latent" in self.info.features, IMAGE
        shards: dict[str, list[Any]] = {}
        for bucket, shard in zip(self.about["shards"], self.info.splits[SPLIT].file_instructions, strict=True):
            shards.setdefault(bucket, []).append(shard)
        self._damaged = Damaged(config.corrupt_records)
        self.buckets = {name: Records(self.info, part, self._damaged) for name, part in sorted(shards.items())}

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """(t, h, w, c) of every bucket."""
        return [tuple(self.about["latent_shapes"][bucket]) for bucket in self.buckets]

    def check(self, config: DistillConfig, generator: Generator) -> "PreparedVideos":
        """Itself, with the images its teacher is told of; ValueError if another encoded it, or for what it lacks."""
        for name, now in fingerprint(generator).items():
            before = np.array(self.about["fingerprint"][name])
            if before.shape != np.shape(now) or np.abs(before - now).max() > 0.05 * np.abs(before).max():
                found = f"was encoded by another {name} than that of config.teacher {config.teacher}"
                teacher = self.about["settings"]["teacher"]
                raise ValueError(f"{self.folder} {found}: it was prepared with --teacher={teacher}")
        length = self.about["settings"]["max_text_length"]
        if not generator.pipeline.family.masks_padding and length != config.data.max_text_length:
            found = f"holds captions padded to {length} tokens, which this teacher attends to"
            raise ValueError(f"{self.folder} {found}: set config.data.max_text_length to {length}")
        told = self._told = IMAGE[: len(jax.tree.leaves(generator.image_shapes(1)))]
        if self.has_latents and not {*told} <= self.info.features.keys():
            raise ValueError(f"{self.folder} lacks the images this teacher is told of: prepare it with this teacher")
        if self.config.given_frames and self.about["settings"]["sample"]:
            raise ValueError(f"{self.folder} holds samples; a given frame is a mean: prepare it without --sample")
        needed = told or self.config.given_frames or config.student.input == "forward" or config.consistency.weight
        if needed and not self.has_latents:
            mend = "config.student.input to 'backward', config.consistency.weight and config.data.given_frames to 0"
            raise ValueError(f"{self.folder} holds prompts without videos: set {mend}")
        return self

    def some_captions(self, count: int) -> dict[str, Any]:
        """At most so many different captions, the same each time, with what is `Generator.given` for a clip of each."""
        first = "{}x{}".format(*self.about["settings"]["buckets"][0])
        records = self.buckets.get(first) or next(iter(self.buckets.values()))
        spread = np.linspace(0, len(records) - 1, min(8 * count, len(records))).astype(int)
        found = (records.readable(int(i)) for i in spread)
        k = self.config.given_frames
        given = {r["caption"].decode(): self._image(r) or np.array(r.get("latent", ())[:k]) for r in found}
        return dict(itertools.islice(given.items(), count))

    def batches(self, config: DistillConfig, rows: np.ndarray | None = None, sharding: Any = None) -> Any:
        """Shuffled batches without end, of each only `rows` if given; as those of `EncodedVideos`, with `name` as in
        the source. Buckets take turns in proportion to their clips; those of fewer clips than a batch are left out."""
        whole = {name: part for name, part in self.buckets.items() if len(part) >= config.batch_size}
        for name in self.buckets.keys() - whole.keys():
            tqdm.write(f"bucket {name} is left out: {len(self.buckets[name])} clips are fewer than a batch")
        if not whole:
            most, least = max(map(len, self.buckets.values())), f"config.batch_size {config.batch_size}"
            raise ValueError(f"there are {most} training videos of one size in {self.folder}, fewer than {least}")
        rows = np.arange(config.batch_size) if rows is None else rows
        datasets = []
        for number, (name, part) in enumerate(whole.items()):
            row = functools.partial(self._row, shape=self.about["latent_shapes"][name])
            datasets.append(_endless(part, config, number, rows, row))
        mixed = grain.IterDataset.mix(datasets, list(map(len, whole.values()))) if len(datasets) > 1 else datasets[0]
        return iter(prefetch(mixed, config, rows, sharding))

    def _row(self, record: dict[str, Any], rng: np.random.Generator, shape: Sequence[int]) -> dict[str, Any]:
        """A record as a batch's row: a fresh sample of the posterior, padded text; zeros for prompts alone."""
        latent = record["latent"].astype(np.float32) if self.has_latents else np.zeros(shape, np.float32)
        if "latent_std" in record:
            noise = record["latent_std"].astype(np.float32) * rng.standard_normal(latent.shape, np.float32)
            latent[self.config.given_frames :] += noise[self.config.given_frames :]  # of an image the mean is given
        text = np.zeros((self.config.max_text_length, record["text"].shape[-1]), np.float32)
        text[: len(record["text"])] = record["text"]
        names = {name: record[name].decode() for name in ("caption", "name")}
        return {"latent": latent, "text": text, "image": self._image(record), **names}

    def _image(self, record: dict[str, Any]) -> ImageCondition | None:
        found = [record[name].astype(np.float32) for name in self._told if name in record]
        return ImageCondition(*found) if found else None


def _endless(records: Records, config: DistillConfig, number: int, rows: np.ndarray, row: Any) -> grain.IterDataset:
    """Batches of the `number`-th bucket, whose order and noise are its own; of each, only `rows` are read."""

    def load(places: np.ndarray) -> dict[str, np.ndarray]:
        parts = []
        for place, index in places[rows].tolist():
            # The noise goes by the place in the run, whichever process reads it.
            parts.append(row(records.readable(index), np.random.default_rng([config.seed, number, place])))
        return jax.tree.map(lambda *found: np.stack(found), *parts)

    dataset = grain.MapDataset.range(len(records)).seed(config.seed + 1_000_003 * number).shuffle().repeat()
    dataset = dataset.map_with_index(lambda place, index: np.array([place, index]))
    dataset = dataset.batch(config.batch_size, drop_remainder=True).map(load)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


def prefetch(
    batches: grain.IterDataset, config: DistillConfig, rows: np.ndarray, sharding: Mapping[str, Any] | None
) -> grain.IterDataset:
    """Batches whose arrays a thread also puts on the devices, `config.data.prefetch` batches ahead of the step. They
    hold this process's `rows` of the step's batch. The position in checkpoints is that of the last batch taken."""
    if sharding is None:
        return batches

    def place(batch: dict[str, Any]) -> dict[str, Any]:
        where = {name: sharding[name] for name in ("latent", "text", "image") if sharding.get(name)}
        arrays = {name: batch[name] for name in where}
        arrays = jax.tree.map(lambda x, s: make_global_rows(x, rows, s, config.batch_size), arrays, where)
        return {**batch, "on_device": arrays}

    return grain.experimental.ThreadPrefetchIterDataset(batches.map(place), prefetch_buffer_size=config.data.prefetch)


def fingerprint_programs(generator: Generator) -> list[Program]:
    """What `fingerprint` executes."""
    side, mesh = 2 * generator.pipeline.vae.config.scale_factor_spatial, generator.own_mesh
    return [generator.encode_program((1, 1, side, side, 3), mesh), generator.text_program(1, mesh)]


def fingerprint(generator: Generator) -> dict[str, list[float]]:
    """16 numbers of the latent of a fixed picture and of the empty prompt's states: they tell teachers apart."""
    side = 2 * generator.pipeline.vae.config.scale_factor_spatial
    ramp = np.indices((side, side, 3)).sum(0)[None, None] * 7 % 256
    values = {"vae": generator.encode(ramp.astype(np.uint8)), "text_encoder": generator.text([""])}
    return {name: [round(float(x), 5) for x in value.ravel()[:16]] for name, value in values.items()}
