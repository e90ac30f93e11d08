"""A video pipeline's folder in diffusers layout ↔ networks, parameters and schedule."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from dollar_jax.checkpoint import restore_tree
from dollar_jax.files import SHA256, find_damage, open_regular, read_json, write_json
from dollar_jax.models.network import Network
from dollar_jax.schedule import Schedule
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.clip import check_preprocessing
from dollar_jax.weights.families import COMPONENTS, FAMILIES, Architecture, Family
from dollar_jax.weights.kind import Kind
from dollar_jax.weights.scheduler import schedule_of, scheduler_json
from dollar_jax.weights.table import Params, Row, export_stream, stream_params

# The Orbax folder in place of a component's safetensors, once it is imported.
IMPORTED = "params"
EXPERTS = {"high": "transformer", "low": "transformer_2"}  # by noise level, where there are two
PROVENANCE = "provenance.json"  # of a teacher: how it was made, or its source


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a pipeline: its configuration, its pure functions and its parameters."""

    config: Any
    network: Network
    params: Params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What a diffusers folder holds. Of two experts `transformer_2` is the low-noise one, or `transformer` the only."""

    family: Family
    transformer: Component
    vae: Component
    text_encoder: Component
    tokenizer: Any
    schedule: Schedule
    image_encoder: Component | None = None
    transformer_2: Component | None = None

    @property
    def params(self) -> Any:
        """Of the transformer, or of both experts a tuple."""
        high, low = self.transformer, self.transformer_2
        return (high.params, low.params) if low else high.params


class Part(NamedTuple):
    """What a component's config.json says: its network, and the table of its weights."""

    kind: Kind
    config: Any
    network: Network
    table: Sequence[Row]


def read_architecture(folder: str | Path) -> Architecture:
    """From a folder's JSON files alone; raises as `load_pipeline` does."""
    folder = Path(folder)
    family = read_family(folder)
    return Architecture(family, **_read_configs(folder, family, {}), schedule=read_schedule(folder, family))


def read_parts(folder: Path, param_dtype: str = "float32", **transformer_options: Any) -> dict[str, Part]:
    """The networks of a pipeline folder, of two experts both, without their weights; raises as `load_pipeline` does."""
    family = read_family(folder)
    held = {"param_dtype": param_dtype}
    configs = _read_configs(folder, family, {"transformer": held | transformer_options, "text_encoder": held})
    parts = {name: _part(family.kinds[name], config) for name, config in configs.items()}
    return parts | ({"transformer_2": parts["transformer"]} if read_schedule(folder, family).boundary else {})


def _part(kind: Kind, config: Any) -> Part:
    network = kind.network(config)
    return Part(kind, config, network, kind.table(config, network.shapes))


def read_vae(folder: Path, kind: Kind, own: Any) -> Part:
    """A VAE in a folder of its own that differs from a pipeline's, `own`, in its decoder's width alone; ValueError."""
    file = folder / "config.json"
    config = kind.read(files.read_config(folder), file)
    found, wanted = (dataclasses.asdict(c) | {"decoder_base_dim": 0} for c in (config, own))
    if other := [name for name in wanted if found[name] != wanted[name]]:
        raise ValueError(f"{file} has another {other[0]} than the teacher's VAE: only decoder_base_dim may differ")
    return _part(kind, config)


def load_pipeline(
    folder: str | Path,
    param_dtype: str = "float32",
    place: Callable[[Params], Any] | None = None,
    without_transformer: bool = False,
    expert: str | None = None,
    **transformer_options: Any,
) -> Pipeline:
    """Loads a folder of one of FAMILIES, with `transformer_options` (dtype, remat, …). `param_dtype` is what
    transformer and text encoder are held in; the rest is fp32. An imported transformer is restored into the shardings
    that `place` gives for its shapes; all else comes as numpy arrays, or `without_transformer` as its shapes. Of two
    experts both are read, or the one named. Raises FileNotFoundError or ValueError naming what is wrong."""
    folder = Path(folder)
    check_whole(folder)
    parts, family = read_parts(folder, param_dtype, **transformer_options), read_family(folder)
    schedule = dataclasses.replace(read_schedule(folder, family), expert=expert)
    if expert:
        parts.pop("transformer_2")
    loaded = {}
    for name, part in parts.items():
        transformer = name in EXPERTS.values()
        source = EXPERTS[expert] if expert and transformer else name
        if without_transformer and transformer:
            loaded[name] = Component(part.config, part.network, part.network.shapes)
        else:
            loaded[name] = load_component(folder / source, part, place if transformer else None)
    return Pipeline(family, **loaded, tokenizer=load_tokenizer(folder / "tokenizer"), schedule=schedule)


