"""An item of the source's list as clips to encode."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dollar_jax.prepare import sources
from dollar_jax.prepare.manifests import list_manifest, readable
from dollar_jax.prepare.settings import PrepareSettings
from dollar_jax.prepare.sources import TFDS, Item
from dollar_jax.prepare.videos import Unusable, array_frames, clips_of, hard_cut, read_clips


class Clip(NamedTuple):
    """The `number`-th clip of the `index`-th video of the list: `frames`, uint8 [t, h, w, 3], or in their place a
    `latent`, float32 [t, h, w, c]; or neither for a prompt."""

    index: int
    number: int
    name: str
    caption: str
    frames: np.ndarray | None = None
    latent: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.frames is None else (self.frames.shape[1], self.frames.shape[2])


class Rejected(NamedTuple):
    """A clip, or the `index`-th video of the list, and why it is not used."""

    index: int
    name: str
    reason: str


class Loader:
    """Reads items of the settings' source: loader(index, item) gives an item's clips."""

    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        name = settings.source or ""
        self.dataset = sources.Dataset(name.removeprefix(TFDS), settings.split) if name.startswith(TFDS) else None

    def items(self) -> Iterator[Item]:
        """The source's items in their order; raises OSError or ValueError for a source that cannot be read."""
        if self.dataset is not None:
            return self.dataset.items()
        if self.settings.source is not None:
            return sources.list_source(self.settings.source)
        assert self.settings.prompts is not None
        return list_manifest(Path(self.settings.prompts), prompts=True)

    def __call__(self, index: int, item: Item) -> list[Clip | Rejected] | str:
        """The clips of the `index`-th item, or the reason why it has none."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, index])
        try:
            if self.dataset is not None:
                video, caption = self.dataset.read(item["video"]["record"])
                clips = clips_of(array_frames(video), settings, rng)
            else:
                choice = np.random.default_rng([settings.seed, index, 1]) if settings.caption == "random" else None
                caption = sources.read_caption(item, choice, settings.language)
                if settings.prompts is not None:
                    name, count = item["name"], settings.clips if settings.sampling else 1
                    names = [f"{name}#{i}" for i in range(count)] if count > 1 else [name]
                    return [Clip(index, i, name, caption) for i, name in enumerate(names)]
                if settings.latents:
                    return [Clip(index, 0, item["name"], caption, latent=sources.read_latent(item))]
                clips = read_clips(sources.open_video(item), settings, rng)
        except Unusable as reason:
            return readable(str(reason))
        except Exception as error:  # whatever is wrong with one video, the job goes on
            return readable(f"cannot be read: {type(error).__name__}: {error}")
        found: list[Clip | Rejected] = []
        for i, frames in enumerate(clips):
            name = item["name"] if settings.clips == 1 else f"{item['name']}#{i}"
            cut = None if settings.keep_cuts else hard_cut(frames)
            clip = Clip(index, i, name, caption, frames)
            found.append(clip if cut is None else Rejected(index, name, f"crosses a hard cut before its frame {cut}"))
        return found
