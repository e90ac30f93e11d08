"""The default domain as a TFDS dataset, rendered on the user's machine: no download, no TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dollar_jax.data import shapes

SEED = 20_241_220


class MovingShapes(tfds.core.GeneratorBasedBuilder):
    """Captioned videos of moving shapes; `held_out` has combinations that are in no other split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def __init__(self, *, sizes: dict[str, int], **kwargs: Any):
        self.sizes = sizes
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = (shapes.FRAMES, shapes.SIZE, shapes.SIZE, 3)
        video: Any = tfds.features.Tensor(shape=size, dtype=np.uint8, encoding="zlib")
        labels = {name: tfds.features.ClassLabel(names=list(values)) for name, values in shapes.ATTRIBUTES.items()}
        features = tfds.features.FeaturesDict({"video": video, "caption": tfds.features.Text(), **labels})
        about = "One shape moving over a patterned background, with a caption."
        keys = ("caption", "video")
        return tfds.core.DatasetInfo(builder=self, description=about, features=features, supervised_keys=keys)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split, size) for split, size in self.sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(size):
            video, caption = shapes.example(SEED, split, index)
            labels = {name: getattr(caption, name) for name in shapes.ATTRIBUTES}
            yield index, {"video": video, "caption": str(caption), **labels}


def load_moving_shapes(folder: Path, split: str, sizes: dict[str, int]) -> Any:
    """Random-access source of a split's records, rendered into `folder` when it is not there yet."""
    name = "_".join(f"{split}{size}" for split, size in sorted(sizes.items()))
    builder = MovingShapes(sizes=sizes, data_dir=folder / name)
    builder.download_and_prepare()
    return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
