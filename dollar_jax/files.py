"""Files and folders that are there whole or not at all, also after a kill or a crash of the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


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
    yield draft
    for folder, _, names in os.walk(draft):
        for name in (*names, "."):
            _sync(Path(folder, name))
    draft.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
