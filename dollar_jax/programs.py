"""The programs of distillation over a mesh: the one train step, what it starts from, and the student to sample. What
is planned ahead of time and what runs are both built here. The teacher's networks are in `generate.Generator`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, MeshConfig
from dollar_jax.distillation import Batch, Distillation, Frozen, Networks
from dollar_jax.flops import count_flops
from dollar_jax.generate import DATA_PROMPTS, Generator, merge_program, student_network
from dollar_jax.models import lora
from dollar_jax.models.latent_reward import FeatureHead, LatentRewardModel
from dollar_jax.models.network import Network, make_network
from dollar_jax.optim import make_optimiser
from dollar_jax.program import Program
from dollar_jax.rewards import JaxReward
from dollar_jax.rewards.methods import method_of
from dollar_jax.rewards.pixels import PixelRewards
from dollar_jax.rewards.scorer import decode_program
from dollar_jax.schedule import Schedule, add_noise, within
from dollar_jax.state import GAN_HEAD, Optimisers, TrainState, init_state
from dollar_jax.step import make_step
from dollar_jax.types import ImageCondition, Params


@dataclasses.dataclass(frozen=True, eq=False)
class TrainPrograms:
    """`step(state, frozen, batch)`, which donates the state, with shapes and places of these; `init(key, teacher)`, the
    state at the start; and, where there are adapters, `merge(teacher, adapters)`, the student's parameters."""

    mesh: Mesh
    distillation: Distillation
    step: Program
    init: Program
    merge: Program | None
    state_shapes: TrainState
    batch_shapes: Batch
    state_sharding: TrainState
    frozen_sharding: Frozen
    batch_sharding: Batch

    def scored(self) -> jax.ShapeDtypeStruct:
        """The latents that a step gives to be scored, with their place."""
        latent = self.step.trace().out_info[2].latent
        return jax.ShapeDtypeStruct(latent.shape, latent.dtype, sharding=self.step.out_shardings[2])


