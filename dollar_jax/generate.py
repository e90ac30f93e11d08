"""From prompts to frames: text states, jitted samplers of teacher and student, decoding, batch by batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dollar_jax import sample
from dollar_jax.config import ComputeConfig, SamplingConfig
from dollar_jax.models.umt5 import zero_padding
from dollar_jax.models.wan_vae import denormalise, normalise
from dollar_jax.types import Params
from dollar_jax.weights.pipeline import Pipeline, load_pipeline, tokenize

SHIPPED_TEACHERS = {"moving_shapes": Path(__file__).parent / "assets" / "moving_shapes"}
Sampler = Callable[[Params, jax.Array, Any], jax.Array]  # params, key per video, text → latent


def load_teacher(name: str, compute: ComputeConfig | None = None) -> Pipeline:
    """The shipped teacher of that name, or the pipeline folder at that path; in fp32 unless `compute` is given."""
    folder = SHIPPED_TEACHERS.get(name, Path(name))
    if compute is None:
        return load_pipeline(folder)
    return load_pipeline(
        folder, param_dtype=compute.teacher_dtype, dtype=compute.dtype, remat=compute.remat,
        scan_layers=compute.scan_layers, attention=compute.attention,
        context_parallel=compute.context_parallel,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generator:
    """A pipeline's jitted functions. Videos are drawn one key each, so batching does not change them."""

    pipeline: Pipeline
    max_text_length: int
    sampling: SamplingConfig
    clip: tuple[int, int, int]  # frames, height, width
    vae_chunk: int | None = None  # latent frames encoded or decoded at a time; None is all

    @functools.cached_property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.pipeline.vae.config.latent_shape(*self.clip)

    @functools.cached_property
    def _encode_text(self) -> Any:
        network = self.pipeline.text_encoder.network
        return jax.jit(lambda p, ids, mask: zero_padding(network.apply(p, ids, mask), mask))

    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """States [n, l, d] of the prompts, padding zeroed."""
        ids, mask = tokenize(self.pipeline.tokenizer, prompts, self.max_text_length)
        return np.asarray(self._encode_text(self.pipeline.text_encoder.params, ids, mask))

    @functools.cached_property
    def null_text(self) -> np.ndarray:
        """States [1, l, d] of the empty prompt, the unconditional half of guidance."""
        return self.text([""])

    @functools.cached_property
    def _encode(self) -> Any:
        vae = self.pipeline.vae

        def encode(params: Params, frames: jax.Array) -> jax.Array:
            frames = frames.astype(jnp.float32) / 127.5 - 1
            mean, _ = vae.network.apply(params, frames, method="encode", chunk=self.vae_chunk)
            return normalise(mean, vae.config)

        return jax.jit(encode)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Normalised latents, the posterior's mean, of uint8 frames [b t h w 3]."""
        return np.asarray(self._encode(self.pipeline.vae.params, frames))

    @functools.cached_property
    def _decode(self) -> Any:
        vae = self.pipeline.vae

        def decode(params: Params, latent: jax.Array) -> jax.Array:
            raw = denormalise(latent, vae.config)
            frames = vae.network.apply(params, raw, method="decode", chunk=self.vae_chunk)
            return (frames + 1) / 2

        return jax.jit(decode)

    def decode(self, latent: np.ndarray | jax.Array) -> np.ndarray:
        """Frames in [0, 1] of normalised latents."""
        return np.asarray(self._decode(self.pipeline.vae.params, latent))

    def noise(self, keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys)

    @functools.cache  # noqa: B019 (a generator lives as long as its program)
    def teacher_sampler(self, num_steps: int, guidance_weight: float) -> Sampler:
        """The ODE in `num_steps` steps with guidance: 2 evaluations each, 1 when the weight is 0."""
        pipeline, null_text = self.pipeline, jnp.asarray(self.null_text)

        @jax.jit
        def draw(params: Params, keys: jax.Array, text: jax.Array) -> jax.Array:
            return sample.ode_sample(
                pipeline.transformer.network.apply, params, pipeline.schedule, self.noise(keys), text,
                null_text, guidance_weight, num_steps, self.sampling.eta,
                keys[0] if self.sampling.eta else None,
            )  # fmt: skip

        return draw

    @functools.cache  # noqa: B019
    def student_sampler(self, timesteps: tuple[float, ...]) -> Sampler:
        """The student through its `timesteps`: one evaluation each, without guidance."""
        pipeline = self.pipeline

        @jax.jit
        def draw(params: Params, keys: jax.Array, text: jax.Array) -> jax.Array:
            return sample.few_step_sample(
                pipeline.transformer.network.apply, params, pipeline.schedule, timesteps,
                self.noise(keys), text, jax.random.fold_in(keys[0], 1),
            )  # fmt: skip

        return draw

    def __hash__(self) -> int:
        return id(self)


def subset(timesteps: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` of the student's timesteps, evenly chosen from the noisiest: 4 → 2 is the 1st and the 3rd.

    Raises ValueError when there are fewer.
    """
    if not 1 <= count <= len(timesteps):
        raise ValueError(
            f"the student takes 1 to {len(timesteps)} steps, not {count}: it knows the timesteps "
            f"{', '.join(f'{t:g}' for t in timesteps)}"
        )
    return tuple(timesteps[i * len(timesteps) // count] for i in range(count))


def video_keys(seed: int, count: int) -> jax.Array:
    """One key per video; video i of a seed starts from the same noise whoever draws it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
