"""What there is to prepare: videos with captions from a folder, a manifest, tar or parquet files, or TFDS; or prompts.

A source is listed as items, one JSON object per video, without opening a video:

    {"name": "cats/1.mp4", "video": {"path": …}, "caption": "a cat"}

`video` is a file ({"path"}, with "folder" as a manifest names it), a span of bytes in a tar file ({"path", "offset",
"size"}), a row of a parquet file ({"path", "group", "row", "column"}) or a record of a TFDS split ({"record"}).
`caption` is what the source says, whatever its type; in its place `captions` are the files or spans it may be in, of
which the first that holds one counts. `broken` in an item says what was wrong with it already.
"""

import csv
import functools
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.files import open_regular, parse_json, read_text
from dollar_jax.prepare.videos import SUFFIXES, Unusable

Item = dict[str, Any]
MANIFESTS = tuple(f"{stem}.{kind}" for stem in ("metadata", "captions", "manifest") for kind in ("csv", "jsonl"))
MANIFESTS += ("videos2caption.json", "videos.txt", "video.txt")  # FastVideo's, finetrainers'
VIDEO_KEYS = ("video", "file_name", "path")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
PICKLED = ("pth", "pt", "pkl", "pickle")
TFDS, HUB = "tfds:", "hf:"
_LONGEST_CAPTION = 1 << 20  # bytes of its file
_LONGEST_ROW = 100  # lines of a CSV; more are an unbalanced quote


def list_source(source: str) -> Iterator[Item]:
    """The items of a folder, a manifest, or a .tar or .parquet file; in an order that depends on names only. Each
    folder is read by the manifest in it (MANIFESTS), else as its .tar or .parquet files, else as the videos in it, each
    with its caption in a .txt or .json of the same name beside it, and the folders under it. `hf:NAME` is a data set of
    the Hugging Face hub, downloaded as a folder. Raises FileNotFoundError or ValueError when it is none of these.
    """
    path = Path(_downloaded(source.removeprefix(HUB)) if source.startswith(HUB) else source)
    if not path.exists():
        raise FileNotFoundError(f"--source={source} does not exist")
    if path.is_file():
        archive = {".tar": _list_tar, ".parquet": _list_parquet}.get(path.suffix)
        return list_manifest(path) if archive is None else archive(path)
    if len(_manifests(path)) > 1:
        raise ValueError(f"{_several(path)}: give the one you mean as --source")
    return _list_folder(path, path, {_identity(path)})


@functools.cache
def _downloaded(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, repo_type="dataset")


def _manifests(folder: Path) -> list[Path]:
    return [folder / name for name in MANIFESTS if (folder / name).is_file()]


def _several(folder: Path) -> str:
    return f"{folder} holds several manifests, {', '.join(path.name for path in _manifests(folder))}"


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def _list_folder(folder: Path, root: Path, seen: set[tuple[int, int]]) -> Iterator[Item]:
    """`seen` are the folders listed so far: what links lead to again is not listed twice."""
    inside = "" if folder == root else f"{readable(str(folder.relative_to(root)))}/"
    archives = sorted(folder.glob("*.tar")) or sorted(folder.glob("*.parquet"))
    if manifests := _manifests(folder):
        if len(manifests) > 1:
            yield {"name": inside, "broken": _several(folder)}
            return
        archives = manifests
    for path in archives:
        for item in list_source(str(path)):
            yield item | {"name": inside + item["name"]}
    if archives:
        return
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries)
    for name, is_folder, is_link in names:
        path = folder / name
        elsewhere = not is_link or not path.resolve().is_relative_to(root.resolve())
        if is_folder:
            if elsewhere and _identity(path) not in seen:
                seen.add(_identity(path))
                yield from _list_folder(path, root, seen)
        elif path.suffix.lower() not in SUFFIXES or name.startswith("._"):
            continue
        elif elsewhere or path.resolve().suffix.lower() not in SUFFIXES:  # else it is listed where it lies
            captions = [{"path": str(path.with_suffix(kind))} for kind in (".txt", ".json")]
            yield {"name": inside + readable(name), "video": {"path": str(path)}, "captions": captions}


def readable(name: str) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def list_manifest(path: Path, prompts: bool = False) -> Iterator[Item]:
    """The rows of a .csv with a header, of a .jsonl or of a .json list: a video and a caption each. A video lies where
    its row says, from the manifest's folder or from videos/ in it. A videos.txt names one on each line, whose caption
    is on the same line of prompts.txt. With `prompts` the caption alone, and a .txt has one on each line. Raises
    ValueError for a file of another kind, or a CSV without such columns.
    """
    needed: list[tuple[str, ...]] = [CAPTION_KEYS] if prompts else [VIDEO_KEYS, CAPTION_KEYS]
    csv_rows = functools.partial(_csv_rows, needed=needed)  # which reads the header at once
    readers: dict[str, Any] = {".csv": csv_rows, ".jsonl": _json_rows, ".json": _json_list}
    if prompts or path.name in MANIFESTS:
        readers[".txt"] = _text_rows if prompts else _paired_rows
    if path.suffix not in readers:
        raise ValueError(f"{path} must be a {', '.join(readers)}" + ("" if prompts else ", .tar, .parquet or a folder"))
    open_regular(path).close()  # a pipe would be waited for
    return (_manifest_item(path, number, row, prompts) for number, row in readers[path.suffix](path))


