"""A text-to-video pipeline folder in diffusers layout ↔ networks, parameters and schedule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.checkpoint import restore_tree
from dollar_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from dollar_jax.models.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from dollar_jax.models.network import Network, make_network
from dollar_jax.models.umt5 import UMT5Config, UMT5Encoder
from dollar_jax.models.wan import WanConfig, WanTransformer
from dollar_jax.models.wan_vae import WanVAE, WanVAEConfig
from dollar_jax.schedule import Path as DiffusionPath
from dollar_jax.schedule import Schedule
from dollar_jax.weights import cogvideox, cogvideox_vae, umt5, wan
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights import wan_vae as wan_vae_weights
from dollar_jax.weights.scheduler import schedule_of, scheduler_json
from dollar_jax.weights.table import Params, Row, export_stream, import_params

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
    """What a diffusers folder holds; its transformer says of which family it is."""

    transformer: Component
    vae: Component
    text_encoder: Component
    tokenizer: Any
    schedule: Schedule

    @property
    def family(self) -> Family:
        return family_of(self.transformer.config)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a pipeline folder says of its networks, without their weights."""

    transformer: Any
    vae: Any
    text_encoder: UMT5Config
    schedule: Schedule

    @property
    def family(self) -> Family:
        return family_of(self.transformer)


def wan_transformer(config: WanConfig) -> Network:
    return make_network(lambda rngs: WanTransformer(config, rngs))


def wan_vae(config: WanVAEConfig) -> Network:
    return make_network(lambda rngs: WanVAE(config, rngs))


def umt5_encoder(config: UMT5Config) -> Network:
    return make_network(lambda rngs: UMT5Encoder(config, rngs))


def cogvideox_transformer(config: CogVideoXConfig) -> Network:
    return make_network(lambda rngs: CogVideoXTransformer(config, rngs))


def cogvideox_vae_network(config: CogVideoXVAEConfig) -> Network:
    return make_network(lambda rngs: CogVideoXVAE(config, rngs))


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of network: its config.json as our configuration and back, its functions, its weight table."""

    class_name: str
    config: type
    read: Callable[..., Any]
    write: Callable[[Any], dict[str, Any]]
    network: Callable[[Any], Network]
    table: Callable[[Any, Params], Sequence[Row]]  # of a configuration and the parameters' shapes


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of diffusers pipeline, and what its transformer expects.

    `masks_padding`: the text encoder does not see the rows of padding, and the transformer gets zeros there.
    """

    pipeline: str
    transformer: Kind
    vae: Kind
    text_encoder: Kind
    path: DiffusionPath
    masks_padding: bool


_UMT5 = Kind(
    umt5.CLASS_NAME,
    UMT5Config,
    umt5.umt5_config,
    umt5.umt5_config_json,
    umt5_encoder,
    lambda config, shapes: umt5.UMT5_TABLE,
)
FAMILIES = (
    Family(
        "WanPipeline",
        Kind(
            wan.CLASS_NAME,
            WanConfig,
            wan.wan_config,
            wan.wan_config_json,
            wan_transformer,
            lambda config, shapes: wan.wan_table(config),
        ),
        Kind(
            wan_vae_weights.CLASS_NAME,
            WanVAEConfig,
            wan_vae_weights.wan_vae_config,
            wan_vae_weights.wan_vae_config_json,
            wan_vae,
            lambda config, shapes: wan_vae_weights.wan_vae_table(shapes),
        ),
        _UMT5,
        path="rf",
        masks_padding=True,
    ),
    Family(
        "CogVideoXPipeline",
        Kind(
            cogvideox.CLASS_NAME,
            CogVideoXConfig,
            cogvideox.cogvideox_config,
            cogvideox.cogvideox_config_json,
            cogvideox_transformer,
            lambda config, shapes: cogvideox.cogvideox_table(config),
        ),
        Kind(
            cogvideox_vae.CLASS_NAME,
            CogVideoXVAEConfig,
            cogvideox_vae.cogvideox_vae_config,
            cogvideox_vae.cogvideox_vae_config_json,
            cogvideox_vae_network,
            lambda config, shapes: cogvideox_vae.cogvideox_vae_table(shapes),
        ),
        dataclasses.replace(_UMT5, class_name=umt5.T5_CLASS_NAME),
        path="ddpm",
        masks_padding=False,
    ),
)


