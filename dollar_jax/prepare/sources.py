"""What there is to prepare: videos with captions from a folder, a manifest, tar or parquet files, or TFDS; or prompts.

A source is listed as items, one JSON object per video, without opening a video:

    {"name": "cats/1.mp4", "video": {"path": …}, "caption": "a cat"}

`video` is a file ({"path"}, with "folder" as a manifest names it), a span of bytes in a tar file ({"path", "offset",
"size"}, with "latent" where it is one), a row of a parquet file ({"path", "group", "row", "column"}) or a record of a
TFDS split ({"record"}).
`caption` is what the source says, whatever its type; in its place `captions` are the files or spans it may be in, of
which the first that holds one counts. `broken` in an item says what was wrong with it already."""

import functools
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.files import download, first_line, parse_json
from dollar_jax.prepare import manifests
from dollar_jax.prepare.manifests import CAPTION_KEYS, Item, column, first_of, list_manifest, readable
from dollar_jax.prepare.videos import SUFFIXES, Unusable
from dollar_jax.weights.torch_file import read_torch

_PICKLED = "what is pickled can run code and is not read"
_LATENTS = "it does not say which VAE made it, nor how it is scaled"
_TORCH = ("pth", "pt")
INSTEAD = dict.fromkeys((*_TORCH, "pkl", "pickle"), _PICKLED) | dict.fromkeys(("npy", "npz", "safetensors"), _LATENTS)
_PARTS = ("latent", "embed", "prompt")  # of a sample of rCM's: NAME.latent.pth, NAME.embed.pth, NAME.prompt.txt
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_NO_CAPTION = ("", "nan", "none", "null", "n/a")
TFDS, HUB = "tfds:", "hf:"
_LONGEST_CAPTION = 1 << 20  # bytes of its file


def list_source(source: str) -> Iterator[Item]:
    """The items of a folder, a manifest, or a .tar or .parquet file; in an order that depends on names only. Each
    folder is read by the manifest in it (MANIFESTS), else as its .tar or .parquet files, else as the videos in it, each
    with its caption in a .txt or .json of the same name beside it, and the folders under it. `hf:NAME` is a data set of
    the Hugging Face hub, downloaded as a folder. Raises FileNotFoundError or ValueError when it is none of these."""
    path = _downloaded(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"--source={source} does not exist")
    if not path.is_dir():
        archive = {".tar": _list_tar, ".parquet": _list_parquet}.get(path.suffix.lower())
        return list_manifest(path) if archive is None else archive(path)
    if len(manifests := _manifests(path)) > 1:
        raise ValueError(f"{_several(path)}: give the one you mean as --source")
    return list_manifest(manifests[0]) if manifests else _list_folder(path, path, {_identity(path)})


@functools.cache
def _downloaded(name: str) -> Path:
    name, _, revision = name.partition("@")
    return download(name, f"the hub did not give the data set {name}", repo_type="dataset", revision=revision or None)


def _manifests(folder: Path) -> list[Path]:
    return [folder / name for name in manifests.MANIFESTS if (folder / name).is_file()]


