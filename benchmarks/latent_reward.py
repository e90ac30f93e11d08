"""How many scored samples a latent reward model needs before it says what the reward says of new ones.

    python benchmarks/rewards.py --workdir=runs/rewards     # distils the student whose samples these are
    python benchmarks/latent_reward.py --workdir=runs/rewards
    python benchmarks/latent_reward.py --workdir=runs/features --features  # of the teacher: no student is needed

The student's four-step samples are drawn and scored once. For each number of them and each variant of the reward
head one is trained on those alone, by the default experiment's optimiser. The table, WORKDIR/latent_reward.md, has
the correlation of latent and true reward on the last 256, which no head has seen."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rewards import make_config
from tqdm import tqdm

from dollar_jax.config import RewardTerm
from dollar_jax.data import shapes
from dollar_jax.generate import make_generator, subset
from dollar_jax.models.latent_reward import FeatureHead, LatentRewardModel
from dollar_jax.models.network import make_network
from dollar_jax.optim import make_optimiser
from dollar_jax.rewards import load_rewards
from dollar_jax.run import restore_student
from dollar_jax.schedule import add_noise

FINER = {"as in the demo": {}, "second_stride 1": {"second_stride": 1}}
OVER_TIME = {"as in the demo": {}, "temporal_kernel 3": {"temporal_kernel": 3}}
HEADS: dict[str, dict[str, dict[str, Any]]] = {"vividness": FINER, "vivid": FINER, "motion": OVER_TIME}
COUNTS, UPDATES = (512, 2048, 8192), (160, 400, 1000, 2000)
BATCH, FRESH = 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--features", action="store_true")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.features:
        return compare_features(args.workdir)
    latents, scores = draw_and_score(args.workdir)
    rows = [
        f"| reward | head | samples | {' | '.join(f'{n} updates' for n in UPDATES)} |",
        "|---" * (3 + len(UPDATES)) + "|",
    ]
    for name, heads in HEADS.items():
        for head, changes in heads.items():
            for count in COUNTS:
                found = correlations(latents, scores[name], count, changes)
                rows.append(f"| {name} | {head} | {count} | {' | '.join(f'{x:.2f}' for x in found)} |")
                print(rows[-1], flush=True)
    (args.workdir / "latent_reward.md").write_text("\n".join(rows) + "\n")


def draw_and_score(workdir: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Latents [n, t, h, w, c] and their rewards [n] by name; kept in a file."""
    kept, total = workdir / "latent_reward.npz", max(COUNTS) + FRESH
    if not kept.exists():
        config = make_config(BATCH, 1)
        generator = make_generator(config)
        student = restore_student(workdir / "base", generator)
        draw = generator.student_sampler(subset(config.student.timesteps, 4))
        rewards = {name: load_rewards([RewardTerm(name, 1.0, None)])[0] for name in HEADS}
        captions = [str(caption) for caption in shapes.all_captions()]
        found: dict[str, list[np.ndarray]] = {"latent": [], **{name: [] for name in rewards}}
        for i in tqdm(range(0, total, BATCH), "drawing"):
            prompts = list(np.random.default_rng(i).choice(captions, BATCH))
            keys = jax.random.split(jax.random.key(i), BATCH)
            found["latent"].append(np.asarray(draw(student, keys, generator.text(prompts))))
            frames = generator.decode(found["latent"][-1])
            for name, reward in rewards.items():
                found[name].append(reward(frames, prompts))
        np.savez(kept, **{name: np.concatenate(values)[:total] for name, values in found.items()})
    with np.load(kept) as file:
        return file["latent"], {name: file[name] for name in HEADS}