def family_of(transformer_config: Any) -> Family:
    """The family whose transformers are configured like this."""
    return next(f for f in FAMILIES if isinstance(transformer_config, f.transformer.config))


@dataclasses.dataclass(frozen=True)
class Part:
    """What a component's config.json says: its network, and the table of its weights."""

    config: Any
    network: Network
    table: Sequence[Row]


def read_parts(folder: Path, param_dtype: str = "float32", **transformer_options: Any) -> dict[str, Part]:
    """The COMPONENTS of a pipeline folder without their weights; raises as `load_pipeline` does."""
    family = read_family(folder)
    held = {"param_dtype": param_dtype}
    options = {"transformer": held | transformer_options, "vae": {}, "text_encoder": held}
    parts = {}
    for name in COMPONENTS:
        kind: Kind = getattr(family, name)
        config = kind.read(files.read_config(folder / name), **options[name])
        network = kind.network(config)
        parts[name] = Part(config, network, kind.table(config, network.shapes))
    return parts


def load_pipeline(
    folder: str | Path,
    param_dtype: str = "float32",
    place: Callable[[Params], Any] | None = None,
    **transformer_options: Any,
) -> Pipeline:
    """Loads a pipeline folder of one of FAMILIES; `transformer_options` are our fields of its transformer's
    configuration (dtype, remat, …).

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


def read_family(folder: Path) -> Family:
    """The family of a pipeline folder, by its model_index.json.

    Raises FileNotFoundError or ValueError naming the class that does not belong there.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    index = files.read_json(path)
    found = {name: (index.get(name) or [None, None])[-1] for name in COMPONENTS}
    families = {family.transformer.class_name: family for family in FAMILIES}
    if found["transformer"] not in families:
        raise ValueError(f"{path} has the transformer {found['transformer']}; those known are {', '.join(families)}")
    family = families[found["transformer"]]
    for name, class_name in found.items():
        kind: Kind = getattr(family, name)
        if class_name != kind.class_name:
            raise ValueError(f"{path} has the {name} {class_name}; a {family.pipeline} has a {kind.class_name}")
    return family


def read_architecture(folder: str | Path) -> Architecture:
    """From a folder's JSON files alone; raises as `load_pipeline` does."""
    folder = Path(folder)
    family = read_family(folder)
    configs = {name: getattr(family, name).read(files.read_config(folder / name)) for name in COMPONENTS}
    return Architecture(**configs, schedule=read_schedule(folder))


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "float32") -> None:
    """Writes a folder that `load_pipeline` and `from_pretrained` of diffusers' pipeline of the family read."""
    folder, family = Path(folder), pipeline.family
    scheduler = scheduler_json(pipeline.schedule, family.path)
    for name in COMPONENTS:
        save_component(folder, name, getattr(pipeline, name), dtype)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": family.pipeline,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", family.text_encoder.class_name],
            "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
            "transformer": ["diffusers", family.transformer.class_name],
            "vae": ["diffusers", family.vae.class_name],
        },
    )


def save_component(folder: Path, name: str, component: Component, dtype: str, shard_size: int | None = None) -> None:
    """Writes one of COMPONENTS under its name in the pipeline folder."""
    kinds: list[Kind] = [getattr(family, name) for family in FAMILIES]
    kind = next(kind for kind in kinds if isinstance(component.config, kind.config))
    table = kind.table(component.config, component.network.shapes)
    file_name = files.TRANSFORMERS_FILE if name == "text_encoder" else files.DIFFUSERS_FILE
    tensors = export_stream(table, component.params)
    files.write_component(
        folder / name, kind.write(component.config), tensors, file_name=file_name, dtype=dtype, shard_size=shard_size
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
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(np.int32)


def load_component(folder: Path, part: Part, place: Callable[[Params], Any] | None = None) -> Component:
    """A component with its weights, from Orbax or safetensors; see `load_pipeline`."""
    shapes = part.network.shapes
    if (folder / IMPORTED).is_dir():
        params = restore_tree(folder / IMPORTED, shapes, place and place(shapes))
    else:
        params = import_params(part.table, files.read_tensors(folder), shapes)
    return Component(part.config, part.network, params)


def read_schedule(folder: Path) -> Schedule:
    """The path and prediction that scheduler/scheduler_config.json describes.

    Raises FileNotFoundError, or ValueError naming the field that asks for something else.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it says how the teacher is sampled")
    return schedule_of(files.read_json(path), read_family(folder).path, path)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """One object as a JSON file, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n")
