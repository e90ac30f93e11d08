"""Teachers without their weights: their networks' programs by shapes alone."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from dollar_jax.config import DistillConfig
from dollar_jax.data.clip import MOVING_SHAPES, clip_size
from dollar_jax.generate import Generator, as_configured, teacher_folder, transformer_options
from dollar_jax.weights.families import PUBLISHED, Architecture
from dollar_jax.weights.pipeline import Component, Pipeline, read_architecture


def architecture_of(config: DistillConfig) -> Architecture:
    """Of the teacher in its folder, or of a published one that is not there yet; ValueError for any other."""
    folder = teacher_folder(config.teacher)
    if (folder / "model_index.json").is_file():
        return read_architecture(folder)
    if folder.name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"the teacher {config.teacher} is not there; without it only these can be planned: {known}")
    return PUBLISHED[folder.name]


def clip_of(config: DistillConfig, video: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Frames, height and width: of a video of height, width and frames, or of the data; ValueError without both."""
    if video is not None:
        return video[2], *video[:2]
    if config.data.name != MOVING_SHAPES and not Path(config.data.name).is_dir():
        raise ValueError(f"the data {config.data.name} is not there: give --video=HEIGHTxWIDTHxFRAMES")
    return clip_size(config.data)


def weightless_generator(
    config: DistillConfig, architecture: Architecture, clip: tuple[int, int, int], mesh: Mesh
) -> Generator:
    """As `generate.make_generator` makes it, with the parameters' shapes in their place, and no tokenizer."""
    family, held = architecture.family, {"param_dtype": config.compute.teacher_dtype}
    options = {"transformer": held | transformer_options(config.compute), "text_encoder": held}
    networks = {}
    for name, kind in family.kinds.items():
        own = dataclasses.replace(getattr(architecture, name), **options.get(name, {}))
        network = kind.network(own)
        networks[name] = Component(own, network, network.shapes)
    pipeline = as_configured(Pipeline(family, **networks, tokenizer=None, schedule=architecture.schedule), config)
    settings = config.data.max_text_length, config.sampling, clip, config.compute.vae_chunk, mesh
    return Generator(pipeline, *settings, student=config.student)