def read_family(folder: Path) -> Family:
    """The family of a folder by its model_index.json; FileNotFoundError or ValueError naming the wrong entry."""
    if not (path := folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json{_foreign(folder)}")
    index = read_json(path)
    found = {name: _class_name(path, name, index.get(name)) for name in COMPONENTS}
    matching = [f for f in FAMILIES if all(index.get(name) == value for name, value in f.entries.items())]
    pipelines = {name: f for f in reversed(matching) for name in (f.image_pipeline, f.pipeline) if name}
    transformers = {family.transformer.class_name: family for family in reversed(matching)}
    if (pipeline := str(index.get("_class_name", ""))) and pipeline not in pipelines:
        raise ValueError(f"{path} is of a {pipeline}; the pipelines known are {', '.join(pipelines)}")
    if found["transformer"] not in transformers:
        known = ", ".join(transformers)
        raise ValueError(f"{path} has the transformer {found['transformer']}; those known are {known}")
    family = pipelines.get(pipeline, transformers[found["transformer"]])
    for name, why in family.unsupported.items():
        if index.get(name) not in (None, False, [None, None]):
            raise ValueError(f"{path} has {name} = {index[name]!r}: this pipeline takes {why}")
    for name, kind in family.kinds.items():
        if (class_name := _class_name(path, name, index.get(name))) != kind.class_name:
            raise ValueError(f"{path} has the {name} {class_name}; a {family.pipeline} has a {kind.class_name}")
    return family


def _class_name(path: Path, name: str, entry: Any) -> str | None:
    if entry is None:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str | None) for x in entry)):
        raise ValueError(f"{path} has {name} = {entry!r}; it must be the library and the class of the {name}")
    return entry[1]


def _foreign(folder: Path) -> str:
    """What to do with Wan's weights in the layout of Wan's own code."""
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") in ("WanModel", "WanModelVACE"):
        return ", but the layout of Wan's own code: give the same model's repository whose name ends in -Diffusers"
    return ""


def _read_configs(folder: Path, family: Family, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The components' configurations, which must fit together."""
    configs: dict[str, Any] = {}
    for name, kind in family.kinds.items():
        file = folder / name / "config.json"
        configs[name] = kind.read(files.read_config(file.parent), file, **options.get(name, {}))
    transformer, vae, text = (configs[name] for name in COMPONENTS)
    file = folder / "transformer" / "config.json"
    taken, made = transformer.in_channels, transformer.out_channels or transformer.in_channels
    if taken != (whole := 2 * made + vae.scale_factor_temporal if family.conditioned else made):
        why = f"a {family.pipeline} has {whole}, its latents{' with a mask and an image' if family.conditioned else ''}"
        raise ValueError(f"{file} has in_channels = {taken} and out_channels = {made}: {why}")
    if made != (latent := vae.latent_channels):
        raise ValueError(f"{file} has in_channels = {taken} and {made} out, but the latents of the vae have {latent}")
    width, image = getattr(transformer, "image_dim", None), configs.get("image_encoder")
    if width != (made := image and image.hidden_size):
        raise ValueError(f"{file} has image_dim = {width}, but the tokens of the pipeline's image_encoder have {made}")
    if image is not None:
        check_preprocessing(folder / "image_processor" / "preprocessor_config.json", image.image_size)
    if transformer.text_dim != text.d_model:
        width = transformer.text_dim
        raise ValueError(f"{file} is for text states of {width} channels, not text_encoder's {text.d_model}")
    return configs


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "float32") -> None:
    """Writes a folder that `load_pipeline` and `from_pretrained` of diffusers' pipeline of the family read."""
    folder, family = Path(folder), pipeline.family
    scheduler = scheduler_json(pipeline.schedule, family.path)
    for name, kind in family.kinds.items():
        save_component(folder / name, kind, getattr(pipeline, name), dtype)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    classes = {name: [kind.library, kind.class_name] for name, kind in family.kinds.items()}
    classes |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    classes |= {"tokenizer": ["transformers", type(pipeline.tokenizer).__name__]}
    write_json(folder / "model_index.json", {"_class_name": family.pipeline, **classes, **family.entries})


