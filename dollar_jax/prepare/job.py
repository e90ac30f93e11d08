"""`dollar prepare`: videos and captions, or prompts alone, as a TFDS data set of latents and text states.

The list of videos is cut into units of `shard_size` videos. A unit becomes one ArrayRecord shard for each aspect
bucket that occurs in it. Until all units are finished, their files lie in OUT/parts:

    parts/index.jsonl                 the list, written once, so that a resumed job goes through the same list
    parts/00012-480x832.shard         a shard of unit 12
    parts/00012.jpg                   a preview of the first clips of unit 12
    parts/00012.json                  the report of unit 12, written when its shards are whole: counts, rejected videos

In the end the shards are moved to OUT under the names of a TFDS data set, and parts/ is deleted. A unit depends on the
list and the settings alone, so that a job that was killed and resumed ends with the same bytes as any other."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from dollar_jax.data.prepared import NAME, SPLIT, fingerprint
from dollar_jax.files import new_file, read_json, write_file
from dollar_jax.generate import Generator
from dollar_jax.prepare.clips import Clip, Loader
from dollar_jax.prepare.settings import PARTS, PrepareSettings, bucket_name, remember_settings
from dollar_jax.prepare.shards import PREVIEW, Encoder, Unit, report_path
from dollar_jax.prepare.sources import Item

REJECTED = "rejected.jsonl"


class Summary(NamedTuple):
    """What a job has made; `waiting` is the number of units that other hosts have yet to finish."""

    clips: int
    videos: int
    rejected: int
    waiting: int


def prepare(
    settings: PrepareSettings, generator: Generator, out: Path, index: int = 0, count: int = 1, workers: int = 4
) -> Summary:
    """Makes the data set in `out`, or resumes an unfinished job there; a finished one is left as it is. Of several
    hosts that write to the same `out` each takes every `count`-th unit, and host 0 waits for the others and
    finishes. Raises ValueError before any work for impossible settings or an unusable source, or when `out` holds
    something else; and in the end when not one video could be used."""
    loader = Loader(settings)
    if next(loader.items(), None) is None:
        raise ValueError(f"there is nothing to prepare in {settings.source or settings.prompts}")
    encoder = Encoder(settings, generator)
    if settings.latents:
        found = (clip for item in loader.items() for clip in loader(0, item) if isinstance(clip, Clip))
        encoder.check(next((clip.latent for clip in found if clip.latent is not None), None))
    remember_settings(settings, out)
    if not (parts := out / PARTS).exists():
        return _finished(out)
    total = _write_index(parts / "index.jsonl", loader.items())
    units = -(-total // settings.shard_size)
    mine = range(index, units, count)
    todo = _missing(parts, mine)
    sizes = [min(settings.shard_size, total - unit * settings.shard_size) for unit in range(units)]
    expected = sum(sizes[unit] for unit in mine)
    done = expected - sum(sizes[unit] for unit in todo)
    with tqdm(total=expected, initial=done, desc="preparing", unit="video", smoothing=0.05) as bar:
        encode_units(todo, encoder, out, workers, bar)
    if index:
        with contextlib.suppress(FileNotFoundError):  # host 0 finishes as soon as it sees the last unit
            summary = _tally(parts, units)
            if parts.exists():
                return summary
        return _finished(out)
    _wait(parts, units)
    return _finish(settings, encoder, out, units)


def encode_units(units: Collection[int], encoder: Encoder, out: Path, workers: int, bar: tqdm) -> None:
    """Writes the shards and reports of these units into `out`; `workers` threads decode videos, `bar` counts them."""
    size, rejected = encoder.settings.shard_size, 0
    items = _read_index(out / PARTS / "index.jsonl", set(units), size)
    loaded = _load_ahead(Loader(encoder.settings), items, workers)
    for unit, members in itertools.groupby(loaded, lambda loaded: loaded[0] // size):
        job, before = Unit(out, unit, encoder), rejected
        for index, item, clips in members:
            job.add(index, item, clips)
            rejected = before + len(job.rejected)
            bar.update()
            bar.set_postfix({"rejected": rejected} if rejected else None, refresh=False)
        job.close()


def _load_ahead(load: Loader, items: Iterable[tuple[int, Item]], workers: int) -> Iterator[tuple[int, Item, Any]]:
    """(index, item, load(index, item)) in order, with the next 2 · `workers` items being loaded in threads."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[int, Item, Future[Any]]] = deque()
        for index, item in items:
            ahead.append((index, item, pool.submit(load, index, item)))
            if len(ahead) > 2 * workers:
                index, item, future = ahead.popleft()
                yield index, item, future.result()
        for index, item, future in ahead:
            yield index, item, future.result()


