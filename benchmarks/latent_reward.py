"""How many scored samples a latent reward model needs before it says what the reward says of new ones.

    python benchmarks/rewards.py --workdir=runs/rewards     # distils the student whose samples these are
    python benchmarks/latent_reward.py --workdir=runs/rewards

The student's four-step samples are drawn and scored once. For each number of them and each variant of the reward
head one is trained on those alone, by the default experiment's optimiser. The table, WORKDIR/latent_reward.md, has
the correlation of latent and true reward on the last 256, which no head has seen."""

from __future__ import annotations

import argparse
import dataclasses
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
from dollar_jax.models.latent_reward import LatentRewardModel
from dollar_jax.models.network import make_network
from dollar_jax.optim import make_optimiser
from dollar_jax.rewards import load_rewards
from dollar_jax.run import restore_student

FINER = {"as in the demo": {}, "second_stride 1": {"second_stride": 1}}
OVER_TIME = {"as in the demo": {}, "temporal_kernel 3": {"temporal_kernel": 3}}
HEADS: dict[str, dict[str, dict[str, Any]]] = {"vividness": FINER, "vivid": FINER, "motion": OVER_TIME}
COUNTS, UPDATES = (512, 2048, 8192), (160, 400, 1000, 2000)
BATCH, FRESH = 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
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
        config = make_config(1, 1)
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


def correlations(latents: np.ndarray, rewards: np.ndarray, count: int, changes: dict[str, Any]) -> list[float]:
    """With the rewards of fresh samples, after each number of UPDATES on the first `count`."""
    reward = make_config(1, 1).reward
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
