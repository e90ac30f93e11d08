"""A text-to-video pipeline folder in diffusers layout ↔ networks, parameters and schedule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.checkpoint import restore_tree
from dollar_jax.models.network import Network, make_network
from dollar_jax.models.umt5 import UMT5Config, UMT5Encoder
from dollar_jax.models.wan import WanConfig, WanTransformer
from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.schedule import Schedule
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.table import Params, Row, export_stream, import_params
from dollar_jax.weights.umt5 import UMT5_TABLE, umt5_config, umt5_config_json
from dollar_jax.weights.wan import wan_config, wan_config_json, wan_table
from dollar_jax.weights.wan_vae import wan_vae_config, wan_vae_config_json, wan_vae_table

COMPONENTS = ("transformer", "vae", "text_encoder")
# The Orbax folder in place of a component's safetensors, once it is imported.
IMPORTED = "params"


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a pipeline: its configuration, its pure functions and its parameters."""

    config: Any
    network: Network
    params: Params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What a diffusers folder of the Wan family holds."""

    transformer: Component
    vae: Component
    text_encoder: Component
    tokenizer: Any
    schedule: Schedule


def wan_transformer(config: WanConfig) -> Network:
    return make_network(lambda rngs: WanTransformer(config, rngs))


def wan_vae(config: WanVAEConfig) -> Network:
    return make_network(lambda rngs: WanVAE(config, rngs))


def umt5_encoder(config: UMT5Config) -> Network:
    return make_network(lambda rngs: UMT5Encoder(config, rngs))


@dataclasses.dataclass(frozen=True)
class Part:
    """What a component's config.json says: its network, and the table of its weights."""

    config: Any
    network: Network
    table: Sequence[Row]


def read_parts(
    folder: Path, param_dtype: str = "float32", **transformer_options: Any
) -> dict[str, Part]:
    """The COMPONENTS of a pipeline folder without their weights; raises as `load_pipeline` does."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    wan = wan_config(
        _config(folder, "transformer"), param_dtype=param_dtype, **transformer_options
    )
    vae = wan_vae_config(_config(folder, "vae"))
    text = umt5_config(_config(folder, "text_encoder"), param_dtype=param_dtype)
    network = wan_vae(vae)
    return {
        "transformer": Part(wan, wan_transformer(wan), wan_table(wan)),
        "vae": Part(vae, network, wan_vae_table(network.shapes)),
        "text_encoder": Part(text, umt5_encoder(text), UMT5_TABLE),
    }


def load_pipeline(
    folder: str | Path,
    param_dtype: str = "float32",
    place: Callable[[Params], Any] | None = None,
    **transformer_options: Any,
) -> Pipeline:
    """Loads a pipeline folder; `transformer_options` are our fields of WanConfig (dtype, remat, …).

    `param_dtype` is what the weights of transformer and text encoder are held in; the VAE's stay fp32.
    In a folder made by `importer.import_pipeline`, the transformer's are restored straight into the
    shardings that `place` gives for their shapes; everything else comes as numpy arrays.

    Raises FileNotFoundError or ValueError naming the file, tensor or field that is wrong.
    """
    folder = Path(folder)
    parts = read_parts(folder, param_dtype, **transformer_options)
    loaded = {
        name: load_component(folder / name, part, place if name == "transformer" else None)
        for name, part in parts.items()
    }
    tokenizer = load_tokenizer(folder / "tokenizer")
    return Pipeline(**loaded, tokenizer=tokenizer, schedule=read_schedule(folder))


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "float32") -> None:
    """Writes a folder that `load_pipeline` and diffusers' `WanPipeline.from_pretrained` read."""
    if pipeline.schedule.path != "rf":
        raise ValueError("only rectified-flow pipelines can be written")
    folder = Path(folder)
    save_component(folder, "transformer", pipeline.transformer, dtype)
    save_component(folder, "vae", pipeline.vae, dtype)
    save_component(folder, "text_encoder", pipeline.text_encoder, dtype)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": pipeline.schedule.num_train_timesteps,
        "shift": pipeline.schedule.shift,
    })  # fmt: skip
    write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip


def save_component(
    folder: Path, name: str, component: Component, dtype: str, shard_size: int | None = None
) -> None:
    """Writes one of COMPONENTS under its name in the pipeline folder."""
    c = component.config
    table, config = {
        "transformer": lambda: (wan_table(c), wan_config_json(c)),
        "vae": lambda: (wan_vae_table(component.network.shapes), wan_vae_config_json(c)),
        "text_encoder": lambda: (UMT5_TABLE, umt5_config_json(c)),
    }[name]()
    file_name = files.TRANSFORMERS_FILE if name == "text_encoder" else files.DIFFUSERS_FILE
    tensors = export_stream(table, component.params)
    files.write_component(
        folder / name, config, tensors, file_name=file_name, dtype=dtype, shard_size=shard_size
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers; nothing is looked up on a hub."""
    from transformers import AutoTokenizer  # slow to import

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: the pipeline has no tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can read") from error


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int32 [n, length]; longer prompts are cut at `length` tokens."""
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    return tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(np.int32)


def _config(folder: Path, name: str) -> dict[str, Any]:
    return files.read_config(folder / name)


def load_component(
    folder: Path, part: Part, place: Callable[[Params], Any] | None = None
) -> Component:
    """A component with its weights, from Orbax or safetensors; see `load_pipeline`."""
    shapes = part.network.shapes
    if (folder / IMPORTED).is_dir():
        params = restore_tree(folder / IMPORTED, shapes, place and place(shapes))
    else:
        params = import_params(part.table, files.read_tensors(folder), shapes)
    return Component(part.config, part.network, params)


# Per scheduler: its field for the time shift; and the fields that change what sampling means, with
# diffusers' default where the file leaves them out and the value this implementation has.
_SIGMAS = {f"use_{name}_sigmas": (False, False) for name in ("karras", "exponential", "beta")}
_SHIFTS = {"use_dynamic_shifting": (False, False), "shift_terminal": (None, None)}
_SCHEDULERS: dict[str, tuple[str, dict[str, tuple[Any, Any]]]] = {
    "FlowMatchEulerDiscreteScheduler": (
        "shift", {**_SIGMAS, **_SHIFTS, "invert_sigmas": (False, False)},
    ),
    "UniPCMultistepScheduler": (
        "flow_shift",
        {
            "prediction_type": ("epsilon", "flow_prediction"),
            "use_flow_sigmas": (False, True),
            "predict_x0": (True, True),
            "solver_order": (2, 2),
            "solver_type": ("bh2", "bh2"),
            "lower_order_final": (True, True),
            "disable_corrector": ([], []),
            "thresholding": (False, False),
            "final_sigmas_type": ("zero", "zero"),
            **_SIGMAS,
            **_SHIFTS,
        },
    ),
}  # fmt: skip


def read_schedule(folder: Path) -> Schedule:
    """The path and prediction that scheduler/scheduler_config.json describes.

    Raises FileNotFoundError, or ValueError naming the field that asks for something else.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it says how the teacher is sampled")
    fields = files.read_json(path)
    name = fields.get("_class_name")
    if name not in _SCHEDULERS:
        raise ValueError(f"{path} is a {name}; the schedulers known are {', '.join(_SCHEDULERS)}")
    shift, wanted = _SCHEDULERS[name]
    for field, (default, value) in wanted.items():
        found = fields.get(field, default)
        if found != value:
            raise ValueError(f"{path} has {field} = {found!r}; a {name} must have {value!r} to be followed here")
    return Schedule(
        "rf",
        "velocity",
        num_train_timesteps=int(fields.get("num_train_timesteps", 1000)),
        shift=float(fields.get(shift, 1.0)),
    )


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """One object as a JSON file, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")
