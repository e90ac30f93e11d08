"""From prompts to frames: the programs of text encoder, samplers and VAE, and drawing with them batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dollar_jax import sampling, sharding
from dollar_jax.config import ComputeConfig, DistillConfig, LoraConfig, MeshConfig, SamplingConfig, StudentConfig
from dollar_jax.data.clip import clip_size
from dollar_jax.models import lora
from dollar_jax.models.activation_sharding import row_by_row
from dollar_jax.models.layers import keep_blocks
from dollar_jax.models.network import Network
from dollar_jax.models.umt5 import zero_padding
from dollar_jax.models.wan_vae import denormalise, normalise
from dollar_jax.program import BESIDE, Program
from dollar_jax.schedule import keep_given
from dollar_jax.types import ImageCondition, Params
from dollar_jax.video import read_image, side_by_side, signed_range, to_uint8
from dollar_jax.weights.families import clean_prompt
from dollar_jax.weights.pipeline import Pipeline, load_component, load_pipeline, read_vae, tokenize

PIXELS_AT_ONCE = 2**21  # of the videos drawn together
SHOWN_PIXELS = 2**22  # of a frame with all samples of a step
DATA_PROMPTS = 3  # of a run whose configuration names none to sample
# Kept, for a new thread takes over the heap of one that ended, in which a compiler may have left no room in one piece.
beside = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="beside")
SHIPPED_TEACHERS = {"moving_shapes": Path(__file__).parent / "assets" / "moving_shapes"}


def teacher_folder(name: str) -> Path:
    """The folder of the shipped teacher of that name, or the path itself."""
    return SHIPPED_TEACHERS.get(name, Path(name))


def transformer_options(compute: ComputeConfig) -> dict[str, Any]:
    """The fields of a transformer's configuration that say how it is computed."""
    return {k: getattr(compute, k) for k in ("dtype", "remat", "scan_layers", "attention", "context_parallel")}


def load_teacher(name: str, c: DistillConfig | None = None, mesh: Mesh | None = None) -> Pipeline:
    """The shipped teacher of that name, or the folder at that path; in fp32 or as configured, in a mesh's shards."""
    if c is None:
        return load_pipeline(teacher_folder(name))
    place = None if mesh is None else functools.partial(sharding.shard, mesh)
    options, dtype = transformer_options(c.compute), c.compute.teacher_dtype
    return load_pipeline(teacher_folder(name), dtype, place, expert=c.expert, **options)


def student_network(transformer: Network, config: LoraConfig) -> Network:
    """The transformer as student and fake score are: with adapters if there are to be some."""
    return lora.adapt(transformer, config.rank, config.alpha, config.targets) if config.rank else transformer


def student_shapes(transformer: Network, layers: int | None) -> Params:
    """The fp32 parameters of a whole student with so many of the transformer's blocks."""
    kept = jax.eval_shape(functools.partial(keep_blocks, count=layers), transformer.shapes)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), kept)


