"""What there is to prepare: videos with captions from a folder, a manifest, tar files or TFDS; or prompts alone.

A source is listed as items, one JSON object per video, without opening a video and without holding the list:

    {"name": "cats/1.mp4", "video": {"path": …}, "caption": "a cat"}

`video` is a file, a span of bytes in a tar file ({"path", "offset", "size"}) or a record of a TFDS split
({"record"}). `caption` is the text, or the {"path"} or span of the file it is in. `broken` in an item says what
was wrong with its line already.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.prepare.videos import SUFFIXES, Unusable

Item = dict[str, Any]
MANIFESTS = tuple(f"{stem}.{kind}" for stem in ("metadata", "captions", "manifest") for kind in ("csv", "jsonl"))
VIDEO_KEYS = ("video", "file_name", "path")
CAPTION_KEYS = ("caption", "text", "prompt")
TFDS = "tfds:"


def list_source(source: str) -> Iterator[Item]:
    """The items of a folder, a .csv or .jsonl manifest, or a .tar; in an order that depends on names only.

    A folder is read by the manifest in it (MANIFESTS), else as its .tar files, else as the videos in it and in the
    folders under it, each with its caption in a .txt of the same name beside it.

    Raises FileNotFoundError or ValueError when it is none of these.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--source={source} does not exist")
    if path.is_file():
        return _list_tar(path) if path.suffix == ".tar" else list_manifest(path)
    manifests = [path / name for name in MANIFESTS if (path / name).is_file()]
    if len(manifests) > 1:
        names = ", ".join(m.name for m in manifests)
        raise ValueError(f"{path} holds several manifests, {names}: give the one you mean as --source")
    if manifests:
        return list_manifest(manifests[0])
    if tars := sorted(path.glob("*.tar")):
        return (item for tar in tars for item in _list_tar(tar))
    return _list_folder(path, path)


def _list_folder(folder: Path, root: Path) -> Iterator[Item]:
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in names:
        path = folder / name
        if is_folder:
            yield from _list_folder(path, root)
        elif path.suffix.lower() in SUFFIXES and not name.startswith("._"):
            yield {
                "name": str(path.relative_to(root)),
                "video": {"path": str(path)},
                "caption": {"path": str(path.with_suffix(".txt"))},
            }