def teacher_programs(
    config: DistillConfig, generator: Generator, pixels: PixelRewards | None, devices: Any = None, real: bool = True
) -> TrainPrograms:
    """For the teacher of a generator, and clips of its size; raises ValueError, before any compilation, for a mesh that
    does not fit. `pixels` are the JAX rewards of config.reward.rewards. `real`: the data has latents for the latent
    reward model to learn from beside the generated ones."""
    pipeline, latent_shape, text_shape = generator.pipeline, generator.latent_shape, generator.text_shape
    transformer, schedule, image_shapes = pipeline.transformer.network, pipeline.schedule, generator.image_shapes
    if schedule.boundary and not config.expert:
        raise ValueError(f"the teacher {config.teacher} has two experts: set config.expert to the one to train")
    method_of(config).check()
    told = {} if (image := image_shapes(1)) is None else {"image": image}
    if told and config.reward.rewards and not method_of(config).keeps_images:
        raise ValueError(f"config.reward.method {config.reward.method!r} does not keep images: take 'lrm' or 'direct'")
    if told and config.reward.head.depth is not None:
        raise ValueError("config.reward.head.depth reads the features of latents alone, and this teacher wants images")
    if (first := config.student.timesteps[0]) > schedule.num_train_timesteps:
        raise ValueError(f"config.student.timesteps has {first:g}, and the teacher only {schedule.num_train_timesteps}")
    if not within(schedule, times := config.student.timesteps).all():
        raise ValueError(f"config.student.timesteps {times} must lie in the expert's range {schedule.time_range}")
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(mesh, "batch_size / accumulation", config.batch_size // config.accumulation)
    head = latent_reward_network(config, latent_shape[-1], text_shape[-1])
    optimisers = Optimisers(
        make_optimiser(config.student.optimiser, config.steps),
        make_optimiser(config.fake_score.optimiser, config.steps * config.fake_score.updates),
        make_optimiser(config.reward.optimiser, config.steps * config.reward.updates),
    )
    adapted, gan_head = student_network(transformer, config.lora), None

    def on_features(depth: float, width: int) -> Network:
        x = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (latent_shape, (), text_shape))
        look = functools.partial(transformer.apply, tap=depth, early=True)
        dim = jax.eval_shape(look, transformer.shapes, *x, **told).shape[-1]
        return make_network(lambda rngs: FeatureHead(dim, width, rngs, config.compute.dtype))

    if (depth := config.reward.head.depth) is not None:
        head = on_features(depth, config.reward.head.width)
    if config.gan.weight:
        if not real:
            raise ValueError("config.gan.weight needs real latents, and the data has none")
        gan_head = on_features(config.gan.depth, config.gan.width)

    def init(key: jax.Array, teacher: Params) -> TrainState:
        state_key, head_key = jax.random.split(key)
        start = lora.adapters(adapted.init(jax.random.fold_in(key, 2))) if config.lora.rank else teacher
        new = None if gan_head is None else gan_head.init(jax.random.fold_in(key, 3))
        rewards, layers = len(config.reward.trained), config.student.layers
        return init_state(state_key, start, head.init(head_key), optimisers, rewards, new, layers)

    state_shapes = jax.eval_shape(init, jax.random.key(0), transformer.shapes)
    state_sharding = sharding.shard(mesh, state_shapes)
    whole = sharding.replicated(mesh)
    teacher_sharding = whole if config.compute.whole_teacher else sharding.shard(mesh, transformer.shapes)
    frozen_sharding = Frozen(teacher_sharding, whole, whole)
    batch_shapes = _batch_shapes(config, latent_shape, text_shape, pixels, image_shapes(config.batch_size))
    batch_sharding, samples_sharding = _batch_sharding(config, mesh, batch_shapes)
    # One forward is traced: heads that do not divide over the mesh are an error here, before any compilation.
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    given = (jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape in (latent_shape, (), text_shape))
    told = {} if (image := image_shapes(rows)) is None else {"image": image}
    jax.eval_shape(sharding.with_mesh(mesh, transformer.apply), transformer.shapes, *given, **told)
    networks = _networks(config, schedule, transformer, adapted, (head, gan_head), pixels)
    distillation = Distillation(config, networks, schedule, real)

    def update(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        step = make_step(distillation.reading(frozen.teacher), optimisers)
        return step(state, frozen, batch)

    reward = () if pixels is None else pixels.params(pipeline.vae.network.shapes)
    reward = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), reward)
    frozen_shapes = Frozen(transformer.shapes, jax.ShapeDtypeStruct((1, *text_shape), jnp.float32), reward)
    arguments, places = (state_shapes, frozen_shapes, batch_shapes), (state_sharding, frozen_sharding, batch_sharding)
    begun, at = (jax.eval_shape(jax.random.key, 0), transformer.shapes), (whole, frozen_sharding.teacher)
    merge = merge_program(config.lora, mesh, transformer.shapes, state_shapes.ema) if config.lora.rank else None
    step = Program("step", update, arguments, mesh, places, (state_sharding, whole, samples_sharding), donate=(0,))
    programs = step, Program("init", init, begun, mesh, at, state_sharding), merge
    return TrainPrograms(mesh, distillation, *programs, state_shapes, batch_shapes, *places)


def shared_rewards(config: DistillConfig, mesh: Mesh) -> DistillConfig:
    """The configuration as it is run on a mesh: where several hosts each score their own samples, reward.samples and
    reward.batch_size are raised to the next numbers that divide over its data × fsdp, and samples a micro-batch."""
    shards, rows = mesh.shape["data"] * mesh.shape["fsdp"], config.batch_size // config.accumulation
    if sharding.host_count(mesh) == 1 or not config.reward.rewards or rows % shards:
        return config
    up = {name: -(-getattr(config.reward, name) // shards) * shards for name in ("samples", "batch_size")}
    up["samples"] = next(n for n in range(up["samples"], rows + 1, shards) if rows % n == 0)
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, **up))


def step_flops(config: DistillConfig, generator: Generator, pixel_rewards: Any, score_real: bool = True) -> float:
    """Floating-point operations of the model in one step, on all devices together: nothing is computed twice."""
    transformer = generator.pipeline.transformer
    held = dataclasses.replace(transformer.config, remat="none", attention="xla")
    network = generator.pipeline.family.transformer.network(held)
    pipeline = dataclasses.replace(generator.pipeline, transformer=dataclasses.replace(transformer, network=network))
    plain = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, 1))
    pixels = pixel_rewards and dataclasses.replace(pixel_rewards, remat=False)
    device = list(generator.mesh.devices.flat)[:1]
    programs = teacher_programs(plain, dataclasses.replace(generator, pipeline=pipeline), pixels, device, score_real)
    return count_flops(programs.step.trace().jaxpr.jaxpr)