def _manifest_item(path: Path, number: int, row: Any, prompts: bool) -> Item:
    where = f"{path.name}:{number}"
    if not isinstance(row, dict):
        return {"name": where, "broken": "is no JSON object"}
    if "broken" in row:
        return {"name": where, "broken": row["broken"]}
    item: Item = {"name": where, "caption": _first(row, CAPTION_KEYS)}
    if prompts:
        return item
    video = _first(row, VIDEO_KEYS)
    if not video:
        return {"name": where, "broken": f"names no video: a row needs {' or '.join(VIDEO_KEYS)}"}
    return {**item, "name": readable(str(video)), "video": {"path": str(video), "folder": str(path.parent)}}


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _csv_rows(path: Path, needed: list[tuple[str, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            header = next(csv.reader(file), [])
        except csv.Error as error:
            raise ValueError(f"{path} begins with no header of a CSV: {error}") from error
    for keys in needed:
        _column(path, header, keys)
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path} has two columns {twice[0]!r}: leave one of them")

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            number, lines = 0, iter(file)
            while True:
                taken: list[str] = []

                def row_lines(lines: Iterator[str] = lines, taken: list[str] = taken) -> Iterator[str]:
                    for line in lines:
                        taken.append(line)
                        if len(taken) > _LONGEST_ROW:
                            raise csv.Error("it goes on for too long")
                        yield line

                try:
                    fields = next(csv.reader(row_lines(), strict=True))
                except StopIteration:
                    return
                except csv.Error as error:
                    yield number + 1, {"broken": f"is no row of a CSV: {error}; is a quote not closed?"}
                    # Only the row that the quote opens is lost.
                    number, lines = number + 1, itertools.chain(taken[1:], lines)
                    continue
                number += len(taken)
                if number > len(taken) and fields:  # the first is the header
                    yield number, dict(zip(header, fields, strict=False))

    return rows()


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, parse_json(line, "it")
                except ValueError:
                    yield number, None


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    rows = parse_json(read_text(path), path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of objects with {VIDEO_KEYS[0]} and {CAPTION_KEYS[0]}")
    return iter(enumerate(rows, 1))


def _text_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"caption": line.strip()}


def _paired_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    captions = path.with_name(path.name.replace("video", "prompt"))
    if not captions.is_file():
        raise ValueError(f"{path} names videos, but there is no {captions.name} with their captions beside it")
    pairs = itertools.zip_longest(_text_rows(path), _text_rows(captions))
    for number, (video, caption) in enumerate(pairs, 1):
        if video is None or caption is None:
            raise ValueError(f"{path} and {captions.name} have different numbers of lines")
        yield number, {"video": video[1]["caption"], **caption[1]}


def _list_tar(path: Path) -> Iterator[Item]:
    """WebDataset's samples: members of one name up to the first dot; a video, and a .txt or .json. Only headers are
    read. A tar that ends too early gives what it has, and an item that says so.
    """
    items: dict[str, Item] = {}
    broken = None
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[assignment]  # tarfile would keep every header
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                if not member.isfile() or base.startswith("._"):  # what macOS adds to each file
                    continue
                stem, _, kind = base.partition(".")
                name = f"{path.name}/{folder + '/' if folder else ''}{stem}"
                item = items.setdefault(name, {"name": readable(name), "captions": []})
                span = {"path": str(path), "offset": member.offset_data, "size": member.size}
                if f".{kind.lower()}" in SUFFIXES:
                    item["video"] = span
                elif kind == "txt":
                    item["captions"].insert(0, span)
                elif kind == "json":
                    item["captions"].append({**span, "json": True})
                elif kind.rpartition(".")[2] in PICKLED:
                    item["pickled"] = kind
    except (tarfile.TarError, EOFError) as error:
        broken = {"name": path.name, "broken": f"cannot be read further: {error}"}
    for item in items.values():
        pickled = item.pop("pickled", None)
        if "video" in item:
            yield item
        elif pickled:
            reason = f"holds a pickled .{pickled} and no video: what is pickled can run code and is not read"
            yield {"name": item["name"], "broken": reason}
    if broken:
        yield broken


def _list_parquet(path: Path) -> Iterator[Item]:
    """The rows of a parquet file as `datasets` writes it: a video's bytes or its path, and a caption."""
    import pyarrow.parquet

    file, number = pyarrow.parquet.ParquetFile(path), itertools.count()
    video, caption = (_column(path, file.schema_arrow.names, keys) for keys in (VIDEO_KEYS, CAPTION_KEYS))
    for group in range(file.num_row_groups):
        for row, text in enumerate(file.read_row_group(group, columns=[caption]).column(0).to_pylist()):
            place = {"path": str(path), "group": group, "row": row, "column": video}
            yield {"name": f"{path.name}:{next(number)}", "video": place, "caption": text}


def _column(path: Path, names: list[str], keys: tuple[str, ...]) -> str:
    if not (found := [name for name in keys if name in names]):
        raise ValueError(f"{path} has no column {' or '.join(keys)}; its columns are {', '.join(names)}")
    return found[0]


def read_caption(item: Item, rng: np.random.Generator | None = None, language: str | None = None) -> str:
    """The caption, stripped: of a list the first, or with `rng` any; of an object by language that of `language`.
    Raises Unusable when there is none that is text.
    """
    if "broken" in item:
        raise Unusable(item["broken"])
    if "captions" not in item:
        return _text(item["caption"], rng, language)
    reason = Unusable("has no caption")
    for place in item["captions"]:
        try:
            data = _read(place)
            text: Any = data.decode("utf-8-sig", errors="replace")
            if data and (place.get("json") or place["path"].endswith(".json")):
                fields = parse_json(text, "it")
                text = _first(fields, CAPTION_KEYS) if isinstance(fields, dict) else None
            return _text(text, rng, language)
        except FileNotFoundError:
            if place is item["captions"][0]:
                reason = Unusable(f"has no caption: there is no {Path(place['path']).name}")
        except ValueError as error:
            reason = error if isinstance(error, Unusable) else Unusable("has a caption that is no JSON")
    raise reason


def _text(value: Any, rng: np.random.Generator | None, language: str | None) -> str:
    if isinstance(value, list) and value:
        return _text(value[0 if rng is None else rng.integers(len(value))], rng, language)
    if isinstance(value, dict) and language in value:
        return _text(value[language], rng, language)
    if value is None or value in ([], {}) or value != value:  # NaN is not equal to itself
        raise Unusable("has no caption")
    if not isinstance(value, str):
        shown = json.dumps(value, ensure_ascii=False, default=str)[:60]
        hint = "; --language takes one of an object's" if isinstance(value, dict) else ""
        raise Unusable(f"has a caption that is no text: {shown}{hint}")
    if not value.strip():
        raise Unusable("has no caption")
    return readable(value.strip().encode("utf-8", "replace").decode())


def open_video(item: Item) -> Any:
    """What `read_clips` opens; raises Unusable for a missing or empty file."""
    video = item["video"]
    if "row" in video:
        return _parquet_video(video)
    if "offset" in video:
        if not video["size"]:
            raise Unusable("is empty")
        return io.BytesIO(_read(video))
    names = dict.fromkeys((video["path"], video["path"].replace("\\", "/")))
    folders = (video["folder"], os.path.join(video["folder"], "videos")) if "folder" in video else ("",)
    places = [Path(folder, name) for folder in folders for name in names]
    path = next((place for place in places if os.path.exists(place)), places[0])
    if not path.is_file():
        raise Unusable("is no file" if path.exists() else "does not exist")
    if not path.stat().st_size:
        raise Unusable("is empty")
    return str(path)


def _parquet_video(place: dict[str, Any]) -> Any:
    value = _row_group(place["path"], place["group"], place["column"])[place["row"]].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return open_video({"video": {"path": value, "folder": str(Path(place["path"]).parent)}})
    if not value:
        raise Unusable("is empty")
    return io.BytesIO(value)


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def _read(span: dict[str, Any]) -> bytes:
    if "offset" not in span:
        if not (path := Path(span["path"])).exists():
            raise FileNotFoundError(path)
        if not path.is_file() or path.stat().st_size > _LONGEST_CAPTION:
            raise Unusable(f"has a caption that is no small file: {path.name}")
        return path.read_bytes()
    with open(span["path"], "rb") as file:
        file.seek(span["offset"])
        data = file.read(span["size"])
    if len(data) < span["size"]:
        raise Unusable("is cut off: its tar file ends before it")
    return data


class Dataset:
    """A split of a TFDS data set as a source: its records' video and caption features."""

    def __init__(self, name: str, split: str):
        """`name` is a TFDS name, or the folder of a prepared data set. Raises ValueError when it does not have one
        video feature and one text or label feature.
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
        text, feature = record[self.caption], self.features[self.caption]
        if hasattr(feature, "int2str"):
            text = feature.int2str(int(text)).replace("_", " ")
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        if not text.strip():
            raise Unusable("has no caption")
        return np.asarray(record[self.video], np.uint8), text.strip()


def _only(name: str, what: str, found: list[str]) -> str:
    if len(found) != 1:
        raise ValueError(f"{name} must have one {what} feature, but has {', '.join(found) or 'none'}")
    return found[0]
