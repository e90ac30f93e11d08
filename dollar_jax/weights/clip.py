"""transformers' `CLIPModel`, and OpenCLIP's names for the same, ↔ `CLIP`; its `CLIPVisionModel` ↔ `CLIPVision`."""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dollar_jax.files import new_folder, read_json
from dollar_jax.models.clip import CLIP, MEAN, STD, VIT_H_14, CLIPConfig, CLIPVision, CLIPVisionConfig, TowerConfig
from dollar_jax.models.network import Network, make_network
from dollar_jax.weights import safetensors_io as files
from dollar_jax.weights.kind import OURS, Kind
from dollar_jax.weights.table import TRANSPOSE, Pairs, Params, Row, Transform, export_stream, import_params
from dollar_jax.weights.torch_file import read_torch

_LENGTHS = "vision_model.embeddings.temporal_embedding.weight", "text_model.embeddings.position_embedding.weight"
HEAD = "layers."  # of the tensors of an aesthetic head
_LIKE = "a published CLIP of its size, such as openai/clip-vit-large-patch14"

_TOWER = "{tower:vision_model|text_model}"
_QKVO = f"{_TOWER}/blocks/{{p:q_proj|k_proj|v_proj|out_proj}}"
# The patches' convolution [out, 3, p, p] ↔ a dense layer over a patch's (row, column, colour).
_PATCHES = Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(round((len(x) / 3) ** 0.5), -1, 3, x.shape[1]).transpose(3, 2, 0, 1),
)

CLIP_TABLE = [
    Row("vision_model.embeddings.class_embedding", "vision_model/class_embedding"),
    Row("vision_model.embeddings.patch_embedding.weight", "vision_model/patch_embedding/kernel", _PATCHES),
    Row("text_model.embeddings.token_embedding.weight", "text_model/token_embedding"),
    Row("{tower}.embeddings.{p}_embedding.weight", f"{_TOWER}/{{p:position|temporal}}_embedding"),
    Row("vision_model.embeddings.position_ids", None),
    Row("text_model.embeddings.position_ids", None),
    Row("{tower}.encoder.layers.{i}.self_attn.{p}.weight", f"{_QKVO}/kernel", TRANSPOSE),
    Row("{tower}.encoder.layers.{i}.self_attn.{p}.bias", f"{_QKVO}/bias"),
    Row("{tower}.encoder.layers.{i}.mlp.{p}.weight", f"{_TOWER}/blocks/{{p:fc1|fc2}}/kernel", TRANSPOSE),
    Row("{tower}.encoder.layers.{i}.mlp.{p}.bias", f"{_TOWER}/blocks/{{p:fc1|fc2}}/bias"),
    Row("{tower}.encoder.layers.{i}.{p}.weight", f"{_TOWER}/blocks/{{p:layer_norm[12]}}/scale"),
    Row("{tower}.encoder.layers.{i}.{p}.bias", f"{_TOWER}/blocks/{{p:layer_norm[12]}}/bias"),
    Row("{tower}.{p}.weight", f"{_TOWER}/{{p:pre_layrnorm|post_layernorm|final_layer_norm}}/scale"),
    Row("{tower}.{p}.bias", f"{_TOWER}/{{p:pre_layrnorm|post_layernorm|final_layer_norm}}/bias"),
    Row("{p}.weight", "{p:visual_projection|text_projection}/kernel", TRANSPOSE),
    Row("logit_scale", "logit_scale"),
]

_MORE: Any = {"fixed": {"model_type": "clip_vision_model"}, "prefix": "vision_model."}
_MORE |= {"note": "the image encoder known is CLIP's image tower", "table": lambda config, shapes: CLIP_TABLE}
CLIP_VISION = Kind("transformers", "CLIPVisionModel", CLIPVisionConfig, CLIPVision, **_MORE)

