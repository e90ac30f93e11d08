"""Prompt lists in, video files out."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from dollar_jax.evaluate.manifest import files_of
from dollar_jax.files import check_writable, read_text
from dollar_jax.generate import Generator, Sampler, draw_beside
from dollar_jax.types import Params
from dollar_jax.video import SUFFIXES, write_video

_LONGEST_NAME = 255  # bytes, on every usual file system


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, also those that come twice; FileNotFoundError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold a prompt per line")
    # Long prompts may hold what str.splitlines also breaks at.
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_prompts(path: Path) -> list[str]:
    """The lines of `read_lines`, each once; ValueError without any."""
    if not (prompts := dict.fromkeys(read_lines(path))):
        raise ValueError(f"{path} holds no prompt; write one per line")
    return list(prompts)


def video_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """`{prompt}-{index}.mp4`, by which VBench finds its videos; ValueError where no file can be named so."""
    name = f"{prompt}-{index}{suffix}"
    if "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
        mend = f"take out slashes, or shorten it to {_LONGEST_NAME - 10} bytes"
        raise ValueError(f"no file can be named by the prompt {prompt[:60]!r}: {mend}")
    return name


def file_name(prompt: str, index: int) -> str:
    """`video_name`; where no file can be named so, a shortened one with a hash of the prompt."""
    with contextlib.suppress(ValueError):
        if not prompt.startswith("."):  # hidden
            return video_name(prompt, index)
    start = re.sub(r"^\.|[/\0]", "_", prompt).encode()[:200].decode(errors="ignore")
    return video_name(f"{start}~{hashlib.sha256(prompt.encode()).hexdigest()[:8]}", index)


def find_videos(folder: Path) -> dict[str, list[Path]]:
    """The .mp4 and .gif files of a folder by prompt: as its manifest says, or by `{prompt}-{index}.mp4`; others are
    their own prompt. Raises FileNotFoundError when there is no folder or no video in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    # macOS leaves a hidden ._NAME.mp4, which is no video, beside every file on a foreign disk.
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if not (paths := [path for path in files if path.suffix.lower() in SUFFIXES]):
        raise FileNotFoundError(f"{folder} holds no {' or '.join(SUFFIXES)} file")
    if others := sorted(path.name for path in files if path.suffix.lower() not in (*SUFFIXES, ".json", ".html")):
        print(f"not measured, for they are no {' or '.join(SUFFIXES)}: {', '.join(others)}")
    found: dict[str, list[tuple[int, Path]]] = {}
    known = files_of(folder)
    for path in paths:
        match = re.fullmatch(r"(.+)-(\d+)", path.stem)
        prompt, index = (match[1], int(match[2])) if match else (path.stem, 0)
        found.setdefault(known.get(path.name, prompt), []).append((index, path))
    return {prompt: [path for _, path in sorted(found[prompt])] for prompt in sorted(found)}


def check_output(out: Path) -> None:
    """Raises ValueError or OSError unless `out` can be written: an .mp4, a .gif or, without a suffix, a folder."""
    if out.suffix.lower() not in ("", *SUFFIXES) and not out.is_dir():
        raise ValueError(f"--out={out} must end in {' or '.join(SUFFIXES)}, or be a folder")
    if out.is_file() and is_folder(out):
        raise FileExistsError(f"--out={out} is a file: give a folder, or a name that ends in {' or '.join(SUFFIXES)}")
    check_writable(out / "video" if is_folder(out) else out)


def is_folder(out: Path) -> bool:
    """Whether an output is a folder, for a file per video, or one file for all of them."""
    return not out.suffix or out.is_dir()


def draw_missing(
    folder: Path,
    rows: Sequence[tuple[str, str, int]],
    keys: Callable[[], jax.Array],
    generator: Generator,
    samplers: Sequence[tuple[Sampler, Params]],
    batch_size: int | None,
    fps: float,
    scale: int = 1,
) -> int:
    """Draws those of `rows` that the folder lacks, each written once it is drawn; how many this process has drawn. A
    row is the name of a file, the prompt, and which of `keys` its noise comes from. Every process draws its own share,
    so killed and started again, on as many or fewer hosts, the folder ends with the same videos."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if missing := [row for row in rows[jax.process_index() :: jax.process_count()] if row[0] not in there]:
        names, prompts, index = zip(*missing, strict=True)
        clips = draw_beside(generator, samplers, prompts, lambda: keys()[np.array(index)], batch_size)
        for name, clip in zip(names, clips, strict=True):
            write_video(folder / name, clip, fps, scale)
    return len(missing)
