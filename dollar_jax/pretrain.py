"""`dollar pretrain`: the default domain's teacher from nothing: video VAE, then text encoder and DiT. Progress is
checkpointed, so a killed run goes on where it was; a finished stage is not run again."""

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dollar_jax import losses
from dollar_jax.checkpoint import Checkpoints
from dollar_jax.config import DistillConfig, Fit, PretrainConfig, SamplingConfig, changed
from dollar_jax.data import shapes
from dollar_jax.data.clip import clip_fps, clip_size
from dollar_jax.data.latents import give_first_frames, load_data
from dollar_jax.data.vocabulary import build_tokenizer
from dollar_jax.files import new_file, read_arrays, write_json
from dollar_jax.generate import Generator, draw_videos, load_teacher, teacher_folder, video_keys
from dollar_jax.models.network import Network
from dollar_jax.models.umt5 import UMT5Config, zero_padding
from dollar_jax.models.wan import WanConfig
from dollar_jax.models.wan_vae import WanVAEConfig, denormalise, normalise
from dollar_jax.optim import muon
from dollar_jax.program import Program
from dollar_jax.schedule import Schedule, add_noise, generated, target, time_from_uniform
from dollar_jax.video import grid, side_by_side, signed_range, to_uint8, unit_range, write_video
from dollar_jax.weights import pipeline as pipelines
from dollar_jax.weights.families import WAN, WAN_TI2V
from dollar_jax.weights.pipeline import Component, Pipeline
from dollar_jax.weights.umt5 import UMT5
from dollar_jax.weights.vae import WAN_VAE
from dollar_jax.weights.wan import WAN_TRANSFORMER

Params = Any
Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, Metrics]]


def pretrain(config: PretrainConfig, workdir: Path) -> Path:
    """Trains and measures the teacher; returns its folder, `workdir/teacher`. Raises ValueError before any work."""
    vae_config, text, dit = networks(config)
    for name, channels in {"text_dim": text.d_model, "in_channels": vae_config.z_dim}.items():
        if channels != (own := getattr(dit, name)):
            raise ValueError(f"config.pretrain.transformer.{name} is {own}, and what it gets has {channels} channels")
    for phase in config.vae_phases:
        vae_config.latent_shape(min(phase.frames, shapes.FRAMES), shapes.SIZE, shapes.SIZE)
        if phase.frames > shapes.FRAMES:
            raise ValueError(f"config.pretrain.vae_phases has {phase.frames} frames, the videos {shapes.FRAMES}")
    pipeline = train_teacher(config, train_vae(config, workdir / "vae"), workdir / "teacher_training")
    folder = workdir / "teacher"
    pipelines.save_pipeline(folder, pipeline, dtype=config.dtype)
    write_provenance(config, measure(config, pipelines.load_pipeline(folder)), folder)  # what was written, in its dtype
    return folder


def networks(config: PretrainConfig) -> tuple[WanVAEConfig, UMT5Config, WanConfig]:
    """The configurations of VAE, text encoder and transformer; ValueError naming a setting that makes no network."""
    kinds = {"vae": WAN_VAE, "text_encoder": UMT5, "transformer": WAN_TRANSFORMER}
    made = (kind.own(getattr(config, name), f"config.pretrain.{name}") for name, kind in kinds.items())
    return tuple(made)  # pyright: ignore[reportReturnType]


def fit(
    name: str,
    folder: Path,
    loss: Loss,
    params: Params,
    batches: Iterator[Any],
    training: Fit,
    config: PretrainConfig | DistillConfig,
    ema_decay: float = 0.0,
    read: Callable[[Any, int], Any] = lambda batch, step: batch,
) -> Params:
    """Muon and Adam with warm-up and cosine; returns the parameters' moving average (themselves for decay 0).
    `read` makes of a batch, and its step, what the loss takes. Checkpoints into `folder` and goes on from there."""
    steps = training.steps
    share = optax.warmup_cosine_decay_schedule(0, 1, min(200, steps // 10), steps, 0.02)
    rates = [lambda n, peak=peak: peak * share(n) for peak in (training.learning_rate, training.adam_learning_rate)]
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), muon(*rates, adam_b2=0.99))

    def update(state: Params, batch: Any, step: jax.Array) -> tuple[Params, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        grads, metrics = jax.grad(loss, has_aux=True)(state["params"], batch, key)
        updates, optimiser_state = optimiser.update(grads, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], 1 - ema_decay)
        return {"params": params, "ema": ema, "optimiser": optimiser_state}, metrics

    program = Program("pretrain_step", update, donate=(0,))
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "optimiser": optimiser.init(params)}
    with Checkpoints(folder, keep=1) as checkpoints:
        if checkpoints.latest():
            state = checkpoints.restore({"state": state, "data": batches})["state"]
        first = checkpoints.restored
        bar = tqdm(range(first, steps), name, initial=first, total=steps, mininterval=5)
        for step in bar:
            state, metrics = program(state, read(next(batches), step), step)
            if step % 50 == 49:
                bar.set_postfix({k: f"{float(v):.3g}" for k, v in metrics.items()}, refresh=False)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
                checkpoints.save(step + 1, {"state": state, "data": batches})
    return state["ema"]


