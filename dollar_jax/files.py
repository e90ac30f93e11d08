"""Files and folders that are there whole or not at all, and readers that nothing in a file can make hang or run out.
What is written survives a kill or a crash. Whatever is read is a regular file: a pipe or a device may never end."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

MOST_TEXT = 2**28  # bytes of a text file that is read as a whole
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEEPEST = 64  # levels of JSON in JSON
SHA256, XXH128 = "SHA256SUMS", "XXH128SUMS"  # checksums of all files of a folder, as sha256sum and xxh128sum check them
_HASHES: dict[str, Any] = {SHA256: hashlib.sha256, XXH128: xxhash.xxh3_128}


def write_file(path: str | os.PathLike[str], data: bytes | str, drafts: Path | None = None) -> None:
    """Writes a file, text as UTF-8; whoever reads it meets the old content or the new. `drafts`: see `new_file`."""
    with new_file(path, drafts) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any, drafts: Path | None = None) -> None:
    """Writes JSON, whole or not at all: mappings, sequences, strings, booleans, None and numbers (NumPy and JAX scalars
    too). Raises ValueError naming a value of another type, or a number that is NaN or infinite."""
    write_file(path, json.dumps(_plain(value, Path(path).stem), indent=2, ensure_ascii=False) + "\n", drafts)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a measurement failed, and nothing is written with it")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where} is of type {type(value).__name__}, which JSON has no place for")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], drafts: Path | None = None) -> Iterator[Path]:
    """A path in the folder of `path`, or in `drafts`, which becomes `path` when the block ends well."""
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A short name of its own: `path`'s may be as long as names can be, and hosts may share the folder.
    draft = (drafts or path.parent) / f".{uuid.uuid4().hex}.partial"
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.filename == str(draft) or error.errno in _FULL:
            error.filename = str(path)  # what its user knows
        raise
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError unless a file of that name, and folders on the way to it, can be made."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {there} is no folder one may write to")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well; FileExistsError when `path` is there."""
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
            sync(Path(folder, name))
    draft.rename(path)
    sync(path.parent)


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
    if not isinstance(content := parse_json(read_text(path), path), kind):
        raise ValueError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}, not {str(content)[:40]}")
    return content


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says, or its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_json(text: str, where: Any) -> Any:
    """What JSON text says; ValueError naming `where` for what is no JSON, too deep or says a name twice."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
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


def download(name: str, unless: str, **options: Any) -> Path:
    """A repository of the Hugging Face hub; FileNotFoundError that says `unless` and what to do."""
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, **options))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        mend = "download it where the hub can be reached, and give the folder"
        raise FileNotFoundError(f"{unless} ({reason}); {mend}") from error


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file by name; ValueError naming one that is damaged."""
    import numpy as np  # scores of files need none of it

    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or holds no arrays ({error}); if it is ours, delete it") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: str | os.PathLike[str], sums: str = SHA256) -> str:
    """The checksum of a file's content, SHA-256 or XXH3 of 128 bits, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _HASHES[sums]).hexdigest()


def checksums(folder: Path, known: Mapping[str, str] | None = None, sums: str = SHA256) -> dict[str, str]:
    """The checksum of every file of a folder, by its path there; what is `known` already is not read again."""
    known = known or {}
    return {**known, **_hash_all(folder, [name for name in _names(folder) if name not in known], sums)}


def write_checksums(folder: Path, about: str = "", known: Mapping[str, str] | None = None, sums: str = SHA256) -> None:
    """Leaves a file `sums` in a folder: `about` in the first line, a line per file, and the checksum of all these in
    the last. When this returns, all files are on the disk. `known`: as of `checksums`."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # the disk takes them in meanwhile
        synced = pool.map(sync, [folder / name for name in _names(folder)])
        lines = [f"# {about}", *(f"{value}  {name}" for name, value in sorted(checksums(folder, known, sums).items()))]
        list(synced)
    text = "".join(f"{line}\n" for line in lines)
    (folder / sums).write_text(f"{text}# {_HASHES[sums](text.encode()).hexdigest()}\n")
    for path in (folder / sums, *folders):
        sync(path)


def find_damage(
    folder: Path, parts: Iterable[str] = (), about: str = "", share: tuple[int, int] = (0, 1), sums: str = SHA256
) -> str:
    """What is wrong with a folder that has a file `sums`, in words that go on from its name; empty when it is whole.
    Only its own files and those of `parts`, folders that must be in it, are looked at if any are given, and of those
    only share (i, n), every n-th file from the i-th, is read. `about` is what the folder must be."""
    try:
        text = (folder / sums).read_text()
    except (OSError, ValueError):
        return f"has no {sums} that can be read"
    body, _, last = text[:-1].rpartition("\n")
    body += "\n"
    if last != f"# {_HASHES[sums](body.encode()).hexdigest()}" or text[-1:] != "\n":
        return f"has a {sums} that is damaged"
    first, *lines = body[:-1].split("\n")
    if about and first != f"# {about}":
        return f"is {first[2:]} under another name"
    parts = list(parts)

    def asked(name: str) -> bool:
        return not parts or "/" not in name or name.partition("/")[0] in parts

    listed = {name: value for value, _, name in (line.partition("  ") for line in lines) if asked(name)}
    for part in parts:
        if not (folder / part).is_dir() or not any(name.startswith(f"{part}/") for name in listed):
            return f"has no {part}"
    found = {name for name in _names(folder) if asked(name)}
    if missing := sorted(listed.keys() - found):
        return f"lacks {missing[0]}"
    if added := sorted(found - listed.keys() if parts else ()):
        return f"holds {added[0]}, which is not its own"
    try:
        hashed = _hash_all(folder, sorted(listed)[share[0] :: share[1]], sums)
    except OSError as error:
        return f"cannot be read: {error}"
    other = [name for name, value in hashed.items() if value != listed[name]]
    return f"has another {other[0]} than was written" if other else ""


def _names(folder: Path) -> list[str]:
    """All files of a folder but its checksums and hidden ones, which a network's file system may add."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if name not in _HASHES and not re.search(r"(^|/)\.", name)]


def _hash_all(folder: Path, names: list[str], sums: str) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, sums), names), strict=True))
