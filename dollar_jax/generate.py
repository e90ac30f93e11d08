"""From prompts to frames: text states, jitted samplers of teacher and student, decoding, batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dollar_jax import sampling, sharding
from dollar_jax.config import ComputeConfig, DistillConfig, LoraConfig, MeshConfig, SamplingConfig
from dollar_jax.data.clip import clip_size
from dollar_jax.models import lora
from dollar_jax.models.network import Network
from dollar_jax.models.umt5 import zero_padding
from dollar_jax.models.wan_vae import denormalise, normalise
from dollar_jax.sharding import shard
from dollar_jax.types import Params
from dollar_jax.video import signed_range, to_uint8
from dollar_jax.weights.pipeline import Pipeline, load_pipeline, tokenize

SHIPPED_TEACHERS = {"moving_shapes": Path(__file__).parent / "assets" / "moving_shapes"}
Sampler = Callable[[Params, jax.Array, Any], jax.Array]  # params, key per video, text → latent


def teacher_folder(name: str) -> Path:
    """The folder of the shipped teacher of that name, or the path itself."""
    return SHIPPED_TEACHERS.get(name, Path(name))


def transformer_options(compute: ComputeConfig) -> dict[str, Any]:
    """The fields of a transformer's configuration that say how it is computed."""
    names = ("dtype", "remat", "scan_layers", "attention", "context_parallel")
    return {name: getattr(compute, name) for name in names}


def load_teacher(name: str, compute: ComputeConfig | None = None, mesh: Mesh | None = None) -> Pipeline:
    """The shipped teacher of that name, or the pipeline folder at that path; in fp32 unless `compute` is given.

    With a mesh the transformer of an imported folder is restored into its shards there.
    """
    folder = teacher_folder(name)
    if compute is None:
        return load_pipeline(folder)
    return load_pipeline(
        folder,
        compute.teacher_dtype,
        None if mesh is None else functools.partial(shard, mesh),
        **transformer_options(compute),
    )


def student_network(transformer: Network, config: LoraConfig) -> Network:
    """The transformer as student and fake score are: with adapters if there are to be some."""
    if not config.rank:
        return transformer
    return lora.adapt(transformer, config.rank, config.alpha, config.targets)


def student_params(config: LoraConfig, teacher: Params, trained: Params) -> Params:
    """Parameters of the transformer itself: what was trained, or the teacher's with those adapters merged."""
    return lora.merge(teacher, trained, config.scale) if config.rank else trained