def save_component(folder: Path, kind: Kind, component: Component, dtype: str, shard_size: int | None = None) -> None:
    """Writes a component's folder."""
    tensors = export_stream(kind.table(component.config, component.network.shapes), component.params)
    file = files.DIFFUSERS_FILE if kind.library == "diffusers" else files.TRANSFORMERS_FILE
    fields = kind.write(component.config)
    files.write_component(folder, fields, tensors, file_name=file, dtype=dtype, shard_size=shard_size)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers; nothing is looked up on a hub."""
    import transformers  # slow, and with AutoTokenizer slower by PyTorch, where that is installed

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: the pipeline has no tokenizer")
    for path in folder.iterdir():
        if not path.is_dir():
            open_regular(path).close()
    try:
        plain = read_json(folder / "tokenizer_config.json").get("tokenizer_class") == "TokenizersBackend"
        reader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
        return reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library meets in the files
        raise ValueError(f"{folder} holds no tokenizer that transformers can read") from error


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int32 [n, length]; longer prompts are cut at `length` tokens."""
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt holds {error.object[error.start : error.end]!a}, which is no text") from error
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(np.int32)


def unknown_words(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The words of the prompts that a small vocabulary does not hold, each once."""
    words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
    return [word for word in words if tokenizer.unk_token_id in tokenizer([word])["input_ids"][0]]


def load_component(folder: Path, part: Part, place: Callable[[Params], Any] | None = None) -> Component:
    """A component with its weights, from Orbax or safetensors; see `load_pipeline`."""
    shapes = part.network.shapes
    if (folder / IMPORTED).is_dir():
        return Component(part.config, part.network, restore_tree(folder / IMPORTED, shapes, place and place(shapes)))
    tensors = part.kind.named(files.list_tensors(folder))
    sizes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        arrays = dict(stream_params(part.table, sizes, lambda name: tensors[name].read(), shapes))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Component(part.config, part.network, unflatten_dict(arrays, sep="/"))


def read_schedule(folder: Path, family: Family) -> Schedule:
    """What scheduler_config.json and two experts' boundary say; FileNotFoundError or ValueError naming the field."""
    if not (path := folder / "scheduler" / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"{path} does not exist; it says how the teacher is sampled")
    schedule, path = schedule_of(read_json(path), family.path, path), folder / "model_index.json"
    index = read_json(path)
    second, ratio = _class_name(path, "transformer_2", index.get("transformer_2")), index.get("boundary_ratio")
    if second is None and ratio is None:
        return schedule
    if second != family.transformer.class_name or not (isinstance(ratio, float) and 0 < ratio < 1):
        told = "two experts are two transformers and a ratio in 0..1"
        raise ValueError(f"{path} has transformer_2 = {second} and boundary_ratio = {ratio}: {told}")
    places = [folder / name / "config.json" for name in EXPERTS.values()]
    first, other = (family.transformer.read(files.read_config(file.parent), file) for file in places)
    if first != other:
        raise ValueError(f"{places[1]} describes another network than {places[0]}: two experts must be of one kind")
    return dataclasses.replace(schedule, boundary=ratio * schedule.num_train_timesteps)


def check_whole(folder: Path) -> None:
    """Raises ValueError when a folder that has checksums is not as it was written."""
    if (folder / SHA256).exists() and (fault := find_damage(folder, share=(jax.process_index(), jax.process_count()))):
        raise ValueError(f"{folder} {fault}: copy it anew, or delete its {SHA256} if that was on purpose")
