"""Lists of videos with captions, or of prompts, in text files: a row each, as an item of `sources`."""

import csv
import functools
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dollar_jax.files import open_regular, parse_json, read_json

Item = dict[str, Any]
Rows = Iterator[tuple[int, Any]]
MANIFESTS = tuple(f"{stem}.{kind}" for stem in ("metadata", "captions", "manifest") for kind in ("csv", "tsv", "jsonl"))
MANIFESTS += ("videos2caption.json", "videos.txt", "video.txt")  # FastVideo's, finetrainers'
VIDEO_KEYS = ("video", "file_name", "path")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
_LONGEST_ROW = 100  # lines of a CSV; more are an unbalanced quote


def list_manifest(path: Path, prompts: bool = False) -> Iterator[Item]:
    """The rows of a .csv or .tsv with a header, of a .jsonl or of a .json list: a video and a caption each. A video
    lies where its row says, from the manifest's folder or from videos/ in it. A videos.txt names one on each line,
    whose caption is on the same line of prompts.txt. With `prompts` the caption alone, and a .txt has one on each line.
    Raises ValueError for a file of another kind, or a CSV without such columns."""
    needed: list[tuple[str, ...]] = [CAPTION_KEYS] if prompts else [VIDEO_KEYS, CAPTION_KEYS]
    csv_rows = functools.partial(_csv_rows, needed=needed)  # which reads the header at once
    readers: dict[str, Any] = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": _json_rows}
    readers[".json"] = lambda path: enumerate(read_json(path, list), 1)
    if prompts or path.name in MANIFESTS:
        readers[".txt"] = _text_rows if prompts else _paired_rows
    if (kind := path.suffix.lower()) not in readers:
        raise ValueError(f"{path} must be a {', '.join(readers)}" + ("" if prompts else ", .tar, .parquet or a folder"))
    open_regular(path).close()  # a pipe would be waited for
    return (_manifest_item(path, number, row, prompts) for number, row in readers[kind](path))


def readable(name: str) -> str:
    """A text of any bytes, or of halves of characters, as one that can be written."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def first_of(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def column(path: Path, names: list[str], keys: tuple[str, ...]) -> str:
    """The first of `keys` among a file's columns; ValueError naming what there is."""
    if not (found := [name for name in keys if name in names]):
        raise ValueError(f"{path} has no column {' or '.join(keys)}; its columns are {', '.join(names)}")
    return found[0]


def encoding_of(start: bytes) -> tuple[str, str]:
    """Encoding and `errors` of a text that begins so: UTF-16 where it says so, as Windows writes it; else UTF-8, whose
    other bytes become lone surrogates: they may name a file, but are no caption."""
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    return ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")


def _open(path: Path, newline: str | None = None) -> TextIO:
    with path.open("rb") as file:
        encoding, errors = encoding_of(file.read(2))
    return path.open(encoding=encoding, errors=errors, newline=newline)


def _manifest_item(path: Path, number: int, row: Any, prompts: bool) -> Item:
    where = readable(f"{path.name}:{number}")
    if not isinstance(row, dict):
        return {"name": where, "broken": "is no JSON object"}
    if "broken" in row:
        return {"name": where, "broken": row["broken"]}
    item: Item = {"name": where, "caption": first_of(row, CAPTION_KEYS)}
    if prompts:
        return item
    if not (video := first_of(row, VIDEO_KEYS)):
        return {"name": where, "broken": f"names no video: a row needs {' or '.join(VIDEO_KEYS)}"}
    return {**item, "name": readable(str(video)), "video": {"path": str(video), "folder": str(path.parent)}}


def _csv_rows(path: Path, needed: list[tuple[str, ...]]) -> Rows:
    with _open(path, newline="") as file:
        first = file.readline()
    kind: Any = {"delimiter": max(",;\t|", key=first.count), "skipinitialspace": True, "strict": True}
    try:
        header = [name.strip().lower() for name in next(csv.reader([first], **kind), [])]
    except csv.Error as error:
        raise ValueError(f"{path} begins with no header of a CSV: {error}") from error
    for keys in needed:
        column(path, header, keys)
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path} has two columns {twice[0]!r}: leave one of them")

    def rows() -> Rows:
        with _open(path, newline="") as file:
            file.readline()
            number, ahead, taken = 1, deque[str](), list[str]()

            def lines() -> Iterator[str]:
                while line := ahead.popleft() if ahead else file.readline():
                    taken.append(line)
                    if len(taken) > _LONGEST_ROW:
                        raise csv.Error("it goes on for too long")
                    yield line

            while True:
                taken.clear()
                try:
                    fields = next(csv.reader(lines(), **kind), None)
                except csv.Error as error:
                    number += 1
                    yield number, {"broken": f"is no row of a CSV: {error}; is a quote not closed?"}
                    ahead.extendleft(reversed(taken[1:]))  # only the row that the quote opens is lost
                    continue
                if fields is None:
                    return
                number += len(taken)
                if any(fields[len(header) :]):
                    broken = f"has {len(fields)} fields, and the header {len(header)}: is a text without its quotes?"
                    yield number, {"broken": broken}
                elif fields:
                    yield number, dict(zip(header, fields, strict=False))

    return rows()


def _json_rows(path: Path) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, parse_json(line, "it")
                except ValueError:
                    yield number, None


def _text_rows(path: Path) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"caption": line.strip()}


def _paired_rows(path: Path) -> Rows:
    if not (captions := path.with_name(path.name.replace("video", "prompt"))).is_file():
        raise ValueError(f"{path} names videos, but there is no {captions.name} with their captions beside it")
    if sum(1 for _ in _text_rows(path)) != sum(1 for _ in _text_rows(captions)):
        raise ValueError(f"{path} and {captions.name} have different numbers of lines")
    pairs = zip(_text_rows(path), _text_rows(captions), strict=True)
    return ((number, {"video": video["caption"], **caption}) for (number, video), (_, caption) in pairs)
