"""A text-to-video pipeline folder in diffusers layout ↔ networks, parameters and schedule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.models.network import Network, make_network
from dollar_jax.models.umt5 import UMT5Config, UMT5Encoder
from dollar_jax.models.wan import WanConfig, WanTransformer
from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.schedule import Schedule
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.table import Params, Row, export_params, import_params
from dollar_jax.weights.umt5 import UMT5_TABLE, umt5_config, umt5_config_json
from dollar_jax.weights.wan import wan_config, wan_config_json, wan_table
from dollar_jax.weights.wan_vae import wan_vae_config, wan_vae_config_json, wan_vae_table

COMPONENTS = ("transformer", "vae", "text_encoder")


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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a pipeline folder says of its networks, without their weights."""

    transformer: WanConfig
    vae: WanVAEConfig
    text_encoder: UMT5Config
    schedule: Schedule


def wan_transformer(config: WanConfig) -> Network:
    return make_network(lambda rngs: WanTransformer(config, rngs))


def wan_vae(config: WanVAEConfig) -> Network:
    return make_network(lambda rngs: WanVAE(config, rngs))


def umt5_encoder(config: UMT5Config) -> Network:
    return make_network(lambda rngs: UMT5Encoder(config, rngs))


def load_pipeline(
    folder: str | Path, param_dtype: str = "float32", **transformer_options: Any
) -> Pipeline:
    """Loads a pipeline folder; `transformer_options` are our fields of WanConfig (dtype, remat, …).

    `param_dtype` is what the weights of transformer and text encoder are held in; the VAE's stay fp32.

    Raises FileNotFoundError or ValueError naming the file, tensor or field that is wrong.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    wan = wan_config(
        _config(folder, "transformer"), param_dtype=param_dtype, **transformer_options
    )
    vae = wan_vae_config(_config(folder, "vae"))
    text = umt5_config(_config(folder, "text_encoder"), param_dtype=param_dtype)
    network = wan_vae(vae)
    return Pipeline(
        _load(folder / "transformer", wan, wan_transformer(wan), wan_table(wan)),
        _load(folder / "vae", vae, network, wan_vae_table(network.shapes)),
        _load(folder / "text_encoder", text, umt5_encoder(text), UMT5_TABLE),
        load_tokenizer(folder / "tokenizer"),
        _schedule(folder),
    )


def read_architecture(folder: str | Path) -> Architecture:
    """From a folder's JSON files alone; raises as `load_pipeline` does."""
    folder = Path(folder)
    return Architecture(
        wan_config(_config(folder, "transformer")),
        wan_vae_config(_config(folder, "vae")),
        umt5_config(_config(folder, "text_encoder")),
        _schedule(folder),
    )


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "float32") -> None:
    """Writes a folder that `load_pipeline` and diffusers' `WanPipeline.from_pretrained` read."""
    if pipeline.schedule.path != "rf":
        raise ValueError("only rectified-flow pipelines can be written")
    folder = Path(folder)
    save_component(folder, "transformer", pipeline.transformer, dtype)
    save_component(folder, "vae", pipeline.vae, dtype)
    save_component(folder, "text_encoder", pipeline.text_encoder, dtype)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    _write(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": pipeline.schedule.num_train_timesteps,
        "shift": pipeline.schedule.shift,
    })  # fmt: skip
    _write(folder / "model_index.json", {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip


def save_component(folder: Path, name: str, component: Component, dtype: str) -> None:
    """Writes one of COMPONENTS under its name in the pipeline folder."""
    c = component.config
    table, config = {
        "transformer": lambda: (wan_table(c), wan_config_json(c)),
        "vae": lambda: (wan_vae_table(component.network.shapes), wan_vae_config_json(c)),
        "text_encoder": lambda: (UMT5_TABLE, umt5_config_json(c)),
    }[name]()
    file_name = files.TRANSFORMERS_FILE if name == "text_encoder" else files.DIFFUSERS_FILE
    tensors = export_params(table, component.params)
    files.write_component(folder / name, config, tensors, file_name=file_name, dtype=dtype)


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


def _load(folder: Path, config: Any, network: Network, table: Sequence[Row]) -> Component:
    params = import_params(table, files.read_tensors(folder), network.shapes)
    return Component(config, network, params)


def _schedule(folder: Path) -> Schedule:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it says how the teacher is sampled")
    fields = files.read_json(path)
    shifts = {"FlowMatchEulerDiscreteScheduler": "shift", "UniPCMultistepScheduler": "flow_shift"}
    name = fields.get("_class_name")
    if name not in shifts:
        raise ValueError(f"{path} is a {name}; the schedulers known are {', '.join(shifts)}")
    return Schedule(
        "rf",
        "velocity",
        num_train_timesteps=int(fields.get("num_train_timesteps", 1000)),
        shift=float(fields.get(shifts[name], 1.0)),
    )


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")
