"""What the training data says of its clips before any is read."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from dollar_jax.config import DataConfig
from dollar_jax.data import shapes

MOVING_SHAPES = "moving_shapes"  # the default domain's name; every other one is a folder's
SETTINGS = "prepare.json"  # in the folder of a data set that is being prepared


def clip_size(config: DataConfig) -> tuple[int, int, int]:
    """Frames, height and width of the data's clips; of the first bucket where there are several. Raises
    FileNotFoundError or ValueError when the folder holds no prepared data set."""
    if config.name == MOVING_SHAPES:
        return shapes.FRAMES, shapes.SIZE, shapes.SIZE
    settings = read_about(Path(config.name))["settings"]
    height, width = settings["buckets"][0]
    return settings["frames"], height, width


def clip_fps(config: DataConfig, teacher: float) -> float:
    """Frames per second of the data's clips; the teacher's own where the data does not say."""
    return shapes.FPS if config.name == MOVING_SHAPES else read_about(Path(config.name))["settings"]["fps"] or teacher


def read_about(folder: Path) -> Any:
    """The metadata of a prepared data set: settings, latent_shapes, shards, fingerprint."""
    if not (folder / "dataset_info.json").is_file():
        begun = (folder / SETTINGS).exists()
        hint = "it is not finished: run dollar prepare again" if begun else "dollar prepare makes one"
        raise FileNotFoundError(f"config.data.name {str(folder)!r} holds no prepared data set; {hint}")
    if not (about := tfds.builder_from_directory(folder).info.metadata) or "latent_shapes" not in about:
        raise ValueError(f"{folder} was not made by dollar prepare")
    return about
