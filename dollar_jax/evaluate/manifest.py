"""What a set of videos, or of their measures, was made with, so that two of them can be told to compare or not. A set's
manifest lies beside its folder, as `NAME.manifest.json`: VBench takes the first file in it for a video."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dollar_jax import __version__
from dollar_jax.files import read_json, write_json

if TYPE_CHECKING:
    from dollar_jax.config import DistillConfig
    from dollar_jax.generate import BoundSampler, Generator

NAME = "manifest.json"
# What two sets must share for their measures to compare; the rest says which model it was, and on what.
PROTOCOL = ("prompts_sha256", "prompts", "names_sha256", "seeds", "num", "frames", "height", "width", "fps")


def hash_params(params: Any) -> str:
    """SHA-256 of parameters by name, type, shape and bytes, wherever they were read from; they must be on this host."""
    import jax  # `dollar vbench-score` does without

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def made_of(prompts: Sequence[str], seeds: Sequence[int], num: int, files: Mapping[str, str]) -> dict[str, Any]:
    """The prompts and seeds of videos that are no list of VBench's; `files` gives each file's prompt."""
    listed = "\n".join(sorted(prompts)).encode()
    made = {"prompts": "raw", "prompts_sha256": hashlib.sha256(listed).hexdigest(), "seeds": seeds, "num": num}
    return {**made, "files": files} if files else made


def describe(config: DistillConfig, generator: Generator, fps: float, samplers: Sequence[BoundSampler]) -> Any:
    """What videos are made with besides their prompts and seeds; of several samplers the last one's."""
    frames, height, width = generator.clip
    *others, sampler = samplers
    made = {"frames": frames, "height": height, "width": width, "fps": fps, **sampler.description}
    made |= {"beside": [other.description for other in others]} if others else {}
    made |= {"vae_sha256": hash_params(generator.pipeline.vae.params)} if generator.sampling.vae else {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "av")}
    versions = {"dollar_jax": __version__, **versions, "python": platform.python_version()}
    return {**made, "teacher": config.teacher, "weights_sha256": hash_params(sampler.params), "versions": versions}


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a folder of videos lies."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.{NAME}")


def write_manifest(folder: Path, manifest: Mapping[str, Any], free: Sequence[str] = ("versions",)) -> None:
    """Writes a folder's manifest; ValueError when it holds videos made otherwise, but for the entries in `free`."""
    if (path := manifest_path(folder)).is_file() and folder.is_dir():
        before, manifest = read_json(path), json.loads(json.dumps(manifest))  # a tuple is read back as a list
        for name in manifest:
            if name not in free and before.get(name) != manifest[name]:
                other = f"{folder} holds videos made with {name} = {before.get(name)!r}, not {manifest[name]!r}"
                raise ValueError(f"{other}: choose another folder, or the same settings to draw what is missing")
    write_json(path, manifest)


def find_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a result file or a folder: in the file itself, in the folder or beside it; None without one."""
    if path.is_file():
        content = read_json(path)
        if isinstance(content.get("manifest"), dict):
            return content["manifest"]
    folder = path if path.is_dir() else path.absolute().parent
    return next((read_json(place) for place in (folder / NAME, manifest_path(folder)) if place.is_file()), None)


def check_alike(a: Path, b: Path) -> dict[str, tuple[Any, Any]]:
    """What two sets were made with, where it differs; ValueError without a manifest, or where PROTOCOL differs."""
    found = []
    for path in (a, b):
        if (manifest := find_manifest(path)) is None:
            raise ValueError(f"{path} cannot be compared: there is no {NAME} in it or beside it to say how it was made")
        found.append(manifest)
    ours, theirs = found
    pairs = {name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}
    different = {name: (x, y) for name, (x, y) in pairs.items() if x != y}
    unlike = [f"{k} is {different[k][0]!r} in {a} and {different[k][1]!r} in {b}" for k in PROTOCOL if k in different]
    if unlike:
        raise ValueError(f"these do not compare: {'; '.join(unlike)}")
    return different


def files_of(folder: Path) -> dict[str, str]:
    """The prompt of each file that the manifest of a folder of videos names."""
    path = manifest_path(folder)
    return read_json(path).get("files", {}) if folder.is_dir() and path.is_file() else {}
