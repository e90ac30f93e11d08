"""Videos and captions as latents and text states, encoded once by the teacher's own VAE and encoder."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tensorflow_datasets.core.hashing import Hasher
from tqdm import tqdm

from dollar_jax.config import DistillConfig
from dollar_jax.data import shapes
from dollar_jax.data.clip import MOVING_SHAPES
from dollar_jax.data.prepared import PreparedVideos, fingerprint_programs, prefetch
from dollar_jax.distributed import wait_for
from dollar_jax.files import new_file, read_arrays
from dollar_jax.generate import Generator
from dollar_jax.program import Program

_AT_ONCE = 32  # videos encoded together


@dataclasses.dataclass(frozen=True)
class EncodedVideos:
    """Normalised latents [n t h w c], text states [n l d] and the captions they came from."""

    latent: np.ndarray
    text: np.ndarray
    captions: Sequence[str]
    has_latents = True

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """(t, h, w, c) of every latent: there is one."""
        return [self.latent.shape[1:]]

    def some_captions(self, count: int) -> dict[str, np.ndarray]:
        """At most so many different captions, the same each time, with the latent of a clip of each."""
        return dict(itertools.islice(dict(zip(self.captions, self.latent, strict=True)).items(), count))

    def batches(self, config: DistillConfig, rows: np.ndarray | None = None, sharding: Any = None) -> Any:
        """Shuffled batches without end, of each only `rows` if given; ValueError for fewer videos than a batch. The
        position that is checkpointed counts whole batches, so that a run may go on with other processes. A batch maps
        to `latent`, `text`, `caption` and `name`, as a message calls a row; with shardings also placed, "on_device"."""
        if len(self) < config.batch_size:
            raise ValueError(f"there are {len(self)} training videos, fewer than config.batch_size {config.batch_size}")
        rows = np.arange(config.batch_size) if rows is None else rows
        names = np.array([f"video {i}" for i in range(len(self))])
        columns = {"latent": self.latent, "text": self.text, "caption": np.array(self.captions), "name": names}

        def load(index: np.ndarray) -> dict[str, Any]:
            return {name: column[index[rows]] for name, column in columns.items()}

        dataset = grain.MapDataset.range(len(self)).seed(config.seed).shuffle().repeat()
        dataset = dataset.batch(config.batch_size, drop_remainder=True).map(load)
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        return iter(prefetch(dataset, config, rows, sharding))


Videos = EncodedVideos | PreparedVideos


def load_programs(config: DistillConfig, generator: Generator) -> list[Program]:
    """What `load_data` executes on the devices the first time, by shapes alone."""
    if config.data.name != MOVING_SHAPES:
        return fingerprint_programs(generator)
    mesh, count, clip = generator.own_mesh, config.data.train_videos, (*generator.clip, 3)
    parts = {min(_AT_ONCE, count - start) for start in range(0, count, _AT_ONCE)}
    return [*(generator.encode_program((part, *clip), mesh) for part in parts), generator.text_program(count, mesh)]


def load_data(config: DistillConfig, generator: Generator, workdir: Path) -> Videos:
    """The training data of config.data: a prepared data set, or the default domain. The latter is rendered and encoded
    into `workdir/data` the first time. Of several processes the first does that, and the others wait for its file."""
    if config.data.name != MOVING_SHAPES:
        return PreparedVideos(config.data).check(config, generator)
    if generator.pipeline.family.conditioned:
        raise ValueError(f"config.data.name {MOVING_SHAPES} keeps no images that a teacher is told of: prepare videos")
    folder, count = workdir / "data", config.data.train_videos
    made_of = repr((config.teacher, generator.clip, count, config.data.max_text_length))
    cache = folder / f"latents_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.npz"
    if jax.process_index() > 0:
        wait_for(cache, "the encoded videos")
    elif not cache.exists():
        latents, captions = [], []
        order = sorted(range(count), key=Hasher("train").hash_key)  # TFDS's, in which figures so far were measured
        for start in tqdm(range(0, count, _AT_ONCE), "encoding", unit_scale=_AT_ONCE, unit="video"):
            part = [shapes.example(shapes.SEED, "train", i) for i in order[start : start + _AT_ONCE]]
            latents.append(generator.encode(np.stack([video for video, _ in part])))
            captions += [str(caption) for _, caption in part]
        with new_file(cache) as draft, draft.open("wb") as file:
            np.savez(file, latent=np.concatenate(latents), text=generator.text(captions), captions=captions)
    stored = read_arrays(cache)
    return EncodedVideos(stored["latent"], stored["text"], stored["captions"].tolist())


def give_first_frames(generator: Generator, captions: Sequence[shapes.Caption], seed: int) -> None:
    """Where a first frame has to be given: that of a clip of each of the default domain's captions, by prompt."""
    if generator.pipeline.schedule.given_frames:
        given = generator.first_frames(shapes.first_frames(seed, captions))
        generator.given.update(zip(map(str, captions), given, strict=True))