def compare_features(workdir: Path, clips: int = 1024, updates: int = 300) -> None:
    """The paper's head, alone or over time, beside one on the teacher's features by noise level and depth, on rendered
    clips of the default domain: how they correlate with two rewards on the last 256. `motion` is asked for without a
    text. `agreement` is the share of a caption's attributes that the video shows, half of the captions being of another
    clip. The table, WORKDIR/features.md."""
    config = make_config(BATCH, 1)
    generator = make_generator(config)
    rendered = [shapes.example(0, "train", i) for i in range(clips + FRESH)]
    frames, captions = np.stack([video for video, _ in rendered]), [caption for _, caption in rendered]
    rng = np.random.default_rng(0)
    asked = [captions[rng.integers(len(captions))] if rng.random() < 0.5 else caption for caption in captions]
    motion = load_rewards([RewardTerm("motion", 1.0, None)])[0]
    batches = range(0, len(frames), BATCH)
    latents = np.concatenate([np.asarray(generator.encode(frames[i : i + BATCH])) for i in batches])
    texts = np.concatenate([generator.text(list(map(str, asked[i : i + BATCH]))) for i in batches])
    empty = np.broadcast_to(generator.null_text, texts.shape)
    cases = {
        "motion": (np.concatenate([motion(frames[i : i + BATCH] / 255.0, [""] * BATCH) for i in batches]), empty),
        "agreement": (
            np.array([shapes.verify(video).correct(c).mean() for video, c in zip(frames, asked, strict=True)]),
            texts,
        ),
    }
    teacher, schedule = generator.pipeline.transformer, generator.pipeline.schedule
    noise = jax.random.normal(jax.random.key(0), latents.shape[1:])

    @functools.partial(jax.jit, static_argnums=(3,))
    def look(x, text, t, depth):
        times = jnp.full(len(x), t)
        x_t = add_noise(schedule, x, jnp.broadcast_to(noise, x.shape), times)
        return teacher.network.apply(teacher.params, x_t, times, text, tap=depth, early=True)

    rows = ["| reward | head | 256 clips | 1024 clips |", "|---|---|---|---|"]

    def show(reward, head, build, inputs, values):
        found = [fit(make_network(build), inputs, values, count, updates) for count in (256, clips)]
        rows.append(f"| {reward} | {head} | {' | '.join(f'{x:.2f}' for x in found)} |")
        print(rows[-1], flush=True)
        (workdir / "features.md").write_text("\n".join(rows) + "\n")

    for name, (values, text) in cases.items():
        for head, changes in {"paper's": {}, "paper's, temporal_kernel 3": {"temporal_kernel": 3}}.items():
            settings = dataclasses.replace(config.reward.head, **changes)
            width = text.shape[-1] if name == "agreement" else None
            given = (latents, text) if width else (latents,)
            build = functools.partial(LatentRewardModel, settings, latents.shape[-1], width)
            show(name, head, build, given, values)
        for t, depth in (
            (50.0, 0.5),
            (250.0, 0.5),
            (500.0, 0.5),
            (750.0, 0.5),
            (250.0, 0.25),
            (250.0, 0.75),
            (250.0, 1.0),
        ):
            tokens = [np.asarray(look(latents[i : i + BATCH], text[i : i + BATCH], t, depth)) for i in batches]
            tokens = np.concatenate(tokens)
            build = functools.partial(FeatureHead, tokens.shape[-1], 64)
            show(name, f"features, time {t:g}, depth {depth:g}", build, (tokens,), values)


def fit(network: Any, inputs: tuple[np.ndarray, ...], values: np.ndarray, count: int, updates: int) -> float:
    """The correlation with the values of the last 256 after so many updates on the first `count`."""
    params, optimiser = network.init(jax.random.key(0)), make_optimiser(make_config(BATCH, 1).reward.optimiser, updates)
    standard = (values - values[:count].mean()) / values[:count].std()

    @jax.jit
    def update(params, moments, given, target):
        gradient = jax.grad(lambda p: jnp.mean((network.apply(p, *given) - target) ** 2))(params)
        changes, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments

    rng, moments = np.random.default_rng(0), optimiser.init(params)
    for _ in range(updates):
        rows = rng.integers(0, count, BATCH)
        params, moments = update(params, moments, tuple(jnp.asarray(x[rows]) for x in inputs), standard[rows])
    fresh = [jnp.asarray(x[-FRESH:]) for x in inputs]
    return float(np.corrcoef(np.asarray(network.apply(params, *fresh)), values[-FRESH:])[0, 1])


def correlations(latents: np.ndarray, rewards: np.ndarray, count: int, changes: dict[str, Any]) -> list[float]:
    """With the rewards of fresh samples, after each number of UPDATES on the first `count`."""
    reward = make_config(BATCH, 1).reward
    head = dataclasses.replace(reward.head, **changes)
    network = make_network(lambda rngs: LatentRewardModel(head, latents.shape[-1], None, rngs))
    params = network.init(jax.random.key(0))
    optimiser = make_optimiser(reward.optimiser, UPDATES[-1])
    standard = (rewards - rewards[:count].mean()) / rewards[:count].std()

    def loss(params, latent, target):
        return jnp.mean((network.apply(params, latent, None) - target) ** 2)

    @jax.jit
    def update(params, moments, latent, target):
        gradient = jax.grad(loss)(params, latent, target)
        changes, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments

    rng, moments, found = np.random.default_rng(0), optimiser.init(params), []
    for step in range(1, UPDATES[-1] + 1):
        rows = rng.integers(0, count, BATCH)
        params, moments = update(params, moments, latents[rows], standard[rows])
        if step in UPDATES:
            predicted = np.asarray(network.apply(params, latents[-FRESH:], None))
            found.append(float(np.corrcoef(predicted, rewards[-FRESH:])[0, 1]))
    return found


if __name__ == "__main__":
    main()
