"""Files and folders that are there whole or not at all, and readers that nothing in a file can make hang or run out.

What is written survives a kill or a crash of the machine. Whatever is read is a regular file: a pipe or a device may
never end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST_TEXT = 2**28  # bytes of a text file that is read as a whole
_DEEPEST = 64  # levels of JSON in JSON


def write_file(path: str | os.PathLike[str], data: bytes | str, drafts: Path | None = None) -> None:
    """Writes a file, text as UTF-8; whoever reads it meets the old content or the new. `drafts`: see `new_file`."""
    with new_file(path, drafts) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], drafts: Path | None = None) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well, and is removed when it fails.

    It lies in the folder of `path`, or in `drafts` on the same file system. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A short name of its own: `path`'s may be as long as names can be, and hosts may share the folder.
    draft = (drafts or path.parent) / f".{uuid.uuid4().hex}.partial"
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well; what a kill left of it is removed.

    Raises FileExistsError when `path` is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already: delete it, or choose another folder")
    draft = path.with_name(f".{path.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for folder, _, names in os.walk(draft):
        for name in (*names, "."):
            _sync(Path(folder, name))
    draft.rename(path)
    _sync(path.parent)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, or a link to one, opened to be read; OSError or ValueError, at once, for anything else."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, where a file was expected")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or it would wait for somebody to write to a pipe
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file, but a pipe or a device, which is not read")
    return os.fdopen(descriptor, "rb")


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT) -> str:
    """A UTF-8 file of at most so many bytes; OSError or ValueError naming it for anything else."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the most that is read of such a file")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: its byte {error.start} is {data[error.start]:#x}") from error


def read_json(path: str | os.PathLike[str], kind: type = dict) -> Any:
    """What a JSON file holds, of that type at its top; raises as `read_text`, and as `parse_json`."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}, not {str(content)[:40]}")
    return content


def parse_json(text: str, where: Any) -> Any:
    """What JSON text says; ValueError naming `where` for what is no JSON, too deep or says a name twice."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it says {next(name for name in names if names.count(name) > 1)!r} twice")
        return found

    if not text.strip():
        raise ValueError(f"{where} is empty, where JSON was expected")
    try:
        level = [content := json.loads(text, object_pairs_hook=fields)]
        for _ in range(_DEEPEST):
            inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
            if not (level := [value for values in inner for value in values]):
                return content
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not valid JSON: {reason}") from error
    raise ValueError(f"{where} is nested more than {_DEEPEST} levels deep")


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file by name; ValueError naming one that is damaged."""
    import numpy as np  # scores of files need none of it

    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or holds no arrays ({error}); if it is ours, delete it") from error


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
