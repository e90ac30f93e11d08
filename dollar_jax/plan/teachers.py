"""Teachers without their weights: their networks' programs by shapes alone."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from dollar_jax.config import DistillConfig
from dollar_jax.data.clip import MOVING_SHAPES, clip_size
from dollar_jax.generate import Generator, as_configured, teacher_folder, transformer_options
from dollar_jax.weights.families import PUBLISHED, Architecture
from dollar_jax.weights.kind import Kind
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
    family = architecture.family
    held = {"param_dtype": config.compute.teacher_dtype}

    def component(kind: Kind, config: object) -> Component:
        network = kind.network(config)
        return Component(config, network, network.shapes)

    transformer = dataclasses.replace(architecture.transformer, **held, **transformer_options(config.compute))
    vae, text = component(family.vae, architecture.vae), dataclasses.replace(architecture.text_encoder, **held)
    networks = component(family.transformer, transformer), vae, component(family.text_encoder, text)
    pipeline = Pipeline(family, *networks, None, architecture.schedule)
    if (encoder := architecture.image_encoder) is not None and family.image_encoder is not None:
        pipeline = dataclasses.replace(pipeline, image_encoder=component(family.image_encoder, encoder))
    pipeline = as_configured(pipeline, config)
    settings = config.data.max_text_length, config.sampling, clip, config.compute.vae_chunk, mesh
    return Generator(pipeline, *settings, student_ode=config.student.sampler == "ode")