# From OpenCLIP's names, and ViCLIP's, to transformers', one after the other.
_OPENCLIP = [
    (r"^vision_encoder\.", "visual."),
    (r"^text_encoder\.", ""),
    (r"^visual\.(?!proj$)", "vision_model."),
    (r"^(?=transformer|positional|token_embedding|ln_final)", "text_model."),
    (r"transformer\.resblocks", "encoder.layers"),
    (r"(?=attn\.)", "self_"),
    (r"ln_([12])", r"layer_norm\1"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
    (r"(class|token)_embedding", r"embeddings.\1_embedding"),
    (r"conv1", "embeddings.patch_embedding"),
    (r"temporal_positional_embedding", "embeddings.temporal_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre", "pre_layrnorm"),
    (r"ln_post", "post_layernorm"),
    (r"ln_final", "final_layer_norm"),
    (r"^visual\.proj$", "visual_projection"),
]


def from_openclip(pairs: Pairs) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under transformers' names: OpenCLIP's are renamed, split and transposed, others passed on."""
    for name, tensor in pairs:
        for pattern, theirs in () if name.startswith(("vision_model.", "text_model.")) else _OPENCLIP:
            name = re.sub(pattern, theirs, name)
        if ".in_proj_" in name:
            for p, piece in zip("qkv", np.split(tensor, 3), strict=True):
                yield name.replace("in_proj_", f"{p}_proj."), piece
        elif name in ("visual_projection", "text_projection"):
            yield f"{name}.weight", tensor.T
        elif name == "temp":  # ViCLIP's temperature
            yield "logit_scale", -np.log(tensor)
        elif name != "attn_mask":
            yield name, tensor.squeeze() if tensor.ndim in (3, 5) else tensor  # ViCLIP's [1 t d] and [d 3 1 p p]


def clip_config(fields: Mapping[str, Any], **ours: Any) -> CLIPConfig:
    """From the config.json of a `CLIPModel`; `ours` are dtype, param_dtype and remat."""
    from transformers import CLIPConfig as Theirs  # knows what a field that is left out means; slow to import

    if fields.get("model_type") != "clip":
        raise ValueError(f"config.json is of a {fields.get('model_type')!r} model, not of a CLIPModel")
    c: Any = Theirs(**fields)

    def tower(theirs: Any) -> TowerConfig:
        return TowerConfig(**{f.name: getattr(theirs, f.name) for f in dataclasses.fields(TowerConfig)})

    text, vision = c.text_config, c.vision_config
    # Files from before transformers knew better say 2, and mean the highest id.
    eos = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    sizes = vision.patch_size, vision.image_size, text.vocab_size, text.max_position_embeddings
    return CLIPConfig(tower(vision), tower(text), c.projection_dim, *sizes, eos, getattr(c, "frames", 1), **ours)


def clip_fields(config: CLIPConfig) -> dict[str, Any]:
    """The config.json of a `CLIPModel`; undoes `clip_config`."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in OURS}
    image = {name: fields.pop(name) for name in ("patch_size", "image_size")}
    words = {name: fields.pop(name) for name in ("vocab_size", "max_position_embeddings", "eos_token_id")}
    text = fields.pop("text")
    towers = {"vision_config": fields.pop("vision") | image} | ({"text_config": text | words} if text else {})
    return {"model_type": "clip", "architectures": ["CLIPModel"], **fields, **towers}


def clip_tokenizer(folder: Path, config: CLIPConfig) -> Any:
    """The folder's tokenizer; raises ValueError where the network would make the same of every prompt."""
    from dollar_jax.weights.pipeline import load_tokenizer  # which knows this module's networks

    tokenizer = load_tokenizer(folder)
    red, fox = tokenizer(["red", "fox"])["input_ids"]
    if red == fox or red[-1] != config.eos_token_id:
        raise ValueError(f"{folder} lacks CLIP's tokenizer, without which all prompts are alike: see docs/rewards.md")
    return tokenizer


def clip_network(config: CLIPConfig) -> Network:
    return make_network(functools.partial(CLIP, config))


def load_clip(folder: Path, text: bool = True, **ours: Any) -> tuple[CLIPConfig, Network, Params, dict[str, Any]]:
    """Configuration, network, parameters, and the tensors of a head, `layers.*`, of a folder of safetensors under
    transformers' or OpenCLIP's names, with or without its text tower; `ours` are dtype, param_dtype and remat."""
    config = clip_config(files.read_config(folder), **ours)
    config = config if text else dataclasses.replace(config, text=None)
    network = clip_network(config)
    return config, network, *_split(from_openclip(files.read_tensors(folder)), config, network)


def _split(pairs: Pairs, config: CLIPConfig, network: Network) -> tuple[Params, dict[str, np.ndarray]]:
    """Parameters, and a head's tensors; a text tower that the configuration has not is left out."""
    head = {}

    def towers() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in pairs:
            if name.startswith(HEAD):
                head[name] = tensor
            elif config.text is not None or not name.startswith(("text_", "logit_scale")):
                yield name, tensor

    return import_params(CLIP_TABLE, towers(), network.shapes), head


def import_reward(source: Path, folder: Path, clip: Path | None = None) -> None:
    """Writes `folder` as the rewards on CLIP are read, of a folder of safetensors, or of one such file or torch's, with
    transformers' or OpenCLIP's names. What `source` lacks is that of the folder `clip`: config.json, tokenizer, and the
    image tower of an aesthetic head. Raises FileExistsError, FileNotFoundError or ValueError naming what is missing."""
    places = [place for place in (source, clip) if place is not None and place.is_dir()]
    if clip not in (None, *places):
        raise FileNotFoundError(f"--clip={clip} is not a folder")
    with np.errstate(over="ignore"), new_folder(folder) as draft:
        pairs = read_torch(source) if source.suffix in files.PICKLES else files.read_tensors(source)
        tensors = dict(from_openclip((name.removeprefix("module."), tensor) for name, tensor in pairs))
        if head := any(name.startswith(HEAD) for name in tensors):
            tensors = {**(dict(from_openclip(files.read_tensors(clip))) if clip else {}), **tensors}
        width = len(tensors.get("vision_model.embeddings.class_embedding", ()))
        described = (place for place in places if (place / "config.json").is_file())
        configs = (*(clip_config(files.read_config(place)) for place in described), VIT_H_14)
        if (config := next((c for c in configs if c.vision.hidden_size == width), None)) is None:
            what = "a head without its CLIP" if head else "of no CLIP that a config.json describes"
            raise ValueError(f"{source} is {what}: give --clip=FOLDER of {_LIKE}")
        frames, length = (len(tensors.get(name, (None,))) for name in _LENGTHS)
        found = {"frames": frames, "max_position_embeddings": length, "text": None if head else config.text}
        config = dataclasses.replace(config, param_dtype="float16", **found)
        try:
            params, layers = _split(tensors.items(), config, clip_network(config))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if config.text is not None:
            _tokenizer(source, places, config).save_pretrained(draft)
        written = itertools.chain(export_stream(CLIP_TABLE, params), layers.items())
        stream = ((name, files.finite(source, name, tensor)) for name, tensor in written)
        dtype = "float32" if head else "float16"
        files.write_component(draft, clip_fields(config), stream, file_name=files.TRANSFORMERS_FILE, dtype=dtype)


def check_preprocessing(path: Path, side: int | None = None) -> None:
    """Raises ValueError where a preprocessor_config.json prepares images otherwise than `models.clip.preprocess`."""
    wanted, fields = {"image_mean": list(MEAN), "image_std": list(STD)}, read_json(path)
    wanted |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} if side else {}
    for name, value in wanted.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path} has {name} {fields[name]}, and only CLIP's {value} is supported")


def _tokenizer(source: Path, places: list[Path], config: CLIPConfig) -> Any:
    """The first place's that has CLIP's; ValueError where images would be prepared otherwise than here."""
    for place in places:
        if (path := place / "preprocessor_config.json").is_file():
            check_preprocessing(path)
        with contextlib.suppress(ValueError):
            return clip_tokenizer(place, config)
    raise ValueError(f"{source} lacks tokenizer.json, or vocab.json and merges.txt: give --clip=FOLDER of {_LIKE}")