def run_programs(config: DistillConfig, generator: Generator, programs: TrainPrograms, rewards: Any) -> list[Program]:
    """All that `train` executes on the devices from the first step to the last, by shapes."""
    found = [generator.text_program(1, generator.own_mesh), programs.init, programs.step]
    if not all(isinstance(reward, JaxReward) for reward in rewards):
        found.append(decode_program(generator.frames, generator.pipeline.vae.network.shapes, programs.scored()))
    if config.visibility.samples_every:
        found += [] if programs.merge is None else [programs.merge]
        found += sample_programs(config, generator)
    return found


def sample_programs(config: DistillConfig, generator: Generator) -> list[Program]:
    """What a run's samples beside the teacher's take: `monitoring.SampleLogger`."""
    prompts, sampling = len(config.visibility.prompts) or DATA_PROMPTS, config.sampling
    total = prompts * config.visibility.videos
    count = generator.samples_at_once(total)
    teacher = generator.teacher_sampler(sampling.num_steps, sampling.guidance_weight).program(count)
    student = generator.student_sampler(config.student.timesteps).program(count)
    show = generator.show_program((count, *generator.latent_shape), generator.shrink(2 * total))
    return [generator.text_program(prompts, generator.own_mesh), student, teacher, show]


def latent_reward_network(config: DistillConfig, channels: int, text_dim: int) -> Network:
    """The latent reward model for latents of so many channels and text states of that width."""
    text = text_dim if config.reward.use_text else None
    return make_network(functools.partial(LatentRewardModel, config.reward.head, channels, text))


def _networks(config: Any, schedule: Schedule, transformer: Network, adapted: Any, heads: Any, pixels: Any) -> Networks:
    """Of the transformer and the same with adapters, told by their parameters, with the reward's and GAN's heads."""
    (head, gan_head), c = heads, config.reward.head
    structure, use_text = jax.tree.structure(adapted.shapes), config.reward.use_text

    def denoiser(params: Params, *args: Any, **more: Any) -> Any:
        params = {name: value for name, value in params.items() if name != GAN_HEAD}
        network = adapted if jax.tree.structure(params) == structure else transformer
        return network.apply(params, *args, **more)

    def discriminator(params: Params, *args: Any, early: bool, **image: Any) -> Any:
        found = denoiser(params, *args, tap=config.gan.depth, early=early, **image)
        logit = functools.partial(gan_head.apply, params[GAN_HEAD])
        return logit(found) if early else (found[0], logit(found[1]))

    def latent_reward(params: Params, latent: jax.Array, text: jax.Array, teacher: Params | None = None) -> jax.Array:
        if teacher is None:
            return head.apply(params, latent, text if use_text else None)
        # The same noise for all, so that a latent has one score.
        t, noise = jnp.full(len(latent), c.time), jax.random.normal(jax.random.key(0), latent.shape[1:])
        x_t = add_noise(schedule, latent, jnp.broadcast_to(noise, latent.shape), t)
        return head.apply(params, transformer.apply(teacher, x_t, t, text, *schedule.given, tap=c.depth, early=True))

    return Networks(denoiser, latent_reward, pixels, discriminator)


def _batch_shapes(
    config: DistillConfig, latent: tuple[int, ...], text: tuple[int, int], pixels: Any, image: ImageCondition | None
) -> Batch:
    rows, float32 = config.batch_size, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = {} if pixels is None else pixels.tokens([""])
    read = {name: jax.ShapeDtypeStruct((rows, ids.shape[1]), jnp.int32) for name, ids in tokens.items()}
    kept = method_of(config).inputs(latent, text)
    return Batch(float32((rows, *latent)), float32((rows, *text)), read, kept, image)


def _batch_sharding(config: DistillConfig, mesh: Mesh, shapes: Batch) -> tuple[Batch, NamedSharding]:
    """Of the batch, and of what is to be scored: few rows on one machine may be everywhere, of several each its own."""
    rows = samples = sharding.batch_sharding(mesh)
    if config.reward.samples % (mesh.shape["data"] * mesh.shape["fsdp"]) and sharding.host_count(mesh) == 1:
        samples = sharding.replicated(mesh)
    if config.reward.rewards and samples is rows:
        sharding.check_batch(mesh, "reward.samples", config.reward.samples)
    kept = method_of(config).inputs_sharding(mesh, samples)
    where: Any = Batch(rows, rows, dict.fromkeys(shapes.tokens, rows), kept, rows)  # pyright: ignore[reportArgumentType]
    return jax.tree.broadcast(where, shapes), samples
