"""Prompt lists in, video files out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dollar_jax.video import SUFFIXES, grid, side_by_side, write_video

_LONGEST_NAME = 255  # bytes, on every usual file system


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each once.

    Raises FileNotFoundError, or ValueError when there are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold a prompt per line")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


def video_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """`{prompt}-{index}.mp4`, by which VBench finds its videos; ValueError where no file can be named so."""
    name = f"{prompt}-{index}{suffix}"
    if "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"no file can be named by the prompt {prompt[:60]!r}: take out slashes, or shorten it to "
            f"{_LONGEST_NAME - 10} bytes"
        )
    return name


def find_videos(folder: Path) -> dict[str, list[Path]]:
    """The .mp4 and .gif files of a folder by prompt: `{prompt}-{index}.mp4`; others are their own prompt.

    Raises FileNotFoundError when there is no folder or no video in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    # macOS leaves a hidden ._NAME.mp4, which is no video, beside every file on a foreign disk.
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(SUFFIXES)} file")
    if others := sorted(path.name for path in files if path.suffix.lower() not in (*SUFFIXES, ".json", ".html")):
        print(f"not measured, for they are no {' or '.join(SUFFIXES)}: {', '.join(others)}")
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        match = re.fullmatch(r"(.+)-(\d+)", path.stem)
        prompt, index = (match[1], int(match[2])) if match else (path.stem, 0)
        found.setdefault(prompt, []).append((index, path))
    return {prompt: [path for _, path in sorted(found[prompt])] for prompt in sorted(found)}


def check_output(out: Path) -> None:
    """Raises ValueError unless `out` is an .mp4, a .gif or, without a suffix, a folder."""
    if out.suffix.lower() not in ("", *SUFFIXES) and not out.is_dir():
        raise ValueError(f"--out={out} must end in {' or '.join(SUFFIXES)}, or be a folder")


def write_samples(out: Path, prompts: Sequence[str], videos: Sequence[np.ndarray], fps: float, scale: int) -> None:
    """Writes samplers' videos, uint8 [prompts, n, t, h, w, 3] each, side by side; process 0 only.

    One file has a row per prompt; a folder gets a file per video.
    """
    if jax.process_index():
        return
    names = [[video_name(prompt, i) for i in range(videos[0].shape[1])] for prompt in prompts]
    beside = np.stack(
        [np.stack([side_by_side(clips) for clips in zip(*row, strict=True)]) for row in zip(*videos, strict=True)]
    )
    if out.suffix and not out.is_dir():
        gap = 2 if len(videos) == 1 else 6
        write_video(out, grid(np.concatenate(list(beside)), beside.shape[1], gap), fps, scale)
        return
    for row, clips in zip(tqdm(names, "writing", unit="prompt"), beside, strict=True):
        for name, clip in zip(row, clips, strict=True):
            write_video(out / name, clip, fps, scale)
