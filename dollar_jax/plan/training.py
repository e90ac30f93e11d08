"""What a whole training costs: forward-equivalents of the transformer by part, and chip-hours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dollar_jax import sharding
from dollar_jax.config import DistillConfig, MeshConfig
from dollar_jax.flops import count_flops
from dollar_jax.plan.chips import CHIPS
from dollar_jax.plan.teachers import architecture_of, clip_of, weightless_generator
from dollar_jax.rewards.methods import method_of


def forwards(config: DistillConfig, blocks: int | None = None) -> dict[str, float]:
    """F per video and update of the student by part, on average: a forward of the teacher, of so many `blocks`, is 1,
    its backward 2, and a forward of a student of fewer its share. Not in it: what is computed again, VAE, text encoder,
    rewards and their latent model, optimisers."""
    layers = config.student.layers
    share = layers / blocks if layers and blocks else 1.0
    n, cd, fake, reward = len(config.student.timesteps), config.consistency, config.fake_score, config.reward
    forward, vsd = config.student.input == "forward", config.vsd
    draws = config.batch_size // config.accumulation if config.student.timestep_per == "sample" else 1
    # The rows of a micro-batch go on to the farthest of independent uniform draws from n timesteps.
    way = 0.0 if forward else sum(1 - (k / n) ** draws for k in range(1, n))
    alone = not (vsd.weight or reward.rewards)
    parts = {"student": 3 * share} if alone else {"student's input": way * share, "student": 3 * share}
    if vsd.weight:
        parts["VSD"] = 2 + bool(vsd.guidance_weight) * (1 + (vsd.guidance_time == "noisier"))
    if cd.weight:
        own = 0 if alone or (forward and cd.times == "student") else 3
        parts["CD"] = ((own + 1) * share + cd.skip * (1 + bool(cd.guidance_weight))) / cd.every
    parts["rewards"] = method_of(config).forwards(share)
    if vsd.weight:
        parts["fake score"] = 3.0 * fake.updates
        if config.gan.weight:
            parts["GAN"] = 3 * config.gan.depth * (1 + fake.updates)
        samples = {"fresh": fake.updates * (1 + way), "rollout": n, "student": 0.0}
        parts["its samples"] = share * samples[fake.samples]
    return {name: float(value) for name, value in parts.items() if value}


def training_cost(config: DistillConfig, topology: str, video: tuple[int, int, int] | None = None) -> tuple[Any, str]:
    """`forwards`, TFLOP of one, and chip-hours to the last update at 30 and 50 % of the peak; and that in words. Of a
    tpu7x they are those of a device, half a chip. `video` is height, width and frames, unless the data's own."""
    architecture = architecture_of(config)
    parts = forwards(config, architecture.transformer.num_layers)
    clip = clip_of(config, video)
    network = architecture.family.transformer.network(dataclasses.replace(architecture.transformer, attention="xla"))
    shapes = architecture.vae.latent_shape(*clip), (), (config.data.max_text_length, architecture.text_encoder.d_model)
    arguments = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes)
    one = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    image = weightless_generator(config, architecture, clip, one).image_shapes(1)
    told = {} if image is None else {"image": image}
    tflops = count_flops(jax.make_jaxpr(network.apply)(network.shapes, *arguments, **told).jaxpr) / 1e12
    peak, total = CHIPS[topology.partition(":")[0]].tflops, sum(parts.values())
    hours = {s: total * config.steps * config.batch_size * tflops / (s * peak * 3600) for s in (0.3, 0.5)}
    sums = " + ".join(f"{value:.3g} {part}" for part, value in parts.items())
    costs = ", ".join(f"{value:,.0f} chip-hours at {share:.0%} of the peak" for share, value in hours.items())
    words = f"forwards of a video and update: {total:.4g} = {sums}\n{config.steps:,} updates of {config.batch_size} "
    words += f"videos at {tflops:,.4g} TFLOP a forward: {costs}"
    chip_hours = {f"{share:.0%}": value for share, value in hours.items()}
    return {"forwards": parts, "forward_tflops": tflops, "chip_hours": chip_hours}, words
