"""`dollar import`: a diffusers pipeline folder, or one from the hub, to Orbax, tensor by tensor."""

import functools
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dollar_jax.checkpoint import save_stream
from dollar_jax.files import download, new_folder, write_checksums, write_json
from dollar_jax.weights import pipeline as pipelines
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.adapter import read_changes
from dollar_jax.weights.table import stream_params

DTYPES = ("float32", "bfloat16")
# Of a hub's repository: what is read before its weights.
_DESCRIPTION = ["*.json", "*.model", "*.txt", "README.md", "LICENSE*"]


def import_pipeline(source: str, folder: str | Path, dtype: str = "float32", adapter: str | Path | None = None) -> None:
    """Writes `folder`, which `load_pipeline` restores straight into a mesh's sharding: tokenizer and configurations as
    they are, transformer and text encoder as Orbax in `dtype`, the rest in fp32, an `adapter` (see `read_changes`)
    merged. In memory are one parameter with all its layers, one tensor and the adapter. All is checked before the first
    tensor is read, and `folder` appears when it is whole. Raises FileNotFoundError, FileExistsError or ValueError."""
    if (folder := Path(folder)).exists():
        raise FileExistsError(f"{folder} is there already; delete it, or import into another folder")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; a teacher can be imported as one of {DTYPES}")
    found = fetch(source, _DESCRIPTION)
    parts = pipelines.read_parts(found, param_dtype=dtype)
    family = pipelines.read_family(found)
    if adapter and "transformer_2" in parts:
        raise ValueError(f"{source} has two experts, and an adapter is for one of them: import it without")
    pipelines.load_tokenizer(found / "tokenizer")
    found = fetch(source, [*_DESCRIPTION, *(f"{name}/*.safetensors" for name in parts)])
    stored = {name: part.kind.named(files.list_tensors(found / name)) for name, part in parts.items()}
    pipelines.check_whole(found)
    changes = {} if adapter is None else read_changes(Path(adapter), family.native, stored["transformer"])

    def read(name: str, key: str) -> np.ndarray:
        bar.update()
        bar.set_postfix_str(key, refresh=False)
        value = stored[name][key].read()
        return value + changes[key] if name == "transformer" and key in changes else value

    streams = {}
    for name, part in parts.items():
        shapes = {key: tensor.shape for key, tensor in stored[name].items()}
        try:
            streams[name] = stream_params(part.table, shapes, functools.partial(read, name), part.network.shapes)
        except ValueError as error:
            raise ValueError(f"{found / name}: {error}") from error
    bar = tqdm(total=sum(map(len, stored.values())), desc="importing", unit="tensor")
    with bar, new_folder(folder) as draft:
        for name in parts:
            save_stream(draft / name / pipelines.IMPORTED, streams[name])
            shutil.copy(found / name / "config.json", draft / name)
        for name in ("tokenizer", "scheduler", *["image_processor"] * ("image_encoder" in parts)):
            shutil.copytree(found / name, draft / name)
        for path in (found / "model_index.json", *found.glob("README.md"), *found.glob("LICENSE*")):
            shutil.copy(path, draft)
        name = Path(source).resolve().name if Path(source).is_dir() else source
        write_json(draft / pipelines.PROVENANCE, {"source": name})
        write_checksums(draft, "imported pipeline")


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder `source`, or the files of these names in the hub's repository OWNER/NAME, downloaded."""
    if (folder := Path(source)).is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the pipeline folder, the one with model_index.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"{source} is neither a folder nor a name on the hub such as OWNER/NAME")
    return download(source, f"{source} is no folder here, and the hub did not give it", allow_patterns=patterns)
