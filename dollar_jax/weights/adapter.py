"""Low-rank adapters in files: by PEFT's names, diffusers', or those of the code that a model was published with."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dollar_jax.weights import safetensors_io as files

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PREFIX = re.compile(r"(diffusion_model|transformer|base_model\.model)\.")
_KEY = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha|diff|diff_b|diff_m))")
_PARTS = {"down": "A", "up": "B"}
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}


def rename(names: Mapping[str, str], module: str) -> str | None:
    """The name that a table, in which `{i}` is a block's number, gives to a module; None where it has none."""
    block = re.search(r"\.(\d+)\.", module)
    found = names.get(re.sub(r"\.\d+\.", ".{i}.", module, count=1))
    return found and found.format(i=block and block[1])


def read_changes(source: Path, native: Mapping[str, str], tensors: Mapping[str, files.Stored]) -> dict[str, np.ndarray]:
    """What an adapter, a safetensors file or the folder of one, adds to which of a transformer's `tensors`, by
    diffusers' names, in fp32: alpha / rank · B A, without an alpha B A, and `diff`, `diff_b` and `diff_m` as they are.
    `native` as in `Family`. Raises FileNotFoundError, or ValueError naming the key without place or counterpart."""
    if source.is_dir() and (source / DIFFUSERS_FILE).is_file():
        source = source / DIFFUSERS_FILE
    theirs = {name: ours for ours, name in native.items()}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    changes: dict[str, np.ndarray] = {}
    for key, stored in files.list_tensors(source).items():
        if not (match := _KEY.fullmatch(key)):
            raise ValueError(f"{source}: {key!r} is no adapter's key such as …lora_A.weight, …lora_up.weight or …alpha")
        module, part, other = match.groups()
        module = _PREFIX.sub("", module, count=1)
        if other == "diff_m":
            name = module.removesuffix("head") + ("" if module == "head" else ".") + "scale_shift_table"
        else:
            name = f"{rename(theirs, module) or module}.{_DIFFERENCES.get(other, 'weight')}"
        if name not in tensors:
            raise ValueError(f"{source}: {key!r} has no place in the transformer, which has no {name!r}")
        value = stored.read().astype(np.float32)
        if part or other == "alpha":
            pairs.setdefault(name, {})[_PARTS.get(part, part) or "alpha"] = value
        else:
            changes[name] = value.reshape(tensors[name].shape)
    for name, pair in pairs.items():
        if {"A", "B"} - pair.keys():
            raise ValueError(f"{source} has only one half of the adapter of {name!r}, or its alpha alone")
        low, high = pair["A"], pair["B"]
        rank, shape = len(low), tensors[name].shape
        if high.shape[1] != rank or (len(high), *low.shape[1:]) != shape:
            product = f"{high.shape} times {low.shape}"
            raise ValueError(f"{source}: the adapter of {name!r} is {product}, but the tensor is {shape}")
        change = (high @ low.reshape(rank, -1)).reshape(shape) * (pair.get("alpha", np.float32(rank)) / rank)
        changes[name] = changes.get(name, np.float32(0)) + change
    return changes