def _several(folder: Path) -> str:
    return f"{folder} holds several manifests, {', '.join(path.name for path in _manifests(folder))}"


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def _list_folder(folder: Path, root: Path, seen: set[tuple[int, int]]) -> Iterator[Item]:
    """`seen` are the folders listed so far: what links lead to again is not listed twice. Nothing hidden is listed."""
    inside = "" if folder == root else f"{readable(str(folder.relative_to(root)))}/"
    try:
        with os.scandir(folder) as entries:
            kinds = [(e.name, e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries if e.name[0] != "."]
        # os.path takes a link to itself for no folder.
        found = sorted((name, os.path.isdir(folder / name) if link else kind, link) for name, kind, link in kinds)
    except OSError as error:
        yield {"name": inside, "broken": f"cannot be read: {error.strerror}"}
        return
    by_kind: dict[str, list[Path]] = {}
    for name, is_folder, _ in found:
        if not is_folder:
            by_kind.setdefault(Path(name).suffix.lower(), []).append(folder / name)
    lists = _manifests(folder) or by_kind.get(".tar") or by_kind.get(".parquet") or []
    if len(_manifests(folder)) > 1:
        yield {"name": inside, "broken": _several(folder)}
        return
    for path in lists:
        try:
            for item in list_source(str(path)):
                yield item | {"name": inside + item["name"]}
        except (OSError, ValueError) as error:
            yield {"name": inside + readable(path.name), "broken": f"cannot be read: {error}"}
    if _manifests(folder):
        return
    for path in (path for kind in _COMPRESSED for path in by_kind.get(kind, ())):
        yield {"name": inside + readable(path.name), "broken": "is compressed: unpack it"}
    for name, is_folder, is_link in found if not lists else ():
        path = folder / name
        if is_link and _is_listed_where_it_lies(path, root):
            continue
        if is_folder:
            if _identity(path) not in seen:
                seen.add(_identity(path))
                yield from _list_folder(path, root, seen)
        elif path.suffix.lower() in SUFFIXES:
            captions = [{"path": str(path.with_suffix(kind))} for kind in (".txt", ".json")]
            yield {"name": inside + readable(name), "video": {"path": str(path)}, "captions": captions}


def _is_listed_where_it_lies(link: Path, root: Path) -> bool:
    there, top = os.path.realpath(link), os.path.realpath(root)
    if not os.path.exists(there) or not Path(there).is_relative_to(top):
        return False
    listed = os.path.isdir(there) or Path(there).suffix.lower() in SUFFIXES
    return listed and not any(part.startswith(".") for part in Path(there).relative_to(top).parts)


def _list_tar(path: Path) -> Iterator[Item]:
    """WebDataset's samples: members of one name; a video or latent, and a .txt or .json. Only headers are read. A tar
    that ends too early, or is damaged, gives what it has, and an item that says so."""
    items: dict[str, Item] = {}
    broken = None
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[assignment]  # tarfile would keep every header
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = base.rpartition(".")
                whole, _, part = stem.rpartition(".") if kind in (*_TORCH, "txt") else ("", "", "")
                stem, part = (whole, part) if whole and part in _PARTS else (stem, "")
                if member.isdir() or base.startswith("."):  # what macOS adds to each file
                    continue
                name = f"{path.name}/{folder + '/' if folder else ''}{stem}"
                item = items.setdefault(name, {"name": readable(name), "captions": []})
                span = {"path": str(path), "offset": member.offset_data, "size": member.size}
                if f".{kind.lower()}" in SUFFIXES:
                    item["video"] = span
                    if not member.isfile():
                        item["broken"] = "is a link inside a tar file"
                elif kind.lower() == "txt":
                    item["captions"].insert(0, span)
                elif kind.lower() == "json":
                    item["captions"].append({**span, "json": True})
                elif part == "latent" and member.isfile():
                    item.setdefault("video", {**span, "latent": True})
                elif kind in INSTEAD and part != "embed":
                    item["instead"] = kind
            assert tar.fileobj
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        broken = {"name": readable(path.name), "broken": f"cannot be read further: {error}"}
    for item in items.values():
        instead = item.pop("instead", None)
        if "video" in item:
            yield item
        elif instead:
            yield {"name": item["name"], "broken": f"holds a .{instead} and no video: {INSTEAD[instead]}"}
    if broken:
        yield broken


def _list_parquet(path: Path) -> Iterator[Item]:
    """The rows of a parquet file as `datasets` writes it: a video's bytes or its path, and a caption."""
    import pyarrow.parquet

    file, number = pyarrow.parquet.ParquetFile(path), itertools.count()
    video, caption = (column(path, file.schema_arrow.names, keys) for keys in (manifests.VIDEO_KEYS, CAPTION_KEYS))
    for group in range(file.num_row_groups):
        for row, text in enumerate(file.read_row_group(group, columns=[caption]).column(0).to_pylist()):
            place = {"path": str(path), "group": group, "row": row, "column": video}
            yield {"name": f"{readable(path.name)}:{next(number)}", "video": place, "caption": text}


def read_caption(item: Item, rng: np.random.Generator | None = None, language: str | None = None) -> str:
    """The caption, stripped: of a list the first, or with `rng` any; of an object `language`'s. Raises Unusable."""
    if "broken" in item:
        raise Unusable(item["broken"])
    if "captions" not in item:
        return _text(item["caption"], rng, language)
    reason = Unusable("has no caption")
    for place in item["captions"]:
        try:
            data = _read(place)
            text: Any = data.decode(*manifests.encoding_of(data))
            if data and (place.get("json") or place["path"].endswith(".json")):
                fields = parse_json(text, "it")
                text = first_of(fields, CAPTION_KEYS) if isinstance(fields, dict) else None
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
    if value.strip().lower() in _NO_CAPTION or not any(c.isprintable() and not c.isspace() for c in value):
        raise Unusable("has no caption")
    if re.search("[\0\ufffd\ud800-\udfff]", value):
        raise Unusable(f"has a caption that is not in UTF-8: {readable(value.strip())[:60]!r}")
    return value.strip()


def open_video(item: Item) -> Any:
    """What `read_clips` opens; raises Unusable for a missing or empty file."""
    video = item["video"]
    if "latent" in video:
        raise Unusable("holds a latent and no video: --latents uses those of the teacher's own VAE")
    if "row" in video:
        return _parquet_video(video)
    if "offset" in video:
        if not video["size"]:
            raise Unusable("is empty")
        return io.BytesIO(_read(video))
    names = dict.fromkeys((video["path"], video["path"].replace("\\", "/"), video["path"].strip()))
    folders = (video["folder"], os.path.join(video["folder"], "videos")) if "folder" in video else ("",)
    places = [Path(folder, name) for folder in folders for name in names]
    path = next((place for place in places if os.path.exists(place)), places[0])
    if not path.is_file():
        raise Unusable("is no file" if path.exists() else "does not exist")
    if not path.stat().st_size:
        raise Unusable("is empty")
    return str(path)


def read_latent(item: Item) -> np.ndarray:
    """The latent, float32 [t, h, w, c], of a sample of rCM's, a torch tensor [c, t, h, w]; raises Unusable."""
    if "latent" not in item["video"]:
        raise Unusable("holds no latent: leave out --latents")
    try:
        ((_, latent),) = read_torch(io.BytesIO(_read(item["video"])))
        return np.asarray(latent, np.float32).reshape(latent.shape[-4:]).transpose(1, 2, 3, 0)
    except ValueError as error:
        raise Unusable(f"has a latent that cannot be read: {error}") from error


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
        """`name` is a TFDS name or folder; ValueError unless it has one video and one text or label feature."""
        import tensorflow_datasets as tfds  # slow to import

        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            try:
                builder = tfds.builder(name, file_format="array_record")
            except ValueError as error:
                raise ValueError(f"TFDS knows no data set {name!r}: {first_line(error)}") from error
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
        self.caption = _only(name, "caption", [k for k in texts if k in CAPTION_KEYS][:1] or texts or labels)

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
        return np.asarray(record[self.video], np.uint8), _text(text, None, None)


def _only(name: str, what: str, found: list[str]) -> str:
    if len(found) != 1:
        raise ValueError(f"{name} must have one {what} feature, but has {', '.join(found) or 'none'}")
    return found[0]