def list_manifest(path: Path, prompts: bool = False) -> Iterator[Item]:
    """The rows of a .csv with a header or of a .jsonl: a video (relative to the manifest) and a caption each.

    With `prompts` the caption alone, and a .txt has one on each line. Raises ValueError for a file of another
    kind, or a CSV without such columns.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_rows} | ({".txt": _text_rows} if prompts else {})
    if path.suffix not in readers:
        raise ValueError(f"{path} must be a {', '.join(readers)}" + ("" if prompts else ", .tar or a folder"))
    # Read at once up to the first row, so that a file of the wrong kind is refused here.
    rows = readers[path.suffix](path, (() if prompts else (VIDEO_KEYS,)) + (CAPTION_KEYS,))
    return (_manifest_item(path, number, row, prompts) for number, row in rows)


def _manifest_item(path: Path, number: int, row: dict[str, Any], prompts: bool) -> Item:
    where = f"{path.name}:{number}"
    if "broken" in row:
        return {"name": where, "broken": row["broken"]}
    caption = _first(row, CAPTION_KEYS)
    # An object would be taken for the place of a file.
    item: Item = {"name": where, "caption": [caption] if isinstance(caption, dict) else caption}
    if prompts:
        return item
    video = _first(row, VIDEO_KEYS)
    if not video:
        return {"name": where, "broken": f"names no video: a row needs {' or '.join(VIDEO_KEYS)}"}
    return {**item, "name": str(video), "video": {"path": os.path.join(path.parent, str(video))}}


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _csv_rows(path: Path, needed: tuple[tuple[str, ...], ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header = next(csv.reader(file), [])
    for keys in needed:
        if not set(keys) & set(header):
            raise ValueError(f"{path} has no column {' or '.join(keys)}; its columns are {', '.join(header)}")

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    yield reader.line_num, row
            except csv.Error as error:  # an unbalanced quote takes in the lines after it
                yield reader.line_num, {"broken": f"cannot be read further: {error}; is a quote not closed?"}

    return rows()


def _json_rows(path: Path, needed: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    del needed  # every line names its own fields
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else {"broken": "is no JSON object"}


def _text_rows(path: Path, needed: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    del needed
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"caption": line.strip()}


def _list_tar(path: Path) -> Iterator[Item]:
    """WebDataset's samples: neighbours of one name up to the first dot; a video, and a .txt or .json.

    Only headers are read. A tar that ends too early gives what it has, and an item that says so.
    """
    item: Item = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[assignment]  # tarfile would keep every header
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                if base.startswith("._"):  # what macOS adds to each file
                    continue
                stem, _, kind = base.partition(".")
                name = f"{path.name}/{folder + '/' if folder else ''}{stem}"
                if name != item.get("name"):
                    if "video" in item:
                        yield item
                    item = {"name": name, "caption": ""}
                span = {"path": str(path), "offset": member.offset_data, "size": member.size}
                if f".{kind.lower()}" in SUFFIXES:
                    item["video"] = span
                elif kind == "txt" or (kind == "json" and not item["caption"]):
                    item["caption"] = {**span, "json": kind == "json"}
        if "video" in item:
            yield item
    except (tarfile.TarError, EOFError) as error:
        if "video" in item:
            yield item
        yield {"name": path.name, "broken": f"cannot be read further: {error}"}


# --- reading what an item names -------------------------------------------------------------------


def read_caption(item: Item) -> str:
    """The caption, stripped, the first of a list; raises Unusable when there is none that is text."""
    if "broken" in item:
        raise Unusable(item["broken"])
    caption = item["caption"]
    if isinstance(caption, dict):
        try:
            data = _read(caption)
        except FileNotFoundError:
            raise Unusable(f"has no caption: there is no {Path(caption['path']).name}") from None
        text = data.decode("utf-8-sig", errors="replace")
        if caption.get("json"):
            try:
                fields = json.loads(text)
            except ValueError:
                raise Unusable("has a caption that is no JSON") from None
            text = _first(fields, CAPTION_KEYS) if isinstance(fields, dict) else None
    else:
        text = caption
    if isinstance(text, list) and text:
        text = text[0]
    if text is None or text == [] or text != text:  # NaN is not equal to itself
        raise Unusable("has no caption")
    if not isinstance(text, str):
        raise Unusable(f"has a caption that is no text: {json.dumps(text, ensure_ascii=False)[:60]}")
    if not text.strip():
        raise Unusable("has no caption")
    return text.strip()


def open_video(item: Item) -> Any:
    """What `read_clips` opens; raises Unusable for a missing or empty file."""
    video = item["video"]
    path = Path(video["path"])
    if "offset" in video:
        if not video["size"]:
            raise Unusable("is empty")
        return io.BytesIO(_read(video))
    if not path.is_file():
        raise Unusable("does not exist")
    if not path.stat().st_size:
        raise Unusable("is empty")
    return str(path)


def _read(span: dict[str, Any]) -> bytes:
    with open(span["path"], "rb") as file:
        if "offset" not in span:
            return file.read()
        file.seek(span["offset"])
        data = file.read(span["size"])
    if len(data) < span["size"]:
        raise Unusable("is cut off: its tar file ends before it")
    return data


class Dataset:
    """A split of a TFDS data set as a source: its records' video and caption features."""

    def __init__(self, name: str, split: str):
        """`name` is a TFDS name, or the folder of a prepared data set.

        Raises ValueError when it does not have one video feature and one text or label feature.
        """
        import tensorflow_datasets as tfds  # slow to import

        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            try:
                builder = tfds.builder(name, file_format="array_record")
            except ValueError as error:
                raise ValueError(f"TFDS knows no data set {name!r}: {str(error).splitlines()[0]}") from error
            builder.download_and_prepare()
        if split not in builder.info.splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        self.name, self.split = name, split
        self.features: Any = builder.info.features
        self.records: Any = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        shapes = {key: feature.shape for key, feature in self.features.items()}
        self.video = _only(name, "video", [k for k, s in shapes.items() if s and len(s) == 4 and s[-1] == 3])
        texts = [k for k, f in self.features.items() if isinstance(f, tfds.features.Text)]
        labels = [k for k, f in self.features.items() if isinstance(f, tfds.features.ClassLabel)]
        named = [k for k in texts if k in CAPTION_KEYS]
        self.caption = _only(name, "caption", named[:1] or texts or labels)

    def items(self) -> Iterator[Item]:
        """One per record; its caption is read with it."""
        for i in range(len(self.records)):
            yield {"name": f"{self.name}/{self.split}/{i}", "video": {"record": i}, "caption": ""}

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """A record's video, uint8 [t, h, w, 3], and caption; a label is its name."""
        record = self.records[index]
        caption = record[self.caption]
        if hasattr(self.features[self.caption], "int2str"):
            text = self.features[self.caption].int2str(int(caption)).replace("_", " ")
        else:
            text = caption.decode(errors="replace") if isinstance(caption, bytes) else str(caption)
        if not text.strip():
            raise Unusable("has no caption")
        return np.asarray(record[self.video], np.uint8), text.strip()


def _only(name: str, what: str, found: list[str]) -> str:
    if len(found) != 1:
        raise ValueError(f"{name} must have one {what} feature, but has {', '.join(found) or 'none'}")
    return found[0]
