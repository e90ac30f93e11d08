"""Reads and writes a component folder of diffusers or transformers: config.json and safetensors."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dollar_jax.files import open_regular, read_json

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_FILE = "model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json; raises FileNotFoundError or ValueError naming the file."""
    if not (path := Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{path} does not exist; it describes the weights beside it")
    return read_json(path)


def tensor_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder: the one file, a lone variant such as model.fp16.safetensors, or the shards of
    an index; where there are both, diffusers follows the index and transformers the file, and so is it here. Raises
    FileNotFoundError for none, several variants, or a missing shard; pickles are never opened."""
    if not (folder := Path(folder)).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    names = (f"{DIFFUSERS_FILE}.index.json", DIFFUSERS_FILE, TRANSFORMERS_FILE, f"{TRANSFORMERS_FILE}.index.json")
    if (usual := [folder / name for name in names if (folder / name).is_file()]) or len(indices) == 1:
        first = (usual or indices)[0]
        return _shards(first) if first in indices else [first]
    if indices:
        found = ", ".join(index.name for index in indices)
        raise FileNotFoundError(f"{folder} holds several variants of its weights, {found}: leave the one you mean")
    if len(others := sorted(folder.glob("*.safetensors"))) == 1:
        return others
    what = "no safetensors file"
    if others:
        what = f"{len(others)} safetensors files and no *.safetensors.index.json that says which belong together"
    elif pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        what = f"{pickles[0]}, a pickle, which is never opened because reading one can run any code; where it is a "
        what += "reward's, `dollar import-reward` reads its tensors without that"
    raise FileNotFoundError(f"{folder} holds {what}")


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        # Opened anew for each tensor, so that no more than it stays mapped into memory.
        with _opened(self.path) as file:
            return finite(self.path, self.name, file.get_tensor(self.name))


def finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The tensor; ValueError naming it and its file when it holds what is not finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: tensor {name!r} holds what is not finite")
    return array


def list_tensors(source: str | Path) -> dict[str, Stored]:
    """Every tensor of a folder, or of a file, by name, from headers; ValueError when one is damaged or comes twice."""
    found: dict[str, Stored] = {}
    for path in [Path(source)] if Path(source).is_file() else tensor_files(source):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise ValueError(f"tensor {name!r} comes twice, in {found[name].path} and {path}")
                found[name] = Stored(path, name, tuple(file.get_slice(name).get_shape()))
    return found


def read_tensors(folder: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) for each tensor of the folder, one at a time; bf16 as ml_dtypes' bfloat16."""
    return ((name, stored.read()) for name, stored in list_tensors(folder).items())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    open_regular(path).close()
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def write_component(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    file_name: str = DIFFUSERS_FILE,
    dtype: str = "float32",
    shard_size: int | None = None,
) -> None:
    """Writes config.json and safetensors, with floating tensors in `dtype`; more than `shard_size` bytes become several
    files and an index, one at a time in memory. Files appear under their names only when all are complete."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; weights can be written as one of {sorted(_DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    size = total = 0

    def partial(number: int) -> Path:
        return folder / f".{file_name}.{number}.partial"

    def flush() -> None:
        _save(waiting, partial(len(shards)))
        shards.append(list(waiting))
        waiting.clear()

    pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
    for name, array in pairs:
        array = _cast(array, _DTYPES[dtype])
        if shard_size is not None and waiting and size + array.nbytes > shard_size:
            flush()
            size = 0
        waiting[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    stem = file_name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [file_name] if len(shards) == 1 else names
    for number, name in enumerate(names):
        partial(number).replace(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{file_name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")


def write_file(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """One safetensors file, with floating tensors in `dtype`."""
    _save({name: _cast(array, _DTYPES[dtype]) for name, array in tensors.items()}, path)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    # diffusers and transformers refuse a file that does not say "pt", although the bytes are the same.
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    floating = array.dtype in _DTYPES.values() or array.dtype == np.float64
    return np.asarray(array, dtype=dtype if floating else None, order="C")


def _shards(index: Path) -> list[Path]:
    if not isinstance(weight_map := read_json(index).get("weight_map"), dict):
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name!r}, which is not in its folder")
    return [index.parent / name for name in names]