def decode_frames(vae: Network, config: Any, chunk: int | None, params: Params, latent: jax.Array) -> jax.Array:
    """Frames in [0, 1] of normalised latents, `chunk` latent frames at a time if given."""
    frames = vae.apply(params, denormalise(latent, config), method="decode", chunk=chunk)
    return (frames + 1) / 2


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
        """States [n, l, d] of the prompts as the transformer expects them: Wan's has padding zeroed."""
        ids, mask = tokenize(self.pipeline.tokenizer, prompts, self.max_text_length)
        if not self.pipeline.family.masks_padding:
            mask = np.ones_like(mask)
        return np.asarray(self._encode_text(self.pipeline.text_encoder.params, ids, mask))

    @functools.cached_property
    def null_text(self) -> np.ndarray:
        """States [1, l, d] of the empty prompt, the unconditional half of guidance."""
        return self.text([""])

    @functools.cached_property
    def _encode(self) -> Any:
        vae = self.pipeline.vae

        def encode(params: Params, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean, log_variance = vae.network.apply(params, signed_range(frames), method="encode", chunk=self.vae_chunk)
            std = jnp.exp(0.5 * log_variance) / jnp.array(vae.config.latents_std)
            return normalise(mean, vae.config), std

        return jax.jit(encode)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Normalised latents, the posterior's mean, of uint8 frames [b t h w 3]."""
        return self.encode_posterior(frames)[0]

    def encode_posterior(self, frames: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the normalised latents' posterior, of uint8 frames [b t h w 3]."""
        mean, std = self._encode(self.pipeline.vae.params, frames)
        return np.asarray(mean), np.asarray(std)

    def frames(self, params: Params, latent: jax.Array) -> jax.Array:
        """Frames in [0, 1] of normalised latents, with the VAE's parameters given: pure, to be traced."""
        vae = self.pipeline.vae
        return decode_frames(vae.network, vae.config, self.vae_chunk, params, latent)

    @functools.cached_property
    def _decode(self) -> Any:
        return jax.jit(self.frames)

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
            if self.sampling.solver == "unipc":
                return sampling.unipc_sample(
                    pipeline.transformer.network.apply,
                    params,
                    pipeline.schedule,
                    self.noise(keys),
                    text,
                    null_text,
                    guidance_weight,
                    num_steps,
                )
            return sampling.ode_sample(
                pipeline.transformer.network.apply,
                params,
                pipeline.schedule,
                self.noise(keys),
                text,
                null_text,
                guidance_weight,
                num_steps,
                self.sampling.eta,
                _step_keys(keys) if self.sampling.eta else None,
            )

        return draw

    @functools.cache  # noqa: B019
    def student_sampler(self, timesteps: tuple[float, ...]) -> Sampler:
        """The student through its `timesteps`: one evaluation each, without guidance."""
        pipeline = self.pipeline

        @jax.jit
        def draw(params: Params, keys: jax.Array, text: jax.Array) -> jax.Array:
            return sampling.few_step_sample(
                pipeline.transformer.network.apply,
                params,
                pipeline.schedule,
                timesteps,
                self.noise(keys),
                text,
                _step_keys(keys),
            )

        return draw

    def __hash__(self) -> int:
        return id(self)


def make_generator(
    config: DistillConfig, clip: tuple[int, int, int] | None = None, mesh: Mesh | None = None
) -> Generator:
    """The teacher of a configuration, ready to sample clips of the size of its data's, or of another.

    An imported teacher is restored into the mesh's sharding if one is given.
    """
    return Generator(
        load_teacher(config.teacher, config.compute, mesh),
        config.data.max_text_length,
        config.sampling,
        clip or clip_size(config.data),
        config.compute.vae_chunk,
    )


def subset(timesteps: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` timesteps for the student, from the noisiest: 4 → 2 is the 1st and the 3rd it knows.

    More than it knows lie evenly between those, the last ones on the way to the clean end at 0.
    Raises ValueError when `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"the student takes at least 1 step, not {count}")
    known = len(timesteps)
    if count <= known:
        return tuple(timesteps[i * known // count] for i in range(count))
    places = np.arange(count) * known / count
    return tuple(np.interp(places, np.arange(known + 1), [*timesteps, 0.0]).tolist())


def video_keys(seed: int, count: int) -> jax.Array:
    """One key per video; video i of a seed starts from the same noise whoever draws it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def _step_keys(keys: jax.Array) -> jax.Array:
    """The keys of the noise on a video's way, besides that of its start."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)


def sampling_mesh(config: MeshConfig) -> Mesh:
    """This process's devices: parameters over as much of the run's `fsdp` axis as fits, videos over all.

    Processes draw on their own, so that none waits for another; the networks must fit into one.
    """
    devices = jax.local_devices()
    fsdp = len(devices) if config.fsdp == -1 else math.gcd(config.fsdp, len(devices))
    return sharding.make_mesh(MeshConfig(-1, fsdp, 1, 1), devices)


def draw_videos(
    generator: Generator,
    draw: Sampler,
    params: Params,
    prompts: Sequence[str],
    keys: jax.Array,
    batch_size: int,
    mesh: Mesh,
    bar: tqdm | None = None,
) -> Iterator[np.ndarray]:
    """A video per prompt and key [n], uint8 [b t h w 3] batch by batch, sharded over the mesh.

    The last batch is filled up for the devices, and cut. Batches do not change the videos beyond rounding.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-min(batch_size, len(prompts)) // shards) * shards
    params = jax.device_put(params, sharding.shard(mesh, params))
    rows = sharding.batch_sharding(mesh)
    data = np.asarray(jax.random.key_data(keys))
    for start in range(0, len(prompts), batch):
        index = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
        count = min(batch, len(prompts) - start)
        text = jax.device_put(generator.text([prompts[i] for i in map(int, index)]), rows)
        latent = draw(params, jax.device_put(jax.random.wrap_key_data(jnp.asarray(data[index])), rows), text)
        frames = to_uint8(generator.decode(latent)[:count])
        if bar is not None:
            bar.update(count)
        yield frames


def sample_prompts(
    generator: Generator,
    draw: Sampler,
    params: Params,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num: int,
    batch_size: int,
    mesh: MeshConfig,
) -> np.ndarray:
    """`num` videos per prompt and seed, uint8 [prompts, seeds × num, t, h, w, 3]; with a progress bar.

    Every prompt starts from the same noises, so a video does not depend on what else is drawn. Each
    process draws a share, and all get all.
    """
    each = jnp.concatenate([video_keys(seed, num) for seed in seeds])
    total, count = len(prompts) * len(each), jax.process_count()
    share = -(-total // count)
    index = np.minimum(np.arange(share) + jax.process_index() * share, total - 1)
    with tqdm(total=share, desc="sampling", unit="video", disable=jax.process_index() > 0) as bar:
        chosen = [prompts[i // len(each)] for i in map(int, index)]
        keys = each[index % len(each)]
        on = sampling_mesh(mesh)
        parts = list(draw_videos(generator, draw, params, chosen, keys, batch_size, on, bar))
    videos = np.concatenate(parts)
    if count > 1:
        videos = np.asarray(multihost_utils.process_allgather(videos, tiled=True))
    return videos[:total].reshape(len(prompts), len(each), *videos.shape[1:])