def rendered(seed: int, split: str, count: int) -> tuple[np.ndarray, list[shapes.Caption]]:
    """The first `count` videos of a split, uint8 [n, t, h, w, 3], and their captions."""
    pairs = [shapes.example(seed, split, i) for i in tqdm(range(count), f"rendering {split}")]
    return np.stack([video for video, _ in pairs]), [caption for _, caption in pairs]


def endless(source: Any, batch_size: int, seed: int, cut: Any = None) -> grain.DatasetIterator:
    """Shuffled batches without end; `cut(record, rng)` is applied to every record."""
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if cut is not None:
        dataset = dataset.random_map(cut)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def vae_loss(network: Network, kl_weight: float, params: Params, video: Any, key: Any) -> tuple[jax.Array, Metrics]:
    """Mean squared error of the frames, in [-1, 1], plus `kl_weight` times the KL per latent value."""
    frames = signed_range(video)
    mean, log_variance = network.apply(params, frames, method="encode")
    latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    mse = jnp.mean((network.apply(params, latent, method="decode", clip=False) - frames) ** 2)
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return mse + kl_weight * kl, {"mse": mse, "kl": kl}


def train_vae(config: PretrainConfig, folder: Path) -> Component:
    """Trains the VAE through `config.vae_phases`, on single frames before clips. Frames are a fiftieth of a clip's work
    and teach most of what there is to learn: from clips alone 17 dB, in the time that gives frames 21."""
    vae = networks(config)[0]
    network = WAN_VAE.network(vae)
    key = jax.random.key(config.seed)
    params = load_teacher(config.init).vae.params if config.init else Program("init", network.init)(key)
    videos, _ = rendered(config.seed, "train", config.vae_videos)
    for number, phase in enumerate(config.vae_phases):

        def cut(video: np.ndarray, rng: np.random.Generator, frames: int = phase.frames) -> np.ndarray:
            start = rng.integers(len(video) - frames + 1)
            return video[start : start + frames]

        seeded = dataclasses.replace(config, seed=config.seed + number)
        loss = functools.partial(vae_loss, network, phase.kl_weight)
        batches = endless(videos, phase.batch_size, seeded.seed, cut)
        params = fit(f"VAE, clips of {phase.frames}", folder / f"phase_{number}", loss, params, batches, phase, seeded)
    return Component(vae, network, params)