def merge_program(config: LoraConfig, mesh: Mesh, teacher: Params, adapters: Params) -> Program:
    """(teacher, adapters) → parameters that compute the same without adapters; both are given by their shapes."""
    places = sharding.shard(mesh, teacher), sharding.shard(mesh, adapters)
    merge = functools.partial(lora.merge, scale=config.scale)
    return Program("merge_adapters", merge, (teacher, adapters), mesh, places, places[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """One way to draw latents [n t h w c]: (parameters, a key per video [n], a `Condition`'s fields) → latents. Each
    video has its own key, so that batches do not change the videos. Where `guided`, `draw` takes the empty prompt's."""

    name: str
    draw: Callable[..., jax.Array]
    generator: Generator
    guided: bool

    @functools.cache  # noqa: B019 (a sampler lives as long as its programs)
    def program(self, count: int) -> Program:
        """The program for so many videos, on the generator's mesh."""
        g = self.generator
        network = g.pipeline.transformer.network
        shapes = network.shapes if self.guided else student_shapes(network, g.student.layers)
        shapes = (shapes,) * 2 if g.pipeline.transformer_2 else shapes
        keys = jax.eval_shape(lambda: video_keys(0, count))
        text = jax.ShapeDtypeStruct((count, *g.text_shape), jnp.float32)
        frames, given = g.pipeline.schedule.given_frames, g.image_shapes(count)
        given = jax.ShapeDtypeStruct((count, frames, *g.latent_shape[1:]), jnp.float32) if frames else given
        rows = sharding.row_sharding(g.mesh, count)
        null_text = (jax.ShapeDtypeStruct((1, *g.text_shape), jnp.float32),) if self.guided else ()
        places = (sharding.shard(g.mesh, shapes), rows, rows, rows, *[sharding.replicated(g.mesh)] * self.guided)
        return Program(self.name, self.draw, (shapes, keys, text, given, *null_text), g.mesh, places, rows)

    def arguments(self, params: Params, keys: jax.Array, text: Any, given: Any = None) -> tuple[Any, ...]:
        """What `program` takes, in its place on the mesh."""
        null_text = (self.generator.null_text,) if self.guided else ()
        return self.program(len(keys)).place(params, keys, text, given, *null_text)

    def __call__(self, params: Params, keys: jax.Array, text: Any, given: Any = None) -> jax.Array:
        return self.program(len(keys))(*self.arguments(params, keys, text, given))


class Condition(NamedTuple):
    """What samplers are given: text states [n l d], and first frames [n k h w c] or what is told of them."""

    text: np.ndarray
    given: np.ndarray | ImageCondition | None = None


class BoundSampler(NamedTuple):
    """A sampler, its parameters, its network evaluations per video, and what a manifest says of it."""

    draw: Sampler
    params: Params
    nfe: int
    description: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A pipeline's programs, from prompts to frames. Samplers run on `mesh`, this process's first device if none
    is given; text encoder and VAE too, unless it is shared with other processes: then on this one's devices of it.
    `given`, to be filled, are latents [k h w c] of the first frames by prompt, where the schedule has some given, or an
    `ImageCondition` where the transformer is told of them."""

    pipeline: Pipeline
    max_text_length: int
    sampling: SamplingConfig
    clip: tuple[int, int, int]  # frames, height, width
    vae_chunk: int | None = None  # latent frames of one video encoded or decoded at a time; None is a whole batch
    mesh: Mesh = dataclasses.field(default_factory=lambda: sampling_mesh(MeshConfig(), jax.local_devices()[:1]))
    host: Mesh | None = None  # for this process alone, where its devices are not to be taken from `mesh`
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    student: StudentConfig = StudentConfig()

    @functools.cached_property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.pipeline.vae.config.latent_shape(*self.clip)

    def holding(self, places: Mapping[str, Any]) -> Generator:
        """The same with the parameters of these networks, if there are such, on the devices, by their shardings."""
        found = {name: part for name in places if (part := getattr(self.pipeline, name)) is not None}
        parts = {n: dataclasses.replace(x, params=sharding.put(x.params, places[n])) for n, x in found.items()}
        return dataclasses.replace(self, pipeline=dataclasses.replace(self.pipeline, **parts))

    @property
    def text_shape(self) -> tuple[int, int]:
        """Tokens and width of a prompt's states."""
        return self.max_text_length, self.pipeline.text_encoder.config.d_model

    @functools.cached_property
    def own_mesh(self) -> Mesh:
        alone = sharding.host_count(self.mesh) == 1
        return self.mesh if alone else self.host or sharding.host_mesh(self.mesh.devices.flat)

    @functools.cache  # noqa: B019 (a generator lives as long as its programs)
    def text_program(self, count: int, mesh: Mesh) -> Program:
        """(parameters, token ids, mask) → states of `count` prompts."""
        network = self.pipeline.text_encoder.network
        tokens = jax.ShapeDtypeStruct((count, self.max_text_length), jnp.int32)
        rows = sharding.row_sharding(mesh, count)
        places = sharding.shard(mesh, network.shapes, strict=False), rows, rows

        def encode(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return zero_padding(network.apply(params, ids, mask), mask)

        return Program("text_encoder", encode, (network.shapes, tokens, tokens), mesh, places, rows)

    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """States [n, l, d] of the prompts as the transformer expects them: Wan's has padding zeroed."""
        if self.pipeline.family.cleans_prompts:
            prompts = list(map(clean_prompt, prompts))
        ids, mask = tokenize(self.pipeline.tokenizer, prompts, self.max_text_length)
        if not self.pipeline.family.masks_padding:
            mask = np.ones_like(mask)
        program = self.text_program(len(prompts), self.own_mesh)
        return np.asarray(program(*program.place(self.pipeline.text_encoder.params, ids, mask)))

    def condition(self, prompts: Sequence[str]) -> Condition:
        """What samplers take; raises ValueError for a prompt whose first frame is not known but has to be."""
        frames, told = self.pipeline.schedule.given_frames, self.pipeline.family.conditioned
        if (frames or told) and (lost := set(prompts) - self.given.keys()):
            raise ValueError(f"a first frame has to be given, an image to continue, and {min(lost)!r} has none")
        given = [self.given[prompt] if told else self.given[prompt][:frames] for prompt in prompts if frames or told]
        stacked = jax.tree.map(lambda *x: np.stack(x, dtype=np.float32), *given) if given else None
        return Condition(self.text(prompts), stacked)

    def continue_from(self, images: Mapping[str, Path | IO[bytes]]) -> None:
        """Takes image files as `given`, by prompt."""
        frames = functools.cache(lambda path: self.first_frames(read_image(path, *self.clip[1:])[None]))
        self.given.update({prompt: jax.tree.map(lambda x: x[0], frames(path)) for prompt, path in images.items()})

    def first_frames(self, frames: np.ndarray) -> Any:
        """What is `given` of first frames, uint8 [b h w 3]."""
        if not self.pipeline.family.conditioned:
            return self.encode(frames[:, None])
        program, encoder = self.image_program(frames.shape, self.own_mesh), self.pipeline.image_encoder
        params = self.pipeline.vae.params, encoder and encoder.params
        return jax.tree.map(np.asarray, program(*program.place(params, frames)))

    def image_shapes(self, count: int) -> ImageCondition | None:
        """Of what the transformer is told of `count` images, None where it is told of none."""
        if not self.pipeline.family.conditioned:
            return None
        shape, c = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), self.pipeline.image_encoder
        tokens = c and shape((count, (c.config.image_size // c.config.patch_size) ** 2 + 1, c.config.hidden_size))
        return ImageCondition(shape((count, *self.latent_shape)), tokens)

    @functools.cache  # noqa: B019
    def image_program(self, shape: tuple[int, ...], mesh: Mesh) -> Program:
        """(parameters of VAE and image encoder, uint8 first frames of `shape`) → what the transformer is told of them:
        the normalised mean of the posterior of the frame and as many grey ones as make a clip, and tokens."""
        vae, encoder = self.pipeline.vae, self.pipeline.image_encoder

        def tell(params: Any, frames: jax.Array) -> ImageCondition:
            # Grey is 0 in [-1, 1], between two bytes.
            clips = jnp.pad(signed_range(frames)[:, None], ((0, 0), (0, self.clip[0] - 1), *[(0, 0)] * 3))
            encode = functools.partial(vae.network.apply, params[0], method="encode", chunk=self.vae_chunk)
            latent = normalise(self._videos(encode, clips)[0], vae.config)
            return ImageCondition(latent, encoder and encoder.network.apply(params[1], jnp.float32(frames) / 255))

        shapes = vae.network.shapes, encoder and encoder.network.shapes
        return self._vae_program("image_condition", tell, jax.ShapeDtypeStruct(shape, jnp.uint8), mesh, shapes)

    @functools.cached_property
    def null_text(self) -> np.ndarray:
        """States [1, l, d] of the negative prompt, the other half of guidance."""
        return self.text([self.sampling.negative_prompt])

    @functools.cache  # noqa: B019
    def encode_program(self, shape: tuple[int, ...], mesh: Mesh) -> Program:
        """(parameters, uint8 frames of `shape`) → mean and deviation of their normalised latents' posterior."""
        vae = self.pipeline.vae

        def encode(params: Params, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
            def moments(frames: jax.Array) -> Any:
                return vae.network.apply(params, signed_range(frames), method="encode", chunk=self.vae_chunk)

            mean, log_variance = self._videos(moments, frames)
            return normalise(mean, vae.config), jnp.exp(0.5 * log_variance) / jnp.array(vae.config.latents_std)

        return self._vae_program("vae_encode", encode, jax.ShapeDtypeStruct(shape, jnp.uint8), mesh)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Normalised latents, the posterior's mean, of uint8 frames [b t h w 3]."""
        return self.encode_posterior(frames)[0]

    def encode_posterior(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the normalised latents' posterior, of uint8 frames [b t h w 3]."""
        return self._run_vae(self.encode_program, frames)

    def frames(self, params: Params, latent: jax.Array) -> jax.Array:
        """Frames in [0, 1] of normalised latents, with the VAE's parameters given: pure, to be traced."""
        vae = self.pipeline.vae

        def decode(latent: jax.Array) -> jax.Array:
            return vae.network.apply(params, denormalise(latent, vae.config), method="decode", chunk=self.vae_chunk)

        return (self._videos(decode, latent) + 1) / 2

    def _videos(self, function: Callable[[jax.Array], Any], videos: jax.Array) -> Any:
        """function(videos): of one at a time where even of one only a chunk is held at a time."""
        return function(videos) if self.vae_chunk is None else row_by_row(function, videos)

    @functools.cache  # noqa: B019
    def decode_program(self, shape: tuple[int, ...], mesh: Mesh) -> Program:
        """(parameters, latents of `shape`) → frames."""
        return self._vae_program("vae_decode", self.frames, jax.ShapeDtypeStruct(shape, jnp.float32), mesh)

    def decode(self, latent: np.ndarray | jax.Array) -> np.ndarray:
        """Frames in [0, 1] of normalised latents."""
        return self._run_vae(self.decode_program, latent)

    @functools.cache  # noqa: B019
    def show_program(self, shape: tuple[int, ...], shrink: int) -> Program:
        """(parameters, latents of `shape`) → their frames, 1 / `shrink` as wide and high, as uint8; mean and mean
        square of each latent. All of them are everywhere, for one process to look at."""

        def show(params: Params, latent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            frames = jnp.nan_to_num(self.frames(params, latent))
            box = (1, 1, shrink, shrink, 1)
            boxes = jax.lax.reduce_window(frames, 0.0, jax.lax.add, box, box, "VALID") / shrink**2
            pixels = jnp.round(255 * jnp.clip(boxes, 0, 1)).astype(jnp.uint8)
            axes = tuple(range(1, latent.ndim))
            return pixels, latent.mean(axes), jnp.square(latent).mean(axes)

        program = self._vae_program("show_samples", show, jax.ShapeDtypeStruct(shape, jnp.float32), self.mesh)
        return dataclasses.replace(program, out_shardings=sharding.replicated(self.mesh), share=BESIDE)

    def samples_at_once(self, total: int, most: int | None = None) -> int:
        """How many of `total` videos are drawn together: as many as are small, or `most`, filled up for the mesh."""
        most = most or max(1, PIXELS_AT_ONCE // math.prod(self.clip))
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-min(most, total) // shards) * shards

    def shrink(self, videos: int) -> int:
        """How many times smaller so many videos are shown, for a frame of all of them to have few pixels."""
        _, h, w = self.clip
        return next(k for k in range(1, h + 1) if videos * (h // k) * (w // k) <= SHOWN_PIXELS)

    def _run_vae(self, program: Callable[..., Program], videos: Any) -> Any:
        """What the VAE's program makes of videos, in NumPy; in parts beside each other on a CPU of several cores."""
        parts = math.gcd(sharding.cores(self.own_mesh.devices.flat), len(videos))
        made = program((len(videos) // parts, *videos.shape[1:]), self.own_mesh)
        made.compile()
        params = sharding.put(self.pipeline.vae.params, made.in_shardings[0])

        def run(part: Any) -> Any:
            return jax.tree.map(np.asarray, made(*made.place(params, part)))

        if parts == 1:
            return run(videos)
        return jax.tree.map(lambda *x: np.concatenate(x), *beside.map(run, np.split(np.asarray(videos), parts)))

    def _vae_program(self, name: str, function: Any, videos: Any, mesh: Mesh, shapes: Any = None) -> Program:
        rows, shapes = sharding.row_sharding(mesh, videos.shape[0]), shapes or self.pipeline.vae.network.shapes
        return Program(name, function, (shapes, videos), mesh, (sharding.replicated(mesh), rows), rows)

    def noise(self, keys: jax.Array, given: Any = None) -> jax.Array:
        """Where sampling starts: noise by each video's key, with its first frames if they are given."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys)
        schedule = self.pipeline.schedule
        return keep_given(schedule, given, noise) if schedule.given_frames and given is not None else noise

    def _denoiser(self, params: Params, text: jax.Array, given: Any, *guidance: Any) -> sampling.Denoiser:
        p, network = self.pipeline, self.pipeline.transformer.network
        apply = network.apply
        if p.transformer_2:  # `params` are a pair; all rows have one time, and one expert is executed

            def apply(params: Any, x_t: jax.Array, t: jax.Array, *rest: Any, **told: Any) -> jax.Array:
                experts = (functools.partial(network.apply, own, x_t, t, *rest, **told) for own in params)
                return jax.lax.cond(t[0] >= jnp.float32(p.schedule.boundary), *experts)

        image = given if p.family.conditioned else None
        return sampling.Denoiser(apply, params, p.schedule, text, *guidance, image=image)

    @functools.cache  # noqa: B019
    def teacher_sampler(self, num_steps: int, guidance_weight: float) -> Sampler:
        """The ODE in `num_steps` steps with guidance: 2 evaluations each, 1 when the weight is 0."""

        def draw(params: Params, keys: jax.Array, text: jax.Array, given: Any, null_text: jax.Array) -> jax.Array:
            low = self.sampling.low_guidance_weight
            weight = guidance_weight if low is None else (guidance_weight, low)
            start = self._denoiser(params, text, given, null_text, weight), self.noise(keys, given), num_steps
            if self.sampling.solver == "unipc":
                return sampling.unipc_sample(*start)
            return sampling.ode_sample(*start, self.sampling.eta, _step_keys(keys) if self.sampling.eta else None)

        return Sampler("teacher_sampler", draw, self, guided=True)

    @functools.cache  # noqa: B019
    def student_sampler(self, timesteps: tuple[float, ...]) -> Sampler:
        """The student through its `timesteps`: one evaluation each, without guidance."""

        def draw(params: Params, keys: jax.Array, text: jax.Array, given: Any) -> jax.Array:
            start = self._denoiser(params, text, given), timesteps, self.noise(keys, given), _step_keys(keys)
            return sampling.few_step_predictions(*start, self.student.sampler == "ode")[-1]

        return Sampler("student_sampler", draw, self, guided=False)


def make_generator(
    c: DistillConfig, clip: tuple[int, int, int] | None = None, mesh: Mesh | None = None, hold_vae: bool = False
) -> Generator:
    """The teacher of a configuration, ready to sample clips of the size of its data's, or of another. It samples on
    `mesh`, on all devices of this process if none is given; an imported teacher is restored into its shards there. The
    VAE comes from the host with each call unless the devices are to hold it."""
    mesh, clip = sampling_mesh(c.mesh) if mesh is None else mesh, clip or clip_size(c.data)
    teacher = as_configured(load_teacher(c.teacher, c, mesh), c)
    made = Generator(teacher, c.data.max_text_length, c.sampling, clip, c.compute.vae_chunk, mesh, student=c.student)
    return made.holding({"vae": sharding.replicated(made.own_mesh)}) if hold_vae else made


def as_configured(pipeline: Pipeline, c: DistillConfig) -> Pipeline:
    """The pipeline with config.data.given_frames, .expert, sampling.shift, warned of, and .vae; or ValueError."""
    if c.data.given_frames and pipeline.family.image_pipeline is None:
        raise ValueError(f"the teacher {c.teacher} takes no image as config.data.given_frames asks: only TI2V does")
    schedule, shift = pipeline.schedule, c.sampling.shift or pipeline.schedule.shift
    if shift != schedule.shift:
        found = f"config.sampling.shift is {shift:g}, and {schedule.shift:g} in the scheduler's file of {c.teacher}"
        print(f"warning: {found}: the former is used", file=sys.stderr)
    own = dataclasses.replace(schedule, given_frames=c.data.given_frames, shift=shift, expert=c.expert)
    vae = pipeline.vae
    if folder := c.sampling.vae and Path(c.sampling.vae):
        vae = load_component(folder, read_vae(folder, pipeline.family.vae, vae.config))
    return dataclasses.replace(pipeline, schedule=own, vae=vae)


def subset(timesteps: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` timesteps for the student, from the noisiest: 4 → 2 is the 1st and the 3rd it knows. More than it knows
    lie evenly between those, and on the way to the clean end at 0. ValueError for a count below 1."""
    if count < 1:
        raise ValueError(f"the student takes at least 1 step, not {count}")
    known = len(timesteps)
    if count <= known:
        return tuple(timesteps[i * known // count] for i in range(count))
    return tuple(np.interp(np.arange(count) * known / count, np.arange(known + 1), [*timesteps, 0.0]).tolist())


def video_keys(seed: int, count: int) -> jax.Array:
    """One key per video; video i of a seed starts from the same noise whoever draws it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def _step_keys(keys: jax.Array) -> jax.Array:
    """The keys of the noise on a video's way, besides that of its start."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)


def sampling_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """This process's devices: parameters over as much of the run's `fsdp` axis as fits, videos over all. Processes draw
    on their own, so that none waits for another; the networks must fit into one."""
    devices = jax.local_devices() if devices is None else devices
    fsdp = len(devices) if config.fsdp == -1 else math.gcd(config.fsdp, len(devices))
    return sharding.make_mesh(MeshConfig(-1, fsdp, 1, 1), devices)


def draw_videos(
    generator: Generator, draw: Sampler, params: Params, prompts: Sequence[str], keys: jax.Array, batch_size: int
) -> Iterator[np.ndarray]:
    """A video per prompt and key [n], uint8 [b t h w 3] batch by batch. The last batch is filled up for the devices,
    and cut. Batches do not change the videos beyond rounding."""
    batch = generator.samples_at_once(len(prompts), batch_size)
    params = sharding.put(params, sharding.shard(generator.mesh, params))
    for start in range(0, len(prompts), batch):
        index = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
        latent = draw(params, keys[index], *generator.condition([prompts[i] for i in map(int, index)]))
        yield to_uint8(generator.decode(latent)[: len(prompts) - start])


def draw_beside(
    generator: Generator,
    samplers: Sequence[tuple[Sampler, Params]],
    prompts: Sequence[str],
    keys: Callable[[], jax.Array],
    batch_size: int | None = None,
) -> Iterator[np.ndarray]:
    """A video uint8 [t h w 3] per prompt and key [n], of several samplers side by side; with a progress bar. Without a
    batch size at most 16 are drawn at a time, and as many as have `PIXELS_AT_ONCE` pixels."""
    size = batch_size or generator.samples_at_once(16)
    # The keys anew for each sampler: they share their noise, which JAX takes for a mistake.
    drawn = [draw_videos(generator, draw, params, prompts, keys(), size) for draw, params in samplers]
    with tqdm(total=len(prompts), desc="sampling", unit="video", disable=jax.process_index() > 0) as bar:
        for batches in zip(*drawn, strict=True):
            for clips in zip(*batches, strict=True):
                yield side_by_side(clips)
                bar.update()


def draw_programs(generator: Generator, config: DistillConfig, total: int, steps: Sequence[int]) -> list[Program]:
    """What `draw_beside` executes for so many videos of the teacher and of the student in `steps` steps each."""
    count, sampling = generator.samples_at_once(min(16, total)), config.sampling
    samplers = [generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight)]
    samplers += [generator.student_sampler(subset(config.student.timesteps, n)) for n in steps]
    transformer = generator.pipeline.transformer.network
    found = [generator.text_program(count, generator.own_mesh), *(sampler.program(count) for sampler in samplers)]
    found.append(generator.decode_program((count, *generator.latent_shape), generator.own_mesh))
    if config.lora.rank:
        adapters = lora.adapters(student_network(transformer, config.lora).shapes)
        found.append(merge_program(config.lora, generator.mesh, transformer.shapes, adapters))
    return found