def _missing(parts: Path, units: Iterable[int]) -> list[int]:
    return [unit for unit in units if not report_path(parts, unit).exists()]


def _reports(parts: Path, units: int) -> Iterator[dict[str, Any]]:
    for unit in range(units):
        if report_path(parts, unit).exists():
            yield read_json(report_path(parts, unit))


def _tally(parts: Path, units: int) -> Summary:
    reports = list(_reports(parts, units))
    clips = sum(shard["clips"] for report in reports for shard in report["shards"])
    videos, rejected = sum(r["videos"] for r in reports), sum(len(r["rejected"]) for r in reports)
    return Summary(clips, videos, rejected, units - len(reports))


def _wait(parts: Path, units: int) -> None:
    """Returns when the other hosts have finished their units."""
    if not (missing := _missing(parts, range(units))):
        return
    with tqdm(total=len(missing), desc="waiting for the other hosts", unit="shard") as bar:
        while missing:
            time.sleep(1)
            missing = _missing(parts, missing)
            bar.update(bar.total - len(missing) - bar.n)


def _finish(settings: PrepareSettings, encoder: Encoder, out: Path, units: int) -> Summary:
    """Moves the shards to their final names and writes the TFDS metadata; may be killed and run again at any point."""
    parts = out / PARTS
    summary = _tally(parts, units)
    shards: list[tuple[int, dict[str, Any]]] = []
    with new_file(out / REJECTED, drafts=parts) as draft, draft.open("w", encoding="utf-8") as rejected:
        for unit, report in enumerate(_reports(parts, units)):
            shards += [(unit, shard) for shard in report["shards"]]
            rejected.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in report["rejected"])
    if not shards:
        mend = f"{out / REJECTED} says why. Mend them and start again with another --out, or remove {out}"
        raise ValueError(f"none of the {summary.videos} videos could be used: {mend}")
    for number, (unit, shard) in enumerate(shards):
        part = parts / f"{unit:05d}-{shard['bucket']}.shard"
        name = f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{len(shards):05d}"
        if part.exists() or not (out / name).exists():
            part.replace(out / name)
    for sheet in sorted(parts.glob("[0-9]*.jpg"))[:1]:
        write_file(out / PREVIEW, sheet.read_bytes(), drafts=parts)
    lengths, size = [shard["clips"] for _, shard in shards], sum(shard["bytes"] for _, shard in shards)
    vae = encoder.generator.pipeline.vae.config
    about = {"settings": dataclasses.asdict(settings), "shards": [shard["bucket"] for _, shard in shards]}
    about["latent_shapes"] = {bucket_name(b): vae.latent_shape(settings.frames, *b) for b in settings.buckets}
    about |= {"fingerprint": fingerprint(encoder.generator), "videos": summary.videos, "rejected": summary.rejected}
    told: Any = {"split_infos": [tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size)]}
    told |= {"filename_template": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "check_data": False}
    told |= {"description": "Latents and text states of captioned videos, made by dollar prepare."}
    told |= {"features": encoder.features, "metadata": tfds.core.MetadataDict(about)}
    tfds.folder_dataset.write_metadata(data_dir=out, **told)
    # Renamed first: a parts/ that is half deleted would look like an unfinished job.
    shutil.rmtree(parts.rename(out / f".{PARTS}"))
    return summary


def _finished(out: Path) -> Summary:
    shutil.rmtree(out / f".{PARTS}", ignore_errors=True)
    info: Any = tfds.builder_from_directory(out).info
    return Summary(info.splits[SPLIT].num_examples, info.metadata["videos"], info.metadata["rejected"], 0)


def _write_index(path: Path, items: Iterator[Item]) -> int:
    """Writes the list unless it was written before; returns its length."""
    if not path.exists():
        with new_file(path) as draft, draft.open("w", encoding="utf-8") as file:
            for item in tqdm(items, "listing", unit="video", mininterval=1):
                file.write(json.dumps(item) + "\n")
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _read_index(path: Path, units: set[int], size: int) -> Iterator[tuple[int, Item]]:
    """The items of these units of `size` items, each with its place in the list."""
    with path.open() as file:
        for index, line in enumerate(file):
            if index // size in units:
                yield index, json.loads(line)