def train_decoder(config: DistillConfig, workdir: Path) -> Path:
    """Distils the decoder of the teacher's VAE into a narrower one, as in TAEHV: the mean square of what tells their
    frames apart, on latents of the data. Returns the folder of the VAE with it, `workdir/vae`, which diffusers'
    `AutoencoderKLWan` reads; beside it a video shows the teacher's frames to the left of its own. Raises ValueError."""
    c = config.decoder
    pipeline = pipelines.load_pipeline(teacher_folder(config.teacher), without_transformer=True)
    vae, clip = dataclasses.replace(pipeline.vae, params=jax.device_put(pipeline.vae.params)), clip_size(config.data)
    if not isinstance(vae.config, WanVAEConfig):
        raise ValueError(f"the VAE of {config.teacher} has one width for both ways: only Wan's have a decoder's own")
    if c.width >= (most := vae.config.decoder_base_dim or vae.config.base_dim):
        raise ValueError(f"config.decoder.width is {c.width}, and that of the teacher's decoder {most}: give less")
    generator = Generator(pipeline, config.data.max_text_length, config.sampling, clip, config.compute.vae_chunk)
    config = changed(config, {"batch_size": c.batch_size, "accumulation": 1, "reward.samples": 1})
    batches = load_data(config, generator, workdir).batches(config)
    small = dataclasses.replace(vae.config, decoder_base_dim=c.width)
    network = WAN_VAE.network(small)

    def pairs(batch: Any, step: int) -> tuple[jax.Array, jax.Array]:
        """A part of the batch's latents, and its frames by the teacher."""
        rng, (_, _, *size, _) = np.random.default_rng([config.seed, step]), batch["latent"].shape
        y, x = (slice(start := rng.integers(max(0, n - c.latent_size) + 1), start + c.latent_size) for n in size)
        latent = jnp.asarray(batch["latent"][:, : c.latent_frames, y, x])
        return latent, generator.decode_program(latent.shape, generator.own_mesh)(vae.params, latent)

    def loss(params: Params, batch: Any, _: jax.Array) -> tuple[jax.Array, Metrics]:
        latent, frames = batch
        raw = denormalise(latent, small)
        decoded = network.apply({**vae.params, "decoder": params}, raw, method="decode", clip=False)
        mse = jnp.mean(((decoded + 1) / 2 - frames) ** 2)
        return mse, {"psnr": -10 * jnp.log10(mse)}

    start = Program("init", network.init)(jax.random.key(config.seed))["decoder"]
    params = fit("decoder", workdir / "training", loss, start, batches, c, config, read=pairs)
    made = Component(small, network, {**vae.params, "decoder": params})
    pipelines.save_component(workdir / "vae", WAN_VAE, made, "float32")
    latent, frames = pairs(next(batches), c.steps)
    drawn = dataclasses.replace(generator, pipeline=dataclasses.replace(pipeline, vae=made)).decode(latent)
    psnr = -10 * np.log10(np.mean((drawn - frames) ** 2))
    print(f"PSNR to the teacher's decoder on {len(latent)} clips of the data: {psnr:.1f} dB")
    shown = [side_by_side(pair) for pair in zip(*map(to_uint8, (np.asarray(frames), drawn)), strict=True)]
    fps, scale = clip_fps(config.data, pipeline.family.fps), max(1, 256 // max(clip[1:]))
    write_video(workdir / "decoder.mp4", grid(np.stack(shown), 2), fps, scale)
    return workdir / "vae"


def encode_all(vae: Component, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of the raw latents of uint8 videos, 64 at a time."""

    def encode(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_variance = vae.network.apply(params, signed_range(video), method="encode")
        return mean, jnp.exp(0.5 * log_variance)

    program = Program("vae_encode", encode)
    parts = [program(vae.params, videos[i : i + 64]) for i in tqdm(range(0, len(videos), 64), "encoding")]
    mean, std = (np.concatenate([np.asarray(p[k]) for p in parts]) for k in range(2))
    return mean, std


def train_teacher(config: PretrainConfig, vae: Component, folder: Path) -> Pipeline:
    """Trains text encoder and DiT together, as a rectified flow on the VAE's normalised latents."""
    c = config.teacher
    tokenizer = build_tokenizer(shapes.VOCABULARY)
    vae_config, text_config, dit_config = networks(config)
    text, dit = UMT5.network(text_config), WAN_TRANSFORMER.network(dit_config)
    schedule = Schedule("rf", "velocity", shift=c.shift, given_frames=c.given_frames)
    if not (cache := folder / "latents.npz").exists():
        videos, captions = rendered(config.seed, "train", c.videos)
        mean, std = encode_all(vae, videos)
        with new_file(cache) as draft, draft.open("wb") as file:
            np.savez(file, mean=mean, std=std, captions=[str(c) for c in captions])
    stored = read_arrays(cache)
    mean, std, captions = stored["mean"], stored["std"], stored["captions"].tolist()
    axes = (0, 1, 2, 3)
    moments = {"latents_mean": mean.mean(axes), "latents_std": np.sqrt(mean.var(axes) + (std**2).mean(axes))}
    vae_config = dataclasses.replace(vae_config, **{name: tuple(x.tolist()) for name, x in moments.items()})
    latents = np.asarray(normalise(jnp.asarray(mean), vae_config))
    ids, mask = pipelines.tokenize(tokenizer, captions, config.max_text_length)
    null_ids, null_mask = pipelines.tokenize(tokenizer, [""], config.max_text_length)

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        keys = jax.random.split(key, 3)
        x0 = batch["latent"]
        drop = jax.random.bernoulli(keys[0], c.caption_dropout, (len(x0), 1))
        ids, mask = jnp.where(drop, null_ids, batch["ids"]), jnp.where(drop, null_mask, batch["mask"])
        states = zero_padding(text.apply(params["text_encoder"], ids, mask), mask)
        # Evenly spread times: each step sees noisy and clean ends alike.
        u = (jnp.arange(len(x0)) + jax.random.uniform(keys[1])) / len(x0)
        t, eps = time_from_uniform(schedule, u), jax.random.normal(keys[2], x0.shape)
        prediction = dit.apply(params["transformer"], add_noise(schedule, x0, eps, t), t, states, *schedule.given)
        value = losses.denoising(*generated(schedule, prediction, target(schedule, x0, eps, t))).mean()
        return value, {"loss": value}

    text_key, dit_key, *bias_keys = jax.random.split(jax.random.key(config.seed), 4)
    if config.init:
        start = load_teacher(config.init)
        params = {"text_encoder": start.text_encoder.params, "transformer": start.transformer.params}
        params = jax.tree.map(jnp.asarray, params)
    else:
        params = {"text_encoder": text.init(text_key), "transformer": dit.init(dit_key)}
        # Rotary embeddings turn queries and keys by where they are: with biases of zero there is nothing
        # but content to turn, and attention begins blind to positions.
        for name, key in zip(("to_q", "to_k"), bias_keys, strict=True):
            layer = params["transformer"]["blocks"]["attn1"][name]
            layer["bias"] = 1.5 * jax.random.normal(key, layer["bias"].shape)
    records = [{"latent": z, "ids": i, "mask": m} for z, i, m in zip(latents, ids, mask, strict=True)]
    batches = endless(records, c.batch_size, config.seed)
    params = fit("teacher", folder / "checkpoints", loss, params, batches, c, config, c.ema_decay)
    transformer, vae = Component(dit_config, dit, params["transformer"]), dataclasses.replace(vae, config=vae_config)
    family, encoder = WAN_TI2V if c.given_frames else WAN, Component(text_config, text, params["text_encoder"])
    return Pipeline(family, transformer, vae, encoder, tokenizer, schedule)


def measure(config: PretrainConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Reconstruction of validation videos, and per-frame accuracy of samples for every caption."""
    sampling = SamplingConfig(config.num_steps, config.guidance_weight)
    schedule = dataclasses.replace(pipeline.schedule, given_frames=config.teacher.given_frames)
    pipeline = dataclasses.replace(pipeline, schedule=schedule)
    generator = Generator(pipeline, config.max_text_length, sampling, (shapes.FRAMES, shapes.SIZE, shapes.SIZE))
    videos, captions = rendered(config.seed, "validation", 256)
    parts = np.split(videos, range(64, len(videos), 64))
    rebuilt = np.concatenate([generator.decode(generator.encode(part)) for part in parts])
    psnr = float(-10 * np.log10(np.mean((rebuilt - videos / 255) ** 2)))
    report: dict[str, Any] = {"vae": {"psnr": psnr, **shapes.alignment(rebuilt, captions)}}
    everything = shapes.all_captions()
    draw = generator.teacher_sampler(config.num_steps, config.guidance_weight)
    prompts, keys = [str(caption) for caption in everything], video_keys(config.seed, len(everything))
    give_first_frames(generator, everything, config.seed)
    parts = draw_videos(generator, draw, pipeline.transformer.params, prompts, keys, 48)
    drawn = unit_range(np.concatenate(list(tqdm(parts, "sampling", -(-len(everything) // 48), unit="batch"))))
    held = np.array([caption.held_out for caption in everything])
    for name, chosen in {"all_captions": held | True, "trained": ~held, "held_out": held}.items():
        names = [caption for caption, keep in zip(everything, chosen, strict=True) if keep]
        report[name] = shapes.alignment(drawn[chosen], names)
    return report


def write_provenance(config: PretrainConfig, metrics: dict[str, Any], folder: Path) -> None:
    """provenance.json beside the weights: command (of the workdir only its name), config, commit, metrics."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    words = [re.sub("^--workdir=.*/(?=[^/])", "--workdir=", word) for word in sys.argv[1:]]
    fields = {"command": shlex.join(["dollar", *words]), "commit": commit or "unknown: not a git checkout"}
    fields |= {"config": dataclasses.asdict(config), "metrics": metrics}
    write_json(folder / pipelines.PROVENANCE, fields)
